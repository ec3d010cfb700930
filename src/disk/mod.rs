//! A disk of the process, from its configuration to the workers that serve its queues.

mod dedicated_worker;
pub mod device_state;
mod freeze;
mod geometry;
pub mod guest_notes;
mod image_lock;
pub mod queue_assignment;
pub mod registry;
pub mod resize;
pub mod size_watch;
pub mod summary;
mod tuning;
mod write_cache;

use std::collections::BTreeSet;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::config::{DiskConfig, OnError};
use crate::engine::SyncFault;
use crate::image::Image;
use crate::mq::cpumap::queue_types::{Counts, QueueMaps};
use crate::mq::cpumap::{MapKind, Topology};
use crate::mq::elevator::Params;
use crate::mq::ids::{DiskId, QueueId, RingId, WorkerId};
use crate::mq::limits::SECTOR_SIZE;
use crate::mq::throttle::Throttle;
use crate::virtio::config_space::ConfigSpace;
use crate::virtio::features;
use crate::virtio::geometry::DiskShape;

use self::dedicated_worker::Dedicated;
pub use self::freeze::{Changes, Holding, NotHeld};
use self::geometry::{shape, space, target};
pub use self::guest_notes::Keeping;
use self::image_lock::Usage;
use self::resize::Size;
pub use self::resize::{Resize, ResizeError};
pub use self::tuning::{Membership, Switch};
pub use self::write_cache::CacheError;
use self::write_cache::CacheState;
use crate::worker::dedicated::DedicatedWorkers;
use crate::worker::io_errors::Hold;
use crate::worker::message::{Message, Reply, WorkerGone, WorkerHandle, ask_all, ask_all_within};

/// How long a change waits for workers to adopt it. None takes long, unless it waits inside the kernel for one disk.
const PATIENCE: Duration = Duration::from_secs(3);

/// A disk that is being served.
#[derive(Debug)]
pub struct Disk {
    /// Its number.
    pub id: DiskId,
    /// What the user asked for.
    pub config: DiskConfig,
    image: Image,
    shape: DiskShape,
    space: ConfigSpace,
    size: Size,
    /// Writes are durable when they complete: what follows from the two below. The workers look here.
    write_through: Arc<AtomicBool>,
    cache: Mutex<CacheState>,
    /// Who writes down what the guest chose.
    keeping: Mutex<Keeping>,
    /// Whether syncs of the image can be believed.
    sync_fault: Arc<SyncFault>,
    /// How often it was held after an error.
    hold: Arc<Hold>,
    /// Those that serve all disks.
    workers: Vec<WorkerHandle>,
    dedicated: Dedicated,
    /// The worker of each queue, by its place in the list; the place behind the last is the dedicated one's.
    dealt: Mutex<Vec<usize>>,
    queues: Mutex<QueuesInUse>,
    scheduler: Mutex<Params>,
    /// Held while the workers change the scheduler.
    switching: Mutex<()>,
    /// Held while limits are read and changed.
    limiting: Mutex<()>,
    /// Its own limits, shared by the workers.
    throttle: Arc<Throttle>,
    group: Mutex<Option<Membership>>,
    usage: Usage,
    /// A front end is being served.
    connected: AtomicBool,
}

/// Which queues are started, and the map that follows from their number.
#[derive(Debug)]
struct QueuesInUse {
    started: BTreeSet<u16>,
    /// Those of them whose guest polls, so that they have no call fd.
    polled: BTreeSet<u16>,
    map: Option<QueueMaps>,
}

impl Disk {
    /// Makes the image known to all shared workers, with the scheduler and the limits of the
    /// configuration, in `group` or in none.
    ///
    /// # Errors
    ///
    /// A worker's engine cannot take the disk.
    pub fn new(
        id: DiskId,
        config: DiskConfig,
        mut image: Image,
        workers: Vec<WorkerHandle>,
        dedicated: Arc<DedicatedWorkers>,
        group: Option<Membership>,
    ) -> io::Result<Arc<Disk>> {
        log::info!(disk = id.0; "disk {}: {}", config.serial, image.describe());
        let shape = shape(&config, &image);
        let space = space(&config, &image, &shape);
        let dealt = Mutex::new(queue_assignment::at_first(
            id.index(),
            config.num_queues,
            workers.len(),
        ));
        let disk = Disk {
            id,
            write_through: Arc::new(AtomicBool::new(config.cache.is_write_through())),
            cache: Mutex::new(CacheState::new(config.cache.is_write_through())),
            keeping: Mutex::new(Keeping::Here),
            sync_fault: Arc::new(SyncFault::new(id.0, &config.serial, image.witness.take())),
            throttle: Arc::new(Throttle::new(config.limits)),
            group: Mutex::new(None),
            usage: Usage::default(),
            connected: AtomicBool::new(false),
            size: Size::new(image.size_bytes),
            config,
            image,
            shape,
            space,
            dealt,
            hold: Arc::new(Hold::new(
                workers
                    .iter()
                    .map(|worker| worker.waker().clone())
                    .collect(),
            )),
            workers,
            dedicated: Dedicated::from(dedicated),
            scheduler: Mutex::new(Params::None),
            switching: Mutex::new(()),
            limiting: Mutex::new(()),
            queues: Mutex::new(QueuesInUse {
                started: BTreeSet::new(),
                polled: BTreeSet::new(),
                map: None,
            }),
        };
        for worker in &disk.workers {
            disk.introduce_to(worker)?;
        }
        let scheduler = disk.choose_scheduler(disk.config.scheduler);
        if scheduler != Params::None {
            disk.set_scheduler(scheduler);
        }
        if group.is_some() {
            disk.set_group(group);
        }
        Ok(Arc::new(disk))
    }

    /// Has a worker serve the disk, as it was when it was opened.
    fn introduce_to(&self, worker: &WorkerHandle) -> io::Result<()> {
        let target = Box::new(target(&self.config, &self.image)?);
        let asked = worker.ask(|done| Message::AddDisk {
            disk: self.id,
            target,
            shape: Box::new(self.shape.clone()),
            write_through: Arc::clone(&self.write_through),
            sync_fault: Arc::clone(&self.sync_fault),
            throttle: Arc::clone(&self.throttle),
            on_error: self.config.on_error,
            hold: Arc::clone(&self.hold),
            coalesce: self.config.coalesce,
            done,
        });
        asked.map_err(io::Error::other)?
    }

    /// The feature bits it offers.
    pub fn features(&self) -> u64 {
        features::offered(&self.shape, &self.space)
    }

    /// `size` bytes of the configuration space from `offset`.
    pub fn read_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let space = ConfigSpace {
            capacity: self.size_bytes() / SECTOR_SIZE,
            writeback: !self.lock_cache().chosen,
            ..self.space
        };
        space.read(offset, size)
    }

    /// Tells all workers something at once, and returns when the last one has adopted it.
    pub fn tell_workers(&self, message: impl Fn(Reply<()>) -> Message) {
        ask_all(self.workers(), message);
    }

    /// Tells all workers something without waiting for any of them.
    pub(super) fn send_workers(&self, message: impl Fn(Reply<()>) -> Message) {
        for worker in self.workers() {
            // One that has ended has nothing left that it matters to.
            let _ = worker.send(&message);
        }
    }

    /// Tells all workers something and waits until they have adopted it, but no longer than for a moment for those that are
    /// stuck: they adopt it when they go on.
    pub(super) fn tell_workers_soon(&self, message: impl Fn(Reply<()>) -> Message) {
        ask_all_within(self.workers(), PATIENCE, message);
    }

    /// What is behind it.
    pub fn image(&self) -> &Image {
        &self.image
    }

    /// Whether a front end is being served.
    pub fn is_connected(&self) -> bool {
        self.connected.load(Ordering::Relaxed)
    }

    /// A front end came, or left.
    pub fn set_connected(&self, connected: bool) {
        self.connected.store(connected, Ordering::Relaxed);
    }

    /// A queue starts: returns how many ctxs it gets. The other queues' ctxs follow the new map.
    pub fn queue_starts(&self, queue: QueueId, polled: bool) -> u16 {
        let mut queues = self.lock_queues();
        queues.started.insert(queue.0);
        if polled {
            queues.polled.insert(queue.0);
        } else {
            queues.polled.remove(&queue.0);
        }
        self.remap(&mut queues);
        self.tell_ctxs(&queues, Some(queue.0));
        ctxs_of(&queues, queue.0)
    }

    /// A queue got a call fd, or lost the one it had, while it runs.
    pub fn queue_polled(&self, queue: QueueId, polled: bool) {
        let mut queues = self.lock_queues();
        let changed = match polled {
            true => queues.polled.insert(queue.0),
            false => queues.polled.remove(&queue.0),
        };
        if changed {
            self.remap(&mut queues);
            self.tell_ctxs(&queues, None);
        }
    }

    fn tell_ctxs(&self, queues: &QueuesInUse, except: Option<u16>) {
        if !self.vcpus_are_given() {
            return;
        }
        for queue in queues.started.iter().filter(|q| Some(**q) != except) {
            let ring = self.ring(QueueId(*queue));
            let ctxs = ctxs_of(queues, *queue);
            // Not waited for: the queues are locked, and status would wait with a worker that is stuck.
            let told = self
                .worker_of(ring.queue)
                .send(|done| Message::SetCtxs(ring, ctxs, done));
            if let Err(WorkerGone(worker)) = told {
                log::debug!(disk = ring.disk.0; "{ring}: worker {worker} has ended");
            }
        }
    }

    /// A queue was stopped. The map stays until the next one starts.
    pub fn queue_stopped(&self, queue: QueueId) {
        let mut queues = self.lock_queues();
        queues.started.remove(&queue.0);
        queues.polled.remove(&queue.0);
        if !queues.started.is_empty() {
            return;
        }
        // With its last queue ends what was held.
        if self.config.on_error != OnError::Report {
            let until = self.hold.times().get();
            self.send_workers(|done| Message::Resume(self.id, until, done));
        }
        drop(queues);
        self.rings_stopped();
    }

    /// The vCPUs the map sends to a queue, for the summary.
    pub fn cpus_of(&self, queue: QueueId) -> Vec<u16> {
        let queues = self.lock_queues();
        match &queues.map {
            Some(map) if queue.0 < map.queues() => map.cpus_of(queue.0).to_vec(),
            _ => Vec::new(),
        }
    }

    /// The name of one of its rings.
    pub fn ring(&self, queue: QueueId) -> RingId {
        RingId {
            disk: self.id,
            queue,
        }
    }

    fn lock_queues(&self) -> MutexGuard<'_, QueuesInUse> {
        // Nothing in here panics halfway, so a poisoned lock still guards a whole value.
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// If not, there are as many as queues, and every queue has one ctx however many there are.
    fn vcpus_are_given(&self) -> bool {
        self.config.vcpus.is_some() || matches!(self.config.queue_map, MapKind::Explicit(_))
    }

    fn remap(&self, queues: &mut QueuesInUse) {
        let in_use = queues.started.last().map_or(0, |last| last + 1);
        // The guest's driver puts its poll queues last.
        let poll = (0..in_use)
            .rev()
            .take_while(|queue| queues.polled.contains(queue))
            .count();
        let poll = u16::try_from(poll).unwrap_or(0);
        let (vcpus, poll) = match &self.config.queue_map {
            // What was given says all: which queue is for what is no longer asked.
            MapKind::Explicit(list) => (u16::try_from(list.len()).unwrap_or(u16::MAX), 0),
            _ if poll < in_use => (self.config.vcpus.unwrap_or(in_use - poll), poll),
            _ => (self.config.vcpus.unwrap_or(in_use), 0),
        };
        let counts = Counts {
            default: in_use - poll,
            read: 0,
            poll,
        };
        match QueueMaps::build(&self.config.queue_map, &Topology::flat(vcpus), counts) {
            Ok(map) => queues.map = Some(map),
            // An explicit map may name queues that this guest does not use (yet).
            Err(error) => {
                log::debug!(disk = self.id.0; "disk {}: queue map: {error}", self.config.serial)
            }
        }
    }
}

fn ctxs_of(queues: &QueuesInUse, queue: u16) -> u16 {
    let count = match &queues.map {
        Some(map) if queue < map.queues() => map.cpus_of(queue).len(),
        _ => 1,
    };
    u16::try_from(count.max(1)).unwrap_or(u16::MAX)
}

/// Where a worker's number comes from.
pub(super) fn worker_id(index: usize) -> WorkerId {
    WorkerId(u16::try_from(index).expect("workers are bounded by CPUs and queues"))
}
