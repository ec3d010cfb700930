//! The way back: from the engine's word to each guest request's own status.

use super::elevator::Times;
use super::hctx::{Hctx, Want};
use super::ids::RequestTag;
use super::limits::SECTOR_SIZE;
use super::queue::Below;
use super::request::{Op, Status};
use super::trace::Action;

impl<P> Hctx<P> {
    /// A request came back from the engine; `finish` gets every part's payload with its status and
    /// the bytes that were read for it.
    ///
    /// A merged request that failed is taken apart and each part sent again, so that every
    /// guest request gets its own exact status. Flushes that became one have one fate.
    pub fn complete(
        &mut self,
        tag: RequestTag,
        result: Result<(), Status>,
        below: &mut Below<'_, ()>,
        mut finish: impl FnMut(P, Status, u64),
    ) -> Want {
        let now_ns = below.now_ns;
        let entry = self.table.get(tag);
        let request = entry.request;
        let (queued_ns, started_ns) = (entry.queued_ns, entry.issued_ns);
        if entry.elevated {
            let times = Times {
                queued_ns,
                started_ns,
                completed_ns: now_ns,
            };
            below.queue.elevated_ended(&request, times);
        }
        if result.is_err() && request.op != Op::Flush && self.table.is_merged(tag) {
            below.trace(Action::Split, self.id, tag, &request);
            self.split(tag, below);
            return Want::Run;
        }
        let device = match request.op {
            Op::Read => &mut self.times.device_read,
            _ => &mut self.times.device_other,
        };
        device.record(now_ns - started_ns);
        let account = &mut below.queue.account;
        account.done(now_ns, request.op, request.bytes / SECTOR_SIZE, queued_ns);
        let status = result.err().unwrap_or(Status::Ok);
        below
            .trace
            .completed(now_ns, self.id, tag, &request, status);
        let (stats, ctxs) = (&mut self.stats, &mut self.ctxs.stats);
        self.table.remove(tag, |ctx, bytes, payload| {
            stats.completed(request.op, bytes, status);
            ctxs[ctx.index()].completed += 1;
            let read = if status == Status::Ok && request.op == Op::Read {
                bytes
            } else {
                0
            };
            finish(payload, status, read);
        });
        if request.op == Op::Flush {
            self.flush.running = false;
            if let Some(next) = self.flush.next.take() {
                self.leftovers.push_front(&mut self.table, next);
                return Want::Run;
            }
        }
        Want::Nothing
    }

    /// Each part of a merged request stands for itself again and waits among the leftovers.
    fn split(&mut self, tag: RequestTag, below: &mut Below<'_, ()>) {
        let op = self.table.get(tag).request.op;
        let mut parts = self.table.split(tag);
        self.stats.requeued += u64::from(parts.len());
        // The one that is in flight for the disk's account becomes several.
        for _ in 1..parts.len() {
            below.queue.account.start(below.now_ns, op);
        }
        self.leftovers.append(&mut self.table, &mut parts);
    }
}
