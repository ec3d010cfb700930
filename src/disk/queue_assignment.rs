//! Which worker serves which queue of the disk.

use std::sync::PoisonError;

use super::Disk;
use crate::mq::ids::QueueId;
use crate::server::placement::deal;
use crate::virtio::memory::MemoryTable;
use crate::worker::dedicated::DedicateError;
use crate::worker::message::WorkerHandle;

/// The worker of each queue at first, when no memory is known.
pub fn at_first(disk: usize, queues: u16, workers: usize) -> Vec<usize> {
    deal(queues, disk, &vec![None; workers], &[])
}

impl Disk {
    /// The worker a queue belongs to: the same as long as a ring of the disk runs.
    ///
    /// Queues are dealt to workers one by one, beginning with a different worker for each disk. A
    /// grouping as the guest's queue map makes would be better for caches, but a disk offers many
    /// more queues than a guest uses, and grouping them all would put the few that are used onto
    /// the first worker.
    pub fn worker_of(&self, queue: QueueId) -> &WorkerHandle {
        let dealt = self.dealt.lock().unwrap_or_else(PoisonError::into_inner);
        let shared = self.workers.get(dealt[queue.index()]);
        let worker = shared.or_else(|| self.dedicated.get());
        worker.expect("queues are dealt to workers that the disk has")
    }

    /// A front end has shown its guest's memory. On a machine with several NUMA nodes the queues go to
    /// workers near it, unless some are with their workers already. Where touching the memory may wait for a
    /// disk's file system (`may_wait`), they go to a worker that serves no other disk.
    ///
    /// # Errors
    ///
    /// There is no worker for memory that may wait.
    pub fn memory_shown(&self, memory: &MemoryTable, may_wait: bool) -> Result<(), DedicateError> {
        // Rings start while this is held, or before.
        let queues = self.lock_queues();
        let is_alone = self.is_alone();
        if may_wait && self.shares_workers() {
            if !is_alone {
                if !queues.started.is_empty() {
                    return Err(DedicateError::Running);
                }
                self.dedicate()?;
                let dedicated = self.workers.len();
                self.deal(vec![dedicated; usize::from(self.config.num_queues)]);
            }
            return Ok(());
        }
        let nodes: Vec<Option<u16>> = self.workers.iter().map(|w| w.seat().node).collect();
        let several = nodes.iter().any(|node| *node != nodes[0]);
        if !queues.started.is_empty() || !several && !is_alone {
            return Ok(());
        }
        let shares = memory.nodes();
        let dealt = deal(self.config.num_queues, self.id.index(), &nodes, &shares);
        if several {
            log::info!(
                disk = self.id.0; "disk {}: its guest's memory is on {}; queues go to workers {}",
                self.config.serial,
                in_words(&shares),
                first_workers(&dealt)
            );
        }
        self.deal(dealt);
        Ok(())
    }

    /// Whether its dedicated worker serves its queues.
    fn is_alone(&self) -> bool {
        let dealt = self.dealt.lock().unwrap_or_else(PoisonError::into_inner);
        dealt.contains(&self.workers.len())
    }

    fn deal(&self, dealt: Vec<usize>) {
        *self.dealt.lock().unwrap_or_else(PoisonError::into_inner) = dealt;
    }
}

/// `node 0 (1.5 GiB), node 1 (512 MiB)`.
fn in_words(shares: &[(u16, u64)]) -> String {
    if shares.is_empty() {
        return "no node that is known".to_owned();
    }
    let bytes = crate::disk::summary::bytes;
    let nodes = shares
        .iter()
        .map(|(node, share)| format!("node {node} ({})", bytes(*share)));
    nodes.collect::<Vec<_>>().join(", ")
}

/// The workers that have queues, in the order in which they get their first.
fn first_workers(dealt: &[usize]) -> String {
    let mut seen = Vec::new();
    for worker in dealt {
        let worker = worker.to_string();
        if !seen.contains(&worker) {
            seen.push(worker);
        }
    }
    seen.join(", ")
}
