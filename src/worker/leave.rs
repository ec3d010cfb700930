//! The end of a session whose disk is held after an error.
//!
//! Its front end keeps an in-flight region, and may come back with it, to this process or to the next one. So what is
//! held is not answered with the error that its guest is to be spared: it stays in the region as in flight, and
//! the ring that starts with the region next takes it again. Without a region it cannot be told from the
//! ring what was in flight, and the guest would wait for ever: there it is tried once more, and ends as it ends.

use crate::mq::ids::{DiskId, HctxId};

use super::mailbox::Pending;
use super::{Worker, open_disk, open_port};
use crate::worker::message::Reply;

impl Worker {
    /// Begins to let go of a ring.
    pub(super) fn leave(&mut self, hctx: HctxId, done: Reply<Option<u16>>) {
        let port = open_port(&mut self.ports, hctx);
        let (id, held) = (port.id, port.gates.held);
        if port.ring.is_tracked() {
            port.gates.leaving = true;
            if !held {
                self.let_end(hctx);
            }
        } else {
            port.gates.stopping = true;
            let waiting = self.mq.in_flight(hctx);
            if held && waiting > 0 {
                log::warn!(
                    disk = id.disk.0; "{id}: {waiting} requests that wait after an error are tried once more and then end as \
                     they end, because the front end keeps no in-flight region"
                );
            }
            self.let_end(hctx);
        }
        self.pending.push(Pending::Leave(hctx, done));
    }

    /// Whether nothing of the ring is in flight but what is held.
    pub(super) fn may_leave(&self, hctx: HctxId) -> bool {
        let Some(port) = self.ports[hctx.index()].as_ref() else {
            return true;
        };
        let stays = port.gates.leaving && port.gates.held && !self.mq.is_issued(hctx);
        stays || self.is_drained(hctx)
    }

    /// Whether nothing of a disk is in flight but what is held.
    pub(super) fn is_idle_or_held(&self, disk: DiskId) -> bool {
        let idle = |hctx| !self.mq.is_issued(hctx);
        let mut ports = self.ports().filter(|(_, port)| port.id.disk == disk);
        self.has_drained(disk) || self.waits_after_error(disk) && ports.all(|(hctx, _)| idle(hctx))
    }

    /// Lets go of a ring that [`Worker::may_leave`]; its next avail index.
    pub(super) fn let_go(&mut self, hctx: HctxId) -> u16 {
        let port = open_port(&mut self.ports, hctx);
        let (id, owed) = (port.id, port.ring.to_resume());
        let pool = open_disk(&mut self.disks, id.disk).pool();
        let mut left = 0;
        self.mq.abandon(hctx, |io| {
            port.ring.abandon(io, pool);
            left += 1;
        });
        let left = left + if port.gates.held { owed } else { 0 };
        if left > 0 {
            log::warn!(
                disk = id.disk.0; "{id}: {left} requests that wait after an error stay in the in-flight region, for the next \
                 session"
            );
        }
        self.stop(hctx)
    }
}
