//! What can be changed about a disk while it is served: its elevator, its limits, its group.

use std::sync::{Arc, MutexGuard, PoisonError, TryLockError};

use crate::config::Scheduler;
use crate::mq::elevator::{Kind, ParamError, Params};
use crate::mq::throttle::{Limits, Throttle};

use super::Disk;
use crate::worker::message::Message;

/// The group a disk is in.
#[derive(Clone, Debug)]
pub struct Membership {
    /// The group's name.
    pub name: String,
    /// The limits its disks share.
    pub throttle: Arc<Throttle>,
}

/// A change of a disk's elevator. There is one at a time.
#[derive(Debug)]
pub struct Switch<'a> {
    disk: &'a Disk,
    _alone: MutexGuard<'a, ()>,
}

impl Switch<'_> {
    /// Gives the disk another elevator, on all workers, while requests may be in flight: each
    /// worker finishes what it has first. Returns when the last one has changed.
    pub fn set(&self, params: Params) {
        let id = self.disk.id;
        self.disk
            .tell_workers(|done| Message::SetScheduler(id, params, done));
        *self.disk.lock_scheduler() = params;
    }

    /// Changes one parameter of the elevator, by its name in sysfs, on all workers.
    ///
    /// # Errors
    ///
    /// The elevator has no such parameter, or not with that value.
    pub fn set_param(&self, name: &str, value: u64) -> Result<(), ParamError> {
        // Checked here once; what holds here holds on each worker.
        self.disk.lock_scheduler().set(name, value)?;
        for worker in self.disk.workers() {
            let name = name.to_owned();
            if let Ok(outcome) =
                worker.ask(|done| Message::SetSchedulerParam(self.disk.id, name, value, done))
            {
                outcome?;
            }
        }
        Ok(())
    }
}

impl Disk {
    /// The elevator it has, with its parameters.
    pub fn scheduler(&self) -> Params {
        *self.lock_scheduler()
    }

    /// Gives the disk another elevator, see [`Switch::set`], when no other change of it is under way.
    pub fn set_scheduler(&self, params: Params) {
        let alone = self.switching.lock();
        Switch {
            disk: self,
            _alone: alone.unwrap_or_else(PoisonError::into_inner),
        }
        .set(params);
    }

    /// Begins to change the elevator; nothing, if it is being changed, which can last as long as what is in
    /// flight.
    pub fn begin_switch(&self) -> Option<Switch<'_>> {
        let alone = match self.switching.try_lock() {
            Ok(alone) => alone,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        Some(Switch {
            disk: self,
            _alone: alone,
        })
    }

    /// Held while limits or the group are read and then changed: for a moment, and not while the elevator
    /// is.
    pub fn alone_with_limits(&self) -> MutexGuard<'_, ()> {
        self.limiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_scheduler(&self) -> MutexGuard<'_, Params> {
        self.scheduler
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The elevator that `choice` means for this disk.
    ///
    /// Linux gives its disks `mq-deadline` if they have one queue and `none` otherwise
    /// (elevator_get_default, block/elevator.c), whatever the medium is: that a disk turns is what
    /// most virtual machines' hosts are told of every disk they have.
    pub fn choose_scheduler(&self, choice: Scheduler) -> Params {
        match choice {
            Scheduler::Given(params) => params,
            Scheduler::Auto if self.config.num_queues == 1 => Kind::MqDeadline.into(),
            Scheduler::Auto => Params::None,
        }
    }

    /// Goes on with the disk, if it is held after an error: what failed is tried again.
    pub fn resume(&self) {
        log::info!(disk = self.id.0; "disk {}: resumed", self.config.serial);
        self.resume_workers();
    }

    /// What holds the disk now ends; what begins to hold it before a worker hears of this does not.
    fn resume_workers(&self) {
        let until = self.hold.times().get();
        self.tell_workers_soon(|done| Message::Resume(self.id, until, done));
    }

    /// The limits of the disk alone.
    pub fn limits(&self) -> Limits {
        self.throttle.limits()
    }

    /// Changes the limits from `now_ns` on, a time on the workers' clock.
    pub fn set_limits(&self, now_ns: u64, limits: Limits) {
        self.throttle.set_limits(now_ns, limits);
        self.tell_workers_soon(Message::LimitsChanged);
    }

    /// The group it is in.
    pub fn group(&self) -> Option<Membership> {
        self.lock_group().clone()
    }

    /// Puts it into a group, or takes it out of the one it is in.
    pub fn set_group(&self, group: Option<Membership>) {
        let mut current = self.lock_group();
        let throttle = group.as_ref().map(|group| &group.throttle);
        self.tell_workers_soon(|done| Message::SetGroup(self.id, throttle.map(Arc::clone), done));
        *current = group;
    }

    pub(super) fn lock_group(&self) -> MutexGuard<'_, Option<Membership>> {
        self.group.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
