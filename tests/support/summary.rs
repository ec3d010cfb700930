//! The summary the program prints when it ends.

use serde::Deserialize;

/// The program's own account of what it did (`--summary json`).
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Summary {
    /// One entry a disk.
    pub disks: Vec<DiskSummary>,
    /// One entry a worker.
    #[serde(default)]
    pub workers: Vec<WorkerSummary>,
}

/// One worker's account.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct WorkerSummary {
    /// System calls it made.
    pub enters: u64,
    /// Transfers the device was polled for.
    #[serde(default)]
    pub polled: u64,
    /// Commands that went through an aligned buffer.
    #[serde(default)]
    pub bounced: u64,
}

/// One disk's account.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct DiskSummary {
    /// Serial number.
    pub serial: String,
    /// One entry a queue.
    pub queues: Vec<QueueSummary>,
}

/// One queue's account.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct QueueSummary {
    /// Index of the queue.
    pub queue: usize,
    /// vCPUs the queue belongs to.
    pub cpus: Vec<usize>,
    /// Software contexts.
    pub ctxs: usize,
    /// Worker that owns it.
    pub worker: usize,
    /// Requests completed.
    pub requests: u64,
    /// Reads.
    pub read: u64,
    /// Writes.
    pub write: u64,
    /// Flushes.
    pub flush: u64,
    /// Discards.
    pub discard: u64,
    /// Write-zeroes.
    pub write_zeroes: u64,
    /// Bytes read.
    pub bytes_read: u64,
    /// Bytes written.
    pub bytes_written: u64,
    /// Drains that brought something.
    pub batches: u64,
    /// Requests issued without being staged.
    pub direct: u64,
    /// Requests staged first.
    pub staged: u64,
    /// Requests merged into another one.
    pub merged: u64,
    /// Requests failed.
    pub errors: u64,
    /// Kicks received.
    pub kicks: u64,
    /// Calls sent.
    pub calls: u64,
}

impl Summary {
    /// The queues of the first disk.
    pub fn queues(&self) -> &[QueueSummary] {
        &self.disks.first().expect("the summary has a disk").queues
    }

    /// The sum of a counter over the first disk's queues.
    pub fn total(&self, counter: impl Fn(&QueueSummary) -> u64) -> u64 {
        self.queues().iter().map(counter).sum()
    }
}
