//! The hardware context: one virtqueue, seen from blk-mq.
//!
//! It holds the table of the virtqueue's requests, its staging queues and its leftovers, and it
//! decides what goes to the engine when. Nothing here knows about other hctxs but the shared tags.

use super::ctx::Ctxs;
use super::ids::{DiskId, DriverTag, HctxId, QueueId, RequestId, RequestTag};
use super::limits::{PLUG_FLUSH_BYTES, PLUG_REQUESTS};
use super::merge::{self, Merged};
use super::request::{Op, Request, Status};
use super::stats::HctxStats;
use super::table::{Fifo, Parts, Table};
use super::tags::TagSet;

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
    /// `parts` are the payloads it consists of, in the order of their sectors.
    fn queue_rq(
        &mut self,
        disk: DiskId,
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
    /// To be run after a while.
    Delay,
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

/// Weight of the past in the busy average (`BLK_MQ_DISPATCH_BUSY_EWMA_WEIGHT`).
const BUSY_WEIGHT: u32 = 8;
/// What one refusal adds, as a shift (`BLK_MQ_DISPATCH_BUSY_EWMA_FACTOR`).
const BUSY_FACTOR: u32 = 4;

#[derive(Debug)]
pub(super) struct Hctx<P> {
    id: HctxId,
    pub config: HctxConfig,
    pub table: Table<P>,
    ctxs: Ctxs,
    plug: Fifo,
    leftovers: Fifo,
    dispatch_busy: u32,
    pub quiesced: bool,
    /// Ordinary driver tags held.
    pub held: u16,
    /// Counted among the tag set's active hctxs.
    pub active: bool,
    /// Used a tag since the last decay.
    pub used_tags: bool,
    pub stats: HctxStats,
}

enum Issue {
    Done,
    NoTag,
    Busy(Busy),
}

impl<P> Hctx<P> {
    pub fn new(id: HctxId, config: HctxConfig) -> Self {
        Hctx {
            id,
            config,
            table: Table::new(config.ring_size),
            ctxs: Ctxs::new(config.ctxs),
            plug: Fifo::default(),
            leftovers: Fifo::default(),
            dispatch_busy: 0,
            quiesced: false,
            held: 0,
            active: false,
            used_tags: false,
            stats: HctxStats::default(),
        }
    }

    /// Whether anything waits to be dispatched.
    #[inline]
    pub fn has_work(&self) -> bool {
        !self.leftovers.is_empty() || self.ctxs.any()
    }

    /// Requests that wait to be dispatched.
    pub fn waiting(&self) -> usize {
        usize::from(self.leftovers.len()) + self.ctxs.staged()
    }

    pub fn ctx_count(&self) -> usize {
        self.ctxs.count()
    }

    /// Changes how many vCPUs are mapped here. What is staged moves to the leftovers, in the order
    /// it would have been flushed.
    pub fn set_ctxs(&mut self, count: u16) {
        let mut staged = self.ctxs.take_all(&mut self.table);
        self.leftovers.append(&mut self.table, &mut staged);
        self.ctxs = Ctxs::new(count);
        self.config.ctxs = count;
    }

    /// Takes a request into the table and the plug. The plug is flushed first when it is long or
    /// its newest request is large (blk_add_rq_to_plug).
    pub fn plug(
        &mut self,
        tag: RequestTag,
        request: Request,
        payload: P,
        tags: &mut TagSet,
        driver: &mut impl Driver<P>,
    ) -> Want {
        self.stats.accepted(&request);
        self.table
            .insert(tag, request, self.ctxs.of(&request), payload);
        if merge::into_newest(&mut self.table, &self.plug, tag, 1) == Merged::Yes {
            self.stats.merged += 1;
            return Want::Nothing;
        }
        let full = usize::from(self.plug.len()) >= PLUG_REQUESTS
            || self
                .plug
                .back()
                .is_some_and(|newest| self.table.get(newest).request.bytes >= PLUG_FLUSH_BYTES);
        let want = if full {
            self.unplug(tags, driver)
        } else {
            Want::Nothing
        };
        self.plug.push_back(&mut self.table, tag);
        want
    }

    /// The end of a drain: what the plug holds goes to the engine directly, or is staged.
    pub fn unplug(&mut self, tags: &mut TagSet, driver: &mut impl Driver<P>) -> Want {
        if self.plug.is_empty() {
            return Want::Nothing;
        }
        let mut want = Want::Run;
        if !self.quiesced && !self.has_work() && self.dispatch_busy == 0 {
            want = Want::Nothing;
            while let Some(tag) = self.plug.pop_front(&mut self.table) {
                match self.issue(tag, tags, driver) {
                    Issue::Done => self.stats.direct += 1,
                    Issue::NoTag => {
                        self.stage(tag);
                        want = Want::Completion;
                        break;
                    }
                    Issue::Busy(busy) => {
                        // Refused by the engine itself: first in line when it is asked again.
                        self.leftovers.push_back(&mut self.table, tag);
                        self.stats.staged += 1;
                        self.update_busy(true);
                        want = busy.into();
                        break;
                    }
                }
            }
        }
        while let Some(tag) = self.plug.pop_front(&mut self.table) {
            self.stage(tag);
        }
        want
    }

    fn stage(&mut self, tag: RequestTag) {
        // A flush covers only what was completed before it came, so there is nothing it would have
        // to wait for: it goes to the head of the leftovers (blk_mq_insert_request).
        if self.table.get(tag).request.op == Op::Flush {
            self.leftovers.push_front(&mut self.table, tag);
            self.stats.staged += 1;
            return;
        }
        match self.ctxs.stage(&mut self.table, tag) {
            Merged::Yes => self.stats.merged += 1,
            Merged::No => self.stats.staged += 1,
        }
    }

    /// Runs the queue: leftovers first; then one by one while the engine is busy, all at once
    /// otherwise (__blk_mq_sched_dispatch_requests).
    pub fn dispatch(&mut self, tags: &mut TagSet, driver: &mut impl Driver<P>) -> Want {
        if self.quiesced {
            return Want::Nothing;
        }
        let mut one_by_one = self.dispatch_busy > 0;
        if !self.leftovers.is_empty() {
            let list = std::mem::take(&mut self.leftovers);
            let want = self.send(list, tags, driver);
            if want != Want::Nothing {
                return want;
            }
            one_by_one = true;
        }
        if !one_by_one {
            let list = self.ctxs.take_all(&mut self.table);
            return self.send(list, tags, driver);
        }
        while let Some(tag) = self.ctxs.take_one(&mut self.table) {
            let mut list = Fifo::default();
            list.push_back(&mut self.table, tag);
            let want = self.send(list, tags, driver);
            if want != Want::Nothing {
                return want;
            }
        }
        Want::Nothing
    }

    /// Hands a list to the engine; what does not go becomes leftovers (blk_mq_dispatch_rq_list).
    fn send(&mut self, mut list: Fifo, tags: &mut TagSet, driver: &mut impl Driver<P>) -> Want {
        if list.is_empty() {
            return Want::Nothing;
        }
        while let Some(tag) = list.pop_front(&mut self.table) {
            let want = match self.issue(tag, tags, driver) {
                Issue::Done => continue,
                Issue::NoTag => Want::Completion,
                Issue::Busy(busy) => busy.into(),
            };
            list.push_front(&mut self.table, tag);
            self.leftovers.append(&mut self.table, &mut list);
            self.update_busy(true);
            return want;
        }
        self.update_busy(false);
        Want::Nothing
    }

    #[inline]
    fn issue(&mut self, tag: RequestTag, tags: &mut TagSet, driver: &mut impl Driver<P>) -> Issue {
        if !self.active {
            self.active = true;
            tags.hctx_activated();
        }
        self.used_tags = true;
        let owner = RequestId { hctx: self.id, tag };
        let request = self.table.get(tag).request;
        let reserved = match request.op {
            Op::Flush => tags.get_reserved(owner),
            _ => None,
        };
        let Some(driver_tag) = reserved.or_else(|| tags.get(owner, self.held)) else {
            return Issue::NoTag;
        };
        self.table.get_mut(tag).started = true;
        match driver.queue_rq(
            self.config.disk,
            driver_tag,
            &request,
            self.table.parts(tag),
        ) {
            Ok(()) => {
                if !tags.is_reserved(driver_tag) {
                    self.held += 1;
                }
                Issue::Done
            }
            Err(busy) => {
                tags.put(driver_tag);
                self.table.get_mut(tag).started = false;
                Issue::Busy(busy)
            }
        }
    }

    /// A request came back from the engine; `finish` gets every part's payload with its status and
    /// the bytes that were read for it.
    ///
    /// A merged request that failed is taken apart and each part sent again, so that every guest
    /// request gets its own exact status.
    pub fn complete(
        &mut self,
        tag: RequestTag,
        result: Result<(), Status>,
        mut finish: impl FnMut(P, Status, u64),
    ) -> Want {
        let op = self.table.get(tag).request.op;
        if result.is_err() && self.table.is_merged(tag) {
            let mut parts = self.table.split(tag);
            self.stats.requeued += u64::from(parts.len());
            self.leftovers.append(&mut self.table, &mut parts);
            return Want::Run;
        }
        let status = result.err().unwrap_or(Status::Ok);
        let stats = &mut self.stats;
        self.table.remove(tag, |_, bytes, payload| {
            stats.completed(op, bytes, status);
            let read = if status == Status::Ok && op == Op::Read {
                bytes
            } else {
                0
            };
            finish(payload, status, read);
        });
        Want::Nothing
    }

    /// The moving average of refusals (blk_mq_update_dispatch_busy).
    fn update_busy(&mut self, busy: bool) {
        self.dispatch_busy = busy_average(self.dispatch_busy, busy);
    }

    pub fn dispatch_busy(&self) -> u32 {
        self.dispatch_busy
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

impl From<Busy> for Want {
    fn from(busy: Busy) -> Want {
        match busy {
            Busy::UntilCompletion => Want::Completion,
            Busy::RetryLater => Want::Delay,
        }
    }
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
