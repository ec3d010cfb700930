//! A disk that another process takes over, or that was taken over from one: held still on all
//! workers, and described with what was changed since it was configured.

use std::collections::BTreeMap;
use std::io;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Instant;

use crate::engine::Errno;
use crate::mq::elevator::Params;
use crate::mq::ids::QueueId;
use crate::mq::throttle::Limits;

use super::{Disk, Membership};
use crate::worker::message::Message;
use crate::worker::{HeldRings, WaitsAfterError};

/// What was chosen while the disk was served, by its guest or with the control socket, and differs
/// from its configuration. `None`: as configured.
#[derive(Clone, Debug, Default)]
pub struct Changes {
    /// Another elevator, or other parameters.
    pub scheduler: Option<Params>,
    /// Other limits.
    pub limits: Option<Limits>,
    /// Another group, or none.
    pub group: Option<Option<String>>,
    /// The guest chose another cache mode: true for write-through.
    pub write_through: Option<bool>,
    /// Whether the guest chose write-through is not known, and it has it for that.
    pub cautious: bool,
    /// Whatever the guest chose, the process that describes the disk has heard of it: its driver began there, or told
    /// it, or a process before did.
    pub known: bool,
    /// The image could not be synced, so that no flush can succeed any more: a host's `errno`.
    pub sync_fault: Option<i32>,
}

/// Why a disk could not be held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotHeld {
    /// Requests were in flight until the deadline.
    Late,
    /// It waits for its user after an I/O error (`--on-error`).
    AfterError,
}

/// A disk whose workers were told to hold it.
#[derive(Debug)]
pub struct Holding {
    /// Of workers that have not answered yet.
    answers: Vec<Receiver<HeldRings>>,
    rings: BTreeMap<QueueId, u16>,
}

impl Holding {
    /// Waits until nothing is in flight, not longer than `deadline`. It can be waited for again after it was
    /// late.
    ///
    /// # Errors
    ///
    /// Something is in flight still, or until the disk is resumed after an I/O error.
    pub fn wait(&mut self, deadline: Instant) -> Result<(), NotHeld> {
        while let Some(answer) = self.answers.last() {
            let left = deadline.saturating_duration_since(Instant::now());
            match answer.recv_timeout(left) {
                Ok(held) => {
                    let rings = held.map_err(|WaitsAfterError| NotHeld::AfterError)?;
                    self.rings.extend(rings);
                }
                Err(RecvTimeoutError::Timeout) => return Err(NotHeld::Late),
                // The worker has ended, and with it all requests.
                Err(RecvTimeoutError::Disconnected) => {}
            }
            self.answers.pop();
        }
        Ok(())
    }

    /// Where each started ring was when nothing was in flight.
    pub fn into_rings(self) -> BTreeMap<QueueId, u16> {
        self.rings
    }
}

impl Disk {
    /// Stops taking requests, on all workers. [`Disk::release`] has to follow, or the end of the
    /// process.
    pub fn hold(&self) -> Holding {
        let workers = self.workers();
        Holding {
            answers: workers
                .filter_map(|worker| worker.send(|done| Message::Hold(self.id, done)).ok())
                .collect(),
            rings: BTreeMap::new(),
        }
    }

    /// Goes on after [`Disk::hold`]. Does not wait for the workers, one of which may be stuck; whatever they are told
    /// after this they hear after it.
    pub fn release(&self) {
        self.send_workers(|done| Message::Release(self.id, done));
    }

    /// Whether the guest was promised that writes are durable when they complete, by its own choice or
    /// by the configuration, or may have been.
    pub fn is_write_through_promised(&self) -> bool {
        self.lock_cache().is_promised()
    }

    /// What differs from the configuration by now.
    pub fn changes(&self) -> Changes {
        let config = &self.config;
        let (scheduler, limits) = (self.scheduler(), self.limits());
        let group = self.group().map(|group| group.name);
        let cache = self.lock_cache();
        let chosen = cache.chosen;
        Changes {
            scheduler: (scheduler != self.choose_scheduler(config.scheduler)).then_some(scheduler),
            limits: (limits != config.limits).then_some(limits),
            group: (group != config.group).then_some(group),
            sync_fault: self.sync_fault.errno().map(|errno| errno.0),
            write_through: (chosen != config.cache.is_write_through()).then_some(chosen),
            cautious: cache.cautious,
            known: cache.has_heard_all(),
        }
    }

    /// Adopts what was changed in the process before this one, and what was promised there:
    /// `was_write_through` is whether writes were durable when they completed.
    ///
    /// A guest that was promised write-through keeps it even if the configuration no longer says so,
    /// because it does not look again. What that process did not know is not known here either: a guest may have chosen
    /// before. An image that could not be synced is still one.
    ///
    /// # Errors
    ///
    /// Write-through begins here, and the image cannot be synced.
    pub fn adopt_changes(
        &self,
        changes: Changes,
        was_write_through: bool,
        now_ns: u64,
        find_group: impl FnOnce(&str) -> Option<Membership>,
    ) -> io::Result<()> {
        if let Some(errno) = changes.sync_fault {
            self.sync_fault.set(Errno(errno));
        }
        if let Some(limits) = changes.limits {
            self.set_limits(now_ns, limits);
        }
        if let Some(group) = changes.group {
            self.set_group(group.and_then(|name| find_group(&name)));
        }
        if let Some(params) = changes.scheduler {
            self.set_scheduler(params);
        }
        self.change_cache(|cache| {
            cache.chosen = match changes.write_through {
                Some(chosen) => chosen,
                // Nothing was chosen where all that is known is that it may have been.
                None => cache.chosen || was_write_through && !changes.cautious,
            };
            cache.cautious = changes.cautious;
            cache.known = changes.known;
        })
    }
}
