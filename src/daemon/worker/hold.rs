//! A disk held still: nothing of it is in flight and nothing is taken, until it is released.
//!
//! While it is held, the worker writes nothing to the guest's memory: what ended is published and
//! called for before the answer, rings that take nothing are not armed for kicks, and kicks are never
//! read from their eventfd, so they are still there for whoever serves the rings next.

use crate::mq::ids::{DiskId, QueueId};

use super::super::message::Reply;
use super::Worker;
use super::control::Pending;

/// The rings of a held disk: the next avail index of each. An error if the disk waits for its user after an I/O error
/// (`--on-error`): what failed is to be tried again and was not answered, so it is in flight until then.
pub type HeldRings = Result<Vec<(QueueId, u16)>, WaitsAfterError>;

/// See [`HeldRings`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WaitsAfterError;

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

    /// Goes on where it was held, or gives up waiting for it to be.
    pub(super) fn release(&mut self, disk: DiskId) {
        self.held.retain(|held| *held != disk);
        self.pending
            .retain(|pending| !matches!(pending, Pending::Hold(held, _) if *held == disk));
        // A disk that waits after an error waits on.
        self.unfreeze(disk);
    }
}
