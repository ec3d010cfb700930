//! From the rings into blk-mq.

use std::sync::atomic::Ordering;

use crate::mq::ids::{HctxId, RequestTag};
use crate::virtio::parse::{Parsed, parse};
use crate::virtio::ring::RingError;

use super::driver::EngineDriver;
use super::{Worker, open_port, touch};

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
        let port = self.ports[hctx.index()].as_mut().expect("hot ports exist");
        if port.ring.available()? == 0 {
            return Ok(false);
        }
        port.ring.suppress_kicks();
        let disk = self.disks[port.id.disk.index()]
            .as_ref()
            .expect("rings belong to disks that were added");
        // A guest that turns write-through on waits for the answer, so what it sends after that is
        // drained after this load.
        let write_through = disk.write_through.load(Ordering::Relaxed);
        let mut driver = EngineDriver {
            engine: &mut self.engine,
            slots: &self.slots,
        };
        let mut outcome = Ok(());
        loop {
            let head = match port.ring.pop_head() {
                Ok(Some(head)) => head,
                Ok(None) => break,
                Err(error) => {
                    outcome = Err(error);
                    break;
                }
            };
            match parse(
                &mut port.ring,
                head,
                &disk.shape,
                write_through,
                &mut self.pool,
            ) {
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
                    port.no_room = true;
                    break;
                }
                Err(error) => {
                    outcome = Err(error);
                    break;
                }
            }
        }
        self.mq.unplug(hctx, &mut driver);
        outcome.map(|()| true)
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
