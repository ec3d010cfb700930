//! Direct I/O: whether a file has it, and what alignment it needs.

use std::fs::File;
use std::path::Path;

use log::warn;
use rustix::fs::{OFlags, Statx, StatxFlags, fcntl_setfl};
use rustix::io::pread;

use super::limits::QueueLimits;

/// Alignments that direct I/O is tried with, in bytes, where the kernel does not tell.
const ALIGNMENTS: [u32; 4] = [512, 1024, 2048, 4096];

/// The coarsest of them: a buffer with this alignment suits every device.
const ALIGNMENT_MAX: usize = 4096;

/// What direct I/O demands, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Alignment {
    /// Of addresses.
    pub memory: u32,
    /// Of offsets and lengths.
    pub offset: u32,
}

/// Switches `file` to direct I/O and returns the alignment it needs for blocks of `block_bytes`; `None`
/// where it has no direct I/O.
pub(super) fn open_direct(
    file: &File,
    facts: &Statx,
    queue: &QueueLimits,
    block_bytes: u32,
) -> Option<Alignment> {
    fcntl_setfl(file, OFlags::DIRECT).ok()?;
    if facts.stx_mask & StatxFlags::DIOALIGN.bits() != 0 {
        // The kernel answers 0 for a file it would serve from the page cache all the same (an encrypted
        // one, for example).
        let (memory, offset) = (facts.stx_dio_mem_align, facts.stx_dio_offset_align);
        if memory == 0 || offset == 0 {
            return None;
        }
        // That may be more than a preference or less: XFS says the file system's block as soon as the
        // file shares an extent with a clone, and takes sectors as before. A read that is tried tells.
        let offset = match offset > block_bytes {
            true => tried(file, queue).map_or(offset, |tried| tried.min(offset)),
            false => offset,
        };
        return Some(Alignment { memory, offset });
    }
    let offset = tried(file, queue)?;
    let memory = tried_memory_align(file, offset)?;
    Some(Alignment { memory, offset })
}

/// The least alignment of offsets that can be believed in after reading.
fn tried(file: &File, queue: &QueueLimits) -> Option<u32> {
    // Some file systems serve a hole at any alignment, so a sparse image tells too little: never
    // believe in less than the device below needs.
    Some(tried_offset_align(file)?.max(queue.logical_block_bytes))
}

/// Says that the image is not served as it was asked to be.
pub(super) fn warn_of_page_cache(path: &Path, alignment: Option<Alignment>, block_bytes: u32) {
    match alignment {
        None => warn!(
            "{path:?} has no direct I/O (O_DIRECT): it is served through the host's page cache"
        ),
        Some(Alignment { offset, .. }) => warn!(
            "{path:?} has direct I/O (O_DIRECT) in units of {offset} bytes only, and the guest's blocks have \
             {block_bytes}: it is served through the host's page cache"
        ),
    }
}

/// The least alignment of offset and length that a direct read succeeds with.
pub(super) fn tried_offset_align(file: &File) -> Option<u32> {
    ALIGNMENTS
        .into_iter()
        .find(|&align| reads(file, 0, align, u64::from(align)) && reads(file, 0, align, 0))
}

/// The least alignment in memory that a direct read of `length` bytes succeeds with.
pub(super) fn tried_memory_align(file: &File, length: u32) -> Option<u32> {
    [4].into_iter()
        .chain(ALIGNMENTS)
        .find(|&align| reads(file, align, length, 0))
}

/// Whether `length` bytes at `offset` can be read to an address that is `skew` bytes past a multiple of
/// [`ALIGNMENT_MAX`]. Reading past the end counts: it is the alignment that is in question.
pub(super) fn reads(file: &File, skew: u32, length: u32, offset: u64) -> bool {
    let (Ok(skew), Ok(length)) = (usize::try_from(skew), usize::try_from(length)) else {
        return false;
    };
    let mut memory = vec![0u8; 2 * ALIGNMENT_MAX + length];
    let start = memory.as_ptr().align_offset(ALIGNMENT_MAX) + skew;
    match memory.get_mut(start..start + length) {
        Some(buffer) => pread(file, buffer, offset).is_ok(),
        None => false,
    }
}
