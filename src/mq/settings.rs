//! What can be changed while requests run: elevator, limits, groups.

use std::cmp::Reverse;
use std::sync::Arc;

use super::elevator::{Kind, ParamError, Params};
use super::hctx::ctx::Ctxs;
use super::hctx::{Hctx, Want};
use super::ids::{DiskId, HctxId};
use super::throttle::{RetryAt, Throttle};
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

    /// Something waits for all requests of an hctx to end: what it holds goes out without regard to limits,
    /// and what is charged for it beyond them is owed. Or nothing waits for that any more.
    pub fn set_ending(&mut self, id: HctxId, ending: bool) {
        if self.hctx(id).ending == ending {
            return;
        }
        self.fold();
        let hctx = &mut self.member(id).hctx;
        hctx.ending = ending;
        if !ending {
            return;
        }
        let disk = hctx.config.disk;
        let queue = self.queues[disk.index()].as_mut();
        let queue = queue.expect("made with its first hctx");
        // In the elevator it could wait behind requests that are limited.
        let hctx = &mut self.hctxs[id.index()].as_mut().expect("it exists").hctx;
        queue.take_out(id, |tag| {
            hctx.leftovers.push_back(&mut hctx.table, tag);
            let entry = hctx.table.get_mut(tag);
            entry.elevated = false;
            entry.request
        });
        if hctx.has_work() {
            self.place(id, Want::Run);
        }
        // Others may have waited for room in it.
        self.wake_staged(id);
    }

    /// Until when a disk has no token, for what was issued without; 0 if it has.
    pub fn owes_until_ns(&mut self, disk: DiskId) -> u64 {
        let now_ns = self.now_ns;
        let throttles = self.queue_of(disk).throttles();
        let owed = throttles.filter_map(|throttle| throttle.owes_until(now_ns));
        owed.map(|RetryAt(at)| at).max().unwrap_or(0)
    }

    /// Changes how many vCPUs are mapped to an hctx, and with it its number of ctxs.
    pub fn set_ctxs(&mut self, id: HctxId, count: u16) {
        self.fold();
        let hctx = &mut self.member(id).hctx;
        hctx.set_ctxs(count);
        if hctx.has_work() {
            self.place(id, Want::Run);
        }
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

impl<P> Hctx<P> {
    /// Changes how many vCPUs are mapped here. What is staged moves to the leftovers, in the order
    /// it would have been flushed; the ctxs' counts begin anew.
    pub fn set_ctxs(&mut self, count: u16) {
        let mut staged = self.ctxs.take_all(&mut self.table);
        self.leftovers.append(&mut self.table, &mut staged);
        self.ctxs = Ctxs::new(count);
        self.config.ctxs = count;
        let ctxs = &self.ctxs;
        self.table.reassign(|request| ctxs.of(request));
    }
}
