//! What a disk may have in the kernel threads of a worker's io_uring, and how much of it at a time.
//!
//! Syncs, fallocates and transfers that cannot go on without waiting are done by threads of the kernel
//! (io-wq), which all disks of a worker share. There are as many of them as driver tags
//! ([`Ring::new`](super::uring::Ring::new)), so that none of these steps ever waits for another disk's; and a
//! disk has few steps there at a time, so that one whose storage hangs does not use up the threads that the
//! host allows, and one that only computes lets others have their turn. What is beyond waits in the engine,
//! in its order.

use std::collections::VecDeque;

use crate::mq::limits::DRIVER_TAGS;

/// Steps of one disk at a time that may sleep in a kernel thread: as many threads as io_uring itself starts
/// with two CPUs.
pub(super) const CALLS: u16 = 8;

/// The same for a disk whose every transfer is done by a kernel thread. They last as long as another program
/// or another machine takes to answer, so that fewer would bound its depth.
pub(super) const REMOTE_CALLS: u16 = 64;

/// Discards and zeroes of one disk at a time. Each locks the file or fills the device's queue.
pub(super) const RANGES: u16 = 2;

/// The steps of a disk of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Syncs, and transfers that may sleep.
    Call,
    /// Discards and zeroes.
    Range,
}

/// Steps of one kind: how many are with the kernel, and the slots that wait.
#[derive(Debug)]
pub(super) struct Lane {
    most: u16,
    in_kernel: u16,
    waiting: VecDeque<u16>,
}

impl Lane {
    pub(super) fn new(most: u16) -> Lane {
        Lane {
            most,
            in_kernel: 0,
            waiting: VecDeque::with_capacity(usize::from(DRIVER_TAGS)),
        }
    }

    /// Whether another step may go to the kernel, where it counts; else the slot waits.
    pub(super) fn enter(&mut self, index: u16) -> bool {
        if self.in_kernel < self.most {
            self.in_kernel += 1;
            return true;
        }
        self.waiting.push_back(index);
        false
    }

    /// A step has come back: the slot that may go on instead.
    pub(super) fn leave(&mut self) -> Option<u16> {
        self.in_kernel -= 1;
        self.waiting.pop_front()
    }

    /// Whether the slot waited here, and does no more.
    pub(super) fn give_up(&mut self, index: u16) -> bool {
        let place = self.waiting.iter().position(|other| *other == index);
        place.is_some_and(|place| self.waiting.remove(place).is_some())
    }
}

/// The least piece of a discard or of zeroes, in bytes. An image's own granularity may be larger.
const LEAST_PIECE: u64 = 1 << 20;

/// The largest. A file of 2 TiB with nothing in it takes 65,536 pieces, less than a second.
const LARGEST_PIECE: u64 = 32 << 20;

/// What a piece is to take.
const PIECE_NS: u64 = 4_000_000;

/// How large the pieces are in which a disk's discards and zeroes go. How long such a call takes does not
/// follow from its length: a hole takes nothing, and each of a fragmented file's extents some 100 µs. So the
/// pieces grow while they are quick and shrink when one was slow.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    least: u64,
    piece: u64,
}

impl Pace {
    /// For an image that frees nothing smaller than `granularity` bytes.
    pub(super) fn new(granularity: u64) -> Pace {
        let least = granularity
            .checked_next_power_of_two()
            .unwrap_or(LARGEST_PIECE)
            .max(LEAST_PIECE);
        Pace {
            least,
            piece: least,
        }
    }

    /// How much of `len` bytes from `offset` on is done at a time. Ends at a multiple of the piece's
    /// size, so that no block lies in two pieces.
    pub(super) fn piece(self, offset: u64, len: u64) -> u64 {
        let end = offset.saturating_add(self.piece) & !(self.piece - 1);
        (end - offset).min(len)
    }

    /// A piece of `bytes` took that long.
    pub(super) fn took(&mut self, bytes: u64, ns: u64) {
        if ns > 2 * PIECE_NS {
            let factor = (ns / PIECE_NS).next_power_of_two();
            self.piece = (self.piece / factor).max(self.least);
        } else if ns < PIECE_NS / 2 && bytes >= self.piece / 2 {
            self.piece = (self.piece * 2).min(LARGEST_PIECE.max(self.least));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lane_admits_so_many_and_keeps_the_order_of_the_rest() {
        let mut lane = Lane::new(2);
        let entered: Vec<bool> = [9, 4, 7, 3, 5].map(|index| lane.enter(index)).to_vec();
        assert_eq!(entered, [true, true, false, false, false]);
        assert!(lane.give_up(3) && !lane.give_up(3));
        assert_eq!((lane.leave(), lane.enter(7)), (Some(7), true));
        assert_eq!((lane.leave(), lane.leave()), (Some(5), None));
    }

    #[test]
    fn pieces_grow_while_they_are_quick_and_shrink_when_one_was_slow() {
        let mut pace = Pace::new(4096);
        assert_eq!(pace.piece(0, u64::MAX), 1 << 20);
        for _ in 0..20 {
            pace.took(pace.piece(0, u64::MAX), 10_000);
        }
        assert_eq!(pace.piece(0, u64::MAX), LARGEST_PIECE);
        pace.took(LARGEST_PIECE, 500_000_000);
        assert_eq!(pace.piece(0, u64::MAX), 1 << 20);
        pace.took(1 << 20, 8_000_000);
        assert_eq!(pace.piece(0, u64::MAX), 1 << 20, "no less than the least");
        pace.took(512, 0);
        assert_eq!(
            pace.piece(0, u64::MAX),
            1 << 20,
            "a short one tells nothing"
        );
        pace.took(1 << 20, 0);
        pace.took(2 << 20, 3_000_000);
        assert_eq!(pace.piece(0, u64::MAX), 2 << 20, "as it should be");
    }

    #[test]
    fn pieces_end_where_blocks_do() {
        let pace = Pace::new(4 << 20);
        assert_eq!(pace.piece(4096, 1 << 40), (4 << 20) - 4096);
        assert_eq!(pace.piece(4 << 20, 1 << 40), 4 << 20);
        assert_eq!(pace.piece((8 << 20) - 512, 100), 100);
        assert_eq!(Pace::new(1 << 63).piece(0, 5), 5);
    }
}
