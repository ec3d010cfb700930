//! Room for the host buffers (or ranges) of requests in flight: inline room for a few with each
//! entry of a ring, and a pool of large buffers for each disk on a worker.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::fmt;
use std::ptr::NonNull;

use super::odd_requests::{Odd, OddRequests};
use crate::mq::limits::{BIG_REQUESTS, MAX_SEGMENTS};

/// A range of the disk, of a discard or write-zeroes request.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Extent {
    /// Where it starts, in bytes from the start of the disk.
    pub offset_bytes: u64,
    /// How long it is; never zero.
    pub len_bytes: u64,
}

/// One piece of a request: a host buffer or a range of the disk. Which of them, the request knows.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) union Segment {
    pub(super) iovec: libc::iovec,
    pub(super) extent: Extent,
}

const _: () = assert!(size_of::<Segment>() == 16);

impl Segment {
    #[inline]
    pub(super) fn buffer(host: NonNull<u8>, bytes: usize) -> Segment {
        Segment {
            iovec: libc::iovec {
                iov_base: host.as_ptr().cast(),
                iov_len: bytes,
            },
        }
    }
}

/// A zeroed allocation, reached through raw pointers because requests point into it while its
/// owner hands out more of it.
pub(super) struct RawTable<T> {
    first: NonNull<T>,
    count: usize,
}

// SAFETY: plain memory with one owner, who decides what is in it. Unsafe because raw pointers
// carry no such promise.
unsafe impl<T> Send for RawTable<T> {}

impl<T> RawTable<T> {
    /// Room for `count` of them; the system gives pages for it only when they are touched.
    pub(super) fn new(count: usize) -> Self {
        let layout = Self::layout(count);
        // SAFETY: the layout is not empty, see there. Unsafe because no safe call leaves a large
        // zeroed allocation untouched.
        let first = unsafe { alloc_zeroed(layout) }.cast::<T>();
        match NonNull::new(first) {
            Some(first) => RawTable { first, count },
            None => handle_alloc_error(layout),
        }
    }

    fn layout(count: usize) -> Layout {
        let layout = Layout::array::<T>(count).expect("limits keep it small");
        assert!(layout.size() > 0);
        layout
    }

    /// Where the one at `index` is.
    #[inline]
    pub(super) fn at(&self, index: usize) -> NonNull<T> {
        assert!(index < self.count);
        // SAFETY: in bounds, as just asserted. Unsafe because of raw pointers, see the type.
        unsafe { self.first.add(index) }
    }

    /// Gives the memory up for good: someone may still use it.
    pub(super) fn leak(&mut self) {
        self.count = 0;
    }
}

impl<T> Drop for RawTable<T> {
    fn drop(&mut self) {
        if self.count > 0 {
            // SAFETY: allocated in `new` with this very layout, and not leaked. Unsafe because
            // deallocation is.
            unsafe { dealloc(self.first.as_ptr().cast(), Self::layout(self.count)) }
        }
    }
}

/// How many pieces a chain can have before anything is cut off: its data, a header split into
/// single bytes, and the status.
pub(super) const SCRATCH_SEGMENTS: usize = MAX_SEGMENTS as usize + 32;

const _: () = assert!(
    BIG_REQUESTS <= 64,
    "the pool keeps one bit for each in a u64"
);

/// Room of one disk on one worker for requests of more than
/// [`INLINE_SEGMENTS`](crate::mq::limits::INLINE_SEGMENTS) segments.
pub struct SegmentPool {
    buffers: RawTable<Segment>,
    /// One bit for each buffer that nobody has.
    free: u64,
    /// Where a chain is laid out before it is known how much of it is data.
    pub(super) scratch: Box<[Segment]>,
    /// What was said of requests that fail.
    pub(super) odd: OddRequests,
}

impl SegmentPool {
    const ALL_FREE: u64 = u64::MAX >> (64 - BIG_REQUESTS);

    /// A pool with all its buffers; about 2 MiB of addresses, and memory only as it is used.
    pub fn new() -> Self {
        let none = Extent {
            offset_bytes: 0,
            len_bytes: 0,
        };
        SegmentPool {
            buffers: RawTable::new(usize::from(BIG_REQUESTS) * usize::from(MAX_SEGMENTS)),
            free: Self::ALL_FREE,
            scratch: vec![Segment { extent: none }; SCRATCH_SEGMENTS].into_boxed_slice(),
            odd: OddRequests::default(),
        }
    }

    /// What was odd about the request parsed last, if that was the first of its kind.
    pub fn take_odd(&mut self) -> Option<Odd> {
        self.odd.take()
    }

    /// How many buffers are lent to requests.
    pub fn lent(&self) -> u16 {
        // A u64 has at most 64 zeros.
        BIG_REQUESTS - u16::try_from(self.free.count_ones()).unwrap_or(BIG_REQUESTS)
    }

    /// A buffer of [`MAX_SEGMENTS`] segments, if there is one.
    pub(super) fn lend(&mut self) -> Option<NonNull<Segment>> {
        if self.free == 0 {
            return None;
        }
        let index = self.free.trailing_zeros() as usize;
        self.free &= self.free - 1;
        Some(self.buffers.at(index * usize::from(MAX_SEGMENTS)))
    }

    /// Takes back what [`SegmentPool::lend`] gave.
    pub(super) fn give_back(&mut self, buffer: NonNull<Segment>) {
        let stride = usize::from(MAX_SEGMENTS) * size_of::<Segment>();
        let offset = buffer
            .addr()
            .get()
            .wrapping_sub(self.buffers.first.addr().get());
        let index = offset / stride;
        assert!(
            offset.is_multiple_of(stride) && index < usize::from(BIG_REQUESTS),
            "a segment buffer came back to a pool it is not from"
        );
        assert!(
            self.free & 1 << index == 0,
            "a segment buffer came back twice"
        );
        self.free |= 1 << index;
    }
}

impl Default for SegmentPool {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for SegmentPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SegmentPool")
            .field("lent", &self.lent())
            .finish_non_exhaustive()
    }
}

impl Drop for SegmentPool {
    fn drop(&mut self) {
        // A request still points into a buffer, and the kernel may still read it.
        if self.free != Self::ALL_FREE {
            self.buffers.leak();
        }
    }
}
