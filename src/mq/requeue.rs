//! Taking a request that failed back, instead of telling the guest: somebody may be able to remove the
//! cause (blk_mq_requeue_request).

use super::Mq;
use super::elevator::Times;
use super::hctx::{Hctx, Want};
use super::ids::{DriverTag, HctxId, RequestTag};
use super::request::{Op, Request};
use super::request_queue::Below;
use super::tags::Returned;
use super::trace::Action;

impl<P> Mq<P> {
    /// What the engine has under a driver tag; `None` if it is nobody's.
    pub fn issued(&self, tag: DriverTag) -> Option<(HctxId, RequestTag, Request)> {
        let owner = self.tags.owner(tag)?;
        let request = self.hctx(owner.hctx).table.get(owner.tag).request;
        Some((owner.hctx, owner.tag, request))
    }

    /// The engine is done with a driver tag, and what it had is to be issued again, as the first of its
    /// hctx: once the hctx runs, so whoever wants to wait quiesces it first.
    ///
    /// A completion nobody waits for is counted and ignored, as by [`Self::complete`].
    pub fn requeue(&mut self, tag: DriverTag) {
        let Some(Returned { owner, ordinary }) = self.tags.put(tag) else {
            self.stale_completions += 1;
            return;
        };
        self.completed_since_run = true;
        let mut nobody = ();
        let (hctx, mut below) = self.split(owner.hctx, &mut nobody);
        below.tags.credit(&mut below.queue.share, ordinary);
        hctx.held -= u16::from(ordinary);
        hctx.requeue(owner.tag, &mut below);
        if below.queue.elevator.is_some() {
            self.wake_staged(owner.hctx);
        }
        self.place(owner.hctx, Want::Run);
    }

    /// Whether an hctx is quiesced.
    pub fn is_quiesced(&self, id: HctxId) -> bool {
        self.hctx(id).quiesced
    }
}

impl<P> Hctx<P> {
    /// What was merged stays merged: it is issued again as a whole.
    fn requeue(&mut self, tag: RequestTag, below: &mut Below<'_, ()>) {
        let entry = self.table.get_mut(tag);
        let request = entry.request;
        let times = Times {
            queued_ns: entry.queued_ns,
            started_ns: entry.issued_ns,
            completed_ns: below.now_ns,
        };
        if std::mem::take(&mut entry.elevated) {
            below.queue.elevated_ended(&request, times);
        }
        if request.op == Op::Flush {
            self.flush.running = false;
        }
        self.stats.requeued += 1;
        below.trace(Action::Requeued, self.id, tag, &request);
        self.leftovers.push_front(&mut self.table, tag);
    }
}
