//! The right, and the duty, to answer a request.

use std::fmt;
use std::ptr::NonNull;

use virtio_bindings::virtio_blk;

use super::pool::{Extent, Segment, SegmentPool};
use crate::mq::limits::INLINE_SEGMENTS;
use crate::mq::request::{Op, Status};

/// An element for the used ring: a chain whose status is written. Made by finishing a request.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub struct Used {
    head: u16,
    len: u32,
}

impl Used {
    #[inline]
    pub(super) fn new(head: u16, len: u32) -> Used {
        Used { head, len }
    }

    /// The chain's head.
    #[inline]
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Bytes written into the chain's buffers, the status byte among them.
    #[inline]
    pub fn len(&self) -> u32 {
        self.len
    }

    /// Never: a used chain has at least its status written.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// What a status is in guest memory (virtio 1.3, section 5.2.6).
#[inline]
fn wire(status: Status) -> u8 {
    const fn byte(value: u32) -> u8 {
        assert!(value <= 0xff);
        #[expect(
            clippy::cast_possible_truncation,
            reason = "checked above, at compile time"
        )]
        let byte = value as u8;
        byte
    }
    const OK: u8 = byte(virtio_blk::VIRTIO_BLK_S_OK);
    const IOERR: u8 = byte(virtio_blk::VIRTIO_BLK_S_IOERR);
    const UNSUPP: u8 = byte(virtio_blk::VIRTIO_BLK_S_UNSUPP);
    match status {
        Status::Ok => OK,
        Status::IoErr => IOERR,
        Status::Unsupp => UNSUPP,
    }
}

/// Ends a chain: writes its status and makes the used element, which counts `bytes` of data and
/// the status byte.
///
/// # Safety
///
/// `byte` is mapped and writable.
#[inline]
pub(super) unsafe fn answer(head: u16, byte: NonNull<u8>, status: Status, bytes: u32) -> Used {
    // SAFETY: the caller vouches for it. Unsafe because the memory is the guest's too.
    unsafe { byte.write_volatile(wire(status)) };
    // `parse` rejects requests whose data and status do not fit into 32 bits.
    Used::new(head, bytes.saturating_add(1))
}

/// What a chain's segments are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Holds {
    /// Buffers that the device reads, or none.
    Readable,
    /// Buffers that the device writes.
    Writable,
    /// [`Extent`]s.
    Ranges,
}

impl Holds {
    /// What those of such a request are.
    #[inline]
    pub(super) fn of(op: Op) -> Holds {
        match op {
            Op::Read => Holds::Writable,
            Op::Write | Op::Flush => Holds::Readable,
            Op::Discard | Op::WriteZeroes => Holds::Ranges,
        }
    }
}

/// A ring's room for one chain in flight.
#[repr(C)]
pub(super) struct Slot {
    status: NonNull<u8>,
    segments: NonNull<Segment>,
    head: u16,
    count: u16,
    holds: Holds,
    inline: [Segment; INLINE_SEGMENTS as usize],
}

impl Slot {
    /// Room for [`INLINE_SEGMENTS`] segments.
    ///
    /// # Safety
    ///
    /// `slot` points to memory for a slot.
    #[inline]
    pub(super) unsafe fn inline(slot: NonNull<Slot>) -> NonNull<Segment> {
        // SAFETY: within the memory the caller vouches for. Unsafe because the slot need not be
        // initialized, so no reference may be made of it.
        unsafe { NonNull::new_unchecked(&raw mut (*slot.as_ptr()).inline).cast() }
    }
}

/// A request's buffers or ranges, and the right to answer it, once: what crosses `mq` without
/// being looked into. Dropping it unfinished is a bug.
///
/// The addresses stay valid until it is finished: its ring keeps the guest memory, and neither the
/// ring nor the pool frees what a request in flight points to, even when dropped.
///
/// It is no more than a pointer, because it is moved often: a request goes from the parser to
/// `mq`, from there to the engine, and back.
#[must_use]
pub struct GuestIo {
    slot: NonNull<Slot>,
}

// SAFETY: it alone refers to its slot, its segments and its status byte until it is finished, and
// guest memory can be reached from any thread. Unsafe because raw pointers carry no such promise.
unsafe impl Send for GuestIo {}

impl GuestIo {
    /// For the chain at `head`, whose status byte is `status`.
    ///
    /// # Safety
    ///
    /// `slot` is the head's in its ring, and the head is in flight. `status` is mapped as long as
    /// it is. The first `count` of `segments` are initialized, as what `holds` says, and neither move nor change until this is finished. If there are more
    /// than [`INLINE_SEGMENTS`], they are in a buffer of the pool that `finish` will be given.
    #[inline]
    pub(super) unsafe fn new(
        slot: NonNull<Slot>,
        head: u16,
        status: NonNull<u8>,
        segments: NonNull<Segment>,
        count: u16,
        holds: Holds,
    ) -> Self {
        let at = slot.as_ptr();
        // SAFETY: the slot is ours to write, as the caller vouches. Unsafe because it need not be
        // initialized, so no reference may be made of it.
        unsafe {
            (*at).status = status;
            (*at).segments = segments;
            (*at).head = head;
            (*at).count = count;
            (*at).holds = holds;
        }
        GuestIo { slot }
    }

    #[inline]
    fn slot(&self) -> &Slot {
        // SAFETY: `new` initialized it (and zeroes are segments too), it lives until this is
        // finished, and nobody writes it. Unsafe because it lies in memory of the ring's.
        unsafe { self.slot.as_ref() }
    }

    /// The chain's head.
    #[inline]
    pub fn head(&self) -> u16 {
        self.slot().head
    }

    /// The host buffers of the data, in order; empty for a flush, a discard or a write-zeroes.
    /// The slice stays where it is until the request is finished, so a system call may be pointed
    /// at it.
    #[inline]
    pub fn iovecs(&self) -> &[libc::iovec] {
        let slot = self.slot();
        if slot.holds == Holds::Ranges {
            return &[];
        }
        // SAFETY: initialized as buffers and immutable, by the contract of `new`; a segment has
        // an iovec's layout. Unsafe because they may lie in memory of the pool's.
        unsafe {
            std::slice::from_raw_parts(slot.segments.as_ptr().cast(), usize::from(slot.count))
        }
    }

    /// The ranges of a discard or a write-zeroes, as the guest listed them, without empty ones;
    /// empty for everything else.
    pub fn ranges(&self) -> &[Extent] {
        let slot = self.slot();
        if slot.holds != Holds::Ranges {
            return &[];
        }
        // SAFETY: as in `iovecs`, for extents. Unsafe for the same reason.
        unsafe {
            std::slice::from_raw_parts(slot.segments.as_ptr().cast(), usize::from(slot.count))
        }
    }

    /// The host buffers that the device may have written: those of a read.
    pub(super) fn written(&self) -> &[libc::iovec] {
        match self.slot().holds {
            Holds::Writable => self.iovecs(),
            Holds::Readable | Holds::Ranges => &[],
        }
    }

    /// Where its status byte is mapped.
    pub(super) fn status(&self) -> NonNull<u8> {
        self.slot().status
    }

    /// Writes the status byte and makes the used element. `bytes` is how much data was really
    /// written to guest memory: zero for anything but a read that succeeded, at least in part.
    /// `pool` is the one the request was parsed with.
    #[inline]
    pub fn finish(self, status: Status, bytes: u32, pool: &mut SegmentPool) -> Used {
        self.give_back(pool);
        let slot = self.slot();
        // SAFETY: the byte is mapped as long as the head is in flight, that is until the element
        // made here is put. Unsafe because the compiler does not see that.
        let used = unsafe { answer(slot.head, slot.status, status, bytes) };
        std::mem::forget(self);
        used
    }

    /// Gives the right up: the chain will be taken from the guest again. Returns its head.
    pub(super) fn abandon(self, pool: &mut SegmentPool) -> u16 {
        self.give_back(pool);
        let head = self.head();
        std::mem::forget(self);
        head
    }

    #[inline]
    fn give_back(&self, pool: &mut SegmentPool) {
        let slot = self.slot();
        if slot.count > INLINE_SEGMENTS {
            pool.give_back(slot.segments);
        }
    }
}

#[cfg(debug_assertions)]
impl Drop for GuestIo {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            panic!("the request at head {} was dropped unfinished", self.head());
        }
    }
}

impl fmt::Debug for GuestIo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let slot = self.slot();
        f.debug_struct("GuestIo")
            .field("head", &slot.head)
            .field("segments", &slot.count)
            .field("holds", &slot.holds)
            .finish_non_exhaustive()
    }
}
