//! The hardware context: one virtqueue, seen from blk-mq.
//!
//! It holds the table of the virtqueue's requests, its staging queues and its leftovers, and it
//! decides what goes to the engine when. Nothing here knows about other hctxs but what they share:
//! the disk's request queue and the worker's tags.

use self::ctx::Ctxs;
use super::ids::{CtxId, DiskId, DriverTag, HctxId, QueueId, RequestId, RequestTag};
use super::limits::{PLUG_FLUSH_BYTES, PLUG_REQUESTS};
use super::merge_fit::Merged;
use super::request::{Op, Request};
use super::request_queue::Below;
use super::stats::batch::{SentRun, StatBatch};
use super::stats::key::StatKey;
use super::stats::{HctxStats, HctxTimes};
use super::table::{Fifo, Parts, Table, merge};
use super::trace::Action;

mod complete;
pub(super) mod ctx;
mod issue;

/// The engine does not take a request now; the variant says who wakes us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Busy {
    /// Something of this worker is in flight, and its completion makes room
    /// (`BLK_STS_DEV_RESOURCE`).
    UntilCompletion,
    /// Nobody promises a wake-up: try again later (`BLK_STS_RESOURCE`).
    RetryLater,
}

/// What is below blk-mq: takes requests, reports completions some other way.
pub trait Driver<P> {
    /// Prepares one request; the engine is told to begin when the turn's batch is committed.
    ///
    /// `hctx` is whose request it is. `parts` are the payloads it consists of, in the order of their sectors.
    fn queue_rq(
        &mut self,
        disk: DiskId,
        hctx: HctxId,
        tag: DriverTag,
        request: &Request,
        parts: Parts<'_, P>,
    ) -> Result<(), Busy>;
}

/// What an hctx needs after it tried to make progress.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Want {
    /// Nothing: all it had is with the engine.
    Nothing,
    /// To be run: it has staged requests.
    Run,
    /// To be run when a completion has freed a tag or a place in the engine.
    Completion,
    /// To be run at this time.
    At(u64),
}

/// Who the hctx is, and how large.
#[derive(Clone, Copy, Debug)]
pub struct HctxConfig {
    /// The disk it belongs to.
    pub disk: DiskId,
    /// The virtqueue it is.
    pub queue: QueueId,
    /// The ring's size: request tags run from 0 to this, exclusive.
    pub ring_size: u16,
    /// How many vCPUs the queue map sends here: as many ctxs.
    pub ctxs: u16,
}

#[derive(Debug)]
pub(super) struct Hctx<P> {
    pub id: HctxId,
    pub config: HctxConfig,
    pub table: Table<P>,
    pub ctxs: Ctxs,
    /// What the drain at hand brought, oldest first; [`PLUG_REQUESTS`] at most.
    plug: Vec<RequestTag>,
    pub leftovers: Fifo,
    pub flush: FlushMachine,
    pub dispatch_busy: u32,
    pub quiesced: bool,
    /// What it holds goes out without regard to limits and past the elevator.
    pub ending: bool,
    /// Ordinary driver tags held.
    pub held: u16,
    /// Counted among the tag set's active hctxs.
    pub active: bool,
    /// Used a tag since the last decay.
    pub used_tags: bool,
    pub stats: HctxStats,
    pub times: HctxTimes,
    /// What is not in the two yet.
    pub batch: StatBatch,
}

/// One flush at a time: those that come while it runs become one, which follows it
/// (block/blk-flush.c). Whoever asked is covered, because a flush that starts later covers more.
#[derive(Debug, Default)]
pub(super) struct FlushMachine {
    pub running: bool,
    pub next: Option<RequestTag>,
}

pub(super) enum Issue {
    /// The engine has it; whose it is.
    Sent(CtxId),
    /// A flush that waits for the one that runs.
    Joined,
    NoTag,
    Throttled(u64),
    Busy(Busy),
}

impl<P> Hctx<P> {
    pub fn new(id: HctxId, config: HctxConfig) -> Self {
        Hctx {
            id,
            config,
            table: Table::new(config.ring_size),
            ctxs: Ctxs::new(config.ctxs),
            plug: Vec::with_capacity(PLUG_REQUESTS),
            leftovers: Fifo::default(),
            flush: FlushMachine::default(),
            dispatch_busy: 0,
            quiesced: false,
            ending: false,
            held: 0,
            active: false,
            used_tags: false,
            stats: HctxStats::default(),
            times: HctxTimes::default(),
            batch: StatBatch::new(),
        }
    }

    /// Whether anything waits to be dispatched, what is in the elevator not counted.
    #[inline]
    pub fn has_work(&self) -> bool {
        !self.leftovers.is_empty() || self.ctxs.any()
    }

    /// Requests that wait to be dispatched, those in the elevator not counted.
    pub fn waiting(&self) -> usize {
        usize::from(self.leftovers.len()) + self.ctxs.staged()
    }

    /// Whether a flush is the next to go.
    pub fn flush_is_first(&self) -> bool {
        let first = self.leftovers.front();
        first.is_some_and(|tag| self.table.get(tag).request.op == Op::Flush)
    }

    /// Takes a request into the table and the plug. The plug is flushed first when it is long or
    /// its newest request is large (blk_add_rq_to_plug).
    pub fn plug<D: Driver<P>>(
        &mut self,
        tag: RequestTag,
        request: Request,
        payload: P,
        below: &mut Below<'_, D>,
    ) -> Want {
        let key = StatKey::new(request.op, self.ctxs.of(&request));
        self.count_arrived(request.op, key, below);
        below.trace(Action::Queued, self.id, tag, &request);
        if self.plug.is_empty() {
            below.trace.plugged(below.now_ns, self.id);
        }
        self.table.insert(tag, request, key, below.now_ns, payload);
        let newest = self.plug.last().copied();
        let mut full = self.plug.len() >= PLUG_REQUESTS;
        if let Some(newest) = newest {
            full |= self.table.get(newest).request.bytes >= PLUG_FLUSH_BYTES;
            let merged = merge::into_one(&mut self.table, newest, tag).unwrap_or(Merged::No);
            if merged != Merged::No {
                self.count_merge(tag, merged, below);
                self.count_merged_arrival();
                return Want::Nothing;
            }
        }
        below.trace(Action::Got, self.id, tag, &request);
        let want = if full {
            self.unplug(below)
        } else {
            Want::Nothing
        };
        self.plug.push(tag);
        want
    }

    fn count_merge<D>(&mut self, tag: RequestTag, merged: Merged, below: &mut Below<'_, D>) {
        self.stats.merged += 1;
        let entry = self.table.get(tag);
        self.ctxs.stats[entry.key.ctx().index()].merged += 1;
        let action = match merged {
            Merged::Front => Action::FrontMerged,
            Merged::Back | Merged::No => Action::BackMerged,
        };
        below.trace(action, self.id, tag, &entry.request);
    }

    /// The end of a drain: what the plug holds goes to the engine directly, or is staged.
    pub fn unplug<D: Driver<P>>(&mut self, below: &mut Below<'_, D>) -> Want {
        if self.plug.is_empty() {
            return Want::Nothing;
        }
        below.trace.unplugged(
            below.now_ns,
            self.id,
            u32::try_from(self.plug.len()).unwrap_or(u32::MAX),
        );
        // It is given back below, with the memory that it has.
        let mut plug = std::mem::take(&mut self.plug);
        let (mut gone, mut want) = (0, Want::Run);
        if !self.quiesced
            && self.dispatch_busy == 0
            && !self.has_work()
            && below.queue.elevator.is_none()
        {
            (gone, want) = self.issue_plug(&plug, below);
        }
        for tag in &plug[gone..] {
            self.stage(*tag, below);
        }
        plug.clear();
        self.plug = plug;
        want
    }

    /// Direct issue, until something is refused (blk_mq_try_issue_list_directly). Says how many of
    /// them are not to be staged.
    fn issue_plug<D: Driver<P>>(
        &mut self,
        plug: &[RequestTag],
        below: &mut Below<'_, D>,
    ) -> (usize, Want) {
        let (mut issued, mut refused) = (0, 0);
        let mut sent = SentRun::NONE;
        let mut want = Want::Nothing;
        for tag in plug {
            match self.issue(*tag, below) {
                Issue::Sent(ctx) => self.count_sent(&mut sent, ctx),
                Issue::Joined => {}
                Issue::NoTag => {
                    want = Want::Completion;
                    break;
                }
                Issue::Throttled(until) => {
                    want = Want::At(until);
                    break;
                }
                Issue::Busy(busy) => {
                    // Refused by the engine itself: first in line when it is asked again.
                    self.leftovers.push_back(&mut self.table, *tag);
                    self.stats.staged += 1;
                    self.update_busy(true);
                    refused = 1;
                    want = want_after(busy, below);
                    break;
                }
            }
            issued += 1;
        }
        self.add_sent(sent);
        self.stats.direct += issued as u64;
        self.times.runs.record(issued);
        (issued + refused, want)
    }

    /// Puts a request where it waits: the leftovers' head for a flush, the elevator if there is
    /// one, else its ctx (blk_mq_insert_request).
    fn stage<D: Driver<P>>(&mut self, tag: RequestTag, below: &mut Below<'_, D>) {
        let request = self.table.get(tag).request;
        // A flush covers only what was completed before it came, so there is nothing it would have
        // to wait for.
        if request.op == Op::Flush {
            self.leftovers.push_front(&mut self.table, tag);
            self.stats.staged += 1;
            return;
        }
        if self.ending {
            self.leftovers.push_back(&mut self.table, tag);
            self.stats.staged += 1;
            below.trace(Action::Inserted, self.id, tag, &request);
            return;
        }
        // To fill a gap between two that wait changes the account.
        self.account(below);
        let id = RequestId { hctx: self.id, tag };
        let mut merged = below.merge_into_elevator(&mut self.table, id);
        if merged == Merged::No {
            if below.queue.may_insert(&request) {
                self.elevate(tag, below);
            } else {
                merged = self.ctxs.stage(&mut self.table, tag);
            }
        }
        if merged == Merged::No {
            self.stats.staged += 1;
            below.trace(Action::Inserted, self.id, tag, &request);
        } else {
            self.count_merge(tag, merged, below);
            let now_ns = below.now_ns;
            self.account(below).merged_started(now_ns, request.op);
        }
    }

    fn elevate<D>(&mut self, tag: RequestTag, below: &mut Below<'_, D>) {
        let entry = self.table.get_mut(tag);
        entry.elevated = true;
        let id = RequestId { hctx: self.id, tag };
        below.queue.insert(id, entry.request, entry.queued_ns);
    }

    /// Runs the queue: leftovers first; then one by one while the engine is busy, all at once
    /// otherwise (__blk_mq_sched_dispatch_requests). With an elevator only the leftovers are issued
    /// here, and what waits in the ctxs for the elevator to take it goes there.
    pub fn dispatch<D: Driver<P>>(&mut self, below: &mut Below<'_, D>) -> Want {
        if self.quiesced {
            return Want::Nothing;
        }
        let mut one_by_one = self.dispatch_busy > 0;
        if !self.leftovers.is_empty() {
            let list = std::mem::take(&mut self.leftovers);
            let want = self.send(list, below);
            if want != Want::Nothing {
                return want;
            }
            one_by_one = true;
        }
        if below.queue.elevator.is_some() && !self.ending {
            self.feed_elevator(below);
            return Want::Nothing;
        }
        if !one_by_one {
            let list = self.ctxs.take_all(&mut self.table);
            return self.send(list, below);
        }
        while let Some(tag) = self.ctxs.take_one(&mut self.table) {
            let mut list = Fifo::default();
            list.push_back(&mut self.table, tag);
            let want = self.send(list, below);
            if want != Want::Nothing {
                return want;
            }
            // What came back meanwhile goes first.
            if !self.leftovers.is_empty() {
                return Want::Run;
            }
        }
        Want::Nothing
    }

    fn feed_elevator<D: Driver<P>>(&mut self, below: &mut Below<'_, D>) {
        while let Some(tag) = self.ctxs.take_one(&mut self.table) {
            if !below.queue.may_insert(&self.table.get(tag).request) {
                self.ctxs.give_back(&mut self.table, tag);
                return;
            }
            self.elevate(tag, below);
        }
    }

    /// Hands a list to the engine; what does not go becomes leftovers (blk_mq_dispatch_rq_list).
    fn send<D: Driver<P>>(&mut self, mut list: Fifo, below: &mut Below<'_, D>) -> Want {
        if list.is_empty() {
            return Want::Nothing;
        }
        let mut issued = 0;
        let mut sent = SentRun::NONE;
        let want = loop {
            let Some(tag) = list.pop_front(&mut self.table) else {
                self.update_busy(false);
                break Want::Nothing;
            };
            self.table
                .get_mut(tag)
                .dispatch_ns
                .get_or_insert(below.now_ns);
            let want = match self.issue_staged(tag, below) {
                Issue::Sent(ctx) => {
                    issued += 1;
                    self.count_sent(&mut sent, ctx);
                    continue;
                }
                Issue::Joined => {
                    issued += 1;
                    continue;
                }
                // Want of tokens says nothing about the engine.
                Issue::Throttled(until) => Want::At(until),
                Issue::NoTag => {
                    self.update_busy(true);
                    Want::Completion
                }
                Issue::Busy(busy) => {
                    self.update_busy(true);
                    want_after(busy, below)
                }
            };
            list.push_front(&mut self.table, tag);
            self.leftovers.append(&mut self.table, &mut list);
            break want;
        };
        self.add_sent(sent);
        self.times.runs.record(issued);
        want
    }
}

/// When an hctx the engine refused is to be run again.
pub(super) fn want_after<D>(busy: Busy, below: &Below<'_, D>) -> Want {
    match busy {
        Busy::UntilCompletion => Want::Completion,
        Busy::RetryLater => Want::At(below.retry_ns()),
    }
}
