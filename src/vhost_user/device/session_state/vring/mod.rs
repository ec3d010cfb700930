//! The crate's idea of a virtqueue, tied to ours.
//!
//! vhost-user-backend keeps the negotiated state of each ring in a type of our choice and calls it
//! when a message changes something. [`Vring`] keeps that state in the crate's own type and passes
//! each change that matters on to the worker that owns the ring, waiting until the worker has
//! adopted it.

mod resume_in_place;
mod snapshot;

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vhost_user_backend::{VringMutex, VringState, VringStateGuard, VringStateMutGuard, VringT};
use virtio_queue::{Error as QueueError, QueueT};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

use crate::mq::ids::{QueueId, RingId};
use crate::mq::limits::MAX_RING_SIZE;
use crate::virtio::ring::{RingError, RingSetup};

use crate::vhost_user::device::noop_bitmap::NoopBitmap;
use crate::worker::message::{FdRole, Message, Reply, StartRing};

use super::SessionState;
use resume_in_place::Closing;

/// Guest memory as the crate hands it out. The data path does not go through it.
pub type GuestMemory = GuestMemoryAtomic<GuestMemoryMmap<NoopBitmap>>;

thread_local! {
    /// The session whose rings are being made on this thread: `VringT::new` is told nothing.
    static BINDING: RefCell<Option<Arc<SessionState>>> = const { RefCell::new(None) };
}

/// Runs `make`, which makes the rings of `session`, in order.
pub fn bind<T>(session: &Arc<SessionState>, make: impl FnOnce() -> T) -> T {
    BINDING.set(Some(Arc::clone(session)));
    let made = make();
    BINDING.set(None);
    made
}

/// One ring of one session.
#[derive(Clone)]
pub struct Vring {
    inner: VringMutex<GuestMemory>,
    link: Arc<Link>,
}

impl std::fmt::Debug for Vring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vring")
            .field("ring", &self.link.ring)
            .finish_non_exhaustive()
    }
}

struct Link {
    session: Arc<SessionState>,
    ring: RingId,
    /// What the crate's state does not keep, or keeps out of reach.
    own: Mutex<Own>,
}

#[derive(Debug, Default)]
struct Own {
    kick: Option<OwnedFd>,
    call: Option<OwnedFd>,
    err: Option<OwnedFd>,
    /// The worker has the ring.
    running: bool,
    /// GET_VRING_BASE is under way: the crate is about to drop kick and call.
    closing: Closing,
    /// Kick and call of a ring that GET_VRING_BASE has stopped; see [`Vring::resume_after_snapshot`].
    parked: Option<[Option<OwnedFd>; 2]>,
}

impl Link {
    fn own(&self) -> MutexGuard<'_, Own> {
        self.own.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks the worker that owns the ring. A worker that is gone is one that was shut down, after
    /// which nothing matters to it.
    fn ask<T>(&self, message: impl FnOnce(Reply<T>) -> Message) -> Option<T> {
        self.session
            .disk
            .worker_of(self.ring.queue)
            .ask(message)
            .ok()
    }
}

impl Vring {
    /// Hands the ring to its worker, if the front end has said enough about it.
    fn start(&self) {
        let link = &self.link;
        let disk = &link.session.disk;
        let (setup, enabled) = {
            let state = self.inner.get_ref();
            let queue = state.get_queue();
            let setup = RingSetup {
                size: queue.size(),
                desc: queue.desc_table(),
                avail: queue.avail_ring(),
                used: queue.used_ring(),
                next_avail: queue.next_avail(),
                event_idx: queue.event_idx_enabled(),
                chain_limit: MAX_RING_SIZE,
            };
            (setup, state.is_enabled())
        };
        let mut own = link.own();
        if own.running {
            return;
        }
        let Some(memory) = link.session.memory() else {
            log::debug!(disk = link.ring.disk.0; "{}: no memory yet, not started", link.ring);
            return;
        };
        if (setup.desc, setup.avail, setup.used) == (0, 0, 0) {
            log::debug!(disk = link.ring.disk.0; "{}: no addresses yet, not started", link.ring);
            return;
        }
        let theirs = [&own.kick, &own.call, &own.err].map(|fd| duplicate(fd.as_ref()));
        let [Ok(kick), Ok(call), Ok(err)] = theirs else {
            link.session.give_up(NO_FDS);
            return;
        };
        if let Err(error) = disk.use_image() {
            log::error!(disk = link.ring.disk.0; "{}: not started: {error}", link.ring);
            link.session.give_up(&error.to_string());
            return;
        }
        disk.ring_starts(setup.has_history(&memory));
        let start = Box::new(StartRing {
            ring: link.ring,
            setup,
            memory,
            memory_lost: Arc::clone(&link.session.memory_lost),
            kick,
            call,
            err,
            enabled,
            inflight: link.session.inflight.queue(link.ring.queue.0, setup.size),
            ctxs: disk.queue_starts(link.ring.queue, own.call.is_none()),
        });
        match link.ask(|done| Message::Start(start, done)) {
            Some(Ok(())) => own.running = true,
            Some(Err(error)) => {
                log::warn!(disk = link.ring.disk.0; "{}: not started: {error}", link.ring);
                if error == RingError::TooMany {
                    // Its guest would wait for it.
                    link.session.give_up(&error.to_string());
                }
                disk.queue_stopped(link.ring.queue);
                disk.leave_image();
            }
            None => {}
        }
    }

    /// Takes the ring back from its worker, after what it has in flight has ended.
    fn stop(&self) {
        self.take_back(Message::Stop);
    }

    fn take_back(&self, message: fn(RingId, Reply<Option<u16>>) -> Message) {
        let link = &self.link;
        let mut own = link.own();
        if !own.running {
            return;
        }
        own.running = false;
        if let Some(Some(next_avail)) = link.ask(|done| message(link.ring, done)) {
            self.inner.set_queue_next_avail(next_avail);
        }
        link.session.disk.queue_stopped(link.ring.queue);
        link.session.disk.leave_image();
    }

    /// Back to how it was made.
    pub(super) fn reset(&self, message: fn(RingId, Reply<Option<u16>>) -> Message) {
        self.take_back(message);
        self.inner.set_queue_ready(false);
        self.inner.set_enabled(false);
        self.inner.set_kick(None);
        self.inner.set_call(None);
        self.inner.set_queue_next_avail(0);
        *self.link.own() = Own::default();
    }

    fn set_fd(&self, role: FdRole, file: Option<&File>) {
        let link = &self.link;
        let mut own = link.own();
        let theirs = match own.running {
            true => duplicate(file),
            false => Ok(None),
        };
        let (Ok(fd), Ok(theirs)) = (duplicate(file), theirs) else {
            link.session.give_up(NO_FDS);
            return;
        };
        if own.running {
            link.ask(|done| Message::SetFd(link.ring, role, theirs, done));
        }
        *match role {
            FdRole::Kick => &mut own.kick,
            FdRole::Call => &mut own.call,
            FdRole::Err => &mut own.err,
        } = fd;
    }
}

/// Why a session ends whose ring cannot have its descriptors: without its call a guest would wait forever.
const NO_FDS: &str = "the daemon has no file descriptors left for a queue: raise its limit of open files \
                      (ulimit -n, LimitNOFILE=), or lower --num-queues";

/// Another descriptor for the same open file.
fn duplicate(fd: Option<&impl AsFd>) -> io::Result<Option<OwnedFd>> {
    fd.map(|fd| fd.as_fd().try_clone_to_owned()).transpose()
}

impl<'a> VringStateGuard<'a, GuestMemory> for Vring {
    type G = MutexGuard<'a, VringState<GuestMemory>>;
}

impl<'a> VringStateMutGuard<'a, GuestMemory> for Vring {
    type G = MutexGuard<'a, VringState<GuestMemory>>;
}

impl VringT<GuestMemory> for Vring {
    fn new(memory: GuestMemory, max_queue_size: u16) -> Result<Self, QueueError> {
        let inner = VringMutex::new(memory, max_queue_size)?;
        let session = BINDING
            .with_borrow(Clone::clone)
            .expect("rings are made within bind()");
        let mut rings = session.rings.lock().unwrap_or_else(PoisonError::into_inner);
        let queue = QueueId(u16::try_from(rings.len()).expect("at most MAX_QUEUES"));
        let vring = Vring {
            inner,
            link: Arc::new(Link {
                ring: session.disk.ring(queue),
                session: Arc::clone(&session),
                own: Mutex::new(Own::default()),
            }),
        };
        rings.push(vring.clone());
        Ok(vring)
    }

    fn get_ref(&self) -> MutexGuard<'_, VringState<GuestMemory>> {
        self.inner.get_ref()
    }

    fn get_mut(&self) -> MutexGuard<'_, VringState<GuestMemory>> {
        self.inner.get_mut()
    }

    fn set_enabled(&self, enabled: bool) {
        self.inner.set_enabled(enabled);
        if enabled {
            self.resume_after_snapshot();
        }
        let own = self.link.own();
        if own.running {
            let ring = self.link.ring;
            self.link.ask(|done| Message::Enable(ring, enabled, done));
        }
    }

    fn set_queue_info(&self, desc: u64, avail: u64, used: u64) -> Result<(), QueueError> {
        self.link.session.is_set_up();
        self.inner.set_queue_info(desc, avail, used)?;
        // A ring that got its kick before its addresses starts now.
        if self.inner.get_ref().get_queue().ready() {
            self.start();
        }
        Ok(())
    }

    fn set_queue_ready(&self, ready: bool) {
        self.inner.set_queue_ready(ready);
        if ready {
            self.start();
        } else {
            self.stop();
            self.link.own().closing = Closing::Kick;
        }
    }

    fn set_kick(&self, file: Option<File>) {
        let closing = self.link.own().close_kick();
        self.set_fd(FdRole::Kick, file.as_ref());
        let please_poll = file.is_none() && !closing;
        if !closing {
            self.link.session.is_set_up();
        }
        self.inner.set_kick(file);
        // Without an fd the front end asks us to look by ourselves. The crate starts a ring only
        // when it has an fd, so that is done here.
        if please_poll && !self.inner.get_ref().get_queue().ready() {
            self.set_queue_ready(true);
        }
    }

    fn set_call(&self, file: Option<File>) {
        self.link.own().close_call();
        self.set_fd(FdRole::Call, file.as_ref());
        let link = &self.link;
        if link.own().running {
            let disk = &link.session.disk;
            disk.queue_polled(link.ring.queue, file.is_none());
        }
        self.inner.set_call(file);
    }

    fn set_err(&self, file: Option<File>) {
        self.set_fd(FdRole::Err, file.as_ref());
        self.inner.set_err(file);
    }

    fn set_queue_size(&self, num: u16) {
        self.link.session.is_set_up();
        self.inner.set_queue_size(num);
    }

    fn set_queue_event_idx(&self, enabled: bool) {
        self.inner.set_queue_event_idx(enabled);
    }

    fn queue_next_avail(&self) -> u16 {
        self.inner.queue_next_avail()
    }

    fn set_queue_next_avail(&self, base: u16) {
        self.link.session.is_set_up();
        self.inner.set_queue_next_avail(base);
    }

    fn set_queue_next_used(&self, idx: u16) {
        self.inner.set_queue_next_used(idx);
    }

    fn queue_used_idx(&self) -> Result<u16, QueueError> {
        self.inner.queue_used_idx()
    }

    // The data path is ours: the crate has no worker that would call what follows.

    fn add_used(&self, head: u16, len: u32) -> Result<(), QueueError> {
        self.inner.add_used(head, len)
    }

    fn signal_used_queue(&self) -> io::Result<()> {
        self.inner.signal_used_queue()
    }

    fn enable_notification(&self) -> Result<bool, QueueError> {
        self.inner.enable_notification()
    }

    fn disable_notification(&self) -> Result<(), QueueError> {
        self.inner.disable_notification()
    }

    fn needs_notification(&self) -> Result<bool, QueueError> {
        self.inner.needs_notification()
    }

    fn read_kick(&self) -> io::Result<bool> {
        self.inner.read_kick()
    }
}
