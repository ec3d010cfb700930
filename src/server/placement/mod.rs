//! Where workers live, and which of them serve which queues.
//!
//! A worker's CPUs are chosen once, when it starts: what it allocates afterwards, its rings and tables
//! among it, the kernel puts on the node it runs on. Which worker serves a queue is chosen when a front
//! end has shown its memory and before its rings start: one on a node that has a part of that memory.
//! With a single node there is nothing to choose.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::sys::cpu_list::{CpuList, MAX_CPUS};

/// Where the kernel describes the nodes of the machine.
pub const NODES: &str = "/sys/devices/system/node";

/// The machine's NUMA nodes that have CPUs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Nodes(BTreeMap<u16, Vec<u16>>);

impl Nodes {
    /// Reads them from a folder like [`NODES`]; without it, or where it cannot be understood, there are
    /// none, which is as good as one.
    pub fn discover(root: &Path) -> Nodes {
        let mut nodes = BTreeMap::new();
        for entry in fs::read_dir(root).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let number = name.to_str().and_then(|name| name.strip_prefix("node"));
            let Some(Ok(number)) = number.map(str::parse) else {
                continue;
            };
            // A node with memory and no CPU has an empty list.
            let list = fs::read_to_string(entry.path().join("cpulist"));
            if let Some(Ok(list)) = list.ok().map(|list| CpuList::parse(&list)) {
                nodes.insert(number, list.cpus().to_vec());
            }
        }
        Nodes(nodes)
    }

    /// Whether there is something to choose.
    pub fn are_several(&self) -> bool {
        self.0.len() > 1
    }

    /// The node of a CPU.
    pub fn of(&self, cpu: u16) -> Option<u16> {
        let mut nodes = self.0.iter();
        nodes.find_map(|(node, cpus)| cpus.contains(&cpu).then_some(*node))
    }
}

/// Where a worker lives.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seat {
    /// The CPUs it may run on; all that the process may use where it is `None`.
    pub cpus: Option<CpuList>,
    /// The node they are on, if the machine has several.
    pub node: Option<u16>,
}

impl Seat {
    /// The calling thread takes the seat.
    ///
    /// # Errors
    ///
    /// The kernel does not let it.
    pub fn take(&self) -> io::Result<()> {
        let Some(list) = &self.cpus else {
            return Ok(());
        };
        let mut set = CpuSet::new();
        for cpu in list.cpus() {
            set.set(usize::from(*cpu));
        }
        Ok(sched_setaffinity(None, &set)?)
    }
}

/// The most that a worker will have to serve at a time.
#[derive(Clone, Copy, Debug, Default)]
pub struct Load {
    /// Virtqueues.
    pub rings: u16,
    /// The disks they belong to.
    pub disks: u16,
}

/// The CPUs this process may use.
///
/// # Errors
///
/// The kernel does not say.
pub fn allowed_cpus() -> io::Result<Vec<u16>> {
    let set = sched_getaffinity(None)?;
    Ok((0..MAX_CPUS)
        .filter(|cpu| set.is_set(usize::from(*cpu)))
        .collect())
}

/// The CPUs that are switched on; `allowed`, if the kernel does not say.
pub fn online_cpus(allowed: &[u16]) -> Vec<u16> {
    let list = fs::read_to_string("/sys/devices/system/cpu/online");
    match list.map(|list| CpuList::parse(&list)) {
        Ok(Ok(list)) => list.cpus().to_vec(),
        _ => allowed.to_vec(),
    }
}

/// Whether workers may run on the CPUs of `--worker-cpus`.
///
/// # Errors
///
/// In words: the first that does not exist or is not allowed.
pub fn check(list: &CpuList, online: &[u16], allowed: &[u16]) -> Result<(), String> {
    let show = |cpus: &[u16]| CpuList::from(cpus.to_vec()).to_string();
    for cpu in list.cpus() {
        if !online.contains(cpu) {
            return Err(format!(
                "--worker-cpus names CPU {cpu}, which this machine does not have; it has {}",
                show(online)
            ));
        }
        if !allowed.contains(cpu) {
            return Err(format!(
                "--worker-cpus names CPU {cpu}, which this process may not use; it may use {} \
                 (taskset, cpuset or the service manager says so)",
                show(allowed)
            ));
        }
    }
    Ok(())
}

/// The seats of `workers` workers: one CPU each, in turn, of those that were asked for. If none were and
/// there are several nodes, each worker gets a node, as many workers a node as it has allowed CPUs in
/// proportion.
pub fn seats(workers: usize, asked: Option<&CpuList>, allowed: &[u16], nodes: &Nodes) -> Vec<Seat> {
    let node_of = |cpu| nodes.of(cpu).filter(|_| nodes.are_several());
    if let Some(list) = asked {
        let cpus = list.cpus().iter().cycle().take(workers);
        return cpus
            .map(|cpu| Seat {
                cpus: Some(CpuList::from(vec![*cpu])),
                node: node_of(*cpu),
            })
            .collect();
    }
    (0..workers)
        .map(|worker| {
            let at = worker * allowed.len() / workers.max(1);
            let node = allowed.get(at).and_then(|cpu| node_of(*cpu));
            let cpus = node.map(|node| {
                let there = allowed.iter().filter(|cpu| nodes.of(**cpu) == Some(node));
                CpuList::from(there.copied().collect::<Vec<_>>())
            });
            Seat { cpus, node }
        })
        .collect()
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
mod tests;
