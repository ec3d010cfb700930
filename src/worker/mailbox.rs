//! What a worker does for the control plane, between two turns' I/O.
//!
//! Stopping, disabling and changing memory have to wait until requests in flight have ended. They
//! are put on a list and looked at at the end of each turn; nothing blocks meanwhile.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::engine::{CallSlot, Engine};
use crate::mq::elevator::Params;
use crate::mq::ids::{DiskId, HctxId, RingId};
use crate::virtio::memory::MemoryTable;

use super::coalesce::Patience;
use super::drain::Taken;
use super::error_policy::Care;
use super::message::HeldRings;
use super::queue::Port;
use super::report::report_of;
use super::{LOOK_FOR_LOSSES, Worker, WorkerDisk, heat, open_port};
use crate::worker::counts::WorkerReport;
use crate::worker::message::{FdRole, Message, Reply};

/// What waits for requests in flight to end.
#[derive(Debug)]
pub(super) enum Pending {
    Stop(HctxId, Reply<Option<u16>>),
    Disable(HctxId, Reply<()>),
    Memory(DiskId, Arc<MemoryTable>, Reply<()>),
    Scheduler(DiskId, Params, Reply<()>),
    WriteThrough(DiskId, Reply<()>),
    Hold(DiskId, Reply<HeldRings>),
    Leave(HctxId, Reply<Option<u16>>),
    Shutdown(Reply<WorkerReport>),
}

impl Pending {
    /// The disk that is frozen until this is carried out.
    pub(super) fn freezes(&self) -> Option<DiskId> {
        match self {
            Pending::Memory(disk, ..)
            | Pending::Scheduler(disk, ..)
            | Pending::WriteThrough(disk, _)
            | Pending::Hold(disk, _) => Some(*disk),
            Pending::Stop(..)
            | Pending::Disable(..)
            | Pending::Leave(..)
            | Pending::Shutdown(_) => None,
        }
    }

    /// The disk whose requests have to end for this, as they end.
    pub(super) fn empties(&self) -> Option<DiskId> {
        match self {
            Pending::Memory(disk, ..) | Pending::Scheduler(disk, ..) => Some(*disk),
            _ => None,
        }
    }
}

impl Worker {
    #[cold]
    pub(super) fn read_mail(&mut self) {
        // What ended before a message is seen before its answer: pages that are to be marked from now on
        // are those of requests the guest has not seen.
        self.publish();
        while let Ok(message) = self.inbox.try_recv() {
            self.apply(message);
        }
        self.follow_holds();
    }

    fn apply(&mut self, message: Message) {
        match message {
            Message::AddDisk {
                disk,
                target,
                shape,
                write_through,
                sync_fault,
                throttle,
                on_error,
                hold,
                coalesce,
                done,
            } => {
                self.coalesces |= coalesce.is_some();
                let needed = disk.index() + 1;
                if self.disks.len() < needed {
                    self.disks.resize_with(needed, || None);
                    self.slots.resize(needed, None);
                }
                self.mq.set_throttle(disk, Some(throttle));
                done.send(self.engine.add_disk(*target).map(|slot| {
                    self.engine.share_sync_fault(slot, sync_fault);
                    self.slots[disk.index()] = Some(slot);
                    self.disks[disk.index()] = Some(WorkerDisk {
                        shape: *shape,
                        write_through,
                        log: None,
                        care: Care::new(on_error, hold),
                        patience: coalesce.map(Patience::from),
                        pool: None,
                        taken: Taken::default(),
                        owes_until_ns: 0,
                    });
                }));
            }
            Message::Start(start, done) => done.send(self.start(*start)),
            Message::Stop(ring, done) => match self.find(ring) {
                Some(hctx) => {
                    open_port(&mut self.ports, hctx).gates.stopping = true;
                    self.let_end(hctx);
                    self.pending.push(Pending::Stop(hctx, done));
                }
                None => done.send(None),
            },
            Message::Leave(ring, done) => match self.find(ring) {
                Some(hctx) => self.leave(hctx, done),
                None => done.send(None),
            },
            Message::Enable(ring, enabled, done) => match self.find(ring) {
                Some(hctx) => {
                    let port = open_port(&mut self.ports, hctx);
                    port.gates.disabled = !enabled;
                    if enabled {
                        port.was_enabled = true;
                        heat(&mut self.hot, port, hctx);
                        let (disk, ends) = (port.id.disk, port.gates.is_draining());
                        self.mq.set_ending(hctx, ends);
                        self.wait_again(hctx);
                        self.pay_first(disk);
                        done.send(());
                    } else {
                        self.let_end(hctx);
                        self.pending.push(Pending::Disable(hctx, done));
                    }
                }
                None => done.send(()),
            },
            Message::SetFd(ring, role, fd, done) => {
                if let Some(hctx) = self.find(ring) {
                    self.set_fd(hctx, role, fd);
                }
                done.send(());
            }
            Message::SetMemory(disk, memory, done) => {
                self.freeze(Pending::Memory(disk, memory, done));
            }
            Message::SetLog(disk, log, done) => self.set_log(disk, log.as_ref(), done),
            Message::SetScheduler(disk, params, done) => {
                self.freeze(Pending::Scheduler(disk, params, done));
            }
            Message::WriteThrough(disk, done) => {
                self.freeze(Pending::WriteThrough(disk, done));
            }
            Message::SetSchedulerParam(disk, name, value, done) => {
                done.send(self.mq.set_elevator_param(disk, &name, value));
            }
            Message::Resize(disk, size_bytes, done) => done.send(self.resize(disk, size_bytes)),
            Message::Hold(disk, done) => self.hold(disk, done),
            Message::Release(disk, done) => {
                self.release(disk);
                done.send(());
            }
            Message::SetCtxs(ring, ctxs, done) => {
                if let Some(hctx) = self.find(ring) {
                    self.mq.set_ctxs(hctx, ctxs);
                }
                done.send(());
            }
            Message::SetGroup(disk, group, done) => {
                self.mq.set_group(disk, group);
                self.review_debts();
                done.send(());
            }
            Message::LimitsChanged(done) => {
                self.mq.limits_changed();
                self.review_debts();
                done.send(());
            }
            Message::StartTrace(events, actions, done) => {
                self.start_trace(events, &actions);
                done.send(());
            }
            Message::StopTrace(done) => {
                self.mq.trace().stop();
                done.send(());
            }
            Message::TakeTrace(done) => done.send(self.take_trace()),
            Message::Report(done) => done.send(self.report()),
            Message::Resume(disk, until, done) => {
                self.resume(disk, until);
                done.send(());
            }
            Message::Shutdown(done) => {
                for hctx in self.hctxs() {
                    open_port(&mut self.ports, hctx).gates.stopping = true;
                    self.let_end(hctx);
                }
                self.leaving = true;
                self.pending.push(Pending::Shutdown(done));
            }
        }
    }

    pub(super) fn find(&self, ring: RingId) -> Option<HctxId> {
        self.ports().find(|(_, port)| port.id == ring).map(|p| p.0)
    }

    pub(super) fn ports(&self) -> impl Iterator<Item = (HctxId, &Port)> {
        self.ports.iter().zip(0..).filter_map(|(port, index)| {
            let port = port.as_ref()?;
            Some((HctxId(index), port))
        })
    }

    pub(super) fn set_fd(&mut self, hctx: HctxId, role: FdRole, fd: Option<OwnedFd>) {
        let token = u32::from(hctx.0);
        let port = self.ports[hctx.index()].as_mut().expect("the port exists");
        match role {
            FdRole::Kick => {
                if std::mem::take(&mut port.has_kick) {
                    self.engine.unwatch(token);
                }
                if let Some(fd) = fd {
                    match self.engine.watch(fd, token) {
                        Ok(()) => port.has_kick = true,
                        Err(error) => {
                            log::warn!(disk = port.id.disk.0; "{}: the kick fd cannot be watched: {error}", port.id);
                        }
                    }
                }
                // A kick may have come before we listened.
                heat(&mut self.hot, port, hctx);
            }
            FdRole::Call => {
                if self.polled.len() <= hctx.index() {
                    self.polled.resize(hctx.index() + 1, false);
                }
                self.polled[hctx.index()] = fd.is_none();
                replace_call(&mut self.engine, &mut port.call, port.id, fd, token);
                // Whoever waits on the new fd has not been told of what was used before.
                port.ring.request_call();
                super::touch(&mut self.touched, port, hctx);
            }
            FdRole::Err => replace_call(&mut self.engine, &mut port.err, port.id, fd, token),
        }
    }

    /// Carries out what waited for requests in flight, as far as they have ended.
    pub(super) fn settle(&mut self) {
        let mut at = 0;
        while at < self.pending.len() {
            let ready = match &self.pending[at] {
                Pending::Stop(hctx, _) | Pending::Disable(hctx, _) => self.is_drained(*hctx),
                Pending::Memory(disk, ..) | Pending::Scheduler(disk, ..) => self.has_drained(*disk),
                Pending::WriteThrough(disk, _) => self.is_idle_or_held(*disk),
                Pending::Leave(hctx, _) => self.may_leave(*hctx),
                Pending::Hold(disk, _) => self.has_drained(*disk) || self.waits_after_error(*disk),
                Pending::Shutdown(_) => self.ports().all(|(hctx, _)| self.is_drained(hctx)),
            };
            if ready {
                let pending = self.pending.remove(at);
                self.carry_out(pending);
            } else {
                at += 1;
            }
        }
    }

    /// Whether nothing of a disk is in flight.
    pub(super) fn has_drained(&self, disk: DiskId) -> bool {
        self.ports()
            .all(|(hctx, port)| port.id.disk != disk || self.mq.in_flight(hctx) == 0)
    }

    /// Whether nothing is in flight, what the daemon before has left included. Of a ring that has been stopped
    /// meanwhile nothing is.
    pub(super) fn is_drained(&self, hctx: HctxId) -> bool {
        // What a held disk owes stays in the record, for the next process.
        let owes = |port: &Port| port.owes() && !self.held.contains(&port.id.disk);
        self.ports[hctx.index()]
            .as_ref()
            .is_none_or(|port| self.mq.in_flight(hctx) == 0 && !owes(port))
    }

    #[cold]
    fn carry_out(&mut self, pending: Pending) {
        // What ended in this turn is published and called for before anybody hears that it is over.
        self.notify();
        self.commit();
        match pending {
            Pending::Stop(hctx, done) => {
                let is_there = self.ports[hctx.index()].is_some();
                done.send(is_there.then(|| self.stop(hctx)));
            }
            Pending::Disable(_, done) => done.send(()),
            Pending::Memory(disk, memory, done) => {
                self.change_memory(disk, &memory);
                self.thaw(disk);
                done.send(());
            }
            Pending::Scheduler(disk, params, done) => {
                self.mq.set_elevator(disk, params);
                self.thaw(disk);
                done.send(());
            }
            Pending::WriteThrough(disk, done) => {
                // What is held was not sent yet, and is sent as what comes from now on.
                self.mq.make_durable(disk);
                self.unfreeze(disk);
                done.send(());
            }
            Pending::Leave(hctx, done) => {
                let is_there = self.ports[hctx.index()].is_some();
                done.send(is_there.then(|| self.let_go(hctx)));
            }
            Pending::Hold(disk, done) => self.is_held(disk, done),
            Pending::Shutdown(done) => {
                for hctx in self.hctxs() {
                    self.stop(hctx);
                }
                done.send(self.report());
            }
        }
    }

    /// Lets go of a ring that has nothing in flight; returns its next avail index.
    pub(super) fn stop(&mut self, hctx: HctxId) -> u16 {
        self.name_traced();
        self.set_fd(hctx, FdRole::Kick, None);
        self.set_fd(hctx, FdRole::Call, None);
        self.set_fd(hctx, FdRole::Err, None);
        self.hot.retain(|other| *other != hctx);
        self.touched.retain(|other| *other != hctx);
        self.held_back.retain(|other| *other != hctx);
        let port = self.ports[hctx.index()].take().expect("the port exists");
        let ctx = self.mq.ctx_stats(hctx).to_vec();
        let (stats, times) = self.mq.remove_hctx(hctx);
        let report = report_of(&mut self.reports, port.id, self.id);
        report.add(ctx, &stats, &times, &port.stats);
        port.ring.next_avail()
    }

    fn change_memory(&mut self, disk: DiskId, memory: &Arc<MemoryTable>) {
        self.losses = LOOK_FOR_LOSSES;
        for index in 0..self.ports.len() {
            let Some(port) = self.ports[index].as_mut().filter(|p| p.id.disk == disk) else {
                continue;
            };
            let hctx = HctxId(u16::try_from(index).expect("fewer ports than MAX_HCTXS"));
            if let Err(error) = port.ring.set_memory(Arc::clone(memory)) {
                self.break_ring(hctx, &error);
            }
        }
    }
}

fn replace_call(
    engine: &mut Engine,
    slot: &mut Option<CallSlot>,
    ring: RingId,
    fd: Option<OwnedFd>,
    token: u32,
) {
    if let Some(old) = slot.take() {
        engine.remove_call(old);
    }
    if let Some(fd) = fd {
        match engine.add_call(fd, token) {
            Ok(new) => *slot = Some(new),
            Err(error) => {
                log::warn!(disk = ring.disk.0; "{ring}: the call or err fd cannot be used: {error}")
            }
        }
    }
}
