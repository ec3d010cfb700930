//! The way back: from the engine's word to each guest request's own status.

use super::{Hctx, Want};
use crate::mq::elevator::Times;
use crate::mq::ids::RequestTag;
use crate::mq::limits::SECTOR_SIZE;
use crate::mq::request::{Op, Status};
use crate::mq::request_queue::Below;
use crate::mq::trace::Action;

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
        let (queued_ns, started_ns, key) = (entry.queued_ns, entry.issued_ns, entry.key);
        if entry.elevated {
            let times = Times {
                queued_ns,
                started_ns,
                completed_ns: now_ns,
            };
            below.queue.elevated_ended(&request, times);
        }
        let merged = entry.is_merged();
        if result.is_err() && request.op != Op::Flush && merged {
            below.trace(Action::Split, self.id, tag, &request);
            self.split(tag, below);
            return Want::Run;
        }
        let status = result.err().unwrap_or(Status::Ok);
        below
            .trace
            .completed(now_ns, self.id, tag, &request, status);
        let read = |bytes| match (status, request.op) {
            (Status::Ok, Op::Read) => bytes,
            _ => 0,
        };
        if status == Status::Ok && !merged {
            self.count_ended(&request, key, (queued_ns, started_ns), below);
            finish(self.table.remove(tag), status, read(request.bytes));
        } else {
            self.times.device(request.op).record(now_ns - started_ns);
            let sectors = request.bytes / SECTOR_SIZE;
            self.account(below)
                .done(now_ns, request.op, sectors, queued_ns);
            let (stats, ctxs) = (&mut self.stats, &mut self.ctxs.stats);
            self.table.remove_parts(tag, |ctx, bytes, payload| {
                ctxs[ctx.index()].completed += 1;
                match status {
                    Status::Ok => stats.succeeded(request.op, bytes),
                    _ => stats.errors += 1,
                }
                finish(payload, status, read(bytes));
            });
        }
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
        let more = u64::from(parts.len() - 1);
        let now_ns = below.now_ns;
        self.account(below).start_many(now_ns, op, more);
        self.leftovers.append(&mut self.table, &mut parts);
    }
}
