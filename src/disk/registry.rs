//! Who is there: the disks, the workers and the groups of the process. Whoever looks at the process or
//! changes it while it runs does so here; the answers are copies, the changes are messages.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use crate::config::Group;
use crate::mq::ids::{DiskId, WorkerId};
use crate::mq::stats::diskstats::DiskStats;
use crate::mq::throttle::{Limits, Throttle};
use crate::mq::trace::Action;
use crate::sys::cpu_list::CpuList;

use super::summary::{DiskSummary, QueueSummary, Summary, WorkerSummary};
use super::{Disk, Membership};
use crate::sys::clock::Clock;
use crate::worker::counts::{TraceReport, WorkerReport};
use crate::worker::io_errors::DiskFaults;
use crate::worker::message::{Message, Reply, WorkerHandle, ask_all_within};

/// How long a worker may take to answer somebody who looks at the process. None takes long, unless it waits
/// inside the kernel for one disk.
const PATIENCE: Duration = Duration::from_secs(3);

/// The groups of disks that share limits, by name.
#[derive(Debug, Default)]
pub struct Groups {
    now: Mutex<BTreeMap<String, Arc<Throttle>>>,
    /// As the configuration has them.
    configured: BTreeMap<String, Limits>,
}

impl Groups {
    /// Those of the configuration, with full buckets.
    pub fn new(groups: &[Group]) -> Groups {
        let configured: BTreeMap<_, _> = groups
            .iter()
            .map(|group| (group.name.clone(), group.limits))
            .collect();
        let now = configured
            .iter()
            .map(|(name, limits)| (name.clone(), Arc::new(Throttle::new(*limits))));
        Groups {
            now: Mutex::new(now.collect()),
            configured,
        }
    }

    /// The group of that name, as what a disk can be a member of.
    pub fn find(&self, name: &str) -> Option<Membership> {
        let throttle = Arc::clone(self.lock().get(name)?);
        Some(Membership {
            name: name.to_owned(),
            throttle,
        })
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Throttle>>> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What keeps disks from being brought to rest, or may.
#[derive(Clone, Debug)]
pub struct Restlessness {
    /// The first disk that is held after an error.
    pub held: Option<DiskId>,
    /// The first worker that does not answer.
    pub stuck: Option<WorkerId>,
    /// By disk: for how long its storage has had the oldest of its requests.
    pub oldest: Vec<Duration>,
}

/// The process, for those who look at it and change it.
#[derive(Debug)]
pub struct Roster {
    disks: Vec<Arc<Disk>>,
    /// The shared ones first, then the dedicated ones.
    workers: Vec<WorkerHandle>,
    /// What each worker that serves a disk said last.
    last: Mutex<BTreeMap<WorkerId, WorkerReport>>,
    groups: Groups,
    /// The workers' clock.
    clock: Clock,
    since: SystemTime,
}

impl Roster {
    /// `clock` is the workers'.
    pub fn new(
        disks: Vec<Arc<Disk>>,
        workers: Vec<WorkerHandle>,
        groups: Groups,
        clock: Clock,
    ) -> Roster {
        Roster {
            disks,
            workers,
            last: Mutex::default(),
            groups,
            clock,
            since: SystemTime::now() - clock.elapsed(),
        }
    }

    /// The disks, by number.
    pub fn disks(&self) -> &[Arc<Disk>] {
        &self.disks
    }

    /// When the workers started.
    pub fn since(&self) -> SystemTime {
        self.since
    }

    /// What each worker that serves a disk has counted so far, in the workers' order. One that does not
    /// answer soon is counted as it was.
    pub fn reports(&self) -> Vec<WorkerReport> {
        self.merge(ask_all_within(&self.workers, PATIENCE, Message::Report))
    }

    /// Ends all workers when nothing is in flight any more; their last counts. Whether all have ended: one
    /// that does not answer for `patience` has not.
    pub fn shut_down(&self, patience: Duration) -> (Vec<WorkerReport>, bool) {
        let answers = ask_all_within(&self.workers, patience, Message::Shutdown);
        let ended = answers.iter().all(Option::is_some);
        (self.merge(answers), ended)
    }

    fn merge(&self, answers: Vec<Option<WorkerReport>>) -> Vec<WorkerReport> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        for (worker, answer) in self.workers.iter().zip(answers) {
            match answer {
                // No disk has needed this one.
                Some(report) if report.disks.is_empty() => {}
                Some(report) => drop(last.insert(worker.id(), report)),
                None => {
                    if let Some(report) = last.get_mut(&worker.id()) {
                        report.stuck = true;
                    }
                }
            }
        }
        last.values().cloned().collect()
    }

    /// Gives up the locks of all images, which no ring uses any more. Closing them may come later: a client of the
    /// control socket is still being answered. An image whose size that client changes stays locked.
    pub fn unlock_images(&self) {
        for disk in &self.disks {
            disk.give_up_image();
        }
    }

    /// The same for the disks whose sessions have ended, where others' have not: their rings have nothing in flight.
    /// The process keeps its files for as long as the kernel has I/O of one disk, and another process is to have the
    /// others meanwhile.
    pub fn unlock_images_at_rest(&self) {
        for disk in self.disks.iter().filter(|disk| !disk.is_connected()) {
            disk.give_up_image();
        }
    }

    /// Answers of those that answer soon.
    fn ask_all<T>(&self, message: impl Fn(Reply<T>) -> Message) -> Vec<T> {
        let answers = ask_all_within(&self.workers, PATIENCE, message);
        answers.into_iter().flatten().collect()
    }

    /// Whether a disk is held after an error.
    pub fn is_held(&self, disk: &Disk) -> bool {
        self.reports()
            .iter()
            .flat_map(|report| &report.faults)
            .any(|(id, found)| *id == disk.id && found.held)
    }

    /// What keeps disks from being brought to rest.
    pub fn rest(&self) -> Restlessness {
        let reports = self.reports();
        let mut faults = reports.iter().flat_map(|report| &report.faults);
        let held = faults.find(|(_, found)| found.held);
        let mut oldest = vec![Duration::ZERO; self.disks.len()];
        for (id, age) in reports.iter().flat_map(|report| &report.oldest) {
            oldest[id.index()] = oldest[id.index()].max(*age);
        }
        Restlessness {
            held: held.map(|(id, _)| *id),
            stuck: reports.iter().find(|r| r.stuck).map(|r| r.worker),
            oldest,
        }
    }

    /// The summary of `reports`.
    pub fn summarize(&self, reports: &[WorkerReport]) -> Summary {
        summarize(&self.disks, &self.workers, reports)
    }

    /// Limits a disk from now on.
    pub fn set_limits(&self, disk: &Disk, limits: Limits) {
        disk.set_limits(self.clock.now_ns(), limits);
    }

    /// The names of the groups, in order.
    pub fn group_names(&self) -> Vec<String> {
        self.groups.lock().keys().cloned().collect()
    }

    /// The groups whose limits are not as configured, with those they have.
    pub fn changed_groups(&self) -> BTreeMap<String, Limits> {
        let now = self.groups.lock();
        now.iter()
            .map(|(name, throttle)| (name.clone(), throttle.limits()))
            .filter(|(name, limits)| self.groups.configured.get(name) != Some(limits))
            .collect()
    }

    /// A group and its limits.
    pub fn group(&self, name: &str) -> Option<Membership> {
        self.groups.find(name)
    }

    /// Limits a group from now on; the group comes into being with its first limits.
    pub fn set_group_limits(&self, name: &str, limits: Limits) {
        let throttle = Arc::clone(self.groups.lock().entry(name.to_owned()).or_default());
        throttle.set_limits(self.clock.now_ns(), limits);
        self.ask_all(Message::LimitsChanged);
    }

    /// Begins to trace `actions` on all workers, `events` at most on each. What was traced before is
    /// forgotten.
    pub fn start_trace(&self, events: usize, actions: &Arc<[Action]>) {
        self.ask_all(|done| Message::StartTrace(events, Arc::clone(actions), done));
    }

    /// Ends the trace; what was recorded can still be taken.
    pub fn stop_trace(&self) {
        self.ask_all(Message::StopTrace);
    }

    /// What was traced since it was taken last: the events of all workers in the order of time.
    pub fn take_trace(&self) -> TraceReport {
        let mut all = TraceReport::default();
        for report in self.ask_all(Message::TakeTrace) {
            all.events.extend(report.events);
            all.lost += report.lost;
        }
        // Stable: events of one turn of one worker have one time, and keep their order.
        all.events.sort_by_key(|traced| traced.event.time_ns);
        all
    }
}

/// One summary of what all workers reported, in the workers' order.
fn summarize(disks: &[Arc<Disk>], workers: &[WorkerHandle], reports: &[WorkerReport]) -> Summary {
    let affinity = |id| {
        let worker = workers.iter().find(|worker| worker.id() == id);
        worker.expect("reports are of workers").affinity()
    };
    let workers = reports
        .iter()
        .map(|report| WorkerSummary {
            worker: report.worker.0,
            cpus: affinity(report.worker)
                .cpus
                .as_ref()
                .map(CpuList::to_string),
            node: affinity(report.worker).node,
            stuck: report.stuck,
            queues: report.queues.len(),
            enters: report.engine.enters,
            sqes: report.engine.sqes,
            cqes: report.engine.cqes,
            bounced: report.engine.bounced,
            polled: report.engine.polled,
            continued: report.engine.continued,
        })
        .collect();
    let disks = disks
        .iter()
        .map(|disk| {
            let mut queues: Vec<QueueSummary> = reports
                .iter()
                .flat_map(|report| &report.queues)
                .filter(|report| report.ring.disk == disk.id)
                .map(|report| QueueSummary {
                    queue: report.ring.queue.0,
                    cpus: disk.cpus_of(report.ring.queue),
                    ctxs: report.ctx.len(),
                    worker: report.worker,
                    ctx: report.ctx.clone(),
                    mq: report.mq,
                    io: report.io,
                    times: (&*report.times).into(),
                })
                .collect();
            queues.sort_by_key(|queue| queue.queue);
            let mut stats = DiskStats::default();
            for report in reports {
                for (_, counted) in report.disks.iter().filter(|(id, _)| *id == disk.id) {
                    stats.add(counted);
                }
            }
            let mut faults = DiskFaults::default();
            for report in reports {
                for (_, found) in report.faults.iter().filter(|(id, _)| *id == disk.id) {
                    faults.held |= found.held;
                    faults.errors.add(&found.errors);
                }
            }
            DiskSummary {
                held: faults.held,
                io_errors: faults.errors,
                serial: disk.config.serial.clone(),
                scheduler: disk.scheduler().kind().to_string(),
                stats,
                queues,
            }
        })
        .collect();
    Summary { disks, workers }
}
