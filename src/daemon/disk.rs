//! A disk of the process, from its configuration to the workers that serve its queues.

use std::collections::BTreeSet;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::config::DiskConfig;
use crate::engine::disk::{Image, ImageKind};
use crate::engine::{FileTarget, Target};
use crate::mq::elevator::{ParamError, Params};
use crate::mq::ids::{DiskId, QueueId, RingId, Sector, WorkerId};
use crate::mq::limits::{MAX_RANGES, SECTOR_SIZE};
use crate::mq::map::{MapKind, QueueMap, Topology};
use crate::virtio::abi::ID_BYTES;
use crate::virtio::config_space::{self, ConfigError, ConfigSpace, WriteCache};
use crate::virtio::features;
use crate::virtio::shape::{DiskShape, RangeLimits};

use super::message::{Message, WorkerGone, WorkerHandle};

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
    /// Writes are durable when they complete: what follows from the two below. The workers look here.
    write_through: Arc<AtomicBool>,
    cache: Mutex<CacheState>,
    workers: Vec<WorkerHandle>,
    queues: Mutex<QueuesInUse>,
    scheduler: Mutex<Params>,
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
    map: Option<QueueMap>,
}

impl Disk {
    /// Makes the image known to all workers.
    ///
    /// # Errors
    ///
    /// A worker's engine cannot take the disk.
    pub fn new(
        id: DiskId,
        config: DiskConfig,
        image: Image,
        workers: Vec<WorkerHandle>,
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
            config,
            image,
            shape,
            space,
            workers,
            scheduler: Mutex::new(Params::None),
            queues: Mutex::new(QueuesInUse {
                started: BTreeSet::new(),
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
                    done,
                })
                .map_err(io::Error::other)??;
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
        if self.image.read_only || self.config.cache.ignores_flush() {
            return;
        }
        if let Err(error) = self.image.file.sync_data() {
            log::error!(
                "disk {}: cannot sync the image: {error}",
                self.config.serial
            );
        }
    }

    /// The elevator it has, with its parameters.
    pub fn scheduler(&self) -> Params {
        *self.lock_scheduler()
    }

    /// Gives the disk another elevator, on all workers, while requests may be in flight: each
    /// worker finishes what it has first. Returns when the last one has changed.
    pub fn set_scheduler(&self, params: Params) {
        let mut scheduler = self.lock_scheduler();
        let answers: Vec<_> = self
            .workers
            .iter()
            .filter_map(|worker| {
                worker
                    .send(|done| Message::SetScheduler(self.id, params, done))
                    .ok()
            })
            .collect();
        for answer in answers {
            // A worker that has ended has no requests to schedule.
            let _ = answer.recv();
        }
        *scheduler = params;
    }

    /// Changes one parameter of the elevator, by its name in sysfs, on all workers.
    ///
    /// # Errors
    ///
    /// The elevator has no such parameter, or not with that value.
    pub fn set_scheduler_param(&self, name: &str, value: u64) -> Result<(), ParamError> {
        let mut scheduler = self.lock_scheduler();
        // Checked here once; what holds here holds on each worker.
        scheduler.set(name, value)?;
        for worker in &self.workers {
            let name = name.to_owned();
            if let Ok(outcome) =
                worker.ask(|done| Message::SetSchedulerParam(self.id, name, value, done))
            {
                outcome?;
            }
        }
        Ok(())
    }

    fn lock_scheduler(&self) -> MutexGuard<'_, Params> {
        self.scheduler
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
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
    pub fn queue_starts(&self, queue: QueueId) -> u16 {
        let mut queues = self.lock_queues();
        queues.started.insert(queue.0);
        self.remap(&mut queues);
        let others: Vec<u16> = queues
            .started
            .iter()
            .copied()
            .filter(|other| *other != queue.0)
            .collect();
        if self.vcpus_are_given() {
            for other in others {
                let ring = self.ring(QueueId(other));
                let ctxs = ctxs_of(&queues, other);
                let asked = self
                    .worker_of(ring.queue)
                    .ask(|done| Message::SetCtxs(ring, ctxs, done));
                if let Err(WorkerGone(worker)) = asked {
                    log::debug!("{ring}: worker {worker} has ended");
                }
            }
        }
        ctxs_of(&queues, queue.0)
    }

    /// A queue was stopped. The map stays until the next one starts.
    pub fn queue_stopped(&self, queue: QueueId) {
        self.lock_queues().started.remove(&queue.0);
    }

    /// The vCPUs the map sends to a queue, for the summary.
    pub fn cpus_of(&self, queue: QueueId) -> Vec<u16> {
        let queues = self.lock_queues();
        match &queues.map {
            Some(map) if queue.index() < map.queues() => map.cpus_of(queue.0).to_vec(),
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
        let vcpus = match &self.config.queue_map {
            MapKind::Explicit(list) => u16::try_from(list.len()).unwrap_or(u16::MAX),
            _ => self.config.vcpus.unwrap_or(in_use),
        };
        let map = QueueMap::build(&self.config.queue_map, &Topology::flat(vcpus), in_use);
        match map {
            Ok(map) => queues.map = Some(map),
            // An explicit map may name queues that this guest does not use (yet).
            Err(error) => log::debug!("disk {}: queue map: {error}", self.config.serial),
        }
    }
}

fn ctxs_of(queues: &QueuesInUse, queue: u16) -> u16 {
    let count = match &queues.map {
        Some(map) if usize::from(queue) < map.queues() => map.cpus_of(queue).len(),
        _ => 1,
    };
    u16::try_from(count.max(1)).unwrap_or(u16::MAX)
}

fn target(config: &DiskConfig, image: &Image) -> io::Result<Target> {
    if image.kind == ImageKind::Null {
        return Ok(Target::Null {
            size_bytes: image.size_bytes,
        });
    }
    Ok(Target::File(FileTarget {
        file: image.file.try_clone()?.into(),
        size_bytes: image.size_bytes,
        direct: image.direct,
        memory_align: image.dio_mem_align,
        offset_align: image.dio_offset_align,
        block_device: image.kind == ImageKind::BlockDevice,
        ignore_flush: config.cache.ignores_flush(),
    }))
}

fn shape(config: &DiskConfig, image: &Image) -> DiskShape {
    let mut serial = [0; ID_BYTES];
    let len = config.serial.len().min(ID_BYTES);
    serial[..len].copy_from_slice(&config.serial.as_bytes()[..len]);
    let block = u64::from(config.logical_block_size);
    let ranges = |max_bytes: u64| {
        // The largest multiple of the logical block that 32 bits of sectors can hold.
        let largest = (u64::from(u32::MAX) * SECTOR_SIZE / block) * block / SECTOR_SIZE;
        RangeLimits {
            max_sectors: u32::try_from((max_bytes / SECTOR_SIZE).min(largest)).unwrap_or(u32::MAX),
            max_ranges: MAX_RANGES,
        }
    };
    DiskShape {
        capacity: Sector::of_bytes(image.size_bytes),
        logical_block_size: config.logical_block_size,
        read_only: config.read_only,
        discard: (image.discard.max_bytes > 0).then(|| ranges(image.discard.max_bytes)),
        // Where the image has no shorter way the engine writes the zeroes itself, so any length
        // goes.
        write_zeroes: (!config.read_only).then(|| {
            ranges(match image.write_zeroes.max_bytes {
                0 => u64::MAX,
                max => max,
            })
        }),
        serial,
    }
}

fn space(config: &DiskConfig, image: &Image, shape: &DiskShape) -> ConfigSpace {
    let block = config.logical_block_size;
    let blocks = |bytes: u32| bytes / block;
    let (discard, zeroes) = (shape.discard, shape.write_zeroes);
    ConfigSpace {
        capacity: shape.capacity.0,
        // Any segment length is taken.
        size_max: 0,
        // A request and its header and status fit into the ring even without indirect descriptors.
        seg_max: u32::from(config.queue_size) - 2,
        blk_size: block,
        topology: config_space::Topology {
            physical_block_exp: u8::try_from(blocks(image.physical_block_bytes).max(1).ilog2())
                .unwrap_or(0),
            alignment_offset: 0,
            min_io_size: u16::try_from(blocks(image.min_io_bytes)).unwrap_or(u16::MAX),
            opt_io_size: blocks(image.opt_io_bytes),
        },
        writeback: true,
        num_queues: config.num_queues,
        max_discard_sectors: discard.map_or(0, |limits| limits.max_sectors),
        max_discard_seg: discard.map_or(0, |limits| u32::from(limits.max_ranges)),
        discard_sector_alignment: match discard {
            Some(_) => (image.discard.granularity_bytes.max(block)) / 512,
            None => 0,
        },
        max_write_zeroes_sectors: zeroes.map_or(0, |limits| limits.max_sectors),
        max_write_zeroes_seg: zeroes.map_or(0, |limits| u32::from(limits.max_ranges)),
        write_zeroes_may_unmap: zeroes.is_some() && image.write_zeroes.may_unmap,
    }
}

/// Where a worker's number comes from.
pub(super) fn worker_id(index: usize) -> WorkerId {
    WorkerId(u16::try_from(index).expect("workers are bounded by CPUs and queues"))
}
