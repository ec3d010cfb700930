//! From the rings into blk-mq.

use std::mem;
use std::sync::atomic::Ordering;

use crate::engine::Event;
use crate::mq::ids::{HctxId, RequestTag};
use crate::mq::request::Status;
use crate::sys::sigbus;
use crate::virtio::parse::{Parsed, parse};
use crate::virtio::ring::{AHEAD, RingError};

use super::driver::EngineDriver;
use super::{Worker, finish, open_disk, open_port, touch};

/// How many chains are taken at a time from a ring whose requests the engine answers at once: few
/// enough that the guest soon has something to do, enough that publishing costs little.
const SLICE: u16 = 8;

/// The same in bytes: no more than one large request.
const SLICE_BYTES: u64 = 128 * 1024;

/// How many chains ahead of the one at work the lines of each step are asked for. A step needs the line of the
/// one before it, which takes as long to come from a CPU that is far away as four chains take to be served.
const FETCH_DESCRIPTOR: u16 = 12;
const FETCH_TABLE: u16 = 8;
const FETCH_HEADER: u16 = 4;
const _: () = assert!((FETCH_DESCRIPTOR as usize) < AHEAD);

/// How many rings ahead of the one that is looked at the lines of their indices are asked for.
const FETCH_RING: usize = 8;

/// How much is taken of all disks together in a turn, as chains and the descriptors of those that are long or
/// odd: some hundreds of microseconds of the worker's time at most.
const TURN_WORK: u32 = 4096;

/// How much is taken of each disk, however many there are.
const DISK_WORK: u32 = 128;

/// How much was taken of a disk in a turn.
#[derive(Debug, Default)]
pub(super) struct Taken {
    turn: u32,
    work: u32,
}

/// What a turn takes. Each disk that has something has the same share, so that one with many rings gets no
/// more than one with few; the rings of a disk that has used its share up are served in turn, from one turn
/// of the worker to the next.
#[derive(Debug, Default)]
pub(super) struct Intake {
    turn: u32,
    /// The share of a disk.
    share: u32,
    /// Some disk has used it up.
    used_up: bool,
    /// Rings that go behind the others; empty between turns.
    behind: Vec<HctxId>,
}

impl Intake {
    /// Makes room for so many rings.
    pub fn reserve(&mut self, rings: usize) {
        self.behind.reserve(rings);
    }
}

/// How a slice of a drain ended.
enum Slice {
    /// All that it was to take, or all there was.
    Whole,
    /// The next chain has more segments than there is room for now.
    NoRoom,
    /// All that its disk may have in a turn.
    Enough,
}

impl Worker {
    /// Takes what is available on every hot ring. One drain is one plug.
    pub(super) fn drain(&mut self) -> bool {
        let mut busy = mem::take(&mut self.busy);
        let mut disks = 0;
        self.intake.turn = self.intake.turn.wrapping_add(1);
        for at in 0..self.hot.len() {
            if let Some(later) = self.hot.get(at + FETCH_RING) {
                open_port(&mut self.ports, *later).ring.fetch_available();
            }
            let hctx = self.hot[at];
            let port = open_port(&mut self.ports, hctx);
            if port.no_room || !port.is_open() && !port.must_resume() {
                continue;
            }
            if self.indebted {
                let (disk, ends) = (port.id.disk, port.gates.is_draining());
                if !ends && self.owes(disk) {
                    continue;
                }
            }
            let port = open_port(&mut self.ports, hctx);
            match port.ring.available() {
                Ok(0) => {}
                Ok(_) => {
                    busy.push(hctx);
                    let taken = &mut open_disk(&mut self.disks, port.id.disk).taken;
                    if taken.turn != self.intake.turn {
                        (taken.turn, taken.work) = (self.intake.turn, 0);
                        disks += 1;
                    }
                    (0..FETCH_DESCRIPTOR).for_each(|after| port.ring.fetch_descriptor(after));
                }
                Err(error) => self.break_ring(hctx, &error),
            }
        }
        // While the lines of one ring come, the others' are asked for.
        for hctx in &busy {
            let ring = &mut open_port(&mut self.ports, *hctx).ring;
            (0..FETCH_TABLE).for_each(|after| ring.fetch_table(after));
        }
        for hctx in &busy {
            let ring = &mut open_port(&mut self.ports, *hctx).ring;
            (0..FETCH_HEADER).for_each(|after| ring.fetch_header(after));
        }
        let found = !busy.is_empty();
        self.intake.share = (TURN_WORK / disks.max(1)).max(DISK_WORK);
        // A slice of each in turn: large requests that the engine serves at once keep nobody waiting
        // for longer than one of them takes.
        while !busy.is_empty() {
            busy.retain(|hctx| match self.drain_ring(*hctx) {
                Ok(more) => more,
                Err(error) => {
                    self.break_ring(*hctx, &error);
                    false
                }
            });
        }
        self.busy = busy;
        if mem::take(&mut self.intake.used_up) {
            self.line_up();
        }
        found
    }

    /// Rings of which something was taken go behind those that had nothing of this turn.
    #[cold]
    fn line_up(&mut self) {
        let Worker {
            hot, ports, intake, ..
        } = self;
        hot.retain(|hctx| {
            let served = open_port(ports, *hctx).turn == intake.turn;
            if served {
                intake.behind.push(*hctx);
            }
            !served
        });
        hot.append(&mut intake.behind);
    }

    /// Takes a slice of the chains of a ring that were seen; true if there are more.
    fn drain_ring(&mut self, hctx: HctxId) -> Result<bool, RingError> {
        open_port(&mut self.ports, hctx).ring.suppress_kicks();
        let taken = self.take_slice(hctx);
        let answered = self.finish_inline();
        let port = open_port(&mut self.ports, hctx);
        // What is staged says nothing of the engine.
        port.inline = answered || port.inline && self.mq.staged(hctx) > 0;
        match taken? {
            Slice::Whole if !port.ring.has_more() => Ok(false),
            // More would be staged behind it. The rest comes when that is with the engine.
            Slice::Whole if !answered => Ok(false),
            Slice::Whole => {
                // The guest can look at these while the next are at work.
                port.ring.publish();
                Ok(true)
            }
            // The rest comes in the next turn, after what others have brought meanwhile.
            Slice::Enough => Ok(false),
            Slice::NoRoom if answered => Ok(true),
            Slice::NoRoom => {
                port.no_room = true;
                self.starving = true;
                Ok(false)
            }
        }
    }

    /// Takes the next chains of those that were seen. One slice is one plug.
    fn take_slice(&mut self, hctx: HctxId) -> Result<Slice, RingError> {
        let port = open_port(&mut self.ports, hctx);
        let disk = open_disk(&mut self.disks, port.id.disk);
        // A guest that turns write-through on waits for the answer, so what it sends after that is
        // drained after this load.
        let write_through = disk.write_through.load(Ordering::Relaxed);
        let mut driver = EngineDriver {
            engine: &mut self.engine,
            slots: &self.slots,
            polled: &self.polled,
        };
        let pool = disk.pool.as_mut().expect("made with the first ring");
        let (slice, mut bytes_left) = match port.inline {
            true => (self.mq.room(hctx).clamp(1, SLICE), SLICE_BYTES),
            false => (u16::MAX, u64::MAX),
        };
        let mut left = slice;
        let allowed = self.intake.share.saturating_sub(disk.taken.work);
        if allowed == 0 {
            self.intake.used_up = true;
            return Ok(Slice::Enough);
        }
        port.ring.start_walk();
        let outcome = loop {
            if left == 0 || bytes_left == 0 {
                break Ok(Slice::Whole);
            }
            if port.ring.walked() + u32::from(slice - left) >= allowed {
                self.intake.used_up = true;
                break Ok(Slice::Enough);
            }
            left -= 1;
            port.turn = self.intake.turn;
            port.ring.fetch_descriptor(FETCH_DESCRIPTOR);
            port.ring.fetch_table(FETCH_TABLE);
            port.ring.fetch_header(FETCH_HEADER);
            let head = match port.ring.pop_head() {
                Ok(Some(head)) => head,
                Ok(None) => break Ok(Slice::Whole),
                Err(error) => break Err(error),
            };
            match parse(&mut port.ring, head, &disk.shape, write_through, pool) {
                // What was parsed while memory was lost may be zeros, and no request of the guest's.
                Ok(Parsed::Request(_, io))
                    if sigbus::losses() != self.losses && port.ring.is_memory_lost() =>
                {
                    port.ring.finish(io, Status::IoErr, 0, pool);
                    touch(&mut self.touched, port, hctx);
                    break Err(RingError::MemoryLost);
                }
                Ok(Parsed::Request(request, io)) => {
                    let tag = RequestTag(io.head());
                    bytes_left = bytes_left.saturating_sub(request.bytes);
                    self.mq.plug(hctx, tag, request, io, &mut driver);
                }
                Ok(Parsed::Done(used)) => {
                    port.ring.put_used(used);
                    port.stats.answered += 1;
                    if let Some(odd) = pool.take_odd() {
                        log::warn!(disk = port.id.disk.0; "{}: {odd}; this is said once", port.id);
                    }
                    touch(&mut self.touched, port, hctx);
                }
                Ok(Parsed::NoRoom(head)) => {
                    port.ring.unpop(head);
                    break Ok(Slice::NoRoom);
                }
                Err(error) => break Err(error),
            }
        };
        disk.taken.work += port.ring.walked() + u32::from(slice - left);
        self.mq.unplug(hctx, &mut driver);
        outcome
    }

    /// What the engine did without the kernel goes back at once, in the turn that brought it; true
    /// if there was any.
    fn finish_inline(&mut self) -> bool {
        if !self.engine.has_inline() {
            return false;
        }
        let Worker {
            engine,
            mq,
            ports,
            disks,
            touched,
            now_ns,
            ..
        } = self;
        engine.reap_inline(&mut |event| {
            if let Event::Done { tag, result } = event {
                finish(mq, ports, disks, touched, *now_ns, tag, result);
            }
        });
        self.room |= self.starving;
        true
    }

    /// The guest broke the rules in a way that leaves nothing to answer: the ring stops, its
    /// requests in flight end, other rings go on.
    #[cold]
    pub(super) fn break_ring(&mut self, hctx: HctxId, error: &RingError) {
        let port = open_port(&mut self.ports, hctx);
        if port.ring.is_memory_lost() {
            // Where its memory was there are zeros now, and whatever seems wrong comes of that.
            // It is the session that ends, and says so.
            log::debug!(disk = port.id.disk.0; "{}: stopped: {}", port.id, RingError::MemoryLost);
            port.memory_lost.signal();
        } else {
            log::warn!(disk = port.id.disk.0; "{}: stopped: {error}", port.id);
        }
        port.gates.broken = true;
        if let Some(err) = port.err {
            self.engine.call(err);
        }
    }
}
