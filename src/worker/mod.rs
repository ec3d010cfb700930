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

pub mod affinity;
mod coalesce;
pub mod counts;
mod debt;
pub mod dedicated;
mod dirty_log;
mod drain;
mod driver;
mod error_policy;
mod handover;
mod idle;
pub mod io_errors;
mod leave;
mod lost_memory;
mod mailbox;
pub mod message;
mod polling;
mod queue;
mod report;
mod resize;
mod start;
mod trace;
mod watchdog;

use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{self, Receiver};
use std::thread::{self, JoinHandle};

use crate::config::OnTimeout;
use crate::engine::{DiskSlot, Engine, Errno, Event, Waker};
use crate::mq::Mq;
use crate::mq::ids::{DiskId, DriverTag, HctxId, WorkerId};
use crate::mq::tags::TagDepth;
use crate::sys::sigbus;
use crate::virtio::geometry::DiskShape;
use crate::virtio::guest_io::GuestIo;
use crate::virtio::pool::SegmentPool;

use self::affinity::{Affinity, Load};
use self::coalesce::Patience;
use self::counts::QueueReport;
use self::drain::{Intake, Taken};
use self::driver::EngineDriver;
use self::error_policy::{Care, failed};
use self::mailbox::Pending;
pub use self::message::{HeldRings, WaitsAfterError};
use self::message::{Message, WorkerHandle};
use self::polling::Spin;
use self::queue::{Port, heat, touch};
use self::trace::Named;
use self::watchdog::Watchdog;
use crate::sys::clock::Clock;
use crate::virtio::dirty_log::DiskLog;

/// A worker that finds nothing reads the clock once in this many turns: the reading would be most of
/// what such a turn costs.
const CLOCK_TURNS: u32 = 16;

/// As a count of losses that was seen: rings have come since. Without any loss it is right.
const LOOK_FOR_LOSSES: u64 = 0;

/// A disk, as far as a worker needs to know it.
struct WorkerDisk {
    shape: DiskShape,
    write_through: Arc<AtomicBool>,
    /// While the guest migrates.
    log: Option<Arc<DiskLog>>,
    care: Care,
    /// How late calls may be.
    patience: Option<Patience>,
    /// Room for its long requests. Each disk has its own, so that none can keep others waiting; made
    /// with the first ring.
    pool: Option<SegmentPool>,
    /// What was taken of it in a turn.
    taken: Taken,
    /// Nothing is taken before this time: what the disk was let do beyond its limits is paid for first.
    owes_until_ns: u64,
}

impl WorkerDisk {
    #[inline]
    fn pool(&mut self) -> &mut SegmentPool {
        self.pool.as_mut().expect("made with the first ring")
    }
}

struct Worker {
    id: WorkerId,
    engine: Engine,
    mq: Mq<GuestIo>,
    /// By disk.
    disks: Vec<Option<WorkerDisk>>,
    /// By disk: the engine's number for it.
    slots: Vec<Option<DiskSlot>>,
    /// By hctx.
    ports: Vec<Option<Port>>,
    /// By hctx: the guest polls for its completions.
    polled: Vec<bool>,
    /// Ports that are looked at each turn.
    hot: Vec<HctxId>,
    /// Ports of which something is taken in this turn; empty between turns.
    busy: Vec<HctxId>,
    /// How much is taken in this turn.
    intake: Intake,
    /// Ports with used elements nobody was told about.
    touched: Vec<HctxId>,
    /// Some disk has something to pay for.
    indebted: bool,
    /// Some disk's calls may be late.
    coalesces: bool,
    /// Ports whose calls are.
    held_back: Vec<HctxId>,
    /// There are ports that wait for room in the pool.
    starving: bool,
    /// Some has been made for them since the last look.
    room: bool,
    inbox: Receiver<Message>,
    has_mail: bool,
    pending: Vec<Pending>,
    /// Disks that take nothing until they are released.
    held: Vec<DiskId>,
    /// Counts of rings that were stopped.
    reports: Vec<QueueReport>,
    named: Named,
    spin: Spin,
    /// Turns since the last one that found something, or since the last sleep.
    empty_turns: u32,
    watchdog: Watchdog,
    clock: Clock,
    now_ns: u64,
    /// How much memory the process had lost when we last looked whether it was ours.
    losses: u64,
    leaving: bool,
}

/// How a worker is to work.
#[derive(Clone, Copy, Debug)]
pub struct WorkerOptions {
    /// The most it will be given.
    pub load: Load,
    /// Its io_uring can do what it needs and nothing else.
    pub restricted: bool,
    /// The longest it looks before it sleeps, in microseconds.
    pub poll_us: u32,
    /// After how many seconds a request counts as stuck; 0 never.
    pub timeout_s: u32,
    /// What is done about it.
    pub on_timeout: OnTimeout,
    /// Its clock. All workers get the same, because they share the limits of the disks,
    /// and with them the times.
    pub clock: Clock,
}

/// Starts worker `id` on a thread of its own, on the CPUs of its affinity.
///
/// # Errors
///
/// The thread or its io_uring could not be created.
pub fn spawn(
    id: WorkerId,
    options: WorkerOptions,
    affinity: Affinity,
) -> io::Result<(WorkerHandle, JoinHandle<()>)> {
    let (ready, outcome) = mpsc::sync_channel(1);
    let thread = thread::Builder::new()
        .name(format!("worker-{id}"))
        .spawn(move || {
            // The ring belongs to the thread that makes it (IORING_SETUP_SINGLE_ISSUER).
            // Seated first: memory goes to the node of whoever touches it first.
            match affinity.apply().and_then(|()| make_engine(options)) {
                Ok((engine, waker)) => {
                    log::debug!("worker {id}: {}", engine.describe());
                    let (handle, inbox) = WorkerHandle::new(id, waker, affinity);
                    let _ = ready.send(Ok(handle));
                    Worker::new(id, engine, inbox, options).run();
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

pub(super) fn make_engine(options: WorkerOptions) -> io::Result<(Engine, Waker)> {
    // A kick to watch and a call and an err fd to write to for each.
    let watches = options.load.rings.saturating_mul(2);
    let depth = TagDepth::for_disks(options.load.disks).total();
    let mut engine = match options.restricted {
        true => Engine::new(depth, watches)?,
        false => Engine::unrestricted(depth, watches)?,
    };
    let waker = Waker::new()?;
    engine.watch_waker(&waker)?;
    Ok((engine, waker))
}

impl Worker {
    fn new(
        id: WorkerId,
        engine: Engine,
        inbox: Receiver<Message>,
        options: WorkerOptions,
    ) -> Worker {
        let depth = TagDepth::for_disks(options.load.disks);
        Worker {
            id,
            engine,
            mq: Mq::new(depth),
            disks: Vec::new(),
            slots: Vec::new(),
            ports: Vec::new(),
            polled: Vec::new(),
            hot: Vec::new(),
            busy: Vec::new(),
            intake: Intake::default(),
            touched: Vec::new(),
            indebted: false,
            coalesces: false,
            held_back: Vec::new(),
            starving: false,
            room: false,
            inbox,
            has_mail: true,
            pending: Vec::new(),
            held: Vec::new(),
            reports: Vec::new(),
            named: Named::default(),
            spin: Spin::new(options.poll_us),
            empty_turns: 0,
            watchdog: Watchdog::new(options.timeout_s, options.on_timeout, depth.total()),
            clock: options.clock,
            now_ns: 0,
            losses: LOOK_FOR_LOSSES,
            leaving: false,
        }
    }

    fn run(mut self) {
        while !self.turn() {}
    }

    /// One turn; true after the last.
    fn turn(&mut self) -> bool {
        if self.empty_turns.is_multiple_of(CLOCK_TURNS) {
            self.now_ns = self.clock.now_ns();
        }
        self.mq.start_turn(self.now_ns);
        self.engine.set_time(self.now_ns);
        let completed = self.reap();
        self.publish();
        let arrived = self.drain();
        if sigbus::losses() != self.losses {
            self.find_lost_memory();
        }
        self.run_hctxs();
        self.watchdog.look(self.now_ns, &self.mq, &mut self.engine);
        self.settle();
        if completed || arrived {
            self.spin.progress(self.now_ns);
            self.empty_turns = 0;
        } else {
            self.empty_turns += 1;
        }
        if self.leaving && self.pending.is_empty() {
            self.notify();
            self.commit();
            return true;
        }
        self.wait(completed || arrived);
        false
    }

    /// Takes what the engine has to tell: completions go through blk-mq to their rings.
    fn reap(&mut self) -> bool {
        let Worker {
            engine,
            mq,
            ports,
            disks,
            touched,
            hot,
            has_mail,
            now_ns,
            ..
        } = self;
        let mut found = false;
        let mut room = false;
        let reaped = engine.reap(&mut |event| match event {
            Event::Done { tag, result } => {
                found = true;
                room = true;
                finish(mq, ports, disks, touched, *now_ns, tag, result);
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
                log::warn!(disk = port.id.disk.0; "{}: the kick fd cannot be watched: {error}", port.id);
                port.gates.broken = true;
            }
            Event::CallLost { token, error } => {
                if let Some(port) = &ports[hctx_of(token).index()] {
                    log::warn!(disk = port.id.disk.0; "{}: the call fd cannot be written: {error}", port.id);
                }
            }
        });
        if let Err(error) = reaped {
            self.engine_broken(&error);
        }
        if self.starving && (room || self.room) {
            (self.starving, self.room) = (false, false);
            for hctx in &self.hot {
                open_port(&mut self.ports, *hctx).no_room = false;
            }
        }
        if self.has_mail {
            self.has_mail = false;
            self.read_mail();
        }
        found
    }

    /// Makes used elements visible, once for each ring that has new ones.
    fn publish(&mut self) {
        for hctx in &self.touched {
            open_port(&mut self.ports, *hctx).ring.publish();
        }
    }

    fn run_hctxs(&mut self) {
        if self.mq.must_run() {
            self.mq.run(&mut EngineDriver {
                engine: &mut self.engine,
                slots: &self.slots,
                polled: &self.polled,
            });
        }
    }
}

/// A command came back: its requests go through blk-mq to their rings, unless the disk is to stop at its
/// failure.
#[inline]
fn finish(
    mq: &mut Mq<GuestIo>,
    ports: &mut [Option<Port>],
    disks: &mut [Option<WorkerDisk>],
    touched: &mut Vec<HctxId>,
    now_ns: u64,
    tag: DriverTag,
    result: Result<u64, Errno>,
) {
    let result = match result {
        Ok(_) => Ok(()),
        Err(errno) => match failed(mq, ports, disks, now_ns, tag, errno) {
            Some(status) => Err(status),
            None => return,
        },
    };
    mq.complete(tag, result, |hctx, io, status, read| {
        let port = open_port(ports, hctx);
        let read = u32::try_from(read).expect("the parser bounds a request's bytes");
        let pool = open_disk(disks, port.id.disk).pool();
        port.ring.finish(io, status, read, pool);
        touch(touched, port, hctx);
    });
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
fn open_disk(disks: &mut [Option<WorkerDisk>], disk: DiskId) -> &mut WorkerDisk {
    disks[disk.index()]
        .as_mut()
        .expect("rings belong to disks that were added")
}
