//! Which worker serves which queue of the disk.

use std::sync::PoisonError;

use super::Disk;
use crate::mq::ids::QueueId;
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
        let nodes: Vec<Option<u16>> = self.workers.iter().map(|w| w.affinity().node).collect();
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

/// Which worker serves each of `queues` queues, by number, where worker *i* lives on node `workers[i]` and
/// the guest's memory is spread as `shares` says (node, bytes).
///
/// Queues are dealt to nodes in proportion to the memory there, evenly mixed, because a guest may use only
/// the first few; and among the workers of a node one by one, beginning with another one for each disk
/// (`first`). Memory on nodes without workers counts for nothing, and if nothing is known all workers are
/// dealt to alike.
pub fn deal(
    queues: u16,
    first: usize,
    workers: &[Option<u16>],
    shares: &[(u16, u64)],
) -> Vec<usize> {
    struct Node {
        workers: Vec<usize>,
        bytes: u64,
        dealt: u64,
    }
    let on = |node: u16| -> Vec<usize> {
        let all = workers.iter().enumerate();
        all.filter(|(_, at)| **at == Some(node))
            .map(|(worker, _)| worker)
            .collect()
    };
    let mut nodes: Vec<Node> = shares
        .iter()
        .map(|(node, bytes)| Node {
            workers: on(*node),
            bytes: *bytes,
            dealt: 0,
        })
        .filter(|node| node.bytes > 0 && !node.workers.is_empty())
        .collect();
    if nodes.is_empty() {
        let everybody = (0..workers.len()).collect();
        nodes.push(Node {
            workers: everybody,
            bytes: 1,
            dealt: 0,
        });
    }
    (0..queues)
        .map(|_| {
            // As seats are shared out by votes (Sainte-Laguë): every prefix is in proportion.
            let due = |node: &Node| (u128::from(node.dealt * 2 + 1) << 64) / u128::from(node.bytes);
            let next = nodes
                .iter_mut()
                .min_by_key(|node| (due(node), std::cmp::Reverse(node.bytes)))
                .expect("at least one");
            let at = first + usize::try_from(next.dealt).expect("a few queues");
            next.dealt += 1;
            next.workers[at % next.workers.len()]
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::deal;

    const WORKERS: [Option<u16>; 4] = [Some(0), Some(0), Some(1), Some(1)];

    #[test]
    fn without_nodes_queues_are_dealt_to_all_in_turn() {
        assert_eq!(deal(5, 0, &[None; 3], &[]), [0, 1, 2, 0, 1]);
        assert_eq!(deal(5, 2, &[None; 3], &[]), [2, 0, 1, 2, 0]);
        assert_eq!(deal(3, 7, &[None; 2], &[(0, 4096)]), [1, 0, 1]);
    }

    #[test]
    fn queues_go_where_the_memory_is() {
        assert_eq!(deal(4, 0, &WORKERS, &[(1, 1 << 30)]), [2, 3, 2, 3]);
        assert_eq!(deal(4, 1, &WORKERS, &[(0, 1 << 30)]), [1, 0, 1, 0]);
    }

    #[test]
    fn memory_on_two_nodes_shares_the_queues_out_from_the_first_on() {
        let even = deal(64, 0, &WORKERS, &[(0, 1 << 30), (1, 1 << 30)]);
        let mut counts = [0; 4];
        for (queues, worker) in even.iter().enumerate() {
            counts[*worker] += 1;
            let on_first: usize = counts[0] + counts[1];
            assert!(on_first.abs_diff(queues.div_ceil(2)) <= 1, "{even:?}");
        }
        assert_eq!(counts, [16; 4]);
        let uneven = deal(8, 0, &WORKERS, &[(0, 1 << 30), (1, 3 << 30)]);
        let on_second = uneven.iter().filter(|worker| **worker >= 2).count();
        assert_eq!(on_second, 6, "{uneven:?}");
    }

    #[test]
    fn memory_where_no_worker_is_counts_for_nothing() {
        let shares = [(5, 8 << 30), (1, 1 << 30)];
        assert_eq!(deal(3, 0, &WORKERS, &shares), [2, 3, 2]);
        assert_eq!(deal(5, 0, &WORKERS, &[(5, 1)]), [0, 1, 2, 3, 0]);
    }
}
