//! A region of guest memory is the front end's file, which the front end can truncate.

use std::fs::File;

use rustix::fs::fstatfs;
use rustix::mm::{Advice, madvise};

use super::{MemoryError, Region};
use crate::sys::sigbus::Guarded;

/// The least there is.
const PAGE_BYTES: usize = 4096;

/// HUGETLBFS_MAGIC (include/uapi/linux/magic.h).
const HUGETLBFS: u32 = 0x9584_58f6;

/// The least of a mapping of `file` that can be replaced, in bytes: a page, and on hugetlbfs a huge page.
/// Where that is larger than said here (device DAX), the mapping is replaced as a whole.
pub(super) fn page_bytes(file: Option<&File>) -> usize {
    let system = file.and_then(|file| fstatfs(file).ok());
    let huge = system.and_then(|system| {
        // A file system's number is a bit pattern of 32 bits, whatever the type of the field.
        let number = u32::try_from(system.f_type & 0xffff_ffff).ok()?;
        let block = usize::try_from(system.f_bsize).ok()?;
        (number == HUGETLBFS && block.is_power_of_two()).then_some(block)
    });
    huge.unwrap_or(PAGE_BYTES)
}

impl Region {
    /// Guards a region that vm-memory has mapped, of pages of `page` bytes.
    pub(super) fn guard(&self, page: usize) -> Result<Guarded, MemoryError> {
        let gpa = self.gpa;
        let unguarded = |why| MemoryError::Unguarded { gpa, why };
        let len = usize::try_from(self.len).expect("the table's constructor checked it");
        // SAFETY: keeps the guest's memory out of a core dump; no content changes. It is a mapping of
        // vm-memory's. Unsafe because other advice does change it.
        let _ = unsafe { madvise(self.host.as_ptr().cast(), len, Advice::LinuxDontDump) };
        // SAFETY: the region is a whole mapping of vm-memory's, which no other has a part of; it
        // hands out no references, and the table drops its guards before what it keeps. The session
        // guard lets only whole huge pages pass. Unsafe because the mapping may be replaced.
        unsafe { Guarded::buffers(self.host, len, page) }.map_err(|error| unguarded(error.kind()))
    }
}
