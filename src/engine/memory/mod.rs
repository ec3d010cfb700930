//! Memory of the engine's own that the kernel reads and writes: mapped once, touched when used.

mod bounces;

use std::io;
use std::ptr::{self, NonNull};

use libc::iovec;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

use self::bounces::Bounces;
use super::{BOUNCE_OF_DISK, BOUNCE_SHARED, Extent, ZERO_BYTES};
use crate::mq::limits::{MAX_RANGES, MAX_SEGMENTS};

/// The alignment of everything here.
pub(super) const PAGE_BYTES: usize = 4096;

/// An anonymous private mapping: zero, page-aligned, and without memory behind it until touched.
#[derive(Debug)]
struct Mapping {
    base: NonNull<u8>,
    len: usize,
    leaked: bool,
}

impl Mapping {
    fn new(len: usize) -> io::Result<Self> {
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        // Unsafe because an allocator gives neither the lazy zeroes nor a right to leak in `Drop`.
        let base = unsafe {
            mmap_anonymous(
                ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )?
        };
        // SAFETY: keeps what passes through it out of a core dump; no content changes. Unsafe because
        // other advice does change it.
        let _ = unsafe { madvise(base, len, Advice::LinuxDontDump) };
        let base = NonNull::new(base.cast()).expect("mmap gives no null without MAP_FIXED");
        Ok(Mapping {
            base,
            len,
            leaked: false,
        })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if self.leaked {
            return;
        }
        // SAFETY: the mapping is ours alone, and the engine drops it only when the kernel has
        // finished with it. Unsafe because unmapping is.
        let result = unsafe { munmap(self.base.as_ptr().cast(), self.len) };
        debug_assert!(result.is_ok());
    }
}

/// A bounce buffer lent to a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Bounce {
    /// The disk it is charged to.
    disk: u16,
    /// [`super::BOUNCE_BYTES`] bytes, page-aligned, the holder's alone.
    pub(super) base: NonNull<u8>,
}

/// All memory of an engine that the kernel may hold addresses of.
#[derive(Debug)]
pub(super) struct Memory {
    segments: Mapping,
    bounces: Bounces,
    zeroes: Mapping,
    extents: Box<[Extent]>,
    depth: u16,
}

const SLOT_SEGMENTS: usize = MAX_SEGMENTS as usize;
const SLOT_EXTENTS: usize = MAX_RANGES as usize;

impl Memory {
    /// For `depth` slots.
    pub(super) fn new(depth: u16) -> io::Result<Self> {
        let slots = usize::from(depth);
        Ok(Memory {
            segments: Mapping::new(slots * SLOT_SEGMENTS * size_of::<iovec>())?,
            bounces: Bounces::new(BOUNCE_SHARED, BOUNCE_OF_DISK)?,
            zeroes: Mapping::new(ZERO_BYTES as usize)?,
            extents: vec![Extent::default(); slots * SLOT_EXTENTS].into_boxed_slice(),
            depth,
        })
    }

    /// The slot's own segment array: room for [`MAX_SEGMENTS`].
    pub(super) fn segments(&self, slot: u16) -> NonNull<iovec> {
        assert!(slot < self.depth);
        // SAFETY: inside the mapping, which has room for `depth` arrays. Unsafe because the arrays
        // are handed to the kernel by address.
        unsafe {
            self.segments
                .base
                .cast::<iovec>()
                .add(usize::from(slot) * SLOT_SEGMENTS)
        }
    }

    /// The slot's ranges.
    pub(super) fn extents(&self, slot: u16) -> &[Extent; SLOT_EXTENTS] {
        self.extents
            .as_chunks()
            .0
            .get(usize::from(slot))
            .expect("a slot of this engine")
    }

    /// The slot's ranges, to be filled in.
    pub(super) fn extents_mut(&mut self, slot: u16) -> &mut [Extent; SLOT_EXTENTS] {
        self.extents
            .as_chunks_mut()
            .0
            .get_mut(usize::from(slot))
            .expect("a slot of this engine")
    }

    /// [`ZERO_BYTES`] zeroes, page-aligned. Never written to.
    pub(super) fn zeroes(&self) -> *const u8 {
        self.zeroes.base.as_ptr()
    }

    /// Makes room for a disk that is added under this number: its part of the bounce buffers.
    pub(super) fn add_disk(&mut self, disk: u16) -> io::Result<()> {
        self.bounces.add_disk(disk)
    }

    /// A disk that holds nothing is removed.
    pub(super) fn remove_disk(&mut self, disk: u16) {
        self.bounces.remove_disk(disk);
    }

    /// Lends a disk a bounce buffer; none when the disk has its part, and others have the rest.
    pub(super) fn take_bounce(&mut self, disk: u16) -> Option<Bounce> {
        self.bounces.take(disk)
    }

    /// Takes a bounce buffer back.
    pub(super) fn put_bounce(&mut self, bounce: Bounce) {
        self.bounces.put(bounce);
    }

    /// Never gives the memory back: the kernel may still write to it.
    pub(super) fn leak(&mut self) {
        for mapping in [&mut self.segments, &mut self.zeroes] {
            mapping.leaked = true;
        }
        self.bounces.leak();
    }

    /// How many bounce buffers are free.
    #[cfg(test)]
    pub(super) fn free_bounces(&self) -> usize {
        self.bounces.free()
    }
}
