//! Staging queues: where requests wait that could not be issued straight away.
//!
//! One ctx stands for one vCPU that the guest's queue map sends to this hctx. With as many
//! virtqueues as vCPUs every hctx has exactly one. With fewer, the ring does not say which vCPU
//! wrote a descriptor, so requests are told apart by *flow*: the 1 MiB region they touch and their
//! ioprio. That keeps one stream together and lets the round-robin be fair between streams.

use crate::mq::ids::{CtxId, RequestTag};
use crate::mq::limits::{MERGE_LOOKBACK, SECTOR_SIZE};
use crate::mq::merge_fit::Merged;
use crate::mq::request::Request;
use crate::mq::stats::CtxStats;
use crate::mq::table::{Fifo, Table, merge};

/// The region of the disk whose requests count as one flow: 1 MiB.
const FLOW_SECTORS: u64 = 1024 * 1024 / SECTOR_SIZE;

/// The ctxs of one hctx, with one bit each that says who has something (the kernel's `ctx_map`).
#[derive(Debug)]
pub(in crate::mq) struct Ctxs {
    queues: Vec<Fifo>,
    pub stats: Vec<CtxStats>,
    map: Vec<u64>,
    /// Where the round-robin goes on (`dispatch_from`).
    from: usize,
}

impl Ctxs {
    pub fn new(count: u16) -> Self {
        let count = usize::from(count.max(1));
        Ctxs {
            queues: vec![Fifo::default(); count],
            stats: vec![CtxStats::default(); count],
            map: vec![0; count.div_ceil(64)],
            from: 0,
        }
    }

    pub fn count(&self) -> usize {
        self.queues.len()
    }

    /// The ctx a request belongs to.
    #[inline]
    pub fn of(&self, request: &Request) -> CtxId {
        let count = self.queues.len();
        if count == 1 {
            return CtxId(0);
        }
        let flow = (request.sector.0 / FLOW_SECTORS) << 16 | u64::from(request.ioprio.0);
        // Fibonacci hashing: neighbouring flows spread, and the upper half of the product is the
        // well-mixed one. Scaled to the count, so the result is always below it.
        let hash = flow.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        #[expect(clippy::cast_possible_truncation, reason = "below the count, a u16")]
        CtxId(((hash * count as u64) >> 32) as u16)
    }

    #[inline]
    pub fn any(&self) -> bool {
        self.map.iter().any(|word| *word != 0)
    }

    /// How many requests wait in all ctxs.
    pub fn staged(&self) -> usize {
        self.queues.iter().map(|q| usize::from(q.len())).sum()
    }

    /// Puts a request into its ctx, or joins it to one of the newest that wait there.
    pub fn stage<P>(&mut self, table: &mut Table<P>, tag: RequestTag) -> Merged {
        let ctx = table.get(tag).key.ctx().index();
        let queue = &mut self.queues[ctx];
        let merged = merge::into_newest(table, queue, tag, MERGE_LOOKBACK);
        if merged != Merged::No {
            return merged;
        }
        queue.push_back(table, tag);
        self.map[ctx / 64] |= 1 << (ctx % 64);
        Merged::No
    }

    /// Takes everything, ctx by ctx (blk_mq_flush_busy_ctxs).
    pub fn take_all<P>(&mut self, table: &mut Table<P>) -> Fifo {
        let mut all = Fifo::default();
        for (at, word) in self.map.iter_mut().enumerate() {
            while *word != 0 {
                let bit = word.trailing_zeros() as usize;
                *word &= *word - 1;
                all.append(table, &mut self.queues[at * 64 + bit]);
            }
        }
        all
    }

    /// Takes one request from the first ctx at or after the cursor that has one, and moves the
    /// cursor past that ctx (blk_mq_dequeue_from_ctx).
    pub fn take_one<P>(&mut self, table: &mut Table<P>) -> Option<RequestTag> {
        let count = self.queues.len();
        for step in 0..count {
            let ctx = (self.from + step) % count;
            if let Some(tag) = self.queues[ctx].pop_front(table) {
                if self.queues[ctx].is_empty() {
                    self.map[ctx / 64] &= !(1 << (ctx % 64));
                }
                self.from = (ctx + 1) % count;
                return Some(tag);
            }
        }
        None
    }

    /// Puts back what `take_one` took last: it stays the first of its ctx, whose turn it still is.
    pub fn give_back<P>(&mut self, table: &mut Table<P>, tag: RequestTag) {
        let ctx = table.get(tag).key.ctx().index();
        self.queues[ctx].push_front(table, tag);
        self.map[ctx / 64] |= 1 << (ctx % 64);
        self.from = ctx;
    }
}
