//! Steps that wait in the engine: for a place among those that their disk may have in kernel threads, or for a
//! turn in which not too much is copied already.

use std::time::Duration;

use io_uring::{opcode, squeue, types};

use super::{Engine, KIND_NUDGE};
use crate::engine::lane::Kind;
use crate::engine::slot::Stage;
use crate::engine::{DIRECT_PER_CACHED, Errno, TURN_BYTES};
use crate::mq::ids::DriverTag;

/// How long a step may be in the hands of kernel threads before they are nudged.
const NUDGE_NS: u64 = 1_000_000_000;

/// What the submitting calls of this turn may still cost.
#[derive(Debug)]
pub(super) struct Turn {
    left: i64,
    /// What is sent now was waited for.
    is_due: bool,
}

impl Turn {
    pub(super) const NEW: Turn = Turn {
        left: TURN_BYTES as i64,
        is_due: false,
    };
}

/// Steps in kernel threads.
#[derive(Debug, Default)]
pub(super) struct Threads {
    busy: u32,
    nudge_ns: u64,
    nudged: bool,
}

impl Engine {
    /// The time, in nanoseconds, for what follows. How long pieces take is measured with it.
    #[inline]
    pub fn set_time(&mut self, now_ns: u64) {
        self.now_ns = now_ns;
    }

    /// Whether a step may go to the kernel threads now; else it waits in its lane.
    pub(super) fn enter_lane(&mut self, index: u16) -> bool {
        let slot = &mut self.slots[usize::from(index)];
        if slot.lane.is_none() && !slot.is_delayed() {
            let kind = slot.kind();
            let disk = self.disks.get_mut(slot.disk);
            let disk = disk.expect("a disk with requests in flight stays");
            if !disk.lane(kind).enter(index) {
                self.counters.waited += 1;
                return false;
            }
            slot.lane = Some(kind);
            if self.threads.busy == 0 {
                self.threads.nudge_ns = self.now_ns.saturating_add(NUDGE_NS);
            }
            self.threads.busy += 1;
        }
        slot.sent_ns = self.now_ns;
        true
    }

    /// A step has come back from there, and was done if it `worked`: the next one of its disk goes.
    #[inline(never)]
    pub(super) fn leave_lane(&mut self, index: u16, worked: bool) {
        let slot = &mut self.slots[usize::from(index)];
        let Some(kind) = slot.lane.take() else {
            return;
        };
        let disk = self.disks.get_mut(slot.disk);
        let disk = disk.expect("a disk with requests in flight stays");
        if let (Kind::Range, Stage::Range(_)) = (kind, slot.stage) {
            let took_ns = self.now_ns.saturating_sub(slot.sent_ns);
            disk.pace.took(slot.step, took_ns);
        }
        if worked && disk.threadless {
            disk.threadless = false;
            log::info!("the kernel can start threads again");
        }
        self.threads.busy -= 1;
        if let Some(next) = disk.lane(kind).leave()
            && !self.send(next)
        {
            self.unsent.push(next);
        }
    }

    /// Whether a large transfer is submitted in this turn; else it waits for the next.
    #[inline(never)]
    pub(super) fn takes_turn(&mut self, index: u16) -> bool {
        let slot = &self.slots[usize::from(index)];
        let disk = self.disks.get(slot.disk);
        let disk = disk.expect("a disk with requests in flight stays");
        let waits = self.turn.left <= 0 || !self.large.is_empty();
        if waits && !self.turn.is_due {
            self.large.push_back(index);
            return false;
        }
        let bytes = slot.left().min(disk.piece_bytes.into());
        let cost = match disk.is_direct() {
            true => bytes / u64::from(DIRECT_PER_CACHED),
            false => bytes,
        };
        self.turn.left -= i64::try_from(cost).expect("a piece");
        true
    }

    /// Begins a turn: large transfers that wait go first, in their order.
    #[inline]
    pub(super) fn begin_turn(&mut self) {
        self.turn = Turn::NEW;
        if !self.large.is_empty() {
            self.send_large();
        }
        if self.threads.busy > 0 && self.now_ns >= self.threads.nudge_ns {
            self.nudge();
        }
    }

    #[inline(never)]
    fn send_large(&mut self) {
        for _ in 0..self.large.len() {
            if self.turn.left <= 0 {
                return;
            }
            let Some(index) = self.large.pop_front() else {
                return;
            };
            self.turn.is_due = true;
            if !self.send(index) {
                self.unsent.push(index);
            }
            self.turn.is_due = false;
        }
    }

    /// io_uring starts a thread for a step when it is handed over, or when another one falls asleep. If the
    /// host had none at that moment and all others sleep for long, nothing would start one later. So now and then
    /// the threads are handed something that does nothing.
    #[cold]
    fn nudge(&mut self) {
        self.threads.nudge_ns = self.now_ns.saturating_add(NUDGE_NS);
        if self.threads.nudged {
            return;
        }
        let nothing = types::CancelBuilder::user_data(0);
        let entry = opcode::AsyncCancel2::new(nothing)
            .build()
            .flags(squeue::Flags::ASYNC)
            .user_data(KIND_NUDGE);
        // SAFETY: a cancel names no memory. Unsafe because other entries do.
        self.threads.nudged = unsafe { self.ring.push(&entry, &mut self.counters) };
    }

    /// The threads did what they were handed.
    #[cold]
    pub(super) fn nudged(&mut self) {
        self.threads.nudged = false;
    }

    /// How long a sleep may last at most.
    #[inline]
    pub(super) fn pause_for_threads(&self) -> Option<Duration> {
        (self.threads.busy > 0).then_some(Duration::from_nanos(NUDGE_NS))
    }

    /// A step that waits here is given up.
    pub(super) fn give_up(&mut self, tag: DriverTag) -> bool {
        let index = tag.index;
        let slot = &mut self.slots[usize::from(index)];
        if slot.generation != tag.generation {
            return false;
        }
        slot.cancelled = true;
        let disk = self.disks.get_mut(slot.disk);
        let disk = disk.expect("a disk with requests in flight stays");
        let mut waited = disk.calls.give_up(index) || disk.ranges.give_up(index);
        if let Some(place) = self.large.iter().position(|other| *other == index) {
            waited |= self.large.remove(place).is_some();
        }
        if waited {
            slot.stage = Stage::Inline;
            self.ready.push((tag, Err(Errno(libc::ECANCELED))));
        }
        waited
    }
}
