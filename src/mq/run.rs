//! Which hctx is asked when: after a completion, at a time, or at once.

use std::cmp::Reverse;

use super::elevator::{Elevator, Queued};
use super::hctx::{Driver, Issue, Want, want_after};
use super::ids::{DiskId, HctxId};
use super::limits::RESOURCE_DELAY_NS;
use super::stats::batch::SentRun;
use super::{Mq, Place};

impl<P> Mq<P> {
    /// Runs every hctx that has work and a reason to believe that it can be done, in the order in
    /// which they came to wait.
    pub fn run(&mut self, driver: &mut impl Driver<P>) {
        if self.completed_since_run {
            self.completed_since_run = false;
            // Those that waited longest are asked first. One that still gets nothing (it is at its
            // share) goes to the end, and the next is asked: a wake-up is never swallowed.
            for _ in 0..self.waiting.len() {
                if self.tags.is_exhausted() {
                    // Who waits is woken by the next completion.
                    break;
                }
                let Some(id) = self.waiting.pop_front() else {
                    break;
                };
                if self.gets_no_tag(id) {
                    self.passed_over.push_back(id);
                    continue;
                }
                self.member(id).place = Place::Nowhere;
                self.dispatch(id, driver);
            }
            // Who was not asked has waited longer than who was.
            while let Some(id) = self.passed_over.pop_back() {
                self.waiting.push_front(id);
            }
        }
        for _ in 0..self.runnable.len() {
            let Some(id) = self.runnable.pop_front() else {
                break;
            };
            self.member(id).place = Place::Nowhere;
            self.dispatch(id, driver);
        }
    }

    /// Whether an hctx need not be asked, because its disk holds all the tags that it may. A disk whose
    /// requests do not come back can have many of those.
    fn gets_no_tag(&mut self, id: HctxId) -> bool {
        let hctx = self.hctx(id);
        let (disk, held, flushes) = (hctx.config.disk, hctx.held, hctx.flush_is_first());
        let queue = self.queues[disk.index()].as_ref();
        let queue = queue.expect("made with its first hctx");
        // What an elevator gives out may be of another hctx.
        let held = if queue.elevator.is_some() { 0 } else { held };
        !flushes && !self.tags.may_get(&queue.share, held)
    }

    /// Whether [`Self::run`] has something to do now.
    #[inline]
    pub fn must_run(&self) -> bool {
        !self.runnable.is_empty() || (self.completed_since_run && !self.waiting.is_empty())
    }

    fn dispatch(&mut self, id: HctxId, driver: &mut impl Driver<P>) {
        let in_use = self.tags.in_use();
        let (hctx, mut below) = self.split(id, driver);
        let quiesced = hctx.quiesced;
        let mut want = hctx.dispatch(&mut below);
        if want == Want::Nothing && !quiesced && below.queue.elevator_waits() {
            let disk = below.queue.disk;
            want = self.dispatch_elevator(disk, driver);
        }
        if want == Want::Nothing || self.tags.in_use() > in_use {
            // It got something: of those that wait for one time, others have waited longer.
            self.member(id).ticket = None;
        }
        self.place(id, want);
    }

    /// Issues what the disk's elevator gives out, whichever of its hctxs it belongs to
    /// (blk_mq_do_dispatch_sched).
    fn dispatch_elevator(&mut self, disk: DiskId, driver: &mut impl Driver<P>) -> Want {
        loop {
            let now_ns = self.now_ns;
            let queue = self.queues[disk.index()].as_mut();
            let queue = queue.expect("it has an elevator");
            let elevator = queue.elevator.as_mut().expect("it has requests");
            if elevator.is_empty() {
                return Want::Nothing;
            }
            if !self.tags.may_get(&queue.share, 0) {
                return Want::Completion;
            }
            let Some(next) = elevator.dispatch(now_ns) else {
                // It holds something back until a completion, or until a time.
                return elevator
                    .next_deadline_ns(now_ns)
                    .map_or(Want::Completion, Want::At);
            };
            let (hctx, mut below) = self.split(next.hctx, driver);
            let entry = hctx.table.get_mut(next.tag);
            entry.dispatch_ns.get_or_insert(now_ns);
            if hctx.quiesced {
                // Another hctx of the disk may go on; this request is the first when its own does.
                hctx.leftovers.push_back(&mut hctx.table, next.tag);
                continue;
            }
            let queued = Queued {
                id: next,
                request: entry.request,
                queued_ns: entry.queued_ns,
            };
            let want = match hctx.issue_staged(next.tag, &mut below) {
                Issue::Sent(ctx) => {
                    hctx.add_sent(SentRun::one(ctx));
                    continue;
                }
                Issue::Joined => continue,
                Issue::NoTag => Want::Completion,
                Issue::Throttled(until) => Want::At(until),
                Issue::Busy(busy) => want_after(busy, &below),
            };
            let elevator = below.queue.elevator.as_mut().expect("it gave the request");
            elevator.requeued(queued);
            return want;
        }
    }

    pub(super) fn elevator_of(&mut self, disk: DiskId) -> Option<&mut Elevator> {
        self.queues
            .get_mut(disk.index())?
            .as_mut()?
            .elevator
            .as_mut()
    }

    #[inline]
    pub(super) fn place(&mut self, id: HctxId, want: Want) {
        if want != Want::Nothing {
            self.put(id, want);
        }
    }

    fn put(&mut self, id: HctxId, want: Want) {
        // A disk with tags of its own waits for completions of its own: another's may never come. Without
        // anything in flight none will come to wake it.
        let want = match want {
            Want::Completion if !self.is_woken(id) => Want::At(self.now_ns + RESOURCE_DELAY_NS),
            other => other,
        };
        let delays = self.delays;
        let member = self.member(id);
        match (want, member.place) {
            // Something has happened, and who waits for a time is to know at once.
            (Want::Run, Place::Delayed) => {
                self.delayed.retain(|Reverse((.., other))| *other != id);
            }
            (_, Place::Nowhere) => {}
            _ => return,
        }
        let member = self.member(id);
        match want {
            Want::Nothing => unreachable!("place() keeps those to itself"),
            Want::Run => {
                member.place = Place::Runnable;
                self.runnable.push_back(id);
            }
            Want::Completion => {
                member.place = Place::Waiting;
                self.waiting.push_back(id);
            }
            Want::At(at) => {
                member.place = Place::Delayed;
                let ticket = *member.ticket.get_or_insert(delays);
                self.delayed.push(Reverse((at, ticket, id)));
                self.delays += 1;
            }
        }
    }

    /// Whether a completion will come for who waits for one.
    fn is_woken(&mut self, id: HctxId) -> bool {
        let disk = self.hctx(id).config.disk;
        let share = &self.queue_of(disk).share;
        share.in_use() > 0 || !share.has_part() && self.tags.in_use() > 0
    }

    /// Runs the other hctxs of the disk that have requests waiting for the elevator to take them.
    pub(super) fn wake_staged(&mut self, of: HctxId) {
        let disk = self.hctx(of).config.disk;
        let members = self.queue_of(disk).members.len();
        for at in 0..members {
            let id = self.queue_of(disk).members[at];
            if id != of && self.hctx(id).ctxs.any() {
                self.place(id, Want::Run);
            }
        }
    }
}
