//! The dirty log: a bitmap that the front end shares while it migrates its guest, in which each page that
//! the device has written is marked (vhost-user, "Migration").
//!
//! Whoever marks a page has written it before: the front end takes the bit first and copies the page
//! then, so what is written after the mark would be lost.

mod bits;
mod disk;

pub use disk::DiskLog;

use std::fmt;
use std::io;
use std::os::fd::AsFd;
use std::ptr::{self, NonNull};

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::atomic::{AtomicU8, Ordering};
use crate::sys::sigbus::Guarded;

/// Bytes of guest memory for which one bit stands, whatever the machine's pages are (VHOST_LOG_PAGE).
pub const LOG_PAGE_BYTES: u64 = 0x1000;

/// A mapped log. Page *n* of the guest-physical addresses is bit *n* % 8 of byte *n* / 8.
pub struct DirtyLog {
    /// A file that is truncated must not end the process. `None` only while this is made or dropped.
    guarded: Option<Guarded>,
    base: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the mapping belongs to this value, and it is only accessed by atomic operations. Unsafe
// because a raw pointer carries no such promise.
unsafe impl Send for DirtyLog {}
// SAFETY: as for Send. Unsafe for the same reason.
unsafe impl Sync for DirtyLog {}

impl fmt::Debug for DirtyLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DirtyLog")
            .field("bytes", &self.bytes)
            .finish_non_exhaustive()
    }
}

impl DirtyLog {
    /// Maps the `bytes` bytes of `file` from `offset`, a multiple of the machine's page size.
    ///
    /// # Errors
    ///
    /// What `mmap` says; an empty log cannot be mapped. Whether the file is that long is for the
    /// caller to check.
    pub fn map(file: &impl AsFd, offset: u64, bytes: u64) -> io::Result<DirtyLog> {
        let bytes = usize::try_from(bytes).map_err(io::Error::other)?;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses replaces nothing. Unsafe because
        // `mmap` can be told to replace something.
        let base = unsafe {
            mmap(
                ptr::null_mut(),
                bytes,
                access,
                MapFlags::SHARED,
                file,
                offset,
            )
        }?;
        let base = NonNull::new(base.cast()).expect("mmap never returns a null address");
        let mut log = DirtyLog {
            guarded: None,
            base,
            bytes,
        };
        // SAFETY: a whole mapping, readable and writable, that `log` keeps until it has given this up.
        // Nobody else knows of it, and its bytes are only reached through raw pointers. Unsafe because
        // the compiler does not know that the mapping may be replaced.
        log.guarded = Some(unsafe { Guarded::new(base, bytes) }?);
        Ok(log)
    }

    /// Whether the front end has taken the file away, so that marks go nowhere.
    pub fn is_lost(&self) -> bool {
        self.guarded.as_ref().is_some_and(Guarded::is_lost)
    }

    /// How many pages have a bit.
    pub fn pages(&self) -> u64 {
        self.bytes as u64 * 8
    }

    /// Whether each page of the `len` bytes from `gpa` has a bit.
    pub fn covers(&self, gpa: u64, len: u64) -> bool {
        match gpa.checked_add(len) {
            Some(end) => end.div_ceil(LOG_PAGE_BYTES) <= self.pages(),
            None => false,
        }
    }

    /// Marks the pages of the `len` bytes from `gpa`, which have been written before. Pages beyond the
    /// log have no bit to mark: a session whose log is too short is not served.
    pub fn mark(&self, gpa: u64, len: u64) {
        if len == 0 {
            return;
        }
        let last = gpa.saturating_add(len - 1) / LOG_PAGE_BYTES;
        let last = last.min(self.pages() - 1);
        bits::mark(|at| self.byte(at), gpa / LOG_PAGE_BYTES, last);
    }

    /// Marks here what is marked in `other`, as far as it has a bit here.
    pub fn add(&self, other: &DirtyLog) {
        for at in 0..self.bytes.min(other.bytes) as u64 {
            let marked = other.byte(at).load(Ordering::SeqCst);
            if marked != 0 {
                self.byte(at).fetch_or(marked, Ordering::SeqCst);
            }
        }
    }

    /// Byte `at` of the log, which must have it.
    fn byte(&self, at: u64) -> &AtomicU8 {
        let at = usize::try_from(at).expect("within a mapping");
        assert!(at < self.bytes, "a byte beyond the log");
        // SAFETY: within the mapping, which lives as long as `self`. Unsafe because the front end
        // accesses it too, by atomic operations of its own.
        unsafe { AtomicU8::from_ptr(self.base.add(at).as_ptr()) }
    }
}

impl Drop for DirtyLog {
    fn drop(&mut self) {
        self.guarded = None;
        // SAFETY: mapped in `map` with this length, and nobody else knows of it. Unsafe because whoever
        // still had a pointer would be left with nothing behind it.
        let unmapped = unsafe { munmap(self.base.as_ptr().cast(), self.bytes) };
        debug_assert!(unmapped.is_ok(), "a mapping of ours can be unmapped");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    fn log(offset: u64, bytes: u64) -> (DirtyLog, File) {
        let file = tempfile::tempfile().unwrap();
        file.set_len(offset + bytes).unwrap();
        (DirtyLog::map(&file, offset, bytes).unwrap(), file)
    }

    fn marked(file: &File, offset: u64, bytes: usize) -> Vec<u64> {
        let mut map = vec![0; bytes];
        file.read_exact_at(&mut map, offset).unwrap();
        (0..bytes as u64 * 8)
            .filter(|page| map[(page / 8) as usize] >> (page % 8) & 1 == 1)
            .collect()
    }

    #[test]
    fn a_page_is_a_bit_behind_the_offset() {
        let (log, file) = log(8192, 16);
        log.mark(0x9fff, 2);
        log.mark(0, 0);
        assert_eq!(marked(&file, 8192, 16), [9, 10]);
        assert_eq!(marked(&file, 0, 8192), [0u64; 0]);
    }

    #[test]
    fn what_has_no_bit_is_left_out_and_said_to_be_uncovered() {
        let (log, file) = log(0, 1);
        assert!(log.covers(0, 8 * 4096) && log.covers(8 * 4096, 0));
        assert!(!log.covers(7 * 4096, 4097) && !log.covers(u64::MAX, 1));
        log.mark(7 * 4096 + 5, u64::MAX);
        log.mark(9 * 4096, 1);
        assert_eq!(marked(&file, 0, 1), [7]);
    }

    #[test]
    fn a_new_log_takes_over_what_the_old_one_has() {
        let ((old, _), (new, file)) = (log(0, 3), log(0, 2));
        old.mark(4096, 1);
        old.mark(20 * 4096, 1);
        new.mark(3 * 4096, 1);
        new.add(&old);
        assert_eq!(marked(&file, 0, 2), [1, 3]);
    }

    #[test]
    fn a_truncated_log_is_lost_and_nothing_else() {
        let (log, file) = log(4096, 8192);
        log.mark(0, 1);
        assert!(!log.is_lost());
        file.set_len(4096).unwrap();
        log.mark(4096, 4096);
        assert!(log.is_lost());
        assert_eq!(
            log.byte(0).load(Ordering::Relaxed),
            2,
            "in zeros of our own"
        );
    }

    proptest! {
        #[test]
        fn exactly_the_pages_of_each_range_are_marked(
            ranges in proptest::collection::vec((0u64..600 << 12, 1u64..40 << 12), 1..8),
        ) {
            let (log, file) = log(4096, 64);
            let mut expected = std::collections::BTreeSet::new();
            for (gpa, len) in ranges {
                log.mark(gpa, len);
                expected.extend((gpa..gpa + len).step_by(64).chain([gpa + len - 1]).map(|at| at >> 12));
            }
            let expected: Vec<u64> = expected.into_iter().filter(|page| *page < 512).collect();
            prop_assert_eq!(marked(&file, 4096, 64), expected);
        }
    }
}
