//! A slot's walk over the host buffers of its command.

use std::ptr;

use super::Slot;
use crate::engine::BOUNCE_BYTES;
use crate::sys::sigbus::losses;

impl Slot {
    /// Drops `moved` transferred bytes from the front of the segments.
    pub(super) fn advance(&mut self, moved: u64) {
        let mut moved = usize::try_from(moved).expect("no more than the segments hold");
        // SAFETY: `segments` and `segment_count` describe an array that stays valid until the
        // command is done (`start_transfer`'s contract), and the walk ends inside it because no more
        // is moved than it holds. Own arrays are written by their slot only, while no SQE names
        // them: the completion at hand was the last one's. A caller's array is copied, not changed.
        // Unsafe because the segments belong to the caller for longer than any borrow can say.
        unsafe {
            while self.segment_count > 0 && (*self.segments).iov_len <= moved {
                moved -= (*self.segments).iov_len;
                self.segments = self.segments.add(1);
                self.segment_count -= 1;
            }
            if moved == 0 {
                return;
            }
            if !self.owned {
                ptr::copy_nonoverlapping(
                    self.segments,
                    self.own.as_ptr(),
                    self.segment_count as usize,
                );
                self.segments = self.own.as_ptr();
                self.owned = true;
            }
            let first = self.segments.cast_mut();
            (*first).iov_base = (*first).iov_base.byte_add(moved);
            (*first).iov_len -= moved;
        }
    }

    /// What the addresses and the lengths of the segments left are multiples of, in bytes.
    pub(super) fn alignment(&self) -> (usize, usize) {
        let (mut addresses, mut lengths) = (0, 0);
        for at in 0..self.segment_count as usize {
            // SAFETY: `segments` has so many (`start_transfer`'s contract). Unsafe as in `advance`.
            let segment = unsafe { *self.segments.add(at) };
            addresses |= segment.iov_base.addr();
            lengths |= segment.iov_len;
        }
        let unit = |bits: usize| {
            1_usize
                .checked_shl(bits.trailing_zeros())
                .unwrap_or(usize::MAX)
        };
        (unit(addresses), unit(lengths))
    }

    /// How many of the first `most` segments are one piece of `piece_bytes` at most, and its bytes. A first segment
    /// that is longer is a piece in part.
    #[cold]
    pub(super) fn cut(&self, most: u32, piece_bytes: u64) -> (u32, u64) {
        let (mut count, mut bytes) = (0, 0);
        while count < most {
            // SAFETY: `segments` has `most` at least (`start_transfer`'s contract). Unsafe as in `advance`.
            let len = unsafe { (*self.segments.add(count as usize)).iov_len } as u64;
            if bytes + len > piece_bytes {
                break;
            }
            bytes += len;
            count += 1;
        }
        match count {
            0 => (1, piece_bytes),
            _ => (count, bytes),
        }
    }

    /// The bytes of the next bounced piece.
    pub(super) fn piece(&self) -> u32 {
        u32::try_from(self.total - self.done).map_or(BOUNCE_BYTES, |left| left.min(BOUNCE_BYTES))
    }

    /// Copies `bytes` between the bounce buffer and the front of the segments.
    pub(super) fn copy_bounced(&self, bytes: usize, into_guest: bool) {
        let Some(bounce) = self.bounce else { return };
        // SAFETY: the bounce buffer is this slot's and large enough (`piece`). Unsafe as below.
        unsafe { self.copy_segments(bounce.base.as_ptr(), bytes, into_guest) };
    }

    /// Copies `bytes` between `ours` and the front of the segments.
    ///
    /// # Safety
    ///
    /// There are so many bytes at `ours`, and so many left in the segments.
    #[inline]
    pub(super) unsafe fn copy_segments(&self, ours: *mut u8, bytes: usize, into_guest: bool) {
        let (mut at, mut left) = (0, bytes);
        let mut segment = self.segments;
        while left > 0 {
            // SAFETY: as in `advance`, the walk stays inside the segments, whose sum is at least
            // what is left of the command; the buffers are valid (`start_transfer`'s contract) and
            // `ours` is large enough (our contract). The guest may write to its buffers meanwhile,
            // from outside this program: then it gets what it made of it. Unsafe because guest
            // memory has no Rust owner.
            unsafe {
                let len = (*segment).iov_len.min(left);
                let guest = (*segment).iov_base.cast::<u8>();
                let ours = ours.add(at);
                if into_guest {
                    ptr::copy_nonoverlapping(ours, guest, len);
                } else {
                    ptr::copy_nonoverlapping(guest, ours, len);
                }
                at += len;
                left -= len;
                segment = segment.add(1);
            }
        }
    }

    /// Copies what was read to where it belongs. False: some of that is gone.
    pub(super) fn scatter(&self, bytes: u64) -> bool {
        let bytes = usize::try_from(bytes).expect("no more than a bounce buffer holds");
        let before = losses();
        self.copy_bounced(bytes, true);
        !self.was_lost_since(before)
    }
}
