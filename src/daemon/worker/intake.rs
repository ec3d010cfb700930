//! From the rings into blk-mq.

use std::sync::atomic::Ordering;

use crate::engine::Event;
use crate::mq::ids::{HctxId, RequestTag};
use crate::virtio::parse::{Parsed, parse};
use crate::virtio::ring::RingError;

use super::driver::EngineDriver;
use super::{Worker, finish, open_disk, open_port, touch};

/// How many chains are taken at a time from a ring whose requests the engine answers at once: few
/// enough that the guest soon has something to do, enough that publishing costs little.
const SLICE: u16 = 8;

/// How a slice of a drain ended.
enum Slice {
    /// All that it was to take, or all there was.
    Whole,
    /// The next chain has more segments than there is room for now.
    NoRoom,
}

impl Worker {
    /// Takes what is available on every hot ring. One drain is one plug.
    pub(super) fn drain(&mut self) -> bool {
        let mut found = false;
        for at in 0..self.hot.len() {
            let hctx = self.hot[at];
            let port = open_port(&mut self.ports, hctx);
            if port.no_room || !port.is_open() && !port.must_resume() {
                continue;
            }
            match self.drain_ring(hctx) {
                Ok(any) => found |= any,
                Err(error) => self.break_ring(hctx, &error),
            }
        }
        found
    }

    fn drain_ring(&mut self, hctx: HctxId) -> Result<bool, RingError> {
        let port = open_port(&mut self.ports, hctx);
        if port.ring.available()? == 0 {
            return Ok(false);
        }
        port.ring.suppress_kicks();
        loop {
            let taken = self.take_slice(hctx);
            let answered = self.finish_inline();
            let port = open_port(&mut self.ports, hctx);
            port.inline = answered;
            match taken {
                Ok(Slice::Whole) if port.ring.unpopped() == 0 => return Ok(true),
                // The guest can look at these while the next are at work.
                Ok(Slice::Whole) => {
                    port.ring.publish();
                }
                Ok(Slice::NoRoom) if answered => {}
                Ok(Slice::NoRoom) => {
                    port.no_room = true;
                    self.starving = true;
                    return Ok(true);
                }
                Err(error) => return Err(error),
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
        };
        let pool = disk.pool.as_mut().expect("made with the first ring");
        let mut left = if port.inline { SLICE } else { u16::MAX };
        let outcome = loop {
            if left == 0 {
                break Ok(Slice::Whole);
            }
            left -= 1;
            let head = match port.ring.pop_head() {
                Ok(Some(head)) => head,
                Ok(None) => break Ok(Slice::Whole),
                Err(error) => break Err(error),
            };
            match parse(&mut port.ring, head, &disk.shape, write_through, pool) {
                Ok(Parsed::Request(request, io)) => {
                    let tag = RequestTag(io.head());
                    self.mq.plug(hctx, tag, request, io, &mut driver);
                }
                Ok(Parsed::Done(used)) => {
                    port.ring.put_used(used);
                    port.stats.answered += 1;
                    touch(&mut self.touched, port, hctx);
                }
                Ok(Parsed::NoRoom(head)) => {
                    port.ring.unpop(head);
                    break Ok(Slice::NoRoom);
                }
                Err(error) => break Err(error),
            }
        };
        self.mq.unplug(hctx, &mut driver);
        outcome
    }

    /// What the engine did without the kernel goes back at once, in the turn that brought it; true
    /// if there was any.
    fn finish_inline(&mut self) -> bool {
        if !self.engine.has_inline() {
            return false;
        }
        let mut failure = None;
        let Worker {
            engine,
            mq,
            ports,
            disks,
            touched,
            ..
        } = self;
        engine.reap_inline(&mut |event| {
            if let Event::Done { tag, result } = event {
                failure = result.err().or(failure);
                finish(mq, ports, disks, touched, tag, result);
            }
        });
        self.room |= self.starving;
        if let Some(errno) = failure {
            self.log_failure(errno);
        }
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
            log::debug!("{}: stopped: {}", port.id, RingError::MemoryLost);
            port.memory_lost.signal();
        } else {
            log::warn!("{}: stopped: {error}", port.id);
        }
        port.gates.broken = true;
        if let Some(err) = port.err {
            self.engine.call(err);
        }
    }
}
