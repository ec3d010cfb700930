//! Which CPUs workers run on.
//!
//! A worker's CPUs are chosen once, when it starts: what it allocates afterwards, its rings and tables
//! among it, the kernel puts on the node it runs on. Which worker serves a queue is chosen later
//! (`disk::queue_assignment`).

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;

use rustix::thread::sched_getaffinity;

use crate::sys::cpu_list::{CpuList, MAX_CPUS};
use crate::worker::affinity::Affinity;

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

/// The CPUs of `workers` workers: one CPU each, in turn, of those that were asked for. If none were and
/// there are several nodes, each worker gets a node, as many workers a node as it has allowed CPUs in
/// proportion.
pub fn affinities(
    workers: usize,
    asked: Option<&CpuList>,
    allowed: &[u16],
    nodes: &Nodes,
) -> Vec<Affinity> {
    let node_of = |cpu| nodes.of(cpu).filter(|_| nodes.are_several());
    if let Some(list) = asked {
        let cpus = list.cpus().iter().cycle().take(workers);
        return cpus
            .map(|cpu| Affinity {
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
            Affinity { cpus, node }
        })
        .collect()
}

#[cfg(test)]
mod tests;
