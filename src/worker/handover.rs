//! A disk held still: nothing of it is in flight and nothing is taken, until it is released.
//!
//! While it is held, the worker writes nothing to the guest's memory: what ended is published and
//! called for before the answer, rings that take nothing are not armed for kicks, and kicks are never
//! read from their eventfd, so they are still there for whoever serves the rings next.

use crate::mq::ids::DiskId;

use super::mailbox::Pending;
use super::{Worker, heat, open_port};
use crate::worker::message::{HeldRings, Reply, WaitsAfterError};

impl Worker {
    /// Begins to hold a disk: no more is taken.
    pub(super) fn hold(&mut self, disk: DiskId, done: Reply<HeldRings>) {
        if self.waits_after_error(disk) {
            return done.send(Err(WaitsAfterError));
        }
        self.freeze(Pending::Hold(disk, done));
    }

    /// Nothing of the disk is in flight any more, or it waits after an error.
    pub(super) fn is_held(&mut self, disk: DiskId, done: Reply<HeldRings>) {
        if self.waits_after_error(disk) {
            return done.send(Err(WaitsAfterError));
        }
        self.held.push(disk);
        let rings = self.ports().filter(|(_, port)| port.id.disk == disk);
        let rings = rings.map(|(_, port)| (port.id.queue, port.ring.next_avail()));
        done.send(Ok(rings.collect()));
    }

    /// Takes nothing more from the disk's rings until what waits for that has been carried out
    /// (blk_mq_freeze_queue).
    pub(super) fn freeze(&mut self, until: Pending) {
        let disk = until.freezes();
        let empties = until.empties().is_some();
        // Only what has to be empty ends what is held.
        let lets_be = !empties && disk.is_some_and(|disk| self.waits_after_error(disk));
        for hctx in self.hctxs() {
            let port = open_port(&mut self.ports, hctx);
            if Some(port.id.disk) == disk {
                port.gates.frozen = true;
                if !lets_be {
                    self.let_end(hctx);
                }
            }
        }
        self.pending.push(until);
        if let Some(care) = disk.and_then(|disk| self.care_of(disk)) {
            care.must_empty |= empties;
        }
    }

    /// Goes on after the disk was drained, unless something else waits for it to be frozen.
    pub(super) fn thaw(&mut self, disk: DiskId) {
        if !self.is_freezing(disk) {
            self.unfreeze(disk);
            self.end_hold(disk);
        }
    }

    /// Its rings may be drained again, unless something else waits for the disk to be frozen.
    pub(super) fn unfreeze(&mut self, disk: DiskId) {
        let empties = self.pending.iter().any(|p| p.empties() == Some(disk));
        if let Some(care) = self.care_of(disk) {
            care.must_empty = empties;
        }
        if self.is_freezing(disk) {
            return;
        }
        for hctx in self.hctxs() {
            let port = open_port(&mut self.ports, hctx);
            if port.id.disk == disk {
                port.gates.frozen = false;
                heat(&mut self.hot, port, hctx);
                self.mq.set_ending(hctx, port.gates.is_draining());
                self.wait_again(hctx);
            }
        }
        self.pay_first(disk);
    }

    pub(super) fn is_freezing(&self, disk: DiskId) -> bool {
        self.held.contains(&disk) || self.pending.iter().any(|p| p.freezes() == Some(disk))
    }

    /// Goes on where it was held, or gives up waiting for it to be.
    pub(super) fn release(&mut self, disk: DiskId) {
        self.held.retain(|held| *held != disk);
        self.pending
            .retain(|pending| !matches!(pending, Pending::Hold(held, _) if *held == disk));
        // A disk that waits after an error waits on.
        self.unfreeze(disk);
    }
}
