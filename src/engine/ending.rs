//! From completions to commands that are done.

use super::Engine;
use crate::engine::slot::Next;
use crate::engine::{Errno, Event};
use crate::mq::ids::DriverTag;

impl Engine {
    #[inline]
    pub(super) fn apply_to_slot(
        &mut self,
        generation: u32,
        index: u16,
        res: i32,
        on: &mut impl FnMut(Event),
    ) {
        let in_lane = match self.slots.get(usize::from(index)) {
            Some(s) if s.in_kernel() && u32::from(s.generation) == generation => s.lane.is_some(),
            _ => {
                self.counters.stale += 1;
                return;
            }
        };
        if in_lane {
            self.leave_lane(index, res >= 0);
        }
        let slot = &mut self.slots[usize::from(index)];
        let disk = self
            .disks
            .get_mut(slot.disk)
            .expect("a disk with requests in flight stays");
        match slot.on_cqe(res, disk, self.memory.extents(index), &mut self.counters) {
            Next::Done(result) => self.done(index, result, on),
            Next::Copy => self.copying.push_back(index),
            Next::Issue => {
                if !self.send(index) {
                    self.unsent.push(index);
                }
            }
        }
    }

    /// Frees a slot that never got on its way, or is done.
    #[inline]
    pub(super) fn release(&mut self, index: u16) {
        if self.slots[usize::from(index)].lane.is_some() {
            self.leave_lane(index, false);
        }
        if let Some(bounce) = self.slots[usize::from(index)].release() {
            self.memory.put_bounce(bounce);
        }
    }

    #[inline]
    pub(super) fn done(
        &mut self,
        index: u16,
        result: Result<u64, Errno>,
        on: &mut impl FnMut(Event),
    ) {
        self.release(index);
        let slot = &self.slots[usize::from(index)];
        let tag = DriverTag {
            index,
            generation: slot.generation,
        };
        self.disks
            .get_mut(slot.disk)
            .expect("a disk with requests in flight stays")
            .in_flight -= 1;
        self.in_flight -= 1;
        on(Event::Done { tag, result });
    }
}
