//! Workers that serve one disk each.
//!
//! A worker reads and writes guest memory, and where that memory is a file on a disk's file system, a page
//! fault waits for that file system. The other disks of the worker would wait with it, so such a disk is
//! served by a dedicated worker. That is known when a front end shows its memory, long after the sandbox has
//! closed, and then no io_uring can be made: the threads and their rings are made before, and sleep until a
//! disk takes one.

use std::io;
use std::sync::{Mutex, PoisonError};

use super::message::WorkerHandle;

/// The most dedicated workers of a process. Each has a thread and about 100 KiB of rings.
pub const MAX_DEDICATED: usize = 8;

/// How many workers are kept for a process of so many disks. A disk alone has all workers to itself.
pub fn count(disks: usize) -> usize {
    match disks {
        0 | 1 => 0,
        several => several.min(MAX_DEDICATED),
    }
}

/// The workers that no disk has taken yet.
#[derive(Debug)]
pub struct DedicatedWorkers {
    free: Mutex<Vec<WorkerHandle>>,
    /// There are several disks, so that a disk can keep another one waiting.
    shared: bool,
}

/// Why a disk gets no dedicated worker. Each is one line.
#[derive(Debug, thiserror::Error)]
pub enum DedicateError {
    /// Its queues run on workers that others use.
    #[error(
        "its queues run already, and this memory needs a worker of its own; connect again, and show it first"
    )]
    Running,
    /// A change waits for its storage.
    #[error("its size or its scheduler is being changed; connect again when that is done")]
    Changing,
    /// All were taken.
    #[error(
        "all {MAX_DEDICATED} dedicated workers of this process are taken by other disks; serve this disk from a \
         process of its own"
    )]
    NoneLeft,
    /// The worker cannot serve the image.
    #[error("its dedicated worker cannot serve the image: {0}")]
    Engine(#[from] io::Error),
}

impl DedicatedWorkers {
    /// Of a process with this many disks.
    pub fn new(free: Vec<WorkerHandle>, disks: usize) -> DedicatedWorkers {
        DedicatedWorkers {
            free: Mutex::new(free),
            shared: disks > 1,
        }
    }

    /// Whether workers serve several disks.
    pub fn are_needed(&self) -> bool {
        self.shared
    }

    /// A worker for a disk to keep.
    pub fn take(&self) -> Option<WorkerHandle> {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        free.pop()
    }
}
