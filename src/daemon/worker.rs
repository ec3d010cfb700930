//! A worker: one thread that owns its rings, their hctxs and one engine.
//!
//! One turn reads in the order in which a request travels, from its end to its beginning, so that
//! what a completion frees can be used in the same turn:
//!
//! ```text
//! reap → publish → drain → run → settle → commit, notify → wait
//! ```
//!
//! Nothing in here locks, and nothing sleeps but `wait`.

mod control;
mod driver;
mod port;
mod spin;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::engine::{DiskSlot, Engine, Errno, Event, Waker};
use crate::mq::Mq;
use crate::mq::ids::{HctxId, RequestTag, WorkerId};
use crate::mq::limits::{DRIVER_TAGS, RESERVED_TAGS};
use crate::mq::request::Status;
use crate::virtio::parse::{Parsed, parse};
use crate::virtio::pool::SegmentPool;
use crate::virtio::receipt::GuestIo;
use crate::virtio::ring::RingError;
use crate::virtio::shape::DiskShape;

use self::control::Pending;
use self::driver::EngineDriver;
use self::port::{Call, Port, write_one};
use self::spin::Spin;
use super::message::{Message, WorkerHandle};
use super::report::QueueReport;

/// How often a ring without a kick eventfd is looked at.
const KICKLESS_POLL: Duration = Duration::from_micros(100);

/// At most one line about failed I/O in this time.
const ERROR_LOG_INTERVAL_NS: u64 = 1_000_000_000;

/// A disk, as far as a worker needs to know it.
struct WorkerDisk {
    shape: DiskShape,
    write_through: Arc<AtomicBool>,
}

struct Worker {
    id: WorkerId,
    engine: Engine,
    mq: Mq<GuestIo>,
    pool: SegmentPool,
    /// By disk.
    disks: Vec<Option<WorkerDisk>>,
    /// By disk: the engine's number for it.
    slots: Vec<Option<DiskSlot>>,
    /// By hctx.
    ports: Vec<Option<Port>>,
    /// Ports that are looked at each turn.
    hot: Vec<HctxId>,
    /// Ports with used elements nobody was told about.
    touched: Vec<HctxId>,
    inbox: Receiver<Message>,
    has_mail: bool,
    pending: Vec<Pending>,
    /// Counts of rings that were stopped.
    reports: Vec<QueueReport>,
    spin: Spin,
    started: Instant,
    now_ns: u64,
    errors_logged_ns: Option<u64>,
    leaving: bool,
}

/// Starts worker `id` on a thread of its own, for `rings` virtqueues at most.
///
/// # Errors
///
/// The thread or its io_uring could not be created.
pub fn spawn(id: WorkerId, rings: u16, poll_us: u32) -> io::Result<(WorkerHandle, JoinHandle<()>)> {
    let (ready, outcome) = mpsc::sync_channel(1);
    let thread = thread::Builder::new()
        .name(format!("worker-{id}"))
        .spawn(move || {
            // The ring belongs to the thread that makes it (IORING_SETUP_SINGLE_ISSUER).
            match make_engine(rings) {
                Ok((engine, waker)) => {
                    log::debug!("worker {id}: {}", engine.describe());
                    let (handle, inbox) = WorkerHandle::new(id, waker);
                    let _ = ready.send(Ok(handle));
                    Worker::new(id, engine, inbox, poll_us).run();
                }
                Err(error) => {
                    let _ = ready.send(Err(error));
                }
            }
        })?;
    match outcome.recv() {
        Ok(Ok(handle)) => Ok((handle, thread)),
        Ok(Err(error)) => Err(error),
        Err(_) => Err(io::Error::other("the worker's thread ended at its start")),
    }
}

fn make_engine(rings: u16) -> io::Result<(Engine, Waker)> {
    let mut engine = Engine::new(DRIVER_TAGS, rings)?;
    let waker = Waker::new()?;
    engine.watch_waker(&waker)?;
    Ok((engine, waker))
}

impl Worker {
    fn new(id: WorkerId, engine: Engine, inbox: Receiver<Message>, poll_us: u32) -> Worker {
        Worker {
            id,
            engine,
            mq: Mq::new(DRIVER_TAGS, RESERVED_TAGS),
            pool: SegmentPool::new(),
            disks: Vec::new(),
            slots: Vec::new(),
            ports: Vec::new(),
            hot: Vec::new(),
            touched: Vec::new(),
            inbox,
            has_mail: true,
            pending: Vec::new(),
            reports: Vec::new(),
            spin: Spin::new(poll_us),
            started: Instant::now(),
            now_ns: 0,
            errors_logged_ns: None,
            leaving: false,
        }
    }

    fn run(mut self) {
        while !self.turn() {}
    }

    /// One turn; true after the last.
    fn turn(&mut self) -> bool {
        self.now_ns = self.clock();
        self.mq.start_turn(self.now_ns);
        let completed = self.reap();
        self.publish();
        let arrived = self.drain();
        self.run_hctxs();
        self.settle();
        if completed || arrived {
            self.spin.progress(self.now_ns);
        }
        if self.leaving && self.pending.is_empty() {
            self.notify();
            return true;
        }
        self.wait(completed || arrived);
        false
    }

    fn clock(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_nanos()).expect("uptime below five centuries")
    }

    /// Takes what the engine has to tell: completions go through blk-mq to their rings.
    fn reap(&mut self) -> bool {
        let Worker {
            engine,
            mq,
            ports,
            pool,
            touched,
            hot,
            has_mail,
            ..
        } = self;
        let mut found = false;
        let mut room = false;
        let mut failure = None;
        let reaped = engine.reap(&mut |event| match event {
            Event::Done { tag, result } => {
                found = true;
                room = true;
                let result = result.map(drop).map_err(|errno| {
                    failure = Some(errno);
                    status_of(errno)
                });
                mq.complete(tag, result, |hctx, io, status, read| {
                    let port = open_port(ports, hctx);
                    let read = u32::try_from(read).expect("the parser bounds a request's bytes");
                    port.ring.put_used(io.finish(status, read, pool));
                    touch(touched, port, hctx);
                });
            }
            Event::Kick(token) => {
                found = true;
                let hctx = hctx_of(token);
                let port = open_port(ports, hctx);
                port.stats.kicks += 1;
                heat(hot, port, hctx);
            }
            Event::Message => *has_mail = true,
            Event::WatchLost { token, error } => {
                let port = open_port(ports, hctx_of(token));
                log::warn!("{}: the kick fd cannot be watched: {error}", port.id);
                port.gates.broken = true;
                port.signal_error();
            }
            Event::CallLost { token, error } => {
                let port = open_port(ports, hctx_of(token));
                log::warn!("{}: the call fd cannot be written: {error}", port.id);
            }
        });
        if let Err(error) = reaped {
            self.engine_broken(&error);
        }
        if room {
            for hctx in &self.hot {
                open_port(&mut self.ports, *hctx).no_room = false;
            }
        }
        if let Some(errno) = failure {
            self.log_failure(errno);
        }
        if self.has_mail {
            self.has_mail = false;
            self.read_mail();
        }
        found
    }

    #[cold]
    fn log_failure(&mut self, errno: Errno) {
        let due = self
            .errors_logged_ns
            .is_none_or(|at| self.now_ns - at >= ERROR_LOG_INTERVAL_NS);
        if due {
            self.errors_logged_ns = Some(self.now_ns);
            log::warn!("worker {}: I/O failed: {errno}", self.id);
        }
    }

    /// Makes used elements visible, once for each ring that has new ones.
    fn publish(&mut self) {
        for hctx in &self.touched {
            open_port(&mut self.ports, *hctx).ring.publish();
        }
    }

    /// Takes what is available on every hot ring. One drain is one plug.
    fn drain(&mut self) -> bool {
        let mut found = false;
        for at in 0..self.hot.len() {
            let hctx = self.hot[at];
            let port = open_port(&mut self.ports, hctx);
            if !port.is_open() || port.no_room {
                continue;
            }
            match self.drain_ring(hctx) {
                Ok(any) => found |= any,
                Err(error) => self.break_ring(hctx, &error),
            }
        }
        found
    }

    fn drain_ring(&mut self, hctx: HctxId) -> Result<bool, RingError> {
        let port = self.ports[hctx.index()].as_mut().expect("hot ports exist");
        if port.ring.available()? == 0 {
            return Ok(false);
        }
        port.ring.suppress_kicks();
        let disk = self.disks[port.id.disk.index()]
            .as_ref()
            .expect("rings belong to disks that were added");
        // A guest that turns write-through on waits for the answer, so what it sends after that is
        // drained after this load.
        let write_through = disk.write_through.load(Ordering::Relaxed);
        let mut driver = EngineDriver {
            engine: &mut self.engine,
            slots: &self.slots,
        };
        let mut outcome = Ok(());
        loop {
            let head = match port.ring.pop_head() {
                Ok(Some(head)) => head,
                Ok(None) => break,
                Err(error) => {
                    outcome = Err(error);
                    break;
                }
            };
            match parse(
                &mut port.ring,
                head,
                &disk.shape,
                write_through,
                &mut self.pool,
            ) {
                Ok(Parsed::Request(request, io)) => {
                    let tag = RequestTag(io.head());
                    self.mq.plug(hctx, tag, request, io, &mut driver);
                }
                Ok(Parsed::Done(used)) => {
                    port.ring.put_used(used);
                    port.stats.answered += 1;
                    touch(&mut self.touched, port, hctx);
                }
                Ok(Parsed::NoRoom(head)) => {
                    port.ring.unpop(head);
                    port.no_room = true;
                    break;
                }
                Err(error) => {
                    outcome = Err(error);
                    break;
                }
            }
        }
        self.mq.unplug(hctx, &mut driver);
        outcome.map(|()| true)
    }

    /// The guest broke the rules in a way that leaves nothing to answer: the ring stops, its
    /// requests in flight end, other rings go on.
    #[cold]
    fn break_ring(&mut self, hctx: HctxId, error: &RingError) {
        let port = open_port(&mut self.ports, hctx);
        log::warn!("{}: stopped: {error}", port.id);
        port.gates.broken = true;
        port.signal_error();
    }

    fn run_hctxs(&mut self) {
        if self.mq.must_run() {
            self.mq.run(&mut EngineDriver {
                engine: &mut self.engine,
                slots: &self.slots,
            });
        }
    }

    /// Tells the guests, at most once for each ring.
    fn notify(&mut self) {
        while let Some(hctx) = self.touched.pop() {
            let port = self.ports[hctx.index()]
                .as_mut()
                .expect("touched ports exist");
            port.touched = false;
            port.ring.publish();
            if !port.ring.should_call() {
                continue;
            }
            match &port.call {
                Call::None => continue,
                Call::Direct(fd) => {
                    if let Err(error) = write_one(fd) {
                        log::warn!("{}: the call fd cannot be written: {error}", port.id);
                        port.call = Call::None;
                        continue;
                    }
                }
                Call::Engine(slot) => self.engine.call(*slot),
            }
            port.stats.calls += 1;
        }
    }

    /// Ends the turn: submits what was queued, tells the guests, and, when there is nothing left to
    /// do and looking on is not worth it, sleeps. All that is waited for arrives in the engine.
    fn wait(&mut self, progress: bool) {
        let busy = self.engine.has_events() || self.mq.must_run() || self.has_mail;
        if busy || (progress && self.spin.is_on()) || self.spin.again(self.now_ns) {
            self.commit();
            self.notify();
            if !progress {
                std::hint::spin_loop();
            }
            return;
        }
        // What was queued is submitted by the same call that sleeps, so the guests are told first.
        self.notify();
        if self.arm() {
            self.commit();
            return;
        }
        let timeout = self.timeout();
        self.spin.sleeps(self.now_ns);
        if let Err(error) = self.engine.wait(timeout) {
            self.engine_broken(&error);
        }
    }

    fn commit(&mut self) {
        if let Err(error) = self.engine.commit_rqs() {
            self.engine_broken(&error);
        }
    }

    /// io_uring_enter fails for good only when we misuse it, and then no request ends any more: the
    /// process stops loudly, so that whoever supervises it starts another.
    #[cold]
    fn engine_broken(&self, error: &io::Error) -> ! {
        log::error!("worker {}: the io_uring is unusable: {error}", self.id);
        std::process::abort()
    }

    /// Asks for kicks on every hot ring; true if requests came in meanwhile. Rings that cannot kick
    /// stay hot, and so do those that wait for room.
    fn arm(&mut self) -> bool {
        let mut more = false;
        let ports = &mut self.ports;
        self.hot.retain(|hctx| {
            let port = open_port(ports, *hctx);
            if !port.is_open() {
                port.hot = false;
                return false;
            }
            if port.no_room || !port.has_kick {
                return true;
            }
            if port.ring.arm_kicks() {
                more = true;
                return true;
            }
            port.hot = false;
            false
        });
        more
    }

    fn timeout(&self) -> Option<Duration> {
        let deadline = self
            .mq
            .next_deadline_ns()
            .map(|at| Duration::from_nanos(at.saturating_sub(self.now_ns)));
        // Only rings without a kick fd are still hot, or such that a completion will wake.
        let kickless = self.hot.iter().any(|hctx| {
            self.ports[hctx.index()]
                .as_ref()
                .is_some_and(|port| !port.has_kick)
        });
        match (deadline, kickless) {
            (Some(deadline), true) => Some(deadline.min(KICKLESS_POLL)),
            (None, true) => Some(KICKLESS_POLL),
            (deadline, false) => deadline,
        }
    }
}

/// What the guest is told of an error of the host.
fn status_of(errno: Errno) -> Status {
    match errno.0 {
        libc::EOPNOTSUPP => Status::Unsupp,
        _ => Status::IoErr,
    }
}

/// Ports are watched under their hctx's number.
fn hctx_of(token: u32) -> HctxId {
    HctxId(u16::try_from(token).expect("tokens are hctx numbers"))
}

#[inline]
fn open_port(ports: &mut [Option<Port>], hctx: HctxId) -> &mut Port {
    ports[hctx.index()]
        .as_mut()
        .expect("events come for ports that exist")
}

#[inline]
fn touch(touched: &mut Vec<HctxId>, port: &mut Port, hctx: HctxId) {
    if !port.touched {
        port.touched = true;
        touched.push(hctx);
    }
}

#[inline]
fn heat(hot: &mut Vec<HctxId>, port: &mut Port, hctx: HctxId) {
    if !port.hot {
        port.hot = true;
        hot.push(hctx);
    }
}
