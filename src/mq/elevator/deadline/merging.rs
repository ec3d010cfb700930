//! What is merged into queued requests, and what that makes of them.

use super::super::super::ids::{HctxId, Sector};
use super::super::super::limits::MERGE_LOOKBACK;
use super::super::super::merge_fit::{Fit, fit};
use super::super::super::request::Request;
use super::super::store::NONE;
use super::super::{Join, Merge, MergeSide};
use super::{Class, Deadline, Dir};

impl Deadline {
    /// How `request` lies to what is in `slot`, if they are of the same hctx and may be one.
    fn side(&self, slot: u32, hctx: HctxId, request: &Request) -> Option<MergeSide> {
        let queued = &self.store.get(slot).queued;
        if queued.id.hctx != hctx {
            return None;
        }
        match fit(&queued.request, request, false) {
            Fit::Back => Some(MergeSide::Back),
            Fit::Front => Some(MergeSide::Front),
            Fit::Refused | Fit::Apart => None,
        }
    }

    pub(in super::super) fn find_merge(&self, hctx: HctxId, request: &Request) -> Option<Merge> {
        if !request.op.moves_data() || request.fua || request.bytes == 0 {
            return None;
        }
        let merge = |slot: u32, side| Merge {
            leader: self.store.get(slot).queued.id,
            side,
            slot,
        };
        let allowed = |side| side == MergeSide::Back || self.params.front_merges;
        if self.last_merge != NONE
            && let Some(side) = self.side(self.last_merge, hctx, request)
            && allowed(side)
        {
            return Some(merge(self.last_merge, side));
        }
        for slot in self.ends.near(hctx, request.sector.0) {
            if self.side(slot, hctx, request) == Some(MergeSide::Back) {
                return Some(merge(slot, MergeSide::Back));
            }
        }
        if !self.params.front_merges {
            return None;
        }
        self.find_start(hctx, request, request.end())
            .map(|slot| merge(slot, MergeSide::Front))
    }

    /// A queued request that begins at `start` and may be one with `request`, which ends there.
    fn find_start(&self, hctx: HctxId, request: &Request, start: Sector) -> Option<u32> {
        let root = self
            .queues(Class::of(request.ioprio), Dir::of(request.op))
            .sorted;
        let mut at = self.sorted.at_or_after(root, start.0)?;
        for _ in 0..MERGE_LOOKBACK {
            if self.store.get(at).queued.request.sector != start {
                return None;
            }
            if self.side(at, hctx, request) == Some(MergeSide::Front) {
                return Some(at);
            }
            at = self.sorted.same_sector_after(root, at)?;
        }
        None
    }

    pub(in super::super) fn merged(&mut self, merge: Merge, now: &Request) -> Option<Join> {
        let slot = merge.slot;
        self.store.leader(slot, merge.leader).queued.request = *now;
        self.last_merge = slot;
        let hctx = merge.leader.hctx;
        let (front_slot, back_slot) = match merge.side {
            MergeSide::Back => {
                self.ends.remove(slot);
                self.ends.insert(slot, hctx, now.end().0);
                (slot, self.find_start(hctx, now, now.end())?)
            }
            MergeSide::Front => {
                let class = &mut self.classes[Class::of(now.ioprio) as usize];
                let root = &mut class.queues[Dir::of(now.op) as usize].sorted;
                self.sorted.remove(root, slot);
                self.sorted.insert(root, slot, now.sector.0);
                let mut near = self.ends.near(hctx, now.sector.0);
                let before = near.find(|s| self.side(*s, hctx, now) == Some(MergeSide::Back))?;
                (before, slot)
            }
        };
        Some(Join {
            front: self.store.get(front_slot).queued.id,
            back: self.store.get(back_slot).queued.id,
            front_slot,
            back_slot,
        })
    }

    pub(in super::super) fn joined(&mut self, join: Join, now: &Request) {
        let (front, back) = (join.front_slot, join.back_slot);
        let gone = self.store.leader(back, join.back);
        let (deadline_ns, queued_ns) = (gone.deadline_ns, gone.queued.queued_ns);
        let class = &mut self.classes[Class::of(now.ioprio) as usize];
        let queues = &mut class.queues[Dir::of(now.op) as usize];
        let node = self.store.leader(front, join.front);
        node.queued.request = *now;
        if deadline_ns < node.deadline_ns {
            node.deadline_ns = deadline_ns;
            node.queued.queued_ns = queued_ns;
            queues.fifo.remove(&mut self.store, front);
            queues.fifo.insert_before(&mut self.store, back, front);
        }
        queues.fifo.remove(&mut self.store, back);
        self.sorted.remove(&mut queues.sorted, back);
        self.ends.remove(back);
        self.ends.remove(front);
        self.ends.insert(front, join.front.hctx, now.end().0);
        self.store.remove(back);
        class.unfinished -= 1;
        self.last_merge = front;
    }
}
