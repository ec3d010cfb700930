//! The right, and the duty, to answer a request.

use std::fmt;
use std::ptr::NonNull;

use virtio_bindings::virtio_blk;

use super::pool::{Extent, Segment, SegmentPool};
use super::ring::Used;
use crate::mq::limits::INLINE_SEGMENTS;
use crate::mq::request::Status;

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

/// Stands for one chain that the guest waits for. Dropping it unfinished is a bug.
#[must_use]
pub struct Receipt {
    status: NonNull<u8>,
    head: u16,
}

impl Receipt {
    /// For the chain at `head`, whose status byte is `status`.
    #[inline]
    pub(super) fn new(head: u16, status: NonNull<u8>) -> Self {
        Receipt { status, head }
    }

    /// The chain's head.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Writes the status byte and makes the used element. `bytes` is how much data was really
    /// written to guest memory: zero for anything but a read that succeeded, at least in part.
    #[inline]
    pub fn finish(self, status: Status, bytes: u32) -> Used {
        // SAFETY: `parse` found this byte in the ring's guest memory, which the ring keeps as long
        // as the chain is in flight, that is until the element made here is put. Unsafe because
        // the memory is the guest's too.
        unsafe { self.status.write_volatile(wire(status)) };
        // `parse` rejects requests whose data and status do not fit into 32 bits.
        let used = Used::new(self.head, bytes.saturating_add(1));
        std::mem::forget(self);
        used
    }
}

#[cfg(debug_assertions)]
impl Drop for Receipt {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            panic!("the request at head {} was dropped unfinished", self.head);
        }
    }
}

impl fmt::Debug for Receipt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Receipt")
            .field("head", &self.head)
            .finish_non_exhaustive()
    }
}

/// A request's buffers or ranges, and its receipt: what crosses `mq` without being looked into.
///
/// The addresses stay valid until it is finished: its ring keeps the guest memory, and neither the
/// ring nor the pool frees the segments of a request in flight, even when dropped.
#[must_use]
pub struct GuestIo {
    segments: NonNull<Segment>,
    receipt: Receipt,
    count: u16,
    /// The segments are [`Extent`]s, not buffers.
    ranges: bool,
}

// SAFETY: it alone refers to its segments and its status byte until it is finished, and guest
// memory can be reached from any thread. Unsafe because raw pointers carry no such promise.
unsafe impl Send for GuestIo {}
// SAFETY: as for GuestIo, with only the status byte. Unsafe for the same reason.
unsafe impl Send for Receipt {}

impl GuestIo {
    /// # Safety
    ///
    /// The first `count` of `segments` are initialized, as extents if `ranges` says so and as
    /// buffers if not, and neither move nor change until this is finished. If there are more than
    /// [`INLINE_SEGMENTS`], they are in a buffer of the pool that `finish` will be given.
    #[inline]
    pub(super) unsafe fn new(
        receipt: Receipt,
        segments: NonNull<Segment>,
        count: u16,
        ranges: bool,
    ) -> Self {
        GuestIo {
            segments,
            receipt,
            count,
            ranges,
        }
    }

    /// The chain's head.
    #[inline]
    pub fn head(&self) -> u16 {
        self.receipt.head
    }

    /// The host buffers of the data, in order; empty for a flush, a discard or a write-zeroes.
    /// The slice stays where it is until the request is finished, so a system call may be pointed
    /// at it.
    #[inline]
    pub fn iovecs(&self) -> &[libc::iovec] {
        if self.ranges {
            return &[];
        }
        // SAFETY: initialized as buffers and immutable, by the contract of `new`; a segment has
        // an iovec's layout. Unsafe because the room is shared by address with the ring or pool.
        unsafe {
            std::slice::from_raw_parts(self.segments.as_ptr().cast(), usize::from(self.count))
        }
    }

    /// The ranges of a discard or a write-zeroes, as the guest listed them, without empty ones;
    /// empty for everything else.
    pub fn ranges(&self) -> &[Extent] {
        if !self.ranges {
            return &[];
        }
        // SAFETY: as in `iovecs`, for extents. Unsafe for the same reason.
        unsafe {
            std::slice::from_raw_parts(self.segments.as_ptr().cast(), usize::from(self.count))
        }
    }

    /// Writes the status byte and makes the used element, as [`Receipt::finish`] does. `pool` is
    /// the one the request was parsed with.
    #[inline]
    pub fn finish(self, status: Status, bytes: u32, pool: &mut SegmentPool) -> Used {
        if self.count > INLINE_SEGMENTS {
            pool.give_back(self.segments);
        }
        self.receipt.finish(status, bytes)
    }
}

impl fmt::Debug for GuestIo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestIo")
            .field("head", &self.receipt.head)
            .field("segments", &self.count)
            .field("ranges", &self.ranges)
            .finish_non_exhaustive()
    }
}
