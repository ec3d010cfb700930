//! What can be changed while requests run: elevator, limits, groups.

use std::cmp::Reverse;

use super::elevator::{Kind, ParamError, Params};
use super::ids::DiskId;
use super::qos::{Limits, Throttle};
use super::queue::GroupId;
use super::{Mq, Place};

impl<P> Mq<P> {
    /// Which elevator a disk has.
    pub fn elevator(&mut self, disk: DiskId) -> Kind {
        self.elevator_of(disk).map_or(Kind::None, |e| e.kind())
    }

    /// Gives a disk another elevator. The disk must be frozen: none of its requests in flight or
    /// waiting (elevator_switch, block/elevator.c).
    pub fn set_elevator(&mut self, disk: DiskId, params: Params) {
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

    /// Limits a disk, from now on. What it has taken so far is not forgotten.
    pub fn set_limits(&mut self, disk: DiskId, limits: Limits) {
        let now_ns = self.now_ns;
        self.queue_of(disk).throttle.set_limits(now_ns, limits);
        self.retry_delayed();
    }

    /// Limits a group of disks, from now on; the group comes into being with its first limits.
    pub fn set_group_limits(&mut self, group: GroupId, limits: Limits) {
        let index = usize::from(group.0);
        if self.groups.len() <= index {
            self.groups.resize_with(index + 1, Throttle::default);
        }
        let now_ns = self.now_ns;
        self.groups[index].set_limits(now_ns, limits);
        self.retry_delayed();
    }

    /// Makes a disk a member of a group, or of none.
    pub fn set_group(&mut self, disk: DiskId, group: Option<GroupId>) {
        assert!(
            group.is_none_or(|group| usize::from(group.0) < self.groups.len()),
            "the group has limits"
        );
        self.queue_of(disk).group = group;
        self.retry_delayed();
    }

    /// Who waits for a time asks again now: the time was computed from limits that have changed.
    fn retry_delayed(&mut self) {
        while let Some(Reverse((.., id))) = self.delayed.pop() {
            self.member(id).place = Place::Runnable;
            self.runnable.push_back(id);
        }
    }
}
