//! Counting what is alike together.
//!
//! Requests come, go and end in batches: of one kind, at one time, from one ctx. So they are counted
//! by runs of such, and a run is added to all the statistics it belongs to when it ends: with the next
//! request that differs, with the turn, or when somebody asks. What is published is exact then, and a
//! request costs two comparisons and two additions instead of a dozen counters, a histogram and an
//! account.

use super::diskstats::{Account, DiskStats};
use super::hctx::Hctx;
use super::ids::{CtxId, DiskId, HctxId};
use super::limits::SECTOR_SIZE;
use super::queue::Below;
use super::request::{Op, Request};
use super::stats::{CtxStats, HctxStats, HctxTimes};
use super::{Mq, NOBODY};

/// Requests a plug has taken.
#[derive(Debug)]
pub(super) struct Arrived {
    op: Op,
    ctx: CtxId,
    count: u32,
    /// Those that became parts of others in the plug.
    pub merged: u32,
}

/// Requests that were handed to the engine.
#[derive(Debug)]
pub(super) struct Sent {
    ctx: CtxId,
    count: u32,
}

/// Requests that ended well, each by itself.
#[derive(Debug)]
pub(super) struct Ended {
    op: Op,
    ctx: CtxId,
    queued_ns: u64,
    started_ns: u64,
    count: u32,
    bytes: u64,
}

/// The runs of one hctx.
#[derive(Debug)]
pub(super) struct Tally {
    /// Nothing is counted.
    pub off: bool,
    arrived: Arrived,
    sent: Sent,
    ended: Ended,
}

impl Tally {
    pub fn new() -> Self {
        let (op, ctx) = (Op::Read, CtxId(0));
        Tally {
            off: false,
            arrived: Arrived {
                op,
                ctx,
                count: 0,
                merged: 0,
            },
            sent: Sent { ctx, count: 0 },
            ended: Ended {
                op,
                ctx,
                queued_ns: 0,
                started_ns: 0,
                count: 0,
                bytes: 0,
            },
        }
    }
}

impl<P> Hctx<P> {
    /// A request came.
    #[inline]
    pub(super) fn count_arrived<D>(&mut self, op: Op, ctx: CtxId, below: &mut Below<'_, D>) {
        if self.tally.off {
            return;
        }
        let run = &self.tally.arrived;
        if run.op != op || run.ctx != ctx {
            self.fold_arrived(below.now_ns, &mut below.queue.account);
            (self.tally.arrived.op, self.tally.arrived.ctx) = (op, ctx);
        }
        self.tally.arrived.count += 1;
    }

    /// The one that came last became a part of another in the plug.
    #[inline]
    pub(super) fn count_merged_arrival(&mut self) {
        if !self.tally.off {
            self.tally.arrived.merged += 1;
        }
    }

    /// Adds the requests of a plug to the statistics; they are in flight for the disk from here on.
    #[inline]
    pub(super) fn fold_arrived(&mut self, now_ns: u64, account: &mut Account) {
        if self.tally.arrived.count != 0 {
            self.add_arrived(now_ns, account);
        }
    }

    #[inline(never)]
    fn add_arrived(&mut self, now_ns: u64, account: &mut Account) {
        let run = &mut self.tally.arrived;
        let (count, merged) = (u64::from(run.count), u64::from(run.merged));
        (run.count, run.merged) = (0, 0);
        self.stats.accepted(run.op, count);
        self.ctxs.stats[run.ctx.index()].queued += count;
        account.merged_many(run.op, merged);
        account.start_many(now_ns, run.op, count - merged);
    }

    /// A request was handed to the engine.
    #[inline]
    pub(super) fn count_sent(&mut self, ctx: CtxId) {
        if self.tally.off {
            return;
        }
        if self.tally.sent.ctx != ctx {
            self.fold_sent();
            self.tally.sent.ctx = ctx;
        }
        self.tally.sent.count += 1;
    }

    #[inline]
    fn fold_sent(&mut self) {
        let run = &mut self.tally.sent;
        if run.count == 0 {
            return;
        }
        let count = u64::from(std::mem::take(&mut run.count));
        self.stats.dispatched += count;
        self.ctxs.stats[run.ctx.index()].dispatched += count;
    }

    /// A request of one part ended well.
    #[inline]
    pub(super) fn count_ended<D>(
        &mut self,
        request: &Request,
        ctx: CtxId,
        (queued_ns, started_ns): (u64, u64),
        below: &mut Below<'_, D>,
    ) {
        if self.tally.off {
            return;
        }
        let run = &self.tally.ended;
        let alike = run.op == request.op
            && run.ctx == ctx
            && run.started_ns == started_ns
            && run.queued_ns == queued_ns;
        if !alike {
            self.fold_ended(below.now_ns, &mut below.queue.account);
            let run = &mut self.tally.ended;
            (run.op, run.ctx) = (request.op, ctx);
            (run.queued_ns, run.started_ns) = (queued_ns, started_ns);
        }
        let run = &mut self.tally.ended;
        run.count += 1;
        run.bytes += request.bytes;
    }

    #[inline]
    fn fold_ended(&mut self, now_ns: u64, account: &mut Account) {
        if self.tally.ended.count != 0 {
            self.add_ended(now_ns, account);
        }
    }

    #[inline(never)]
    fn add_ended(&mut self, now_ns: u64, account: &mut Account) {
        let run = &mut self.tally.ended;
        let count = u64::from(std::mem::take(&mut run.count));
        let bytes = std::mem::take(&mut run.bytes);
        // Whole sectors each, as the parser sees to.
        account.done_many(now_ns, run.op, count, bytes / SECTOR_SIZE, run.queued_ns);
        self.times
            .device(run.op)
            .record_many(now_ns - run.started_ns, count);
        self.stats.succeeded(run.op, bytes);
        self.ctxs.stats[run.ctx.index()].completed += count;
    }

    /// Adds everything to the statistics. `now_ns` is the time of the turn it was counted in.
    pub(super) fn fold(&mut self, now_ns: u64, account: &mut Account) {
        self.fold_arrived(now_ns, account);
        self.fold_sent();
        self.fold_ended(now_ns, account);
    }
}

impl<P> Mq<P> {
    /// Adds to the statistics what was counted apart.
    pub(super) fn fold(&mut self) {
        if self.tallied == NOBODY {
            return;
        }
        let id = std::mem::replace(&mut self.tallied, NOBODY);
        let hctx = &mut self.hctxs[id.index()].as_mut().expect("it exists").hctx;
        let queue = self.queues[hctx.config.disk.index()].as_mut();
        let account = &mut queue.expect("made with its first hctx").account;
        hctx.fold(self.now_ns, account);
    }

    /// What each ctx of an hctx did since it has that many.
    pub fn ctx_stats(&mut self, id: HctxId) -> &[CtxStats] {
        self.fold();
        &self.hctx(id).ctxs.stats
    }

    /// How long requests of an hctx were where.
    pub fn times(&mut self, id: HctxId) -> &HctxTimes {
        self.fold();
        &self.hctx(id).times
    }

    /// A disk's counts as of the last turn, in the terms of /proc/diskstats.
    pub fn disk_stats(&mut self, disk: DiskId) -> DiskStats {
        self.fold();
        let now_ns = self.now_ns;
        self.queue_of(disk).account.at(now_ns)
    }

    /// What an hctx counted so far.
    pub fn stats(&mut self, id: HctxId) -> &HctxStats {
        self.fold();
        &self.hctx(id).stats
    }

    /// Counts nothing more of what a disk's requests do, or everything again: the `iostats` of a
    /// kernel's queue, to measure what counting costs. Nothing of the disk may be in flight.
    pub fn set_iostats(&mut self, disk: DiskId, on: bool) {
        self.fold();
        self.queue_of(disk).account.set_on(on);
        let of_disk = self.hctxs.iter_mut().flatten();
        for member in of_disk.filter(|member| member.hctx.config.disk == disk) {
            assert_eq!(member.hctx.table.live(), 0, "requests are in flight");
            member.hctx.tally.off = !on;
        }
    }
}

#[cfg(test)]
mod tests;
