//! Handing one request to the engine, and remembering how willing it was.

use super::{Driver, Hctx, Issue};
use crate::mq::ids::{CtxId, RequestId, RequestTag};
use crate::mq::request::Op;
use crate::mq::request_queue::Below;
use crate::mq::throttle::RetryAt;
use crate::mq::trace::Action;

/// Weight of the past in the busy average (`BLK_MQ_DISPATCH_BUSY_EWMA_WEIGHT`).
const BUSY_WEIGHT: u32 = 8;
/// What one refusal adds, as a shift (`BLK_MQ_DISPATCH_BUSY_EWMA_FACTOR`).
const BUSY_FACTOR: u32 = 4;

impl<P> Hctx<P> {
    /// Issues a request that waited. Apart from [`Self::issue`], so that there are few copies of that.
    #[inline(never)]
    pub fn issue_staged<D: Driver<P>>(
        &mut self,
        tag: RequestTag,
        below: &mut Below<'_, D>,
    ) -> Issue {
        self.issue(tag, below)
    }

    /// Budget, driver tag, engine, in this order; what was taken is given back if a later one
    /// refuses.
    #[inline(always)]
    pub fn issue<D: Driver<P>>(&mut self, tag: RequestTag, below: &mut Below<'_, D>) -> Issue {
        let request = &self.table.get(tag).request;
        if request.op == Op::Flush && self.flush.running {
            self.join_flush(tag, below);
            return Issue::Joined;
        }
        if let Err(RetryAt(until)) = below.take_budget(request, self.ending) {
            self.stats.throttled += 1;
            return Issue::Throttled(until);
        }
        if !self.active {
            self.active = true;
            below.tags.hctx_activated(&mut below.queue.share);
        }
        self.used_tags = true;
        let owner = RequestId { hctx: self.id, tag };
        let share = &mut below.queue.share;
        let for_flush = match request.op {
            Op::Flush => below.tags.get_for_flush(share, owner),
            _ => None,
        };
        let ordinary = for_flush.is_none();
        let Some(driver_tag) = for_flush.or_else(|| below.tags.get(share, owner, self.held)) else {
            below.put_budget(request);
            return Issue::NoTag;
        };
        let parts = self.table.parts(tag);
        match below
            .driver
            .queue_rq(self.config.disk, self.id, driver_tag, request, parts)
        {
            Ok(()) => {
                self.held += u16::from(ordinary);
                self.flush.running |= request.op == Op::Flush;
                below.trace(Action::Issued, self.id, tag, request);
                Issue::Sent(self.issued(tag, below.now_ns))
            }
            Err(busy) => {
                below.tags.put(driver_tag);
                below.tags.credit(&mut below.queue.share, ordinary);
                below.put_budget(request);
                below.trace(Action::Requeued, self.id, tag, request);
                Issue::Busy(busy)
            }
        }
    }

    #[inline]
    fn issued(&mut self, tag: RequestTag, now_ns: u64) -> CtxId {
        let entry = self.table.get_mut(tag);
        entry.started = true;
        entry.issued_ns = now_ns;
        if let Some(dispatch_ns) = entry.dispatch_ns {
            self.times.staged.record(dispatch_ns - entry.queued_ns);
            self.times.dispatch.record(now_ns - dispatch_ns);
        }
        entry.key.ctx()
    }

    /// A flush that comes while one runs becomes a part of the next, or is it.
    #[cold]
    fn join_flush<D>(&mut self, tag: RequestTag, below: &mut Below<'_, D>) {
        match self.flush.next {
            Some(leader) => {
                self.table.merge_back(leader, tag);
                self.stats.flush_joined += 1;
                let now_ns = below.now_ns;
                self.account(below).merged_started(now_ns, Op::Flush);
            }
            None => self.flush.next = Some(tag),
        }
    }

    /// The moving average of refusals (blk_mq_update_dispatch_busy).
    pub fn update_busy(&mut self, busy: bool) {
        self.dispatch_busy = busy_average(self.dispatch_busy, busy);
    }
}

/// One step of the busy average: the past has weight 7 of 8, a refusal counts 16.
fn busy_average(average: u32, busy: bool) -> u32 {
    if average == 0 && !busy {
        return 0;
    }
    let refusal = if busy { 1 << BUSY_FACTOR } else { 0 };
    (average * (BUSY_WEIGHT - 1) + refusal) / BUSY_WEIGHT
}

#[cfg(test)]
mod tests {
    use super::busy_average;

    fn run(start: u32, outcomes: &[bool]) -> Vec<u32> {
        let mut average = start;
        outcomes
            .iter()
            .map(|busy| {
                average = busy_average(average, *busy);
                average
            })
            .collect()
    }

    #[test]
    fn busy_average_follows_the_kernels_table() {
        assert_eq!(run(0, &[true; 9]), [2, 3, 4, 5, 6, 7, 8, 9, 9]);
        assert_eq!(run(9, &[false; 8]), [7, 6, 5, 4, 3, 2, 1, 0]);
        let mixed = [
            true, false, false, true, true, true, false, false, false, false,
        ];
        assert_eq!(run(0, &mixed), [2, 1, 0, 2, 3, 4, 3, 2, 1, 0]);
        let every_second: Vec<bool> = (0..40).map(|i| i % 2 == 0).collect();
        assert!(run(0, &every_second).iter().all(|average| *average > 0));
    }
}
