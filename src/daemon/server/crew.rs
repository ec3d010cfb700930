//! The workers' threads: how many, where, and their start and end.

use std::path::Path;
use std::thread::JoinHandle;

use crate::config::Config;
use crate::daemon::clock::Clock;
use crate::daemon::disk::worker_id;
use crate::daemon::message::WorkerHandle;
use crate::daemon::placement::{self, Nodes, Seat};
use crate::daemon::worker::{self, WorkerOptions};
use crate::error::StartError;
use crate::mq::limits::MAX_HCTXS;

use super::system;

/// All workers.
pub(super) struct Crew {
    handles: Vec<WorkerHandle>,
    threads: Vec<JoinHandle<()>>,
}

impl Crew {
    /// Starts a worker on each seat.
    pub(super) fn start(
        config: &Config,
        seats: Vec<Seat>,
        clock: Clock,
    ) -> Result<Crew, StartError> {
        let (queues, count) = (queues(config), seats.len());
        let several = seats.iter().any(|seat| seat.node != seats[0].node);
        // Each disk begins with another worker, so one may get a queue of each disk more than its
        // share. On several nodes the memory of the guests may bring all queues to the workers of one.
        let share = if several { queues } else { queues / count };
        let rings = u16::try_from(share + config.disks.len())
            .unwrap_or(MAX_HCTXS)
            .min(MAX_HCTXS);
        let options = WorkerOptions {
            rings,
            restricted: config.sandbox.io_uring,
            poll_us: config.poll_us,
            timeout_s: config.timeout_s,
            on_timeout: config.on_timeout,
            clock,
        };
        let mut crew = Crew {
            handles: Vec::new(),
            threads: Vec::new(),
        };
        for (index, seat) in seats.into_iter().enumerate() {
            if let Some(cpus) = &seat.cpus {
                let node = seat.node.map(|node| format!(", node {node}"));
                log::info!("worker {index}: CPU {cpus}{}", node.unwrap_or_default());
            }
            let spawned = worker::spawn(worker_id(index), options, seat);
            let (handle, thread) = spawned.map_err(|source| StartError::System {
                what: format!("start worker {index}"),
                source,
                advice: "check that io_uring is allowed (sysctl kernel.io_uring_disabled) \
                         and that the limit of locked memory is not tiny (ulimit -l)",
            })?;
            crew.handles.push(handle);
            crew.threads.push(thread);
        }
        Ok(crew)
    }

    pub(super) fn handles(&self) -> &[WorkerHandle] {
        &self.handles
    }

    /// Waits until all have ended.
    pub(super) fn join(self) {
        for thread in self.threads {
            let _ = thread.join();
        }
    }
}

fn queues(config: &Config) -> usize {
    let queues = config.disks.iter().map(|disk| usize::from(disk.num_queues));
    queues.sum()
}

/// Where the workers are to live.
pub(super) fn seats(config: &Config) -> Result<Vec<Seat>, StartError> {
    let allowed =
        placement::allowed_cpus().map_err(|source| system("ask which CPUs may be used", source))?;
    if let Some(list) = &config.worker_cpus {
        placement::check(list, &placement::online_cpus(&allowed), &allowed)
            .map_err(StartError::Usage)?;
    }
    let nodes = Nodes::discover(Path::new(placement::NODES));
    Ok(placement::seats(
        config.workers.min(queues(config)),
        config.worker_cpus.as_ref(),
        &allowed,
        &nodes,
    ))
}
