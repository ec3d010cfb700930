//! Transfers whose buffers lie in memory that was lost: what was read there are zeros, and what was written
//! there went nowhere. See [`crate::sys::sigbus`].

use super::{Slot, Stage};
use crate::engine::memory::PAGE_BYTES;
use crate::sys::sigbus::{Losses, losses};

impl Slot {
    /// Whether some of the buffers left, or of those just used, are lost.
    #[inline]
    pub(in crate::engine) fn meets(&self, losses: &mut Losses) -> bool {
        losses.are_any() && self.names(losses)
    }

    /// The same for a slot that is perhaps no transfer.
    pub(in crate::engine) fn is_in(&self, losses: &Losses) -> bool {
        self.stage == Stage::Transfer && self.names(losses)
    }

    #[cold]
    fn names(&self, losses: &Losses) -> bool {
        (0..self.segment_count as usize).any(|at| {
            // SAFETY: `segments` has so many (`start_transfer`'s contract). Unsafe because the array is
            // the caller's for longer than any borrow can say.
            let segment = unsafe { *self.segments.add(at) };
            losses.have(segment.iov_base.addr(), segment.iov_len)
        })
    }

    /// Whether memory that is used here has been lost since the count of losses was `before`.
    #[inline]
    pub(super) fn was_lost_since(&self, before: u64) -> bool {
        losses() != before && self.meets(&mut Losses::default())
    }

    /// Reads a byte of each page of the next `bytes`.
    #[inline]
    pub(super) fn touch(&self, bytes: usize) {
        let (mut left, mut segment) = (bytes, self.segments);
        while left > 0 {
            // SAFETY: as in `copy_segments`, the walk stays inside the segments, and its reads inside the
            // buffers. Unsafe because guest memory has no Rust owner.
            unsafe {
                let len = (*segment).iov_len.min(left);
                let guest = (*segment).iov_base.cast::<u8>();
                let mut at = 0;
                while at < len {
                    guest.add(at).read_volatile();
                    at += PAGE_BYTES;
                }
                // The last page, where the buffer begins within a page.
                if len > 0 {
                    guest.add(len - 1).read_volatile();
                }
                left -= len;
                segment = segment.add(1);
            }
        }
    }
}
