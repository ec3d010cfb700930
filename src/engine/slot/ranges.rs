//! Discards and zeroes: one range after the other, each in the first way that the disk has.

use super::{Method, Next, Slot, Stage};
use crate::engine::target::Abilities;
use crate::engine::{EngineCounters, Extent};
use crate::mq::request::Op;

impl Slot {
    /// Makes it a discard or write-zeroes of `count` ranges.
    pub(in crate::engine) fn start_ranges(
        &mut self,
        extents: &[Extent],
        count: u16,
        fua: bool,
        unmap: bool,
        can: Abilities,
        counters: &mut EngineCounters,
    ) -> Next {
        self.ranges = count;
        self.range = 0;
        self.fua = fua;
        self.unmap = unmap;
        self.next_range(None, extents, can, counters)
    }

    /// Goes on with the range `self.range`, in the first way that comes after `tried`; finishes when
    /// there is no range left.
    pub(super) fn next_range(
        &mut self,
        tried: Option<Method>,
        extents: &[Extent],
        can: Abilities,
        counters: &mut EngineCounters,
    ) -> Next {
        let methods: &[Method] = match (self.op, self.unmap) {
            (Op::Discard, _) => &[Method::Discard, Method::Punch],
            (_, true) => &[
                Method::Punch,
                Method::ZeroRange,
                Method::Zero,
                Method::Write,
            ],
            // The guest wants to keep the space: no punching.
            (_, false) => &[Method::ZeroRange, Method::Zero, Method::Write],
        };
        let after = |tried| {
            methods
                .iter()
                .position(|m| *m == tried)
                .map_or(0, |i| i + 1)
        };
        let mut first = tried.map_or(0, after);
        self.done = 0;
        while self.range < self.ranges {
            if extents[usize::from(self.range)].len > 0 {
                if let Some(method) = methods[first..].iter().find(|m| can.allows(**m)) {
                    self.stage = Stage::Range(*method);
                    counters.zeroes_written += u64::from(*method == Method::Write);
                    return match method {
                        Method::Zero => Next::Copy,
                        _ => Next::Issue,
                    };
                }
                // A discard is a hint: without a way to do it, it is done.
                counters.discards_ignored += 1;
            }
            self.range += 1;
            first = 0;
        }
        if self.fua {
            self.stage = Stage::Sync;
            return Next::Issue;
        }
        Next::Done(Ok(self.total))
    }
}
