//! blk-mq itself. Pure: no file descriptor, no guest address, no clock, no thread, no log.
//!
//! [`Mq`] is one worker's share of it: the hctxs of the virtqueues the worker owns, over all disks,
//! and the driver tags they share. Where the kernel takes `ctx->lock` or `hctx->lock`, ownership
//! does: one thread calls, so there is nothing to lock. Only the limits of a disk belong to all
//! workers that serve it, see [`throttle`].
//!
//! The buffers of a request cross this module as an opaque payload `P`.

#![forbid(unsafe_code)]

mod abandon;
mod accounting;
pub mod cpumap;
pub mod elevator;
mod hctx;
pub mod ids;
pub mod limits;
mod merge_fit;
mod overdue;
pub mod request;
mod request_queue;
mod requeue;
mod run;
mod settings;
pub mod stats;
mod table;
pub mod tags;
pub mod throttle;
pub mod trace;

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

pub use self::hctx::{Busy, Driver, HctxConfig};
use self::hctx::{Hctx, Want};
use self::ids::{DiskId, DriverTag, HctxId, RequestTag};
use self::limits::ACTIVITY_DECAY_NS;
pub use self::overdue::Overdue;
use self::request::{Request, Status};
use self::request_queue::{Below, RequestQueue};
use self::stats::{HctxStats, HctxTimes};
pub use self::table::Parts;
use self::tags::{Returned, TagDepth, TagSet};
use self::trace::Trace;

/// Stands for no hctx: there are fewer than [`limits::MAX_HCTXS`].
const NOBODY: HctxId = HctxId(u16::MAX);

/// Where an hctx stands that is not idle. It stands in one place at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Nowhere,
    /// To be run in this turn.
    Runnable,
    /// Waits for a completion.
    Waiting,
    /// Waits for a time.
    Delayed,
}

/// One worker's blk-mq.
#[derive(Debug)]
pub struct Mq<P> {
    hctxs: Vec<Option<Member<P>>>,
    /// By disk.
    queues: Vec<Option<RequestQueue>>,
    tags: TagSet,
    runnable: VecDeque<HctxId>,
    waiting: VecDeque<HctxId>,
    /// Those of them that are not asked; empty between two runs.
    passed_over: VecDeque<HctxId>,
    /// Earliest first, and of those with one time the one that waits longest: all that wait for one
    /// bucket are told the same time.
    delayed: BinaryHeap<Reverse<(u64, u64, HctxId)>>,
    delays: u64,
    completed_since_run: bool,
    trace: Trace,
    /// The hctx whose latest requests are not in the statistics yet; there is never a second.
    batched: HctxId,
    now_ns: u64,
    next_decay_ns: u64,
    stale_completions: u64,
}

#[derive(Debug)]
struct Member<P> {
    hctx: Hctx<P>,
    place: Place,
    /// Since when it waits for a time and got nothing, as a place in a line.
    ticket: Option<u64>,
}

impl<P> Mq<P> {
    /// With so many driver tags.
    pub fn new(depth: TagDepth) -> Self {
        Mq {
            hctxs: Vec::new(),
            queues: Vec::new(),
            tags: TagSet::new(depth),
            runnable: VecDeque::new(),
            waiting: VecDeque::new(),
            passed_over: VecDeque::new(),
            delayed: BinaryHeap::new(),
            delays: 0,
            completed_since_run: false,
            trace: Trace::new(),
            batched: NOBODY,
            now_ns: 0,
            next_decay_ns: 0,
            stale_completions: 0,
        }
    }

    /// Whether there are as many hctxs as there can be.
    pub fn is_full(&self) -> bool {
        self.hctxs.len() >= usize::from(limits::MAX_HCTXS) && self.hctxs.iter().all(Option::is_some)
    }

    /// Adds an hctx, unless [`Self::is_full`]; the only place, with [`Self::remove_hctx`], where memory is allocated.
    pub fn add_hctx(&mut self, config: HctxConfig) -> HctxId {
        let free = self.hctxs.iter().position(Option::is_none);
        let index = free.unwrap_or(self.hctxs.len());
        let id = HctxId(u16::try_from(index).expect("fewer hctxs than MAX_HCTXS"));
        assert!(id.0 < limits::MAX_HCTXS, "more hctxs than MAX_HCTXS");
        let mut hctx = Hctx::new(id, config);
        hctx.batch.off = !self.queue_of(config.disk).account.is_on();
        let member = Some(Member {
            hctx,
            place: Place::Nowhere,
            ticket: None,
        });
        match free {
            Some(index) => self.hctxs[index] = member,
            None => self.hctxs.push(member),
        }
        let queue = self.queues[config.disk.index()].as_mut();
        let queue = queue.expect("made above");
        if queue.members.is_empty() {
            self.tags.seat(&mut queue.share);
        }
        queue.add_member(id, config.ring_size);
        // Each hctx is in at most one of the lists, so this is all they ever need.
        let count = self.hctxs.len();
        self.runnable.reserve(count);
        self.waiting.reserve(count);
        self.passed_over.reserve(count);
        self.delayed.reserve(count);
        id
    }

    /// Removes an hctx that has nothing in flight and says what it counted.
    pub fn remove_hctx(&mut self, id: HctxId) -> (HctxStats, Box<HctxTimes>) {
        self.fold();
        let member = self.hctxs[id.index()].take().expect("the hctx exists");
        assert_eq!(
            member.hctx.table.live(),
            0,
            "hctx {id} removed while in use"
        );
        self.runnable.retain(|other| *other != id);
        self.waiting.retain(|other| *other != id);
        self.delayed.retain(|Reverse((_, _, other))| *other != id);
        let config = member.hctx.config;
        let queue = self.queues[config.disk.index()].as_mut();
        let queue = queue.expect("made with its first hctx");
        if member.hctx.active {
            self.tags.hctx_idled(&mut queue.share);
        }
        queue.remove_member(id, config.ring_size);
        if queue.members.is_empty() {
            self.tags.unseat(&mut queue.share);
        }
        (member.hctx.stats, Box::new(member.hctx.times))
    }

    #[inline]
    fn member(&mut self, id: HctxId) -> &mut Member<P> {
        self.hctxs[id.index()].as_mut().expect("the hctx exists")
    }

    fn hctx(&self, id: HctxId) -> &Hctx<P> {
        &self.hctxs[id.index()]
            .as_ref()
            .expect("the hctx exists")
            .hctx
    }

    /// Begins a turn at `now_ns`, a monotonic time in nanoseconds: the one clock reading the turn
    /// gets. Delayed hctxs whose time has come become runnable.
    pub fn start_turn(&mut self, now_ns: u64) {
        if self.now_ns != now_ns {
            self.fold();
            self.now_ns = now_ns;
        }
        while let Some(&Reverse((at, _, id))) = self.delayed.peek() {
            if at > now_ns {
                break;
            }
            self.delayed.pop();
            self.member(id).place = Place::Runnable;
            self.runnable.push_back(id);
        }
        if now_ns >= self.next_decay_ns {
            self.next_decay_ns = now_ns + ACTIVITY_DECAY_NS;
            self.decay();
        }
    }

    /// An hctx that used no tag for a while no longer takes part in the sharing
    /// (blk_mq_tag_idle; the kernel leaves it to the timeout worker).
    fn decay(&mut self) {
        for member in self.hctxs.iter_mut().flatten() {
            let hctx = &mut member.hctx;
            if hctx.active && !hctx.used_tags && hctx.held == 0 && !hctx.has_work() {
                hctx.active = false;
                let queue = self.queues[hctx.config.disk.index()].as_mut();
                let share = &mut queue.expect("made with its first hctx").share;
                self.tags.hctx_idled(share);
            }
            hctx.used_tags = false;
        }
    }

    /// How many requests of an hctx would get a driver tag now, or a few less.
    #[inline]
    pub fn room(&self, id: HctxId) -> u16 {
        let hctx = self.hctx(id);
        let queue = self.queues[hctx.config.disk.index()].as_ref();
        let share = &queue.expect("made with its first hctx").share;
        self.tags.room(share, hctx.held)
    }

    /// When the worker has to take a turn even if nothing happens, on the same clock.
    pub fn next_deadline_ns(&self) -> Option<u64> {
        self.delayed.peek().map(|Reverse((at, ..))| *at)
    }

    /// Takes a request a drain of `id`'s ring brought into the plug.
    #[inline]
    pub fn plug(
        &mut self,
        id: HctxId,
        tag: RequestTag,
        request: Request,
        payload: P,
        driver: &mut impl Driver<P>,
    ) {
        let (hctx, mut below) = self.split(id, driver);
        let want = hctx.plug(tag, request, payload, &mut below);
        self.place(id, want);
    }

    /// Ends the drain of `id`'s ring: its plug is issued directly or staged.
    #[inline]
    pub fn unplug(&mut self, id: HctxId, driver: &mut impl Driver<P>) {
        let waits = self.member(id).place == Place::Waiting;
        let (hctx, mut below) = self.split(id, driver);
        hctx.stats.batches += 1;
        let want = hctx.unplug(&mut below);
        if waits && hctx.flush_is_first() {
            // A flush has tags of its own. The others keep their place in the line.
            hctx.dispatch(&mut below);
            return;
        }
        self.place(id, want);
    }

    /// An hctx, and what is below it.
    #[inline]
    fn split<'a, D>(
        &'a mut self,
        id: HctxId,
        driver: &'a mut D,
    ) -> (&'a mut Hctx<P>, Below<'a, D>) {
        if self.batched != id {
            self.fold();
            self.batched = id;
        }
        let member = self.hctxs[id.index()].as_mut().expect("the hctx exists");
        let disk = member.hctx.config.disk;
        let below = Below {
            tags: &mut self.tags,
            queue: self.queues[disk.index()]
                .as_mut()
                .expect("made with its first hctx"),
            trace: &mut self.trace,
            driver,
            now_ns: self.now_ns,
        };
        (&mut member.hctx, below)
    }

    /// The disk's request queue; made when it is first spoken of.
    fn queue_of(&mut self, disk: DiskId) -> &mut RequestQueue {
        let index = disk.index();
        if self.queues.len() <= index {
            self.queues.resize_with(index + 1, || None);
        }
        self.queues[index].get_or_insert_with(|| RequestQueue::new(disk))
    }

    /// The engine is done with a driver tag. `finish` gets every request that ended: its hctx, its
    /// payload, its status, and how many bytes were read for it.
    ///
    /// A completion nobody waits for (late, or twice) is counted and ignored.
    #[inline]
    pub fn complete(
        &mut self,
        tag: DriverTag,
        result: Result<(), Status>,
        mut finish: impl FnMut(HctxId, P, Status, u64),
    ) {
        let Some(Returned { owner, ordinary }) = self.tags.put(tag) else {
            self.stale_completions += 1;
            return;
        };
        self.completed_since_run = true;
        let mut nobody = ();
        let (hctx, mut below) = self.split(owner.hctx, &mut nobody);
        below.tags.credit(&mut below.queue.share, ordinary);
        hctx.held -= u16::from(ordinary);
        let mut want = hctx.complete(owner.tag, result, &mut below, |payload, status, read| {
            finish(owner.hctx, payload, status, read);
        });
        if below.queue.elevator.is_some() {
            // A completion can make the elevator give out what it held back, for any hctx; and a
            // request above the async limit, which waits in its ctx, may now go in.
            if below.queue.elevator_waits() || hctx.has_work() {
                want = Want::Run;
            }
            if below.queue.members.len() > 1 {
                self.wake_staged(owner.hctx);
            }
        }
        self.place(owner.hctx, want);
    }

    /// Stops dispatching (blk_mq_quiesce_queue). Completions and insertions go on.
    pub fn quiesce(&mut self, id: HctxId) {
        self.member(id).hctx.quiesced = true;
    }

    /// Dispatches again, and at once if something was staged meanwhile.
    pub fn unquiesce(&mut self, id: HctxId) {
        let hctx = &mut self.member(id).hctx;
        hctx.quiesced = false;
        let (disk, has_work) = (hctx.config.disk, hctx.has_work());
        if has_work || self.queue_of(disk).elevator_waits() {
            self.place(id, Want::Run);
        }
    }

    /// Requests of an hctx that are not completed: staged, or with the engine.
    #[inline]
    pub fn in_flight(&self, id: HctxId) -> u16 {
        self.hctx(id).table.live()
    }

    /// Requests of an hctx that wait to be dispatched.
    pub fn staged(&self, id: HctxId) -> usize {
        self.hctx(id).waiting()
    }

    /// How many ctxs an hctx has.
    pub fn ctx_count(&self, id: HctxId) -> usize {
        self.hctx(id).ctxs.count()
    }

    /// The busy average of an hctx, 0 to 16: above 0, requests are dispatched one by one.
    pub fn dispatch_busy(&self, id: HctxId) -> u32 {
        self.hctx(id).dispatch_busy
    }

    /// Completions that came for a driver tag nobody held.
    pub fn stale_completions(&self) -> u64 {
        self.stale_completions
    }

    /// The trace of this worker, off until it is started.
    pub fn trace(&mut self) -> &mut Trace {
        &mut self.trace
    }

    /// The driver tags.
    pub fn tags(&self) -> &TagSet {
        &self.tags
    }
}

#[cfg(test)]
mod tests;
