//! What the control plane says to a worker, and how it gets an answer.
//!
//! A worker owns its rings outright, so nobody else touches them: whoever wants something of a ring
//! sends a message and waits until the worker has done it. That is why a reply on the vhost-user
//! socket means "done".

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{self, Receiver, Sender, SyncSender};
use std::time::{Duration, Instant};

use crate::config::{Coalesce, OnError};
use crate::engine::{SyncFault, Target, Waker};
use crate::mq::elevator::{ParamError, Params};
use crate::mq::ids::{DiskId, QueueId, RingId, WorkerId};
use crate::mq::throttle::Throttle;
use crate::mq::trace::Action;
use crate::virtio::geometry::DiskShape;
use crate::virtio::inflight::InflightQueue;
use crate::virtio::memory::MemoryTable;
use crate::virtio::ring::{RingError, RingSetup};

use super::io_errors::Hold;
use crate::sys::listener::Stop;
use crate::virtio::dirty_log::DiskLog;
use crate::worker::affinity::Affinity;
use crate::worker::counts::{TraceReport, WorkerReport};

/// A ring the front end has finished describing.
#[derive(Debug)]
pub struct StartRing {
    /// Which one.
    pub ring: RingId,
    /// Size, addresses, position, negotiated features.
    pub setup: RingSetup,
    /// The guest memory it lies in.
    pub memory: Arc<MemoryTable>,
    /// Said when some of that memory was taken away: the session is to end.
    pub memory_lost: Arc<Stop>,
    /// Written to by the front end when there are requests. `None`: look without being told.
    pub kick: Option<OwnedFd>,
    /// Written to by us when requests are done. `None`: the guest polls.
    pub call: Option<OwnedFd>,
    /// Written to by us when the ring is broken.
    pub err: Option<OwnedFd>,
    /// Whether requests may be taken already (SET_VRING_ENABLE).
    pub enabled: bool,
    /// Where account is kept of what is in flight, and what the daemon before has left there.
    pub inflight: Option<InflightQueue>,
    /// How many vCPUs the queue map sends here.
    pub ctxs: u16,
}

/// Which of a ring's file descriptors is replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FdRole {
    /// SET_VRING_KICK
    Kick,
    /// SET_VRING_CALL
    Call,
    /// SET_VRING_ERR
    Err,
}

/// The rings of a held disk: the next avail index of each. An error if the disk waits for its user after an I/O error
/// (`--on-error`): what failed is to be tried again and was not answered, so it is in flight until then.
pub type HeldRings = Result<Vec<(QueueId, u16)>, WaitsAfterError>;

/// See [`HeldRings`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WaitsAfterError;

/// What can be asked of a worker.
#[derive(Debug)]
pub enum Message {
    /// Serve queues of this disk.
    AddDisk {
        /// Its number.
        disk: DiskId,
        /// What its I/O goes to.
        target: Box<Target>,
        /// What its requests are checked against.
        shape: Box<DiskShape>,
        /// Whether writes have to be durable when they complete; the guest can change it.
        write_through: Arc<AtomicBool>,
        /// Whether syncs of the image can be believed; the same for all workers.
        sync_fault: Arc<SyncFault>,
        /// What it may do in a second; the same for all workers.
        throttle: Arc<Throttle>,
        /// What becomes of requests that fail.
        on_error: OnError,
        /// Shared with the other workers that serve the disk.
        hold: Arc<Hold>,
        /// How late the guest may be told that requests are done.
        coalesce: Option<Coalesce>,
        /// Answered when it is known to the engine.
        done: Reply<std::io::Result<()>>,
    },
    /// Begin to serve a ring.
    Start(Box<StartRing>, Reply<Result<(), RingError>>),
    /// Finish what the ring has in flight, without regard to limits, then let go of it. Answers the next avail index, `None`
    /// for a ring that was not started.
    Stop(RingId, Reply<Option<u16>>),
    /// As [`Message::Stop`], at the end of the session: what is held after an error stays in the in-flight record of a
    /// ring that has one.
    Leave(RingId, Reply<Option<u16>>),
    /// Take requests, or stop taking them; a disabled ring is answered when nothing is in flight.
    Enable(RingId, bool, Reply<()>),
    /// Use another file descriptor.
    SetFd(RingId, FdRole, Option<OwnedFd>, Reply<()>),
    /// Freeze the disk's rings, use the new memory, thaw. Rings that do not lie in the new memory
    /// are stopped as broken.
    SetMemory(DiskId, Arc<MemoryTable>, Reply<()>),
    /// From now on mark what is written to the guest's memory, or mark nothing any more.
    SetLog(DiskId, Option<Arc<DiskLog>>, Reply<()>),
    /// The disk is in write-through mode from now on. Freeze its rings, thaw when nothing is in flight; requests that
    /// are held after an error need not end: they are to be durable when they complete.
    WriteThrough(DiskId, Reply<()>),
    /// The disk has this many bytes from now on, more than before; its rings go on meanwhile.
    Resize(DiskId, u64, Reply<std::io::Result<()>>),
    /// Take nothing more of the disk, and answer when nothing is in flight; where its rings are then.
    /// The disk stays so until it is released.
    Hold(DiskId, Reply<HeldRings>),
    /// Go on with a disk that was held.
    Release(DiskId, Reply<()>),
    /// The queue map changed: this many vCPUs use the ring.
    SetCtxs(RingId, u16, Reply<()>),
    /// Freeze the disk's rings, use another elevator, thaw.
    SetScheduler(DiskId, Params, Reply<()>),
    /// Change one parameter of the disk's elevator, by its name in sysfs, at once.
    SetSchedulerParam(DiskId, String, u64, Reply<Result<(), ParamError>>),
    /// The disk shares the limits of a group, or of none.
    SetGroup(DiskId, Option<Arc<Throttle>>, Reply<()>),
    /// Limits have changed: who was told to wait asks again.
    LimitsChanged(Reply<()>),
    /// Go on with a disk that is held after an error, and had been so this many times.
    Resume(DiskId, u32, Reply<()>),
    /// Forget what was traced before, and record these actions, this many events at most.
    StartTrace(usize, Arc<[Action]>, Reply<()>),
    /// Record no more; what was recorded can still be taken.
    StopTrace(Reply<()>),
    /// Hand out what was recorded and not handed out before.
    TakeTrace(Reply<TraceReport>),
    /// Say what was counted.
    Report(Reply<WorkerReport>),
    /// Finish what is in flight and end. Answers the last counts.
    Shutdown(Reply<WorkerReport>),
}

/// Where an answer goes. Dropped unanswered, the one who waits learns that the worker is gone.
#[derive(Debug)]
pub struct Reply<T>(SyncSender<T>);

impl<T> Reply<T> {
    /// Answers. The one who asked may have given up; that is not the worker's problem.
    pub fn send(self, value: T) {
        let _ = self.0.send(value);
    }
}

/// Asks all workers at once, then waits for each: the answers, in the workers' order. One that has
/// ended has none.
pub fn ask_all<'a, T>(
    workers: impl IntoIterator<Item = &'a WorkerHandle>,
    message: impl Fn(Reply<T>) -> Message,
) -> Vec<T> {
    let answers: Vec<_> = workers
        .into_iter()
        .filter_map(|worker| worker.send(&message).ok())
        .collect();
    answers
        .into_iter()
        .filter_map(|answer| answer.recv().ok())
        .collect()
}

/// The same, waiting no longer than `patience` altogether: `None` for a worker that did not answer in that
/// time, or has ended. What it was asked it will do all the same, should it go on.
pub fn ask_all_within<'a, T>(
    workers: impl IntoIterator<Item = &'a WorkerHandle>,
    patience: Duration,
    message: impl Fn(Reply<T>) -> Message,
) -> Vec<Option<T>> {
    let deadline = Instant::now() + patience;
    let answers: Vec<_> = workers
        .into_iter()
        .map(|worker| worker.send(&message).ok())
        .collect();
    let left = || deadline.saturating_duration_since(Instant::now());
    answers
        .into_iter()
        .map(|answer| answer?.recv_timeout(left()).ok())
        .collect()
}

/// A worker that does not answer because its thread has ended.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("worker {0} has ended")]
pub struct WorkerGone(pub WorkerId);

/// How other threads reach a worker.
#[derive(Clone, Debug)]
pub struct WorkerHandle {
    id: WorkerId,
    messages: Sender<Message>,
    waker: Waker,
    affinity: Arc<Affinity>,
}

impl WorkerHandle {
    /// A handle, and the receiver for the worker it belongs to.
    pub fn new(
        id: WorkerId,
        waker: Waker,
        affinity: Affinity,
    ) -> (WorkerHandle, Receiver<Message>) {
        let (messages, inbox) = mpsc::channel();
        (
            WorkerHandle {
                id,
                messages,
                waker,
                affinity: Arc::new(affinity),
            },
            inbox,
        )
    }

    /// Which worker it is.
    pub fn id(&self) -> WorkerId {
        self.id
    }

    /// What has the worker look around without a message.
    pub fn waker(&self) -> &Waker {
        &self.waker
    }

    /// Where it lives.
    pub fn affinity(&self) -> &Affinity {
        &self.affinity
    }

    /// Sends a message and waits for the answer.
    ///
    /// # Errors
    ///
    /// The worker's thread has ended.
    pub fn ask<T>(&self, message: impl FnOnce(Reply<T>) -> Message) -> Result<T, WorkerGone> {
        self.send(message)?.recv().map_err(|_| WorkerGone(self.id))
    }

    /// Sends a message; the answer comes through the receiver.
    ///
    /// # Errors
    ///
    /// The worker's thread has ended.
    pub fn send<T>(
        &self,
        message: impl FnOnce(Reply<T>) -> Message,
    ) -> Result<Receiver<T>, WorkerGone> {
        // One answer, sent without waiting for anybody to take it.
        let (reply, answer) = mpsc::sync_channel(1);
        self.messages
            .send(message(Reply(reply)))
            .map_err(|_| WorkerGone(self.id))?;
        self.waker.wake();
        Ok(answer)
    }
}
