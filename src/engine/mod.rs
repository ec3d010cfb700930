//! The only place that knows the disk and io_uring.
//!
//! A worker owns one [`Engine`], and everything that can happen to the worker arrives through it:
//! completions of disk I/O, kicks (eventfds armed in the ring and never read), messages from other
//! threads ([`Waker`]), and the end of a wait. Nothing else in a worker sleeps or makes a system
//! call on the data path. The words are blk-mq's: [`Engine::queue_rq`] prepares,
//! [`Engine::commit_rqs`] submits what was prepared with one system call (a long batch in a few, so that
//! the device need not wait for its end), and a refusal says who acts next ([`Busy`]).
//!
//! ```text
//!  queue_rq ──▶ Slot (one for each driver tag) ──▶ SQE ─┐
//!                 ▲                                      ├── commit_rqs / wait: one io_uring_enter
//!  call, watch ───┼──────────────────────────────▶ SQE ─┘
//!                 │ not whole yet: continue, retry, next extent, sync
//!  reap ◀── Event ┴── CQE
//! ```
//!
//! Guest memory enters as host buffers (`iovec`) whose owner is the caller; the engine knows
//! nothing of rings, guests or front ends.

mod command;
mod copy_queue;
mod ending;
mod eventfds;
mod iopoll;
mod lane;
mod lost;
pub mod mapping;
mod memory;
mod prefetch;
mod resize;
#[cfg(test)]
mod sim;
mod slot;
mod start;
mod submit;
mod sync_fault;
mod target;
#[cfg(test)]
mod tests;
mod uring;
mod waiting;
mod watch;

use std::collections::VecDeque;
use std::io;
use std::mem::MaybeUninit;
use std::sync::Arc;
use std::time::Duration;

use io_uring::cqueue;

use self::copy_queue::Small;
use self::iopoll::Polled;
use self::lost::fields;
use self::memory::Memory;
use self::slot::{Next, Slot, Stage};
use self::start::start;
use self::submit::Batch;
use self::target::Disk;
use self::uring::{Ask, REAP_BATCH, Ring};
use self::waiting::{Threads, Turn};
use self::watch::{Call, Table, Watch};
use crate::mq::ids::DriverTag;

pub use self::command::{
    BOUNCE_BYTES, BOUNCE_OF_DISK, BOUNCE_SHARED, Busy, CACHED_PIECE_BYTES, COPY_SLICE_BYTES,
    COPY_SMALL_BYTES, COPY_TURN_BYTES, Command, DIRECT_PER_CACHED, DIRECT_PIECE_BYTES, DiskSlot,
    EngineCounters, Errno, Event, Extent, MAX_DISKS, Payload, RETRIES, TURN_BYTES, ZERO_BYTES,
};
pub use self::sync_fault::SyncFault;
pub use self::target::{FileTarget, IoPoll, Target};
pub use self::watch::{CallSlot, Waker};

/// What a completion is for: the upper byte of user data. Below it 32 bits of generation and 16 of index.
const KIND_SLOT: u64 = 1 << 56;
const KIND_WATCH: u64 = 2 << 56;
const KIND_CALL: u64 = 3 << 56;
const KIND_CANCEL: u64 = 4 << 56;
/// Nothing, for the kernel threads to do.
const KIND_NUDGE: u64 = 5 << 56;
const KIND_MASK: u64 = 0xff << 56;

fn user_data(kind: u64, generation: u32, index: u16) -> u64 {
    kind | u64::from(generation) << 16 | u64::from(index)
}

/// One worker's host adapter: all its I/O, and all it waits for. Belongs to the thread that made it.
///
/// Allocates when it is made and when disks, watches and calls are added, not in between.
#[derive(Debug)]
pub struct Engine {
    ring: Ring,
    polled: Option<Polled>,
    slots: Box<[Slot]>,
    memory: Memory,
    disks: Table<Disk>,
    watches: Table<Watch>,
    calls: Table<Call>,
    /// Commands completed without the kernel, to be reaped.
    ready: Vec<(DriverTag, Result<u64, Errno>)>,
    /// Small copies to be done.
    small: VecDeque<Small>,
    /// Slots of larger ones that are not done, in the order in which they have their turns.
    copying: VecDeque<u16>,
    /// Slots of large transfers that wait for a turn.
    large: VecDeque<u16>,
    turn: Turn,
    threads: Threads,
    now_ns: u64,
    /// Slots whose next step the ring had no room for.
    unsent: Vec<u16>,
    /// Calls and watches the ring had no room for.
    unsent_fds: bool,
    in_flight: usize,
    batch: Batch,
    generation: u32,
    counters: EngineCounters,
}

impl Engine {
    /// An engine with `depth` driver tags, which can watch `watches` fds and write to as many.
    ///
    /// The ring is for the calling thread. Fails with one line for the user when the kernel has no
    /// io_uring for us.
    pub fn new(depth: u16, watches: u16) -> io::Result<Self> {
        Engine::asking(depth, watches, Ask::ALL)
    }

    /// The same, whose ring may do all that a ring can do.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn unrestricted(depth: u16, watches: u16) -> io::Result<Self> {
        let ask = Ask {
            restricted: false,
            ..Ask::ALL
        };
        Engine::asking(depth, watches, ask)
    }

    fn asking(depth: u16, watches: u16, ask: Ask) -> io::Result<Self> {
        assert!(depth > 0, "an engine without driver tags serves nobody");
        let (slots, fds) = (u32::from(depth), u32::from(watches) + 1);
        // An SQE for each slot and a good part of the fds: more are submitted in between. A CQE for
        // each slot, each call and each cancel, and for each watch as many as come from kicks
        // between two turns, since one completion stands for all writes between two task runs. Should
        // it not do, the kernel keeps the rest and ends the polls, and we arm them again.
        let sqes = (slots + fds.min(slots) + 64).next_power_of_two().min(32768);
        let cqes = (sqes + 6 * fds).next_power_of_two().min(65536);
        let disks = u32::from(MAX_DISKS);
        let files = [disks + u32::from(watches), disks];
        let ring = Ring::new(sqes, cqes, &files, ask)?;
        let memory = Memory::new(depth)?;
        Ok(Engine {
            ring,
            polled: None,
            slots: (0..depth)
                .map(|slot| Slot::new(memory.segments(slot)))
                .collect(),
            memory,
            disks: Table::new(MAX_DISKS),
            watches: Table::new(watches.saturating_add(1)),
            calls: Table::new(watches),
            ready: Vec::with_capacity(usize::from(depth)),
            small: VecDeque::with_capacity(usize::from(depth)),
            copying: VecDeque::with_capacity(usize::from(depth)),
            large: VecDeque::with_capacity(usize::from(depth)),
            turn: Turn::NEW,
            threads: Threads::default(),
            now_ns: 0,
            unsent: Vec::with_capacity(usize::from(depth)),
            unsent_fds: false,
            in_flight: 0,
            batch: Batch::NEW,
            generation: 0,
            counters: EngineCounters::default(),
        })
    }

    /// What kind of ring the kernel gave, for the log.
    pub fn describe(&self) -> String {
        self.ring.describe()
    }

    /// Counts since the engine was made.
    pub fn counters(&self) -> EngineCounters {
        self.counters
    }

    /// Commands taken and not yet reported done.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Adds a disk.
    pub fn add_disk(&mut self, target: Target) -> io::Result<DiskSlot> {
        let index = self.disks.vacant()?;
        let mut disk = Disk::new(index, target)?;
        self.memory.add_disk(index)?;
        disk.registered = disk.fd >= 0 && self.ring.register_file(index, disk.fd);
        self.begin_polling(&mut disk);
        self.disks.put(index, disk);
        Ok(DiskSlot(index))
    }

    /// Shares what is known of a disk's syncs with the others who serve the same image.
    pub fn share_sync_fault(&mut self, slot: DiskSlot, fault: Arc<SyncFault>) {
        let disk = self.disks.get_mut(slot.0).expect("a disk of this engine");
        disk.sync_fault = fault;
    }

    /// Removes a disk, on which nothing may be in flight, and gives back what it stood on.
    pub fn remove_disk(&mut self, slot: DiskSlot) -> Target {
        let disk = self.disks.take(slot.0).expect("a disk of this engine");
        assert_eq!(
            disk.in_flight, 0,
            "a disk is removed while requests of it are in flight"
        );
        self.memory.remove_disk(slot.0);
        if disk.registered {
            self.ring.unregister_file(slot.0);
            self.end_polling(slot.0);
        }
        disk.target
    }

    /// Takes a command; it is submitted by the next [`Engine::commit_rqs`] or [`Engine::wait`] at the
    /// latest.
    ///
    /// The tag must be free: not used, or its [`Event::Done`] reaped. A command outside the disk ends
    /// with `EIO`.
    ///
    /// # Safety
    ///
    /// Until the tag's [`Event::Done`], the buffers must be valid to be read (write) or written
    /// (read), and so must be the array of a [`crate::engine::Payload::Buffers`], which must not change.
    pub unsafe fn queue_rq(
        &mut self,
        disk: DiskSlot,
        tag: DriverTag,
        command: Command<'_>,
    ) -> Result<(), Busy> {
        let target = self.disks.get_mut(disk.0).expect("a disk of this engine");
        let slot = &mut self.slots[usize::from(tag.index)];
        slot.claim(tag.generation, disk.0, command.op, command.bytes);

        // SAFETY: passed on to our caller. Unsafe because the buffers are the caller's.
        let started = unsafe {
            start(
                slot,
                tag.index,
                target,
                command,
                &mut self.memory,
                &mut self.counters,
            )
        };
        match started {
            Err(busy) => {
                self.counters.busy += 1;
                return Err(busy);
            }
            Ok(Next::Done(result)) => {
                slot.stage = Stage::Inline;
                // Counted here and not below, where the disk has to be looked up once more.
                target.in_flight += 1;
                self.counters.inline += 1;
                self.in_flight += 1;
                self.ready.push((tag, result));
                return Ok(());
            }
            Ok(Next::Copy) => self.begin_copy(tag.index),
            Ok(Next::Issue) => {
                if !self.send(tag.index) {
                    self.release(tag.index);
                    self.counters.busy += 1;
                    return Err(Busy::RetryLater);
                }
                self.begin_early();
            }
        }
        self.disks
            .get_mut(disk.0)
            .expect("looked up above")
            .in_flight += 1;
        self.in_flight += 1;
        Ok(())
    }

    /// Reports what has happened and returns how many completions were looked at.
    ///
    /// Makes a system call only when the kernel says that it keeps something back for us.
    pub fn reap(&mut self, on: &mut impl FnMut(Event)) -> io::Result<usize> {
        self.ring.run_task_work(&mut self.counters)?;
        self.begin_turn();
        if self.has_copies() {
            self.copy_on();
        }
        let mut reaped = self.ready.len();
        if self.is_polling() {
            reaped += self.reap_polled(on)?;
        }
        self.reap_inline(on);
        let mut batch = [const { MaybeUninit::<cqueue::Entry>::uninit() }; REAP_BATCH];
        loop {
            let entries = self.ring.take(&mut batch);
            reaped += entries.len();
            // After the completions are here: what they read is counted by now.
            let lost = self.ring.losses.are_any();
            for entry in entries {
                let result = self.result(entry, lost);
                self.apply(entry.user_data(), result, entry.flags(), on);
            }
            if entries.len() < REAP_BATCH {
                break;
            }
        }
        self.resend();
        Ok(reaped)
    }

    /// Reports the commands that were completed without the kernel.
    #[inline]
    pub fn reap_inline(&mut self, on: &mut impl FnMut(Event)) {
        for i in 0..self.ready.len() {
            let (tag, result) = self.ready[i];
            self.done(tag.index, result, on);
        }
        self.ready.clear();
    }

    /// Whether [`Self::reap_inline`] has something to report.
    #[inline]
    pub fn has_inline(&self) -> bool {
        !self.ready.is_empty()
    }

    /// Whether [`Self::reap`] has something to report without a system call.
    pub fn has_events(&mut self) -> bool {
        self.has_copies()
            || !self.large.is_empty()
            || self.polls_now()
            || !self.ready.is_empty()
            || self.ring.has_completions()
    }

    /// Submits what is queued and sleeps until there is something to reap, a signal comes, or
    /// `timeout` is over. Returns at once if there is something to reap already. Where the kernel refuses
    /// to be entered it sleeps for a moment, so that a caller that tries again takes no CPU to speak of.
    pub fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.resend();
        self.batch = Batch::NEW;
        let short = !self.unsent.is_empty() || self.unsent_fds;
        if self.has_events() || timeout == Some(Duration::ZERO) {
            return self.submit();
        }
        // The kernel had no room: look again soon.
        let sooner = short.then_some(Duration::from_millis(1));
        let sooner = sooner.or_else(|| self.pause_polling());
        let timeout = [sooner, self.pause_for_threads(), timeout];
        let timeout = timeout.into_iter().flatten().min();
        self.ring.wait(timeout, &mut self.counters)
    }

    /// Gives a completion to whom it belongs.
    #[inline]
    fn apply(&mut self, data: u64, res: i32, flags: u32, on: &mut impl FnMut(Event)) {
        self.counters.cqes += 1;
        let (generation, index) = fields(data);
        match data & KIND_MASK {
            KIND_SLOT => self.apply_to_slot(generation, index, res, on),
            KIND_WATCH => self.apply_to_watch(generation, index, (res, flags), on),
            KIND_CALL => self.apply_to_call(generation, index, res, on),
            KIND_NUDGE => self.nudged(),
            _ => {}
        }
    }
}

impl Drop for Engine {
    /// Waits until nothing is in flight: the buffers are the guest's, and the kernel writes to them
    /// until then. If the ring is broken its memory is leaked rather than freed under the kernel.
    fn drop(&mut self) {
        while self.in_flight > 0 {
            let drained = self.wait(None).and_then(|()| self.reap(&mut |_| {}));
            if let Err(error) = drained {
                log::error!(
                    "the ring broke with {} requests in flight: {error}",
                    self.in_flight
                );
                self.memory.leak();
                return;
            }
        }
    }
}

#[cfg(test)]
impl Engine {
    /// Feeds a completion as if the kernel had sent it.
    fn feed_slot(&mut self, tag: DriverTag, res: i32, on: &mut impl FnMut(Event)) {
        self.apply(
            user_data(KIND_SLOT, u32::from(tag.generation), tag.index),
            res,
            0,
            on,
        );
    }

    /// The same for the watch with this token.
    fn feed_watch(&mut self, token: u32, res: i32, flags: u32, on: &mut impl FnMut(Event)) {
        let index = self
            .watches
            .find(|w| w.whom == watch::Watched::Kick(token))
            .expect("a watch");
        let generation = self.watches.get(index).expect("found").generation;
        self.apply(user_data(KIND_WATCH, generation, index), res, flags, on);
    }

    fn memory_free_bounces(&self) -> usize {
        self.memory.free_bounces()
    }
}
