//! The request queue: what the hctxs of one disk on one worker have in common.

use std::sync::Arc;

use super::elevator::{Elevator, MergeSide, Params, Queued, Times};
use super::ids::{DiskId, HctxId, RequestId, RequestTag};
use super::limits::RESOURCE_DELAY_NS;
use super::merge_fit::Merged;
use super::request::Request;
use super::stats::diskstats::Account;
use super::table::Table;
use super::tags::{TagSet, TagShare};
use super::throttle::{RetryAt, Throttle};
use super::trace::{Action, Trace};

/// One disk's share of a worker.
#[derive(Debug)]
pub(super) struct RequestQueue {
    pub disk: DiskId,
    pub members: Vec<HctxId>,
    /// `none` is its absence.
    pub elevator: Option<Elevator>,
    /// The disk's limits, which other workers take from as well.
    pub throttle: Option<Arc<Throttle>>,
    /// Those of the group of disks it belongs to.
    pub group: Option<Arc<Throttle>>,
    pub account: Account,
    /// Its driver tags.
    pub share: TagShare,
    /// The sum of the members' ring sizes: as many requests can wait in the elevator. Of 64 rings of 1024
    /// entries it is more than 16 bits have.
    pub depth: u32,
    /// Requests the elevator's async limit is for, from insertion to completion.
    async_held: u32,
}

impl RequestQueue {
    pub fn new(disk: DiskId) -> Self {
        RequestQueue {
            disk,
            members: Vec::new(),
            elevator: None,
            throttle: None,
            group: None,
            account: Account::new(),
            share: TagShare::default(),
            depth: 0,
            async_held: 0,
        }
    }

    pub fn add_member(&mut self, hctx: HctxId, ring_size: u16) {
        self.members.push(hctx);
        self.depth += u32::from(ring_size);
        let room = self.room();
        if let Some(elevator) = &mut self.elevator {
            elevator.reserve(room);
        }
    }

    pub fn remove_member(&mut self, hctx: HctxId, ring_size: u16) {
        self.members.retain(|other| *other != hctx);
        self.depth -= u32::from(ring_size);
    }

    /// How many requests there can be at a time.
    fn room(&self) -> usize {
        usize::try_from(self.depth).expect("as many entries have been allocated")
    }

    /// Puts another elevator in place. The disk is frozen: nothing waits and nothing is in flight.
    pub fn set_elevator(&mut self, params: Params) {
        assert_eq!(self.account.in_flight(), [0, 0], "the disk is frozen");
        self.elevator = Elevator::new(params, self.room());
        self.async_held = 0;
    }

    /// The limits that hold for it.
    pub fn throttles(&self) -> impl Iterator<Item = &Throttle> {
        let both = [&self.throttle, &self.group].into_iter().flatten();
        both.map(|throttle| &**throttle)
    }

    /// Takes what an hctx has in the elevator out of it.
    pub fn take_out(&mut self, hctx: HctxId, mut each: impl FnMut(RequestTag) -> Request) {
        let Some(elevator) = &mut self.elevator else {
            return;
        };
        let mut tags = Vec::new();
        elevator.take_hctx(hctx, |id| tags.push(id.tag));
        for tag in tags {
            self.async_held -= u32::from(elevator.is_async(&each(tag)));
        }
    }

    /// Whether the elevator holds requests.
    #[inline]
    pub fn elevator_waits(&self) -> bool {
        self.elevator.as_ref().is_some_and(|e| !e.is_empty())
    }

    /// Whether the elevator may take `request` now: as with a scheduler tag that is not to be had,
    /// one above the async limit waits in its ctx.
    #[inline]
    pub fn may_insert(&self, request: &Request) -> bool {
        self.elevator.as_ref().is_some_and(|elevator| {
            !elevator.is_async(request) || self.async_held < elevator.async_limit(self.depth.max(1))
        })
    }

    pub fn insert(&mut self, id: RequestId, request: Request, queued_ns: u64) {
        let elevator = self.elevator.as_mut().expect("may_insert said yes");
        if elevator.is_async(&request) {
            self.async_held += 1;
        }
        let queued = Queued {
            id,
            request,
            queued_ns,
        };
        elevator.insert(queued, false);
    }

    /// A request the elevator gave out ended, or is sent again in parts.
    pub fn elevated_ended(&mut self, request: &Request, times: Times) {
        if let Some(elevator) = &mut self.elevator {
            if elevator.is_async(request) {
                self.async_held -= 1;
            }
            elevator.completed(request, times);
        }
    }

    /// One that was inserted became a part of another that was as well.
    pub fn elevated_joined(&mut self, request: &Request) {
        if self.elevator.as_ref().is_some_and(|e| e.is_async(request)) {
            self.async_held -= 1;
        }
    }
}

/// What is below an hctx when it issues.
pub(super) struct Below<'a, D> {
    pub tags: &'a mut TagSet,
    pub queue: &'a mut RequestQueue,
    pub trace: &'a mut Trace,
    pub driver: &'a mut D,
    pub now_ns: u64,
}

impl<D> Below<'_, D> {
    /// The budget: tokens of the disk and of its group, all or none (blk_mq_get_dispatch_budget). What is
    /// ending has it always, and owes what it lacks.
    #[inline]
    pub fn take_budget(&mut self, request: &Request, ending: bool) -> Result<(), RetryAt> {
        if self.queue.throttle.is_none() && self.queue.group.is_none() {
            return Ok(());
        }
        self.take_tokens(request, ending)
    }

    /// Apart from [`Self::take_budget`], so that a disk without limits pays for no call.
    fn take_tokens(&mut self, request: &Request, ending: bool) -> Result<(), RetryAt> {
        let (now_ns, op, bytes) = (self.now_ns, request.op, request.bytes);
        if ending {
            for throttle in self.queue.throttles() {
                throttle.owe(now_ns, op, bytes);
            }
            return Ok(());
        }
        match (&self.queue.throttle, &self.queue.group) {
            (None, None) => Ok(()),
            (Some(one), None) | (None, Some(one)) => one.try_take(now_ns, op, bytes),
            (Some(disk), Some(group)) => disk.try_take_with(group, now_ns, op, bytes),
        }
    }

    /// Gives back what was taken for a request that was not issued (blk_mq_put_dispatch_budget).
    pub fn put_budget(&mut self, request: &Request) {
        for throttle in self.queue.throttles() {
            throttle.refund(request.op, request.bytes);
        }
    }

    /// Records what happens to a request, if anybody wants to know.
    #[inline]
    pub fn trace(&mut self, action: Action, hctx: HctxId, tag: RequestTag, request: &Request) {
        self.trace.request(self.now_ns, action, hctx, tag, request);
    }

    /// When to try again if nobody promises to wake us.
    pub fn retry_ns(&self) -> u64 {
        self.now_ns + RESOURCE_DELAY_NS
    }

    /// Joins a request to one that waits in the elevator, if it fits one.
    pub fn merge_into_elevator<P>(&mut self, table: &mut Table<P>, id: RequestId) -> Merged {
        let Some(elevator) = &mut self.queue.elevator else {
            return Merged::No;
        };
        let Some(merge) = elevator.find_merge(id.hctx, &table.get(id.tag).request) else {
            return Merged::No;
        };
        let leader = merge.leader.tag;
        let merged = match merge.side {
            MergeSide::Back => {
                table.merge_back(leader, id.tag);
                Merged::Back
            }
            MergeSide::Front => {
                table.merge_front(leader, id.tag);
                Merged::Front
            }
        };
        if let Some(join) = elevator.merged(merge, &table.get(leader).request) {
            // The gap between two that waited is filled: the later becomes a part of the earlier.
            let (front, back) = (join.front.tag, join.back.tag);
            let swallowed = table.get(back).request;
            table.merge_back(front, back);
            elevator.joined(join, &table.get(front).request);
            self.queue.elevated_joined(&swallowed);
            self.queue.account.merged_started(self.now_ns, swallowed.op);
        }
        merged
    }
}
