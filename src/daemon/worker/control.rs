//! What a worker does for the control plane, between two turns' I/O.
//!
//! Stopping, disabling and changing memory have to wait until requests in flight have ended. They
//! are put on a list and looked at at the end of each turn; nothing blocks meanwhile.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::engine::{CallSlot, Engine};
use crate::mq::HctxConfig;
use crate::mq::elevator::Params;
use crate::mq::ids::{DiskId, HctxId, RingId, WorkerId};
use crate::virtio::memory::MemoryTable;
use crate::virtio::ring::{Ring, RingError};

use super::super::message::{FdRole, Message, Reply, StartRing};
use super::super::report::{QueueReport, RingStats, WorkerReport};
use super::port::{Gates, Port};
use super::{LOOK_FOR_LOSSES, Worker, WorkerDisk, heat, open_port};

/// What waits for requests in flight to end.
#[derive(Debug)]
pub(super) enum Pending {
    Stop(HctxId, Reply<Option<u16>>),
    Disable(HctxId, Reply<()>),
    Memory(DiskId, Arc<MemoryTable>, Reply<()>),
    Scheduler(DiskId, Params, Reply<()>),
    Shutdown(Reply<WorkerReport>),
}

impl Pending {
    /// The disk that is frozen until this is carried out.
    fn freezes(&self) -> Option<DiskId> {
        match self {
            Pending::Memory(disk, ..) | Pending::Scheduler(disk, ..) => Some(*disk),
            Pending::Stop(..) | Pending::Disable(..) | Pending::Shutdown(_) => None,
        }
    }
}

impl Worker {
    #[cold]
    pub(super) fn read_mail(&mut self) {
        while let Ok(message) = self.inbox.try_recv() {
            self.apply(message);
        }
    }

    fn apply(&mut self, message: Message) {
        match message {
            Message::AddDisk {
                disk,
                target,
                shape,
                write_through,
                throttle,
                done,
            } => {
                let needed = disk.index() + 1;
                if self.disks.len() < needed {
                    self.disks.resize_with(needed, || None);
                    self.slots.resize(needed, None);
                }
                self.mq.set_throttle(disk, Some(throttle));
                done.send(self.engine.add_disk(*target).map(|slot| {
                    self.slots[disk.index()] = Some(slot);
                    self.disks[disk.index()] = Some(WorkerDisk {
                        shape: *shape,
                        write_through,
                    });
                }));
            }
            Message::Start(start, done) => done.send(self.start(*start)),
            Message::Stop(ring, done) => match self.find(ring) {
                Some(hctx) => {
                    open_port(&mut self.ports, hctx).gates.stopping = true;
                    self.pending.push(Pending::Stop(hctx, done));
                }
                None => done.send(None),
            },
            Message::Enable(ring, enabled, done) => match self.find(ring) {
                Some(hctx) => {
                    let port = open_port(&mut self.ports, hctx);
                    port.gates.disabled = !enabled;
                    if enabled {
                        port.was_enabled = true;
                        heat(&mut self.hot, port, hctx);
                        done.send(());
                    } else {
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
            Message::SetScheduler(disk, params, done) => {
                self.freeze(Pending::Scheduler(disk, params, done));
            }
            Message::SetSchedulerParam(disk, name, value, done) => {
                done.send(self.mq.set_elevator_param(disk, &name, value));
            }
            Message::Resize(disk, size_bytes, done) => done.send(self.resize(disk, size_bytes)),
            Message::SetCtxs(ring, ctxs, done) => {
                if let Some(hctx) = self.find(ring) {
                    self.mq.set_ctxs(hctx, ctxs);
                }
                done.send(());
            }
            Message::SetGroup(disk, group, done) => {
                self.mq.set_group(disk, group);
                done.send(());
            }
            Message::LimitsChanged(done) => {
                self.mq.limits_changed();
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
            Message::Shutdown(done) => {
                for port in self.ports.iter_mut().flatten() {
                    port.gates.stopping = true;
                }
                self.leaving = true;
                self.pending.push(Pending::Shutdown(done));
            }
        }
    }

    /// Takes nothing more from the disk's rings until what waits for that has been carried out
    /// (blk_mq_freeze_queue).
    fn freeze(&mut self, until: Pending) {
        let disk = until.freezes();
        for port in self.ports.iter_mut().flatten() {
            port.gates.frozen |= Some(port.id.disk) == disk;
        }
        self.pending.push(until);
    }

    /// Goes on, unless something else waits for the disk to be frozen.
    fn thaw(&mut self, disk: DiskId) {
        if self.is_freezing(disk) {
            return;
        }
        for (port, index) in self.ports.iter_mut().zip(0..) {
            if let Some(port) = port.as_mut().filter(|port| port.id.disk == disk) {
                port.gates.frozen = false;
                heat(&mut self.hot, port, HctxId(index));
            }
        }
    }

    fn is_freezing(&self, disk: DiskId) -> bool {
        self.pending.iter().any(|p| p.freezes() == Some(disk))
    }

    fn find(&self, ring: RingId) -> Option<HctxId> {
        self.ports().find(|(_, port)| port.id == ring).map(|p| p.0)
    }

    fn ports(&self) -> impl Iterator<Item = (HctxId, &Port)> {
        self.ports.iter().zip(0..).filter_map(|(port, index)| {
            let port = port.as_ref()?;
            Some((HctxId(index), port))
        })
    }

    fn start(&mut self, start: StartRing) -> Result<(), RingError> {
        let StartRing {
            ring: id,
            setup,
            memory,
            memory_lost,
            kick,
            call,
            err,
            enabled,
            inflight,
            ctxs,
        } = start;
        assert!(self.find(id).is_none(), "{id} is started twice");
        let mut ring = Ring::new(&setup, memory)?;
        if let Some(record) = inflight {
            ring.track(record)?;
        }
        if ring.to_resume() > 0 {
            log::info!("{id}: {} requests of before go on", ring.to_resume());
        }
        let hctx = self.mq.add_hctx(HctxConfig {
            disk: id.disk,
            queue: id.queue,
            ring_size: setup.size,
            ctxs,
        });
        if self.ports.len() <= hctx.index() {
            self.ports.resize_with(hctx.index() + 1, || None);
            // A port is on each list at most once.
            self.hot.reserve(self.ports.len());
            self.touched.reserve(self.ports.len());
        }
        let frozen = self.is_freezing(id.disk);
        let next_avail = ring.next_avail();
        self.ports[hctx.index()] = Some(Port {
            id,
            ring,
            memory_lost,
            has_kick: false,
            call: None,
            err: None,
            gates: Gates {
                disabled: !enabled,
                frozen,
                ..Gates::default()
            },
            hot: false,
            touched: false,
            no_room: false,
            was_enabled: enabled,
            stats: RingStats::default(),
        });
        self.losses = LOOK_FOR_LOSSES;
        self.set_fd(hctx, FdRole::Kick, kick);
        self.set_fd(hctx, FdRole::Call, call);
        self.set_fd(hctx, FdRole::Err, err);
        log::debug!(
            "worker {}: {id} started: {} entries at {}, {ctxs} ctx",
            self.id,
            setup.size,
            next_avail
        );
        Ok(())
    }

    fn set_fd(&mut self, hctx: HctxId, role: FdRole, fd: Option<OwnedFd>) {
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
                            log::warn!("{}: the kick fd cannot be watched: {error}", port.id);
                        }
                    }
                }
                // A kick may have come before we listened.
                heat(&mut self.hot, port, hctx);
            }
            FdRole::Call => {
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
                Pending::Memory(disk, ..) | Pending::Scheduler(disk, ..) => self
                    .ports()
                    .all(|(hctx, port)| port.id.disk != *disk || self.mq.in_flight(hctx) == 0),
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

    /// Whether nothing is in flight, what the daemon before has left included.
    fn is_drained(&self, hctx: HctxId) -> bool {
        let owes = |port: &Port| port.owes();
        self.mq.in_flight(hctx) == 0 && !self.ports[hctx.index()].as_ref().is_some_and(owes)
    }

    #[cold]
    fn carry_out(&mut self, pending: Pending) {
        // What ended in this turn is published and called for before anybody hears that it is over.
        self.notify();
        self.commit();
        match pending {
            Pending::Stop(hctx, done) => done.send(Some(self.stop(hctx))),
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
            Pending::Shutdown(done) => {
                let all: Vec<HctxId> = self.ports().map(|(hctx, _)| hctx).collect();
                for hctx in all {
                    self.stop(hctx);
                }
                done.send(self.report());
            }
        }
    }

    /// Lets go of a ring that has nothing in flight; returns its next avail index.
    fn stop(&mut self, hctx: HctxId) -> u16 {
        self.name_traced();
        self.set_fd(hctx, FdRole::Kick, None);
        self.set_fd(hctx, FdRole::Call, None);
        self.set_fd(hctx, FdRole::Err, None);
        self.hot.retain(|other| *other != hctx);
        self.touched.retain(|other| *other != hctx);
        // A ring that is disabled and then stopped has both waiting for it at most once each, and
        // the first was answered when nothing was in flight, as now.
        self.pending
            .retain(|p| !matches!(p, Pending::Disable(other, _) if *other == hctx));
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

    /// Counts of the rings that were stopped and of those that run.
    fn report(&mut self) -> WorkerReport {
        let mut reports = self.reports.clone();
        for (hctx, port) in self.ports() {
            let ctx = self.mq.ctx_stats(hctx).to_vec();
            report_of(&mut reports, port.id, self.id).add(
                ctx,
                self.mq.stats(hctx),
                self.mq.times(hctx),
                &port.stats,
            );
        }
        let disks = (0..self.disks.len())
            .map(|index| DiskId(u16::try_from(index).expect("disks are bounded")))
            .map(|disk| (disk, self.mq.disk_stats(disk)))
            .collect();
        WorkerReport {
            queues: reports,
            disks,
            engine: self.engine.counters(),
        }
    }
}

/// The report of a ring; a new one if there is none yet.
fn report_of(reports: &mut Vec<QueueReport>, ring: RingId, worker: WorkerId) -> &mut QueueReport {
    let index = reports.iter().position(|report| report.ring == ring);
    let index = index.unwrap_or_else(|| {
        reports.push(QueueReport::new(ring, worker.0));
        reports.len() - 1
    });
    &mut reports[index]
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
            Err(error) => log::warn!("{ring}: the call or err fd cannot be used: {error}"),
        }
    }
}
