//! Copies from and to images in memory: small ones at once, large ones slice by slice in turn, so that
//! neither waits long for the other.

use super::Engine;
use crate::engine::prefetch::{CACHE_LINE_BYTES, prefetch};
use crate::engine::slot::{Next, Stage};
use crate::engine::{COPY_SLICE_BYTES, COPY_SMALL_BYTES, COPY_TURN_BYTES};
use crate::mq::ids::DriverTag;

/// Small copies whose first line is asked for together: about as many as the processor has under way
/// at a time.
const PREFETCH_COPIES: usize = 32;

/// Cache lines of the next small copy that are asked for while one is under way: a page's.
const PREFETCH_LINES: usize = 64;

/// A small copy that is to be done.
#[derive(Clone, Copy, Debug)]
pub(super) struct Small {
    index: u16,
    /// Its place in the image, to be fetched; the guest's side has just been used.
    image: *const u8,
    lines: usize,
}

impl Small {
    #[inline]
    fn prefetch(self, most_lines: usize) {
        for line in 0..self.lines.min(most_lines) {
            prefetch(self.image.wrapping_add(line * CACHE_LINE_BYTES));
        }
    }
}

impl Engine {
    /// A copy was started. It is done in the next turn, together with others.
    #[inline]
    pub(super) fn begin_copy(&mut self, index: u16) {
        let slot = &self.slots[usize::from(index)];
        let disk = self
            .disks
            .get(slot.disk)
            .expect("a disk with requests in flight stays");
        match slot.small_copy(disk) {
            Some((image, bytes)) => {
                self.counters.inline += 1;
                let lines = bytes.div_ceil(CACHE_LINE_BYTES);
                self.small.push_back(Small {
                    index,
                    image,
                    lines,
                });
            }
            None => self.copying.push_back(index),
        }
    }

    /// Whether there is something to copy.
    #[inline]
    pub(super) fn has_copies(&self) -> bool {
        !self.small.is_empty() || !self.copying.is_empty()
    }

    /// This turn's share of the copies: small ones first, and always a slice of a large one.
    ///
    /// To find a page of an image that nobody has looked at for long takes the processor longer than to
    /// copy it, but it can look for many at a time.
    #[inline(never)]
    pub(super) fn copy_on(&mut self) {
        let mut budget = COPY_TURN_BYTES;
        for small in self.small.iter().take(PREFETCH_COPIES) {
            small.prefetch(1);
        }
        while budget > 0 {
            let Some(Small { index, .. }) = self.small.pop_front() else {
                break;
            };
            if let Some(next) = self.small.front() {
                next.prefetch(PREFETCH_LINES);
            }
            budget = budget.saturating_sub(self.copy_slice(index, COPY_SMALL_BYTES).max(1));
        }
        let mut budget = budget.max(1);
        while budget > 0 {
            let Some(index) = self.copying.pop_front() else {
                return;
            };
            budget = budget.saturating_sub(self.copy_slice(index, COPY_SLICE_BYTES).max(1));
        }
    }

    /// Copies a slice; returns its length in bytes, more or less.
    #[inline]
    fn copy_slice(&mut self, index: u16, most: u64) -> u64 {
        let slot = &mut self.slots[usize::from(index)];
        let disk = self
            .disks
            .get(slot.disk)
            .expect("a disk with requests in flight stays");
        let moved = slot.left().min(most);
        let next = slot.copy(
            disk,
            self.memory.extents(index),
            most,
            &mut self.ring.losses,
            &mut self.counters,
        );
        match next {
            Next::Copy => self.copying.push_back(index),
            Next::Done(result) => {
                slot.stage = Stage::Inline;
                let generation = slot.generation;
                self.ready.push((DriverTag { index, generation }, result));
            }
            Next::Issue => {
                if !self.send(index) {
                    self.unsent.push(index);
                }
            }
        }
        moved
    }
}
