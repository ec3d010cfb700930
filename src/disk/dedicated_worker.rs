//! The dedicated worker of a disk.

use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use super::{Disk, PATIENCE};
use crate::mq::elevator::Params;
use crate::worker::dedicated::{DedicateError, DedicatedWorkers};
use crate::worker::message::{Message, WorkerHandle};

/// The disk's dedicated worker, if it was ever needed, and where it comes from.
#[derive(Debug)]
pub(super) struct Dedicated {
    workers: Arc<DedicatedWorkers>,
    taken: OnceLock<WorkerHandle>,
}

impl Dedicated {
    pub fn from(workers: Arc<DedicatedWorkers>) -> Dedicated {
        Dedicated {
            workers,
            taken: OnceLock::new(),
        }
    }

    /// The worker that was taken.
    pub fn get(&self) -> Option<&WorkerHandle> {
        self.taken.get()
    }
}

impl Disk {
    /// All workers that know the disk.
    pub fn workers(&self) -> impl Iterator<Item = &WorkerHandle> + Clone {
        self.workers.iter().chain(self.dedicated.get())
    }

    /// Sees to it that the disk's next rings can be served by a worker that serves no other disk. The disk
    /// keeps that worker as long as the process lives: a guest that needed one comes back with the same memory.
    ///
    /// Called with the queues locked, so that there is one caller at a time.
    pub(super) fn dedicate(&self) -> Result<(), DedicateError> {
        if self.dedicated.get().is_some() {
            return Ok(());
        }
        // What is changed for all workers waits, so that this one does not miss it. It is not waited for in turn: that
        // could last as long as the disk's storage takes, with the queues locked.
        let unchanged = || Some((self.begin_resize()?, self.begin_switch()?));
        let deadline = Instant::now() + PATIENCE;
        let _unchanged = loop {
            match unchanged() {
                Some(unchanged) => break unchanged,
                None if Instant::now() < deadline => thread::sleep(Duration::from_millis(5)),
                None => return Err(DedicateError::Changing),
            }
        };
        let taken = self.dedicated.workers.take();
        let worker = taken.ok_or(DedicateError::NoneLeft)?;
        let group = self.lock_group();
        self.introduce_to(&worker)?;
        let gone = std::io::Error::other;
        let size_bytes = self.size_bytes();
        if size_bytes > self.image.size_bytes {
            let resized = worker.ask(|done| Message::Resize(self.id, size_bytes, done));
            resized.map_err(gone)??;
        }
        let scheduler = self.scheduler();
        if scheduler != Params::None {
            let switched = worker.ask(|done| Message::SetScheduler(self.id, scheduler, done));
            switched.map_err(gone)?;
        }
        if let Some(group) = &*group {
            let shared = Some(Arc::clone(&group.throttle));
            let joined = worker.ask(|done| Message::SetGroup(self.id, shared, done));
            joined.map_err(gone)?;
        }
        log::info!(
            disk = self.id.0; "disk {}: its guest's memory may keep a worker waiting; worker {} serves this disk alone",
            self.config.serial,
            worker.id()
        );
        self.dedicated
            .taken
            .set(worker)
            .expect("one caller at a time");
        Ok(())
    }

    /// Whether a page fault in the guest's memory that lasts keeps other disks waiting.
    pub(super) fn shares_workers(&self) -> bool {
        self.dedicated.workers.are_needed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{self, Invocation};
    use crate::disk::worker_id;
    use crate::image::Image;
    use crate::mq::ids::{DiskId, QueueId};
    use crate::sys::clock::Clock;
    use crate::virtio::memory::MemoryTable;
    use crate::worker::affinity::{Affinity, Load};
    use crate::worker::{WorkerOptions, spawn};
    use vm_memory::{GuestAddress, GuestMemoryMmap};

    /// Workers, ended with the test.
    struct Workers(Vec<WorkerHandle>);

    impl Workers {
        fn start(count: usize) -> Workers {
            let options = WorkerOptions {
                load: Load { rings: 8, disks: 1 },
                restricted: true,
                poll_us: 0,
                timeout_s: 0,
                on_timeout: crate::config::OnTimeout::Report,
                clock: Clock::start(),
            };
            let start = |index| spawn(worker_id(index), options, Affinity::default());
            Workers((0..count).map(|i| start(i).expect("a worker").0).collect())
        }
    }

    impl Drop for Workers {
        fn drop(&mut self) {
            for worker in &self.0 {
                let _ = worker.ask(Message::Shutdown);
            }
        }
    }

    fn disk(number: u16, shared: &[WorkerHandle], pool: &Arc<DedicatedWorkers>) -> Arc<Disk> {
        let words =
            "vhost-user-blkmq --socket-path /nowhere --engine null --size 1M --num-queues 2";
        let Ok(Invocation::Serve(arguments)) = cli::parse(words.split(' ').map(Into::into)) else {
            panic!("that is a disk")
        };
        let config = arguments.resolve().expect("a disk");
        let config = config.disks.into_iter().next().expect("one disk");
        let image = Image::open(&config).expect("no image at all");
        let pool = Arc::clone(pool);
        Disk::new(DiskId(number), config, image, shared.to_vec(), pool, None).expect("a disk")
    }

    fn memory() -> MemoryTable {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)]);
        MemoryTable::from_guest_memory(Arc::new(memory.expect("memory")), None).expect("a table")
    }

    fn serving(disk: &Disk) -> Vec<u16> {
        let queues = 0..disk.config.num_queues;
        queues
            .map(|queue| disk.worker_of(QueueId(queue)).id().0)
            .collect()
    }

    #[test]
    fn memory_that_may_wait_moves_the_disk_to_a_worker_of_its_own_and_back() {
        let workers = Workers::start(3);
        let (shared, dedicated) = workers.0.split_at(2);
        let pool = Arc::new(DedicatedWorkers::new(dedicated.to_vec(), 2));
        let (first, second) = (disk(0, shared, &pool), disk(1, shared, &pool));
        first.memory_shown(&memory(), true).expect("one is free");
        assert_eq!(serving(&first), [2, 2]);
        let refused = second.memory_shown(&memory(), true);
        assert!(matches!(refused, Err(DedicateError::NoneLeft)));
        assert_eq!(serving(&second), [1, 0], "as it was");
        second
            .memory_shown(&memory(), false)
            .expect("shared ones do");
        first.memory_shown(&memory(), false).expect("no ring runs");
        assert_eq!(serving(&first), [0, 1]);
        first
            .memory_shown(&memory(), true)
            .expect("it is still its own");
        assert_eq!(serving(&first), [2, 2]);
        assert_eq!((first.workers().count(), second.workers().count()), (3, 2));
    }

    #[test]
    fn queues_that_run_on_shared_workers_refuse_memory_that_may_wait() {
        let workers = Workers::start(2);
        let (shared, dedicated) = workers.0.split_at(1);
        let pool = Arc::new(DedicatedWorkers::new(dedicated.to_vec(), 2));
        let disk = disk(0, shared, &pool);
        disk.queue_starts(QueueId(0), false);
        let refused = disk.memory_shown(&memory(), true);
        assert!(matches!(refused, Err(DedicateError::Running)));
        disk.queue_stopped(QueueId(0));
        disk.memory_shown(&memory(), true).expect("nothing runs");
        disk.queue_starts(QueueId(0), false);
        disk.memory_shown(&memory(), true)
            .expect("more of the same");
        assert_eq!(serving(&disk), [1, 1]);
    }

    #[test]
    fn a_disk_alone_in_its_process_needs_no_worker_of_its_own() {
        let workers = Workers::start(1);
        let pool = Arc::new(DedicatedWorkers::new(Vec::new(), 1));
        let disk = disk(0, &workers.0, &pool);
        disk.memory_shown(&memory(), true)
            .expect("there is no other disk");
        assert_eq!(serving(&disk), [0, 0]);
    }
}
