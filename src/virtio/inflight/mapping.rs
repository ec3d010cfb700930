//! A part of a file that this process and its front end share.

use std::fmt;
use std::io;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, AtomicU64};

use rustix::fs::fstat;
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::sys::sigbus::Guarded;

/// Bytes of the smallest page there is.
const PAGE_BYTES: usize = 4096;

/// Unmapped when nobody uses it any more.
pub(super) struct Mapping {
    base: NonNull<u8>,
    len: usize,
    /// The front end may truncate a file that it did not let us seal. Then zeros are here, and what the next
    /// process could have known is lost, which is the front end's own doing and its own guest's loss.
    guard: Option<Guarded>,
}

// SAFETY: the mapping is shared with another process and may be accessed from any thread. Unsafe because
// raw pointers carry no such promise.
unsafe impl Send for Mapping {}
// SAFETY: as for Send. Unsafe for the same reason.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// The `bytes` bytes of `file` from `offset` on, and what is left of the last page.
    pub(super) fn new(file: &impl AsFd, offset: u64, bytes: usize) -> io::Result<Mapping> {
        // Huge pages are mapped as a whole; a file on hugetlbfs calls them its blocks.
        let block = usize::try_from(fstat(file)?.st_blksize).unwrap_or(0);
        let len = bytes.next_multiple_of(block.max(PAGE_BYTES));
        // SAFETY: a new mapping at an address that the kernel chooses replaces nothing. Unsafe because
        // mapping in general can.
        let base = unsafe {
            mmap(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                file,
                offset,
            )
        }?;
        let base = NonNull::new(base.cast()).ok_or(Errno::NOMEM)?;
        let mut mapping = Mapping {
            base,
            len,
            guard: None,
        };
        // SAFETY: a whole mapping of ours, which the drop below unmaps after the guard is gone; all accesses
        // are by raw pointers. Unsafe because the guard may replace what is mapped there.
        mapping.guard = Some(unsafe { Guarded::new(base, len) }?);
        Ok(mapping)
    }

    /// Where byte `at` is, with `bytes` bytes behind it.
    pub(super) fn at(&self, at: usize, bytes: usize) -> NonNull<u8> {
        assert!(at.checked_add(bytes).is_some_and(|end| end <= self.len));
        // SAFETY: within the mapping, as was just checked. Unsafe because pointers can lead anywhere.
        unsafe { self.base.add(at) }
    }

    /// The 64-bit word at byte `at`, a multiple of 8.
    pub(super) fn word(&self, at: usize) -> &AtomicU64 {
        assert!(at.is_multiple_of(8));
        // SAFETY: mapped as long as this is, and aligned: a mapping begins with a page. Unsafe because the memory
        // is shared with another process.
        unsafe { AtomicU64::from_ptr(self.at(at, 8).cast().as_ptr()) }
    }

    /// The 16-bit word at byte `at`, a multiple of 2.
    pub(super) fn half(&self, at: usize) -> &AtomicU16 {
        assert!(at.is_multiple_of(2));
        // SAFETY: as in `word`. Unsafe for the same reason.
        unsafe { AtomicU16::from_ptr(self.at(at, 2).cast().as_ptr()) }
    }

    /// Whether the front end has taken some of it away.
    #[cfg(test)]
    pub(super) fn is_lost(&self) -> bool {
        self.guard.as_ref().is_some_and(Guarded::is_lost)
    }
}

impl fmt::Debug for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mapping")
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        drop(self.guard.take());
        // SAFETY: the mapping is ours, and whoever points into it keeps it. Unsafe because the kernel would
        // unmap anything.
        let unmapped = unsafe { munmap(self.base.as_ptr().cast(), self.len) };
        debug_assert!(unmapped.is_ok());
    }
}
