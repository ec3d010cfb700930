//! The workers' threads: how many, where, and their start and end.

use std::path::Path;
use std::thread::JoinHandle;

use crate::config::Config;
use crate::disk::{queue_assignment, worker_id};
use crate::error::StartError;
use crate::mq::limits::MAX_HCTXS;
use crate::server::placement::{self, Nodes};
use crate::sys::clock::Clock;
use crate::worker::affinity::{Affinity, Load};
use crate::worker::dedicated;
use crate::worker::message::WorkerHandle;
use crate::worker::{self, WorkerOptions};

use super::{locked_memory, system};

/// All workers.
pub(super) struct Crew {
    shared: Vec<WorkerHandle>,
    dedicated: Vec<WorkerHandle>,
    threads: Vec<JoinHandle<()>>,
}

impl Crew {
    /// Starts a worker on each affinity.
    pub(super) fn start(
        config: &Config,
        affinities: Vec<Affinity>,
        clock: Clock,
    ) -> Result<Crew, StartError> {
        let loads = loads(config, &affinities);
        let options = WorkerOptions {
            load: Load::default(),
            restricted: config.sandbox.io_uring,
            poll_us: config.poll_us,
            timeout_s: config.timeout_s,
            on_timeout: config.on_timeout,
            clock,
        };
        let mut crew = Crew {
            shared: Vec::new(),
            dedicated: Vec::new(),
            threads: Vec::new(),
        };
        for (index, affinity) in affinities.into_iter().enumerate() {
            if let Some(cpus) = &affinity.cpus {
                let node = affinity.node.map(|node| format!(", node {node}"));
                log::info!("worker {index}: CPU {cpus}{}", node.unwrap_or_default());
            }
            let options = WorkerOptions {
                load: loads[index],
                ..options
            };
            let spawned = worker::spawn(worker_id(index), options, affinity);
            let (handle, thread) = spawned.map_err(|source| StartError::System {
                what: format!("start worker {index}"),
                source,
                advice: "check that io_uring is allowed (sysctl kernel.io_uring_disabled) \
                         and that the limit of locked memory is not tiny (ulimit -l)",
            })?;
            crew.shared.push(handle);
            crew.threads.push(thread);
        }
        crew.start_dedicated(config, options);
        if config.control_path.is_some() {
            locked_memory::check(options, crew.threads.len());
        }
        Ok(crew)
    }

    /// Starts the workers that disks may need for themselves. Most never do, so that too few are no reason
    /// not to serve.
    fn start_dedicated(&mut self, config: &Config, options: WorkerOptions) {
        let rings = config.disks.iter().map(|disk| disk.num_queues).max();
        let options = WorkerOptions {
            load: Load {
                rings: rings.unwrap_or(1),
                disks: 1,
            },
            ..options
        };
        let affinity = Affinity {
            cpus: config.worker_cpus.clone(),
            node: None,
        };
        let count = dedicated::count(config.disks.len());
        for index in 0..count {
            let id = worker_id(self.shared.len() + index);
            match worker::spawn(id, options, affinity.clone()) {
                Ok((handle, thread)) => {
                    self.dedicated.push(handle);
                    self.threads.push(thread);
                }
                Err(error) => {
                    log::warn!(
                        "{index} of {count} dedicated workers could be started: {error}; a guest whose memory is \
                         a file on a disk may be refused (threads and locked memory are limited by ulimit -u \
                         and -l)"
                    );
                    return;
                }
            }
        }
    }

    /// The workers that serve all disks.
    pub(super) fn shared(&self) -> &[WorkerHandle] {
        &self.shared
    }

    /// Those that a disk may take for itself.
    pub(super) fn dedicated(&self) -> &[WorkerHandle] {
        &self.dedicated
    }

    /// Waits until all have ended.
    pub(super) fn join(self) {
        for thread in self.threads {
            let _ = thread.join();
        }
    }
}

/// The most that each worker will have to serve. Disks offer more queues than guests use, so there may be
/// more than a worker can have: then it is a ring too many that is refused.
fn loads(config: &Config, affinities: &[Affinity]) -> Vec<Load> {
    let mut loads = vec![Load::default(); affinities.len()];
    let several = affinities
        .iter()
        .any(|affinity| affinity.node != affinities[0].node);
    for (index, disk) in config.disks.iter().enumerate() {
        let mut rings = vec![0_u16; affinities.len()];
        if several {
            // The guest's memory may bring all queues to the workers of one node.
            rings.fill(disk.num_queues);
        } else {
            for worker in queue_assignment::at_first(index, disk.num_queues, affinities.len()) {
                rings[worker] += 1;
            }
        }
        for (load, rings) in loads.iter_mut().zip(rings) {
            load.rings = load.rings.saturating_add(rings).min(MAX_HCTXS);
            load.disks += u16::from(rings > 0);
        }
    }
    loads
}

fn queues(config: &Config) -> usize {
    let queues = config.disks.iter().map(|disk| usize::from(disk.num_queues));
    queues.sum()
}

/// Where the workers are to live.
pub(super) fn affinities(config: &Config) -> Result<Vec<Affinity>, StartError> {
    let allowed =
        placement::allowed_cpus().map_err(|source| system("ask which CPUs may be used", source))?;
    if let Some(list) = &config.worker_cpus {
        placement::check(list, &placement::online_cpus(&allowed), &allowed)
            .map_err(StartError::Usage)?;
    }
    let nodes = Nodes::discover(Path::new(placement::NODES));
    Ok(placement::affinities(
        config.workers.min(queues(config)),
        config.worker_cpus.as_ref(),
        &allowed,
        &nodes,
    ))
}
