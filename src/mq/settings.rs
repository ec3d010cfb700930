//! What can be changed while requests run: elevator, limits, groups.

use std::cmp::Reverse;
use std::sync::Arc;

use super::elevator::{Kind, ParamError, Params};
use super::ids::DiskId;
use super::qos::Throttle;
use super::{Mq, Place};

impl<P> Mq<P> {
    /// Which elevator a disk has.
    pub fn elevator(&mut self, disk: DiskId) -> Kind {
        self.elevator_of(disk).map_or(Kind::None, |e| e.kind())
    }

    /// Gives a disk another elevator. The disk must be frozen: none of its requests in flight or
    /// waiting (elevator_switch, block/elevator.c).
    pub fn set_elevator(&mut self, disk: DiskId, params: Params) {
        self.fold();
        self.queue_of(disk).set_elevator(params);
    }

    /// Changes one parameter of a disk's elevator, by its name in sysfs, while it runs.
    ///
    /// # Errors
    ///
    /// The elevator has no such parameter, or not with that value.
    pub fn set_elevator_param(
        &mut self,
        disk: DiskId,
        name: &str,
        value: u64,
    ) -> Result<(), ParamError> {
        match self.elevator_of(disk) {
            Some(elevator) => elevator.set_param(name, value),
            None => Params::None.set(name, value),
        }
    }

    /// Gives a disk its limits, or none. All workers that serve it are given the same.
    pub fn set_throttle(&mut self, disk: DiskId, throttle: Option<Arc<Throttle>>) {
        self.queue_of(disk).throttle = throttle;
        self.limits_changed();
    }

    /// Gives a disk the limits of the group it belongs to, or of none. All workers that serve disks
    /// of the group are given the same.
    pub fn set_group(&mut self, disk: DiskId, group: Option<Arc<Throttle>>) {
        self.queue_of(disk).group = group;
        self.limits_changed();
    }

    /// Who waits for a time asks again in this turn: the time was computed from limits that have
    /// changed. To be called on every worker after [`Throttle::set_limits`].
    pub fn limits_changed(&mut self) {
        while let Some(Reverse((.., id))) = self.delayed.pop() {
            self.member(id).place = Place::Runnable;
            self.runnable.push_back(id);
        }
    }
}
