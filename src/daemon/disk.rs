//! A disk of the process, from its configuration to the workers that serve its queues.

mod describe;
mod resize;
mod tuning;
mod usage;

use std::collections::BTreeSet;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::config::DiskConfig;
use crate::engine::disk::{Image, ImageKind};
use crate::mq::elevator::Params;
use crate::mq::ids::{DiskId, QueueId, RingId, WorkerId};
use crate::mq::limits::SECTOR_SIZE;
use crate::mq::map::{MapKind, Topology};
use crate::mq::qos::Throttle;
use crate::mq::types::{Counts, QueueMaps};
use crate::virtio::config_space::{ConfigError, ConfigSpace, WriteCache};
use crate::virtio::features;
use crate::virtio::shape::DiskShape;

use self::describe::{shape, space, target};
pub use self::resize::ResizeError;
use self::resize::Size;
pub use self::tuning::Membership;
use self::usage::Usage;
use super::message::{Message, Reply, WorkerGone, WorkerHandle, ask_all};

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
    workers: Vec<WorkerHandle>,
    queues: Mutex<QueuesInUse>,
    scheduler: Mutex<Params>,
    /// Held while the workers change the scheduler.
    switching: Mutex<()>,
    /// Its own limits, shared by the workers.
    throttle: Arc<Throttle>,
    group: Mutex<Option<Membership>>,
    usage: Usage,
    /// A front end is being served.
    connected: AtomicBool,
}

/// Why writes may have to be durable when they complete.
#[derive(Debug)]
struct CacheState {
    /// The guest chose it, or the user did before. It belongs to the disk, not to a session: a guest
    /// that chose write-through still believes in it after its front end has reconnected.
    chosen: bool,
    /// The driver that is active now can neither flush nor choose (firmware, for instance).
    flushless: bool,
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
    /// Makes the image known to all workers, with the scheduler and the limits of the configuration,
    /// in `group` or in none.
    ///
    /// # Errors
    ///
    /// A worker's engine cannot take the disk.
    pub fn new(
        id: DiskId,
        config: DiskConfig,
        image: Image,
        workers: Vec<WorkerHandle>,
        group: Option<Membership>,
    ) -> io::Result<Arc<Disk>> {
        let shape = shape(&config, &image);
        let space = space(&config, &image, &shape);
        let disk = Disk {
            id,
            write_through: Arc::new(AtomicBool::new(config.cache.is_write_through())),
            cache: Mutex::new(CacheState {
                chosen: config.cache.is_write_through(),
                flushless: false,
            }),
            throttle: Arc::new(Throttle::new(config.limits)),
            group: Mutex::new(None),
            usage: Usage::default(),
            connected: AtomicBool::new(false),
            size: Size::new(image.size_bytes),
            config,
            image,
            shape,
            space,
            workers,
            scheduler: Mutex::new(Params::None),
            switching: Mutex::new(()),
            queues: Mutex::new(QueuesInUse {
                started: BTreeSet::new(),
                polled: BTreeSet::new(),
                map: None,
            }),
        };
        for worker in &disk.workers {
            let target = Box::new(target(&disk.config, &disk.image)?);
            worker
                .ask(|done| Message::AddDisk {
                    disk: id,
                    target,
                    shape: Box::new(disk.shape.clone()),
                    write_through: Arc::clone(&disk.write_through),
                    throttle: Arc::clone(&disk.throttle),
                    done,
                })
                .map_err(io::Error::other)??;
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

    /// A write of the driver to the configuration space.
    ///
    /// # Errors
    ///
    /// Anything but a valid cache mode; the disk does not change.
    pub fn write_config(&self, offset: u32, bytes: &[u8]) -> Result<(), ConfigError> {
        let mode = self.space.write(offset, bytes)?;
        let chosen = mode == WriteCache::WriteThrough;
        log::info!(
            "disk {}: the guest chose {}",
            self.config.serial,
            if chosen {
                "write-through"
            } else {
                "write-back"
            }
        );
        self.change_cache(|cache| cache.chosen = chosen);
        Ok(())
    }

    /// A driver acknowledged these features. One that can neither flush nor choose the cache mode
    /// relies on write-through (virtio 1.3, section 5.2.6.2).
    pub fn driver_acknowledged(&self, acked: u64) {
        self.change_cache(|cache| cache.flushless = !features::allows_write_back(acked));
    }

    /// Changes the cache mode, and returns when it holds for all that the guest sends from now on.
    fn change_cache(&self, change: impl FnOnce(&mut CacheState)) {
        let mut cache = self.lock_cache();
        change(&mut cache);
        let now = cache.chosen || cache.flushless;
        let before = self.write_through.swap(now, Ordering::Relaxed);
        if now && !before {
            // What completed in write-back mode was not promised to be durable, but a guest that
            // changes the mode counts on it from here on.
            self.sync();
        }
    }

    fn lock_cache(&self) -> MutexGuard<'_, CacheState> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes all completed writes durable.
    fn sync(&self) {
        let is_null = self.image.kind == ImageKind::Null;
        if is_null || self.image.read_only || self.config.cache.ignores_flush() {
            return;
        }
        if let Err(error) = self.image.file.sync_data() {
            log::error!(
                "disk {}: cannot sync the image: {error}",
                self.config.serial
            );
        }
    }

    /// Tells all workers something at once, and returns when the last one has adopted it.
    pub fn tell_workers(&self, message: impl Fn(Reply<()>) -> Message) {
        ask_all(&self.workers, message);
    }

    /// What is behind it.
    pub fn image(&self) -> &Image {
        &self.image
    }

    /// Whether writes are durable when they complete, as things are now.
    pub fn is_write_through(&self) -> bool {
        self.write_through.load(Ordering::Relaxed)
    }

    /// Whether a front end is being served.
    pub fn is_connected(&self) -> bool {
        self.connected.load(Ordering::Relaxed)
    }

    /// A front end came, or left.
    pub fn set_connected(&self, connected: bool) {
        self.connected.store(connected, Ordering::Relaxed);
    }

    /// The worker a queue belongs to, always the same.
    ///
    /// Queues are dealt to workers one by one, beginning with a different worker for each disk. A
    /// grouping as the guest's queue map makes would be better for caches, but a disk offers many
    /// more queues than a guest uses, and grouping them all would put the few that are used onto
    /// the first worker.
    pub fn worker_of(&self, queue: QueueId) -> &WorkerHandle {
        &self.workers[(self.id.index() + queue.index()) % self.workers.len()]
    }

    /// All workers.
    pub fn workers(&self) -> &[WorkerHandle] {
        &self.workers
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
            let asked = self
                .worker_of(ring.queue)
                .ask(|done| Message::SetCtxs(ring, ctxs, done));
            if let Err(WorkerGone(worker)) = asked {
                log::debug!("{ring}: worker {worker} has ended");
            }
        }
    }

    /// A queue was stopped. The map stays until the next one starts.
    pub fn queue_stopped(&self, queue: QueueId) {
        let mut queues = self.lock_queues();
        queues.started.remove(&queue.0);
        queues.polled.remove(&queue.0);
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
            Err(error) => log::debug!("disk {}: queue map: {error}", self.config.serial),
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
