//! mq-deadline: sorted batches, reads before writes, a deadline for each, three priority classes.
//!
//! Facts and constants are those of Linux' block/mq-deadline.c. One thing differs: when a lower class is
//! asked for a request that has aged and has none, nothing is changed. The kernel then has already
//! ended the current batch, or counted a batch of reads, though nothing was dispatched.

mod merging;

use super::super::ids::{HctxId, RequestId, Sector};
use super::super::request::{IoPrio, Op, Request};
use super::Queued;
use super::ends::Ends;
use super::params::DeadlineParams;
use super::sorted::{Root, Sorted};
use super::store::{List, NONE, Store};

/// The priority classes, the first one first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Real time.
    Rt,
    /// Best effort: also what has no class, or one nobody knows.
    Be,
    /// Only when nobody else wants the disk.
    Idle,
}

impl Class {
    const ALL: [Class; 3] = [Class::Rt, Class::Be, Class::Idle];

    /// The class in a guest's hint: its upper three bits (uapi/linux/ioprio.h).
    #[inline]
    pub fn of(ioprio: IoPrio) -> Class {
        match ioprio.0 >> 13 {
            1 => Class::Rt,
            3 => Class::Idle,
            _ => Class::Be,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Dir {
    Read,
    Write,
}

impl Dir {
    const BOTH: [Dir; 2] = [Dir::Read, Dir::Write];

    /// What changes the disk counts as a write.
    #[inline]
    fn of(op: Op) -> Dir {
        match op {
            Op::Read => Dir::Read,
            _ => Dir::Write,
        }
    }
}

/// The queues of one class and direction.
#[derive(Debug, Default)]
struct Queues {
    /// In the order of arrival, and so of the deadlines.
    fifo: List,
    sorted: Root,
    /// Where the last one that was dispatched begins.
    last: Sector,
}

#[derive(Debug, Default)]
struct PerClass {
    /// Queued or with the engine.
    unfinished: usize,
    /// Goes before everything else of the class.
    head: List,
    queues: [Queues; 2],
}

/// Where the scheduler is in its alternation. All classes share it.
#[derive(Clone, Copy, Debug)]
struct Batch {
    dir: Dir,
    /// Requests of this batch so far.
    count: u32,
    /// Batches of reads since the last of writes, while writes waited.
    starved: u32,
}

/// What to dispatch, and where that leaves the batch. Nothing has changed yet.
#[derive(Clone, Copy, Debug)]
struct Choice {
    slot: u32,
    class: Class,
    /// As part of a batch; nothing for one from the head.
    batch: Option<Batch>,
}

/// The `mq-deadline` scheduler.
#[derive(Debug)]
pub struct Deadline {
    params: DeadlineParams,
    store: Store,
    sorted: Sorted,
    ends: Ends,
    classes: [PerClass; 3],
    batch: Batch,
    /// The slot that was inserted into or merged into last: the most likely to be continued.
    last_merge: u32,
}

impl Deadline {
    /// With room for `capacity` requests.
    pub fn new(params: DeadlineParams, capacity: usize) -> Self {
        Deadline {
            params,
            store: Store::new(capacity),
            sorted: Sorted::new(capacity),
            ends: Ends::new(capacity),
            classes: Default::default(),
            batch: Batch {
                dir: Dir::Read,
                // Over, whatever `fifo_batch` is: the first request begins one.
                count: u32::MAX,
                starved: 0,
            },
            last_merge: NONE,
        }
    }

    pub(super) fn reserve(&mut self, capacity: usize) {
        self.store.reserve(capacity);
        self.sorted.reserve(self.store.capacity());
        self.ends.reserve(self.store.capacity());
    }

    pub(super) fn params(&self) -> &DeadlineParams {
        &self.params
    }

    pub(super) fn set_params(&mut self, params: DeadlineParams) {
        self.params = params;
    }

    pub(super) fn len(&self) -> usize {
        self.store.len()
    }

    /// Requests of a class that are queued or with the engine.
    pub fn unfinished(&self, class: Class) -> usize {
        self.classes[class as usize].unfinished
    }

    fn queues(&self, class: Class, dir: Dir) -> &Queues {
        &self.classes[class as usize].queues[dir as usize]
    }

    pub(super) fn insert(&mut self, queued: Queued, at_head: bool) {
        let request = queued.request;
        assert!(request.op != Op::Flush, "flushes are not scheduled");
        let (class, dir) = (Class::of(request.ioprio), Dir::of(request.op));
        self.classes[class as usize].unfinished += 1;
        if at_head {
            self.push_head(queued);
            return;
        }
        let expire_ns = match dir {
            Dir::Read => self.params.read_expire_ns(),
            Dir::Write => self.params.write_expire_ns(),
        };
        let slot = self
            .store
            .insert(queued, queued.queued_ns + expire_ns, false);
        let queues = &mut self.classes[class as usize].queues[dir as usize];
        queues.fifo.push_back(&mut self.store, slot);
        self.sorted
            .insert(&mut queues.sorted, slot, request.sector.0);
        self.ends.insert(slot, queued.id.hctx, request.end().0);
        self.last_merge = slot;
    }

    fn push_head(&mut self, queued: Queued) {
        let class = &mut self.classes[Class::of(queued.request.ioprio) as usize];
        let slot = self.store.insert(queued, queued.queued_ns, true);
        class.head.push_front(&mut self.store, slot);
    }

    pub(super) fn requeued(&mut self, queued: Queued) {
        let class = Class::of(queued.request.ioprio);
        assert!(
            self.unfinished(class) > 0,
            "requeued without being dispatched"
        );
        self.push_head(queued);
    }

    pub(super) fn completed(&mut self, request: &Request) {
        let class = Class::of(request.ioprio);
        let unfinished = &mut self.classes[class as usize].unfinished;
        assert!(*unfinished > 0, "completed without being dispatched");
        *unfinished -= 1;
    }

    pub(super) fn is_async(&self, request: &Request) -> bool {
        request.op != Op::Read
    }

    pub(super) fn async_limit(&self, depth: u32) -> u32 {
        let limit = self.params.async_depth.map_or(depth, u32::from);
        limit.min(depth).max(1)
    }

    /// What a class would dispatch. With an age in nanoseconds, only what came at least that long
    /// ago.
    #[inline]
    fn choose(&self, class: Class, now_ns: u64, age_ns: Option<u64>) -> Option<Choice> {
        let queues = &self.classes[class as usize];
        let (slot, batch) = match queues.head.front() {
            Some(slot) => (slot, None),
            None => {
                let (slot, batch) = self.choose_sorted(class, now_ns)?;
                (slot, Some(batch))
            }
        };
        if let Some(age_ns) = age_ns
            && now_ns.saturating_sub(self.store.get(slot).queued.queued_ns) < age_ns
        {
            return None;
        }
        Some(Choice { slot, class, batch })
    }

    fn choose_sorted(&self, class: Class, now_ns: u64) -> Option<(u32, Batch)> {
        let mut batch = self.batch;
        if batch.count < self.params.fifo_batch
            && let Some(slot) = self.ahead(class, batch.dir)
        {
            batch.count += 1;
            return Some((slot, batch));
        }
        let waits = |dir| !self.queues(class, dir).fifo.is_empty();
        batch.dir = match (waits(Dir::Read), waits(Dir::Write)) {
            (false, false) => return None,
            (true, false) => Dir::Read,
            (false, true) => Dir::Write,
            (true, true) if batch.starved >= self.params.writes_starved => Dir::Write,
            (true, true) => {
                batch.starved += 1;
                Dir::Read
            }
        };
        if batch.dir == Dir::Write {
            batch.starved = 0;
        }
        batch.count = 1;
        let oldest = self.queues(class, batch.dir).fifo.front()?;
        let expired = self.store.get(oldest).deadline_ns <= now_ns;
        let slot = match self.ahead(class, batch.dir) {
            Some(ahead) if !expired => ahead,
            _ => oldest,
        };
        Some((slot, batch))
    }

    /// The first request at or after the place where the last one of its class and direction began.
    #[inline]
    fn ahead(&self, class: Class, dir: Dir) -> Option<u32> {
        let queues = self.queues(class, dir);
        self.sorted.at_or_after(queues.sorted, queues.last.0)
    }

    /// What is dispatched next, with nothing changed yet.
    fn next(&self, now_ns: u64) -> Option<Choice> {
        if self.may_age() {
            let age_ns = self.params.prio_aging_expire_ns();
            for class in [Class::Be, Class::Idle] {
                let choice = self.choose(class, now_ns, Some(age_ns));
                if choice.is_some() {
                    return choice;
                }
            }
        }
        // The lower classes wait until the higher are done, also with what is in the engine.
        let class = Class::ALL.into_iter().find(|c| self.unfinished(*c) > 0)?;
        self.choose(class, now_ns, None)
    }

    /// Ageing is only asked about when there are classes to wait for each other.
    fn may_age(&self) -> bool {
        self.classes.iter().filter(|c| c.unfinished > 0).count() > 1
    }

    fn take(&mut self, choice: Choice) -> Queued {
        let slot = choice.slot;
        let class = &mut self.classes[choice.class as usize];
        match choice.batch {
            None => class.head.remove(&mut self.store, slot),
            Some(batch) => {
                let queues = &mut class.queues[batch.dir as usize];
                queues.last = self.store.get(slot).queued.request.sector;
                queues.fifo.remove(&mut self.store, slot);
                self.sorted.remove(&mut queues.sorted, slot);
                self.ends.remove(slot);
                self.batch = batch;
            }
        }
        if self.last_merge == slot {
            self.last_merge = NONE;
        }
        self.store.remove(slot)
    }

    #[inline]
    pub(super) fn dispatch(&mut self, now_ns: u64) -> Option<RequestId> {
        if self.store.len() == 0 {
            return None;
        }
        let choice = self.next(now_ns)?;
        Some(self.take(choice).id)
    }

    pub(super) fn has_work(&self, now_ns: u64) -> bool {
        self.store.len() > 0 && self.next(now_ns).is_some()
    }

    /// Only age makes anything dispatchable by itself: of a lower class, what would be chosen. An
    /// expired deadline may change what that is.
    pub(super) fn next_deadline_ns(&self, now_ns: u64) -> Option<u64> {
        if self.store.len() == 0 || !self.may_age() {
            return None;
        }
        let age_ns = self.params.prio_aging_expire_ns();
        let aged = |slot: u32| self.store.get(slot).queued.queued_ns + age_ns;
        let mut earliest = None;
        let mut consider = |at: u64| {
            if at > now_ns && earliest.is_none_or(|e| at < e) {
                earliest = Some(at);
            }
        };
        for class in [Class::Be, Class::Idle] {
            if let Some(slot) = self.classes[class as usize].head.front() {
                consider(aged(slot));
                continue;
            }
            for dir in Dir::BOTH {
                if let Some(slot) = self.queues(class, dir).fifo.front() {
                    consider(aged(slot));
                    consider(self.store.get(slot).deadline_ns);
                }
                if let Some(slot) = self.ahead(class, dir) {
                    consider(aged(slot));
                }
            }
        }
        earliest
    }

    pub(super) fn drain(&mut self, now_ns: u64, mut each: impl FnMut(RequestId)) {
        for class in Class::ALL {
            while let Some(choice) = self.choose(class, now_ns, None) {
                let queued = self.take(choice);
                self.classes[class as usize].unfinished -= 1;
                each(queued.id);
            }
        }
    }

    pub(super) fn take_hctx(&mut self, hctx: HctxId, mut each: impl FnMut(RequestId)) {
        self.last_merge = NONE;
        for class in &mut self.classes {
            let unfinished = &mut class.unfinished;
            let of_hctx = |node: &super::store::Node| node.queued.id.hctx == hctx;
            class.head.take(&mut self.store, of_hctx, |store, slot| {
                *unfinished -= 1;
                each(store.remove(slot).id);
            });
            for queues in &mut class.queues {
                let root = &mut queues.sorted;
                queues.fifo.take(&mut self.store, of_hctx, |store, slot| {
                    self.sorted.remove(root, slot);
                    self.ends.remove(slot);
                    *unfinished -= 1;
                    each(store.remove(slot).id);
                });
            }
        }
    }
}

#[cfg(test)]
mod tests;
