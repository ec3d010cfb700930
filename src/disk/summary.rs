//! What was counted, as it is shown to people and to programs.

use std::fmt::Write as _;

use serde::Serialize;

use crate::mq::stats::diskstats::DiskStats;
use crate::mq::stats::histogram::Histogram;
use crate::mq::stats::{CtxStats, HctxStats, HctxTimes};

use crate::worker::counts::RingStats;
use crate::worker::io_errors::IoErrors;

/// The summary of all disks.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// In the order of the configuration.
    pub disks: Vec<DiskSummary>,
    /// In the order of their numbers.
    pub workers: Vec<WorkerSummary>,
}

/// One disk's part of the summary.
#[derive(Clone, Debug, Serialize)]
pub struct DiskSummary {
    /// Its serial.
    pub serial: String,
    /// Its elevator.
    pub scheduler: String,
    /// Whether it waits, after an error, for somebody to resume it.
    pub held: bool,
    /// Operations that failed, over all workers.
    pub io_errors: IoErrors,
    /// The fields of /proc/diskstats, over all workers.
    pub stats: DiskStats,
    /// Those that were ever started, by number.
    pub queues: Vec<QueueSummary>,
}

/// One virtqueue's part of the summary.
#[derive(Clone, Debug, Serialize)]
pub struct QueueSummary {
    /// Its number.
    pub queue: u16,
    /// The vCPUs the queue map sends here.
    pub cpus: Vec<u16>,
    /// Its staging queues.
    pub ctxs: usize,
    /// Who served it.
    pub worker: u16,
    /// What each ctx did since the queue has that many.
    pub ctx: Vec<CtxStats>,
    /// blk-mq's counts.
    #[serde(flatten)]
    pub mq: HctxStats,
    /// The ring's counts.
    #[serde(flatten)]
    pub io: RingStats,
    /// How long its requests were where.
    pub times: TimesSummary,
}

/// How long one virtqueue's requests were where.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct TimesSummary {
    /// In a ctx or the elevator; of those that were staged.
    pub staged: Quantiles,
    /// From there until the engine took them.
    pub dispatch: Quantiles,
    /// In the engine: reads.
    pub device_read: Quantiles,
    /// In the engine: everything else.
    pub device_other: Quantiles,
    /// Runs of the queue that handed 0, 1, 2–3, 4–7, 8–15, 16–31, 32 or more requests to the engine.
    pub runs: [u64; 7],
}

/// A histogram, told shortly. Times are in nanoseconds.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Quantiles {
    /// How many.
    pub count: u64,
    /// The median, to an eighth.
    pub p50_ns: u64,
    /// What one in a hundred exceeds, to an eighth.
    pub p99_ns: u64,
    /// What one in a thousand exceeds, to an eighth.
    pub p999_ns: u64,
    /// The longest.
    pub max_ns: u64,
}

impl From<&Histogram> for Quantiles {
    fn from(times: &Histogram) -> Self {
        let quantile = |q| times.quantile_ns(q).unwrap_or(0);
        Quantiles {
            count: times.count(),
            p50_ns: quantile(0.5),
            p99_ns: quantile(0.99),
            p999_ns: quantile(0.999),
            max_ns: times.max_ns(),
        }
    }
}

impl From<&HctxTimes> for TimesSummary {
    fn from(times: &HctxTimes) -> Self {
        TimesSummary {
            staged: (&times.staged).into(),
            dispatch: (&times.dispatch).into(),
            device_read: (&times.device_read).into(),
            device_other: (&times.device_other).into(),
            runs: *times.runs.counts(),
        }
    }
}

/// One worker's part of the summary.
#[derive(Clone, Debug, Serialize)]
pub struct WorkerSummary {
    /// Its number.
    pub worker: u16,
    /// The CPUs it may run on, as taskset(1) writes them; `null` if nobody chose.
    pub cpus: Option<String>,
    /// The NUMA node they are on; `null` on a machine with one.
    pub node: Option<u16>,
    /// It does not answer, because it waits inside the kernel: for a page of guest memory, for example. The
    /// counts are older ones then.
    pub stuck: bool,
    /// The queues it served, over all disks.
    pub queues: usize,
    /// System calls (`io_uring_enter`).
    pub enters: u64,
    /// Submission entries prepared.
    pub sqes: u64,
    /// Completion entries seen.
    pub cqes: u64,
    /// Transfers the device was polled for.
    pub polled: u64,
    /// Commands that went through an aligned buffer.
    pub bounced: u64,
    /// Partial transfers that were continued.
    pub continued: u64,
}

impl Summary {
    /// For programs: one line of JSON.
    pub fn json(&self) -> String {
        serde_json::to_string(self).expect("plain numbers and strings always serialize")
    }

    /// For people: a table for each disk.
    pub fn text(&self) -> String {
        let mut out = String::new();
        for disk in &self.disks {
            let _ = writeln!(out, "disk {}:", disk.serial);
            if disk.queues.is_empty() {
                out.push_str("  no queue was started\n");
                continue;
            }
            let _ = writeln!(
                out,
                "  {:>5} {:>9} {:>4} {:>6} {:>10} {:>9} {:>9} {:>8} {:>9} {:>9} {:>8} {:>6} {:>8} {:>8}",
                "queue",
                "vCPUs",
                "ctxs",
                "worker",
                "requests",
                "read",
                "written",
                "batches",
                "direct",
                "staged",
                "merged",
                "errors",
                "kicks",
                "calls"
            );
            for q in &disk.queues {
                let _ = writeln!(
                    out,
                    "  {:>5} {:>9} {:>4} {:>6} {:>10} {:>9} {:>9} {:>8} {:>9} {:>9} {:>8} {:>6} {:>8} {:>8}",
                    q.queue,
                    ranges(&q.cpus),
                    q.ctxs,
                    q.worker,
                    q.mq.requests,
                    bytes(q.mq.bytes_read),
                    bytes(q.mq.bytes_written),
                    q.mq.batches,
                    q.mq.direct,
                    q.mq.staged,
                    q.mq.merged,
                    q.mq.errors,
                    q.io.kicks,
                    q.io.calls
                );
            }
        }
        out
    }
}

/// `0-3,8` for 0, 1, 2, 3, 8; `-` for none.
fn ranges(sorted: &[u16]) -> String {
    let mut out = String::new();
    let mut rest = sorted;
    while let Some((&first, _)) = rest.split_first() {
        let run = rest
            .iter()
            .zip(first..)
            .take_while(|(cpu, expected)| **cpu == *expected)
            .count();
        if !out.is_empty() {
            out.push(',');
        }
        match run {
            1 => {
                let _ = write!(out, "{first}");
            }
            _ => {
                let _ = write!(out, "{first}-{}", rest[run - 1]);
            }
        }
        rest = &rest[run..];
    }
    if out.is_empty() {
        out.push('-');
    }
    out
}

/// `1.5 MiB` and the like.
pub(crate) fn bytes(n: u64) -> String {
    let mut unit = 1u64;
    for name in ["B", "KiB", "MiB", "GiB", "TiB"] {
        if n < unit * 1024 || name == "TiB" {
            let whole = n / unit;
            return if whole < 10 && unit > 1 {
                format!("{whole}.{} {name}", (n % unit) * 10 / unit)
            } else {
                format!("{whole} {name}")
            };
        }
        unit *= 1024;
    }
    unreachable!("the last unit takes everything")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpus_are_shown_as_ranges() {
        assert_eq!(ranges(&[]), "-");
        assert_eq!(ranges(&[3]), "3");
        assert_eq!(ranges(&[0, 1, 2, 3, 8, 10, 11]), "0-3,8,10-11");
    }

    #[test]
    fn bytes_are_shown_in_the_largest_unit_that_fits() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(20 << 20), "20 MiB");
        assert_eq!(bytes(u64::MAX), "16777215 TiB");
    }
}
