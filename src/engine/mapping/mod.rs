//! An image that lies in memory, mapped: reading and writing it is a copy.
//!
//! A file of tmpfs has two traps. A page that was never written is a hole, and to touch it through a
//! mapping allocates it, even by reading; and when the file system is full that is a SIGBUS, where
//! a system call returns ENOSPC. So a mapping knows which pages are there (`known`), and only those
//! are touched; for the rest the slot asks the kernel, and learns from what it says.
//!
//! And somebody may truncate the file. Then the range is lost ([`Guarded`]): the copy at hand, which
//! dealt with zeros that are not the image's, ends with `EIO`, and all that comes later goes to the
//! file by system calls, which say what is the matter.
//!
//! One mapping is shared by all workers. What they share are its pages, which is the point, and one
//! bit for each of them, which is read and hardly ever written.

mod known;

use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::fs::{SeekFrom, seek};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};

use self::known::Known;
pub(super) use self::known::Since;
use crate::sys::filesystem::FileSystem;
use crate::sys::sigbus::Guarded;

/// The unit of what is known, in bytes.
pub(super) const PAGE_BYTES: u64 = 4096;

/// How many pieces of a file are asked for when it is mapped. What comes after them is learned from
/// reads.
const MOST_PIECES: u32 = 50_000;

/// How far beyond its end a file is mapped, so that it may grow: as far as it is long, and this many
/// bytes at least. Addresses cost nothing.
const ROOM_BYTES: u64 = 64 << 30;

/// What a mapped image stands on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Medium {
    /// tmpfs, or a memfd: memory of the system, allocated when written.
    Tmpfs,
    /// Huge pages, all of them set aside for the mapping when it is made; the size of one in bytes.
    /// There is no `write` and nothing to discard.
    Hugetlbfs(u64),
    /// Persistent memory: durable when synced.
    Dax,
}

impl Medium {
    /// In a word.
    pub fn name(self) -> &'static str {
        match self {
            Medium::Tmpfs => "tmpfs",
            Medium::Hugetlbfs(_) => "hugetlbfs",
            Medium::Dax => "dax",
        }
    }

    /// What is not synced is not durable.
    pub fn needs_sync(self) -> bool {
        self == Medium::Dax
    }

    /// System calls on the file take no longer than a copy, so that a worker may make them itself.
    pub(super) fn is_prompt(self) -> bool {
        self == Medium::Tmpfs
    }
}

/// See the module.
#[derive(Debug)]
pub struct Mapping {
    base: NonNull<u8>,
    len: usize,
    medium: Medium,
    guard: ManuallyDrop<Guarded>,
    known: Known,
    told: AtomicBool,
}

// SAFETY: `base` points to a mapping that lives as long as this; all threads may copy from and to it,
// as other processes may, and nothing in it is believed. Unsafe because raw pointers say nothing about
// threads.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps the first `size_bytes` of `file`, for writing too if it is `writable`, and looks up what
    /// is there.
    ///
    /// # Errors
    ///
    /// What `mmap` says; `ENOMEM` for hugetlbfs: there are not as many huge pages.
    pub fn new(file: &File, size_bytes: u64, writable: bool, medium: Medium) -> io::Result<Self> {
        let len = match medium {
            // To map more would make the file longer.
            Medium::Hugetlbfs(page_bytes) => size_bytes.next_multiple_of(page_bytes),
            Medium::Tmpfs | Medium::Dax => {
                (size_bytes + size_bytes.max(ROOM_BYTES)).next_multiple_of(PAGE_BYTES)
            }
        };
        let len = usize::try_from(len).map_err(io::Error::other)?;
        let mut access = ProtFlags::READ;
        access.set(ProtFlags::WRITE, writable);
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        // Unsafe because what it maps changes under our hands, which only raw copies may meet.
        let base = unsafe { mmap(ptr::null_mut(), len, access, MapFlags::SHARED, file, 0) }?;
        let base = NonNull::new(base.cast::<u8>()).expect("mmap gives no null without MAP_FIXED");
        // SAFETY: the range was mapped above, as a whole, and is unmapped after the guard is gone.
        // Nothing makes a reference to it. Unsafe because the guard may replace it.
        let guard = match unsafe { Guarded::new(base, len) } {
            Ok(guard) => guard,
            Err(error) => {
                // SAFETY: as mapped above, and nobody else has it. Unsafe because unmapping is.
                let _ = unsafe { munmap(base.as_ptr().cast(), len) };
                return Err(error);
            }
        };
        // SAFETY: keeps the image out of a core dump; no content changes. Unsafe because other advice
        // does change it.
        let _ = unsafe { madvise(base.as_ptr().cast(), len, Advice::LinuxDontDump) };
        let mapping = Mapping {
            base,
            len,
            medium,
            guard: ManuallyDrop::new(guard),
            known: Known::new(len as u64 / PAGE_BYTES, medium != Medium::Dax),
            told: AtomicBool::new(false),
        };
        mapping.look_up(file, size_bytes);
        Ok(mapping)
    }

    /// What it stands on.
    pub fn medium(&self) -> Medium {
        self.medium
    }

    /// How many bytes of the file can be reached, should it grow.
    pub fn reach_bytes(&self) -> u64 {
        self.len as u64
    }

    /// Asks the file system for the pieces of the file that are there.
    fn look_up(&self, file: &File, size_bytes: u64) {
        let since = self.known.now();
        if matches!(self.medium, Medium::Hugetlbfs(_)) {
            self.known.learn(since, 0, size_bytes);
            return;
        }
        let mut at = 0;
        for _ in 0..MOST_PIECES {
            let Ok(start) = seek(file, SeekFrom::Data(at)) else {
                return;
            };
            let end = match seek(file, SeekFrom::Hole(start)) {
                Ok(end) => end.min(size_bytes),
                Err(_) => return,
            };
            if start >= end {
                return;
            }
            self.known.learn(since, start, end - start);
            at = end;
        }
        log::debug!("an image of many pieces: those from byte {at} on are learned when read");
    }

    /// Whether it was truncated or its memory failed, now or before. Says so in the log once.
    #[inline]
    pub(super) fn is_lost(&self) -> bool {
        let lost = self.guard.is_lost();
        if lost {
            self.tell();
        }
        lost
    }

    #[cold]
    fn tell(&self) {
        if !self.told.swap(true, Ordering::Relaxed) {
            log::error!(
                "an image in memory ({}) lost pages: it was truncated, or its memory failed. It is \
                 served by system calls from now on",
                self.medium.name()
            );
        }
    }

    /// How many bytes from `offset` on, `most` at most, are all known or all unknown, and which.
    #[inline]
    pub(super) fn run(&self, offset: u64, most: u64) -> (u64, bool) {
        self.known.run(offset, most)
    }

    /// To be asked for before a system call from whose success [`Self::wrote`] or [`Self::read`] learns.
    #[inline]
    pub(super) fn now(&self) -> Since {
        self.known.now()
    }

    /// A system call wrote there.
    pub(super) fn wrote(&self, since: Since, offset: u64, bytes: u64) {
        self.known.learn(since, offset, bytes);
    }

    /// A system call read something there that is not zero, so the page is no hole.
    pub(super) fn read(&self, since: Since, offset: u64) {
        if self.medium == Medium::Tmpfs {
            self.known.learn(since, offset, 1);
        }
    }

    /// A range is about to be discarded; [`Self::discarded`] says when that is over.
    pub(super) fn discards(&self, offset: u64, bytes: u64) {
        self.known.discards(offset, bytes);
    }

    /// A discard that was announced has ended, well or not.
    pub(super) fn discarded(&self) {
        self.known.discarded();
    }

    /// Where the image's byte `offset` is; at least `bytes` from there are mapped.
    #[inline]
    pub(super) fn at(&self, offset: u64, bytes: u64) -> *mut u8 {
        let end = offset.checked_add(bytes);
        assert!(
            end.is_some_and(|end| end <= self.len as u64),
            "a request beyond the image"
        );
        // SAFETY: inside the mapping. Unsafe because only the length tells.
        unsafe { self.base.as_ptr().add(in_memory(offset)) }
    }

    /// Whether all pages of a range are known. For tests.
    #[cfg(test)]
    pub(super) fn knows(&self, offset: u64, bytes: u64) -> bool {
        self.run(offset, bytes) == (bytes, true)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: dropped once, here, and not used afterwards. Unsafe because the field stays.
        unsafe { ManuallyDrop::drop(&mut self.guard) };
        // SAFETY: the range is ours, mapped in `new`, and nobody copies any more, because whoever
        // does holds the mapping. Unsafe because unmapping is.
        let result = unsafe { munmap(self.base.as_ptr().cast(), self.len) };
        debug_assert!(result.is_ok());
    }
}

/// An offset or a length within a mapping.
#[expect(
    clippy::cast_possible_truncation,
    reason = "what is mapped has addresses"
)]
#[inline]
pub(super) const fn in_memory(bytes: u64) -> usize {
    bytes as usize
}

/// The medium of an image on this file system, if it lies in memory.
pub fn medium_of(file_system: FileSystem, is_dax: bool) -> Option<Medium> {
    match file_system {
        _ if is_dax => Some(Medium::Dax),
        FileSystem::Tmpfs => Some(Medium::Tmpfs),
        FileSystem::Hugetlbfs { page_bytes } => Some(Medium::Hugetlbfs(page_bytes)),
        _ => None,
    }
}

/// Words of zeroes, without memory behind them until they are written to.
fn zeroes(count: usize) -> Box<[AtomicU64]> {
    let plain = vec![0_u64; count].into_boxed_slice();
    // SAFETY: an `AtomicU64` has the size, the alignment and the values of a `u64`, and the box is the
    // only owner. Unsafe because the type changes, which spares writing each word once.
    unsafe { Box::from_raw(Box::into_raw(plain) as *mut [AtomicU64]) }
}

#[cfg(test)]
mod tests;
