//! The queue map: which queue a CPU uses.
//!
//! blk-mq builds one for CPUs and hardware queues. Here it says which vCPUs share an hctx (and so how
//! many ctxs that hctx has), and, with queues in the place of CPUs, which worker owns a queue.
//!
//! Both of the kernel's default algorithms are here, because a guest uses the one of its own kernel:
//! *modulo* (block/blk-mq-cpumap.c up to Linux 6.2) and *grouping* (lib/group_cpus.c, since 6.6).

use std::collections::BTreeMap;

use thiserror::Error;

/// How a map is built.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum MapKind {
    /// Neighbours together: nodes first, then SMT siblings, groups of equal size (Linux 6.6 and later).
    #[default]
    Grouping,
    /// Round-robin over the CPUs that are present, SMT siblings together after that (up to Linux 6.2).
    Modulo,
    /// The queue of each CPU, as given.
    Explicit(Vec<u16>),
}

/// What a map needs to know of one CPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cpu {
    /// Whether it is there; one that may be plugged in later is mapped too, but served last.
    pub present: bool,
    /// The NUMA node it belongs to.
    pub node: u16,
    /// The CPUs that share its core, itself included or not; numbers without a CPU are ignored.
    pub siblings: Vec<u16>,
}

/// The CPUs a map is built for, by number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Topology {
    /// One entry for each possible CPU.
    pub cpus: Vec<Cpu>,
}

/// Why a map cannot be built.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum MapError {
    /// There is no queue to map to.
    #[error("a queue map needs at least one queue")]
    NoQueues,
    /// There are no CPUs, or more than the 65,536 that a number of 16 bits tells apart.
    #[error("a queue map needs 1 to 65536 CPUs, not {cpus}")]
    CpuCount {
        /// How many there are.
        cpus: usize,
    },
    /// An explicit map has an entry too few or too many.
    #[error("the queue map lists {listed} CPUs, but there are {cpus}")]
    Length {
        /// Entries in the list.
        listed: usize,
        /// CPUs in the topology.
        cpus: usize,
    },
    /// An explicit map names a queue that is not there.
    #[error("the queue map puts CPU {cpu} on queue {queue}, but there are only {queues} queues")]
    Queue {
        /// The CPU of the entry.
        cpu: u16,
        /// The queue it names.
        queue: u16,
        /// How many queues there are.
        queues: u16,
    },
}

/// Which queue each CPU uses, and which CPUs use each queue. Every CPU has exactly one queue; a queue
/// may have no CPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueueMap {
    queue_of: Vec<u16>,
    cpus_of: Vec<Vec<u16>>,
}

impl Topology {
    /// `cpus` present CPUs on one node, each a core of its own: all that a vhost-user backend can know
    /// of its guest.
    pub fn flat(cpus: u16) -> Topology {
        let cpu = Cpu {
            present: true,
            node: 0,
            siblings: Vec::new(),
        };
        Topology {
            cpus: vec![cpu; usize::from(cpus)],
        }
    }

    /// The first CPU of the core that `cpu` is on.
    fn first_sibling(&self, cpu: usize) -> usize {
        let siblings = self.cpus[cpu]
            .siblings
            .iter()
            .map(|&sibling| usize::from(sibling));
        siblings
            .filter(|&sibling| sibling < self.cpus.len())
            .min()
            .map_or(cpu, |first| first.min(cpu))
    }
}

impl QueueMap {
    /// Maps the CPUs of `topology` to queues 0 to `queues` − 1.
    ///
    /// # Errors
    ///
    /// Without CPUs or queues there is no map; an explicit one must fit both.
    pub fn build(kind: &MapKind, topology: &Topology, queues: u16) -> Result<QueueMap, MapError> {
        let cpus = topology.cpus.len();
        if queues == 0 {
            return Err(MapError::NoQueues);
        }
        if cpus == 0 || cpus > usize::from(u16::MAX) + 1 {
            return Err(MapError::CpuCount { cpus });
        }
        let queue_of = match kind {
            MapKind::Grouping => grouping(topology, queues),
            MapKind::Modulo => modulo(topology, queues),
            MapKind::Explicit(list) => explicit(list, cpus, queues)?,
        };
        assert_eq!(queue_of.len(), cpus, "every CPU has a queue");
        let mut cpus_of = vec![Vec::new(); usize::from(queues)];
        for (cpu, &queue) in (0..=u16::MAX).zip(&queue_of) {
            cpus_of[usize::from(queue)].push(cpu);
        }
        Ok(QueueMap { queue_of, cpus_of })
    }

    /// The queue that `cpu` uses.
    ///
    /// # Panics
    ///
    /// If there is no such CPU.
    pub fn queue_of(&self, cpu: u16) -> u16 {
        self.queue_of[usize::from(cpu)]
    }

    /// The CPUs that use `queue`, in ascending order; there may be none.
    ///
    /// # Panics
    ///
    /// If there is no such queue.
    pub fn cpus_of(&self, queue: u16) -> &[u16] {
        &self.cpus_of[usize::from(queue)]
    }

    /// How many CPUs are mapped.
    pub fn cpus(&self) -> usize {
        self.queue_of.len()
    }

    /// How many queues there are, used or not.
    pub fn queues(&self) -> usize {
        self.cpus_of.len()
    }
}

fn explicit(list: &[u16], cpus: usize, queues: u16) -> Result<Vec<u16>, MapError> {
    if list.len() != cpus {
        return Err(MapError::Length {
            listed: list.len(),
            cpus,
        });
    }
    match (0..=u16::MAX)
        .zip(list)
        .find(|&(_, &queue)| queue >= queues)
    {
        Some((cpu, &queue)) => Err(MapError::Queue { cpu, queue, queues }),
        None => Ok(list.to_vec()),
    }
}

/// Up to Linux 6.2. Present CPUs take one queue each while queues last; every CPU after that takes the
/// queue of its core's first CPU, which itself takes the next one in turn.
fn modulo(topology: &Topology, queues: u16) -> Vec<u16> {
    let cpus = &topology.cpus;
    let mut queue_of: Vec<Option<u16>> = vec![None; cpus.len()];
    let mut turn = (0..queues).cycle();
    let mut fresh = queues;
    let mut next = move || {
        turn.next()
            .expect("a cycle of at least one queue has no end")
    };

    for (cpu, _) in cpus.iter().enumerate().filter(|(_, cpu)| cpu.present) {
        if fresh == 0 {
            break;
        }
        queue_of[cpu] = Some(next());
        fresh -= 1;
    }
    for cpu in 0..cpus.len() {
        if queue_of[cpu].is_some() {
            continue;
        }
        let first = topology.first_sibling(cpu);
        queue_of[cpu] = match queue_of[first] {
            Some(queue) if fresh == 0 => Some(queue),
            _ => Some(next()),
        };
        fresh = fresh.saturating_sub(1);
    }
    queue_of.into_iter().flatten().collect()
}

/// Since Linux 6.6. The CPUs that are present are divided into groups, then those that are not, whose
/// groups go on where the first ones ended, or begin again at 0.
fn grouping(topology: &Topology, queues: u16) -> Vec<u16> {
    let mut queue_of = vec![0; topology.cpus.len()];
    let used = group(topology, true, 0, queues, &mut queue_of);
    group(
        topology,
        false,
        if used < queues { used } else { 0 },
        queues,
        &mut queue_of,
    );
    queue_of
}

/// Divides the CPUs whose `present` is as given into `queues` groups from `start` on, going round, and
/// returns how many groups there are.
fn group(topology: &Topology, present: bool, start: u16, queues: u16, queue_of: &mut [u16]) -> u16 {
    let mut nodes: BTreeMap<u16, Vec<usize>> = BTreeMap::new();
    for (number, cpu) in topology
        .cpus
        .iter()
        .enumerate()
        .filter(|(_, cpu)| cpu.present == present)
    {
        nodes.entry(cpu.node).or_default().push(number);
    }
    if nodes.is_empty() {
        return 0;
    }
    let mut turn = (0..queues).cycle().skip(usize::from(start));
    let mut next = move || {
        turn.next()
            .expect("a cycle of at least one queue has no end")
    };

    if usize::from(queues) <= nodes.len() {
        for cpus in nodes.values() {
            let queue = next();
            cpus.iter().for_each(|&cpu| queue_of[cpu] = queue);
        }
        return queues;
    }

    // Small nodes first, so that each gets its one group before the large ones share the rest.
    let mut nodes: Vec<Vec<usize>> = nodes.into_values().collect();
    nodes.sort_by_key(Vec::len);
    let mut cpus_left: usize = nodes.iter().map(Vec::len).sum();
    let mut groups_left = usize::from(queues).min(cpus_left);
    let mut done = 0;
    for mut cpus in nodes {
        let groups = (groups_left * cpus.len() / cpus_left).max(1);
        cpus_left -= cpus.len();
        groups_left -= groups;
        done += groups;
        let (size, mut larger) = (cpus.len() / groups, cpus.len() % groups);
        for _ in 0..groups {
            let queue = next();
            for cpu in take_group(topology, &mut cpus, size + usize::from(larger > 0)) {
                queue_of[cpu] = queue;
            }
            larger = larger.saturating_sub(1);
        }
    }
    u16::try_from(done).expect("never more groups than queues")
}

/// Takes `size` CPUs out of `cpus` (ascending): the lowest, then its siblings, then the next lowest.
fn take_group(topology: &Topology, cpus: &mut Vec<usize>, size: usize) -> Vec<usize> {
    let mut taken = Vec::with_capacity(size);
    while taken.len() < size {
        let first = cpus.remove(0);
        taken.push(first);
        let mut siblings = topology.cpus[first].siblings.clone();
        siblings.sort_unstable();
        for sibling in siblings {
            if taken.len() == size {
                break;
            }
            if let Ok(place) = cpus.binary_search(&usize::from(sibling)) {
                taken.push(cpus.remove(place));
            }
        }
    }
    taken
}

pub mod queue_types;
#[cfg(test)]
mod tests;
