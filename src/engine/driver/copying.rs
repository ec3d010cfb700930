//! Copies from and to images in memory: small ones at once, large ones slice by slice in turn, so that
//! neither waits long for the other.

use super::Engine;
use crate::engine::slot::{Next, Stage};
use crate::engine::{COPY_SLICE_BYTES, COPY_SMALL_BYTES, COPY_TURN_BYTES};
use crate::mq::ids::DriverTag;

/// Cache lines of the next small copy that are asked for while one is under way: a page's.
const PREFETCH_LINES: usize = 64;

impl Engine {
    /// A copy was started.
    #[inline]
    pub(super) fn begin_copy(&mut self, index: u16) {
        if self.slots[usize::from(index)].left() <= COPY_SMALL_BYTES {
            self.counters.inline += 1;
            self.prefetch(index, 1);
            self.copying_small.push_back(index);
        } else {
            self.copying.push_back(index);
        }
    }

    /// Copies wait for their turn at least until the drain that brought them is over, so that the
    /// memory has time to answer: from RAM at random a page takes twice as long without.
    #[inline]
    fn prefetch(&self, index: u16, lines: usize) {
        let slot = &self.slots[usize::from(index)];
        let disk = self
            .disks
            .get(slot.disk)
            .expect("a disk with requests in flight stays");
        slot.prefetch(disk, lines);
    }

    /// This turn's share of the copies: small ones first, and always a slice of a large one.
    #[inline]
    pub(super) fn copy_on(&mut self) {
        let mut budget = COPY_TURN_BYTES;
        while budget > 0 {
            let Some(index) = self.copying_small.pop_front() else {
                break;
            };
            if let Some(next) = self.copying_small.front() {
                self.prefetch(*next, PREFETCH_LINES);
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
        let next = slot.copy(disk, self.memory.extents(index), most, &mut self.counters);
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
