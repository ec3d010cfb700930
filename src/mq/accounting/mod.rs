//! Counting what is alike together.
//!
//! Requests come, go and end in batches: of one kind, at one time, from one ctx. So they are counted
//! by runs of such, and a run is added to all the statistics it belongs to when it ends: with the next
//! request that differs, with the turn, or when somebody asks. What is published is exact then, and a
//! request costs two comparisons and two additions instead of a dozen counters, a histogram and an
//! account.
//!
//! Whatever else changes the disk's account asks for it by [`Hctx::account`], which adds those that came
//! first: none ends or is merged there that never started.

use super::hctx::Hctx;
use super::ids::{CtxId, DiskId, HctxId};
use super::limits::SECTOR_SIZE;
use super::request::{Op, Request};
use super::request_queue::Below;
use super::stats::batch::SentRun;
use super::stats::diskstats::{Account, DiskStats};
use super::stats::key::StatKey;
use super::stats::{CtxStats, HctxStats, HctxTimes};
use super::{Mq, NOBODY};

impl<P> Hctx<P> {
    /// A request came.
    #[inline]
    pub(in crate::mq) fn count_arrived<D>(
        &mut self,
        op: Op,
        key: StatKey,
        below: &mut Below<'_, D>,
    ) {
        if self.batch.off {
            return;
        }
        if self.batch.arrived.key != key {
            self.fold_arrived(below.now_ns, &mut below.queue.account);
            (self.batch.arrived.key, self.batch.arrived.op) = (key, op);
        }
        self.batch.arrived.count += 1;
    }

    /// The one that came last became a part of another in the plug.
    #[inline]
    pub(in crate::mq) fn count_merged_arrival(&mut self) {
        if !self.batch.off {
            self.batch.arrived.merged += 1;
        }
    }

    #[inline]
    fn fold_arrived(&mut self, now_ns: u64, account: &mut Account) {
        if self.batch.arrived.count != 0 {
            self.add_arrived(now_ns, account);
        }
    }

    #[inline(never)]
    fn add_arrived(&mut self, now_ns: u64, account: &mut Account) {
        let run = &mut self.batch.arrived;
        let (count, merged) = (u64::from(run.count), u64::from(run.merged));
        (run.count, run.merged) = (0, 0);
        self.stats.accepted(run.op, count);
        self.ctxs.stats[run.key.ctx().index()].queued += count;
        account.merged_many(run.op, merged);
        account.start_many(now_ns, run.op, count - merged);
    }

    /// The disk's account, with all in it that came.
    #[inline]
    pub(in crate::mq) fn account<'a, D>(&mut self, below: &'a mut Below<'_, D>) -> &'a mut Account {
        let account = &mut below.queue.account;
        self.fold_arrived(below.now_ns, account);
        account
    }

    /// A request of `ctx` was handed to the engine, after those in `sent`.
    #[inline]
    pub(in crate::mq) fn count_sent(&mut self, sent: &mut SentRun, ctx: CtxId) {
        if sent.ctx != ctx {
            self.add_sent(std::mem::replace(sent, SentRun { ctx, count: 0 }));
        }
        sent.count += 1;
    }

    #[inline]
    pub(in crate::mq) fn add_sent(&mut self, sent: SentRun) {
        if sent.count != 0 && !self.batch.off {
            self.stats.dispatched += sent.count;
            self.ctxs.stats[sent.ctx.index()].dispatched += sent.count;
        }
    }

    /// A request of one part ended well.
    #[inline]
    pub(in crate::mq) fn count_ended<D>(
        &mut self,
        request: &Request,
        key: StatKey,
        (queued_ns, started_ns): (u64, u64),
        below: &mut Below<'_, D>,
    ) {
        if self.batch.off {
            return;
        }
        let run = &self.batch.ended;
        let alike = run.key == key && run.started_ns == started_ns && run.queued_ns == queued_ns;
        if !alike {
            self.fold(below.now_ns, &mut below.queue.account);
            let run = &mut self.batch.ended;
            (run.key, run.op) = (key, request.op);
            (run.queued_ns, run.started_ns) = (queued_ns, started_ns);
        }
        let run = &mut self.batch.ended;
        run.count += 1;
        run.bytes += request.bytes;
    }

    /// Adds everything to the statistics, what came before what ended. `now_ns` is the time of the turn it
    /// was counted in.
    #[inline]
    pub(in crate::mq) fn fold(&mut self, now_ns: u64, account: &mut Account) {
        self.fold_arrived(now_ns, account);
        if self.batch.ended.count != 0 {
            self.add_ended(now_ns, account);
        }
    }

    #[inline(never)]
    fn add_ended(&mut self, now_ns: u64, account: &mut Account) {
        let run = &mut self.batch.ended;
        let count = u64::from(std::mem::take(&mut run.count));
        let bytes = std::mem::take(&mut run.bytes);
        // Whole sectors each, as the parser sees to.
        account.done_many(now_ns, run.op, count, bytes / SECTOR_SIZE, run.queued_ns);
        self.times
            .device(run.op)
            .record_many(now_ns - run.started_ns, count);
        self.stats.succeeded(run.op, bytes);
        self.ctxs.stats[run.key.ctx().index()].completed += count;
    }
}

impl<P> Mq<P> {
    /// Adds to the statistics what was counted apart.
    pub(in crate::mq) fn fold(&mut self) {
        if self.batched == NOBODY {
            return;
        }
        let id = std::mem::replace(&mut self.batched, NOBODY);
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
            member.hctx.batch.off = !on;
        }
    }
}

#[cfg(test)]
mod tests;
