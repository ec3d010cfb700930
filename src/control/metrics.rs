//! The counters in Prometheus' text format (version 0.0.4): what is there, and under which name.
//!
//! Disks have the names node_exporter gives the fields of /proc/diskstats, with `blkmq_` for `node_`.

use std::fmt::Write as _;
use std::time::UNIX_EPOCH;

use crate::daemon::report::{QueueReport, WorkerReport};
use crate::daemon::roster::Roster;
use crate::engine::EngineCounters;
use crate::mq::diskstats::{Direction, DiskStats};
use crate::mq::hist::Histogram;

/// Buckets of a histogram end where an octave of nanoseconds ends; those below a microsecond and above
/// 17 seconds are left out.
const SHORTEST_BOUND_NS: u64 = (1 << 10) - 1;
const LONGEST_BOUND_NS: u64 = (1 << 34) - 1;

/// All metrics of the process.
pub(super) fn text(roster: &Roster) -> String {
    let reports = roster.reports();
    let mut page = Page::default();
    page.family("blkmq_build_info", "gauge", "The program's version.");
    page.sample(
        "blkmq_build_info",
        &[("version", env!("CARGO_PKG_VERSION"))],
        1,
    );
    let since = roster.since().duration_since(UNIX_EPOCH);
    page.family(
        "process_start_time_seconds",
        "gauge",
        "When the workers started, in seconds since 1970.",
    );
    page.sample(
        "process_start_time_seconds",
        &[],
        since.unwrap_or_default().as_secs_f64(),
    );
    disks(&mut page, roster, &reports);
    queues(&mut page, roster, &reports);
    workers(&mut page, &reports);
    page.0
}

/// The text so far.
#[derive(Debug, Default)]
struct Page(String);

impl Page {
    /// Begins a metric.
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    /// One value of it.
    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl std::fmt::Display) {
        self.0.push_str(name);
        for (at, (label, text)) in labels.iter().enumerate() {
            self.0.push(if at == 0 { '{' } else { ',' });
            let _ = write!(self.0, "{label}=\"");
            for c in text.chars() {
                match c {
                    '\\' => self.0.push_str("\\\\"),
                    '"' => self.0.push_str("\\\""),
                    '\n' => self.0.push_str("\\n"),
                    c => self.0.push(c),
                }
            }
            self.0.push('"');
        }
        if !labels.is_empty() {
            self.0.push('}');
        }
        let _ = writeln!(self.0, " {value}");
    }

    fn histogram(&mut self, name: &str, labels: &[(&str, &str)], times: &Histogram) {
        let bucket = format!("{name}_bucket");
        for octave in times.octaves() {
            let bound = match octave.upto_ns {
                None => "+Inf".to_owned(),
                Some(ns @ SHORTEST_BOUND_NS..=LONGEST_BOUND_NS) => seconds(ns.into()).to_string(),
                Some(_) => continue,
            };
            let labels = [labels, &[("le", &bound)]].concat();
            self.sample(&bucket, &labels, octave.count);
        }
        self.sample(&format!("{name}_sum"), labels, seconds(times.sum_ns()));
        self.sample(&format!("{name}_count"), labels, times.count());
    }
}

fn seconds(ns: u128) -> f64 {
    ns as f64 / 1e9
}

/// A value of one kind of thing, with a name and what it means.
type Column<T> = (&'static str, &'static str, &'static str, fn(&T) -> f64);

const DISK_COLUMNS: &[Column<DiskStats>] = &[
    (
        "reads_completed_total",
        "counter",
        "Reads that ended.",
        |s| s.reads.ios as f64,
    ),
    (
        "reads_merged_total",
        "counter",
        "Reads that became part of another.",
        |s| s.reads.merges as f64,
    ),
    (
        "read_bytes_total",
        "counter",
        "Bytes of reads that ended.",
        |s| bytes(s.reads),
    ),
    (
        "read_time_seconds_total",
        "counter",
        "Time that reads took together.",
        |s| seconds(s.reads.time_ns),
    ),
    (
        "writes_completed_total",
        "counter",
        "Writes and write-zeroes that ended.",
        |s| s.writes.ios as f64,
    ),
    (
        "writes_merged_total",
        "counter",
        "Writes that became part of another.",
        |s| s.writes.merges as f64,
    ),
    (
        "written_bytes_total",
        "counter",
        "Bytes of writes that ended.",
        |s| bytes(s.writes),
    ),
    (
        "write_time_seconds_total",
        "counter",
        "Time that writes took together.",
        |s| seconds(s.writes.time_ns),
    ),
    ("io_now", "gauge", "Requests in flight.", |s| {
        s.in_flight as f64
    }),
    (
        "io_time_seconds_total",
        "counter",
        "Time with something in flight, a sum over workers.",
        |s| seconds(s.busy_ns),
    ),
    (
        "io_time_weighted_seconds_total",
        "counter",
        "Requests in flight, summed over time.",
        |s| seconds(s.weighted_ns),
    ),
    (
        "discards_completed_total",
        "counter",
        "Discards that ended.",
        |s| s.discards.ios as f64,
    ),
    (
        "discards_merged_total",
        "counter",
        "Discards that became part of another.",
        |s| s.discards.merges as f64,
    ),
    (
        "discarded_sectors_total",
        "counter",
        "Sectors of 512 bytes that were discarded.",
        |s| s.discards.sectors as f64,
    ),
    (
        "discard_time_seconds_total",
        "counter",
        "Time that discards took together.",
        |s| seconds(s.discards.time_ns),
    ),
    (
        "flush_requests_total",
        "counter",
        "Flushes that ended.",
        |s| s.flushes as f64,
    ),
    (
        "flush_requests_time_seconds_total",
        "counter",
        "Time that flushes took together.",
        |s| seconds(s.flush_ns),
    ),
];

fn bytes(direction: Direction) -> f64 {
    direction.sectors as f64 * 512.0
}

fn disks(page: &mut Page, roster: &Roster, reports: &[WorkerReport]) {
    let summary = roster.summarize(reports);
    let indices: Vec<String> = roster
        .disks()
        .iter()
        .map(|disk| disk.id.to_string())
        .collect();
    let disks = || roster.disks().iter().zip(&indices).zip(&summary.disks);
    page.family(
        "blkmq_disk_info",
        "gauge",
        "The disk's scheduler and group.",
    );
    for ((disk, index), summary) in disks() {
        let group = disk.group().map(|group| group.name).unwrap_or_default();
        let labels = [
            ("disk", disk.config.serial.as_str()),
            ("index", index),
            ("scheduler", &summary.scheduler),
            ("group", &group),
        ];
        page.sample("blkmq_disk_info", &labels, 1);
    }
    page.family("blkmq_disk_size_bytes", "gauge", "Size of the disk.");
    for ((disk, index), _) in disks() {
        let labels = [("disk", disk.config.serial.as_str()), ("index", index)];
        page.sample("blkmq_disk_size_bytes", &labels, disk.image().size_bytes);
    }
    page.family(
        "blkmq_disk_connected",
        "gauge",
        "1 while a front end is connected.",
    );
    for ((disk, index), _) in disks() {
        let labels = [("disk", disk.config.serial.as_str()), ("index", index)];
        page.sample(
            "blkmq_disk_connected",
            &labels,
            u8::from(disk.is_connected()),
        );
    }
    for (name, kind, help, value) in DISK_COLUMNS {
        let name = format!("blkmq_disk_{name}");
        page.family(&name, kind, help);
        for ((disk, index), summary) in disks() {
            let labels = [("disk", disk.config.serial.as_str()), ("index", index)];
            page.sample(&name, &labels, value(&summary.stats));
        }
    }
}

const QUEUE_COLUMNS: &[Column<QueueReport>] = &[
    ("ctxs", "gauge", "Staging queues.", |q| f64::from(q.ctxs)),
    (
        "read_bytes_total",
        "counter",
        "Bytes read by requests that succeeded.",
        |q| q.mq.bytes_read as f64,
    ),
    (
        "written_bytes_total",
        "counter",
        "Bytes written by requests that succeeded.",
        |q| q.mq.bytes_written as f64,
    ),
    (
        "batches_total",
        "counter",
        "Drains of the ring that found something.",
        |q| q.mq.batches as f64,
    ),
    (
        "direct_total",
        "counter",
        "Requests issued straight from the plug.",
        |q| q.mq.direct as f64,
    ),
    (
        "staged_total",
        "counter",
        "Requests that were staged first.",
        |q| q.mq.staged as f64,
    ),
    (
        "merged_total",
        "counter",
        "Requests that travelled as a part of another.",
        |q| q.mq.merged as f64,
    ),
    (
        "flush_joined_total",
        "counter",
        "Flushes that ended with another.",
        |q| q.mq.flush_joined as f64,
    ),
    (
        "dispatched_total",
        "counter",
        "Requests handed to the engine.",
        |q| q.mq.dispatched as f64,
    ),
    (
        "requeued_total",
        "counter",
        "Requests taken back and sent again.",
        |q| q.mq.requeued as f64,
    ),
    (
        "throttled_total",
        "counter",
        "Times that limits held the queue up.",
        |q| q.mq.throttled as f64,
    ),
    (
        "errors_total",
        "counter",
        "Requests that ended with an error.",
        |q| q.mq.errors as f64,
    ),
    (
        "answered_total",
        "counter",
        "Requests answered without the disk.",
        |q| q.io.answered as f64,
    ),
    ("kicks_total", "counter", "Wake-ups by the guest.", |q| {
        q.io.kicks as f64
    }),
    ("calls_total", "counter", "Interrupts for the guest.", |q| {
        q.io.calls as f64
    }),
];

type Times = fn(&QueueReport) -> &Histogram;

const QUEUE_TIMES: &[(&str, &str, Times)] = &[
    (
        "staged_seconds",
        "Time from the ring to leaving the ctx or elevator.",
        |q| &q.times.staged,
    ),
    ("dispatch_seconds", "Time from there to the engine.", |q| {
        &q.times.dispatch
    }),
    ("device_read_seconds", "Time in the engine: reads.", |q| {
        &q.times.device_read
    }),
    (
        "device_other_seconds",
        "Time in the engine: all but reads.",
        |q| &q.times.device_other,
    ),
];

fn queues(page: &mut Page, roster: &Roster, reports: &[WorkerReport]) {
    let mut queues: Vec<&QueueReport> = reports.iter().flat_map(|report| &report.queues).collect();
    queues.sort_by_key(|q| (q.ring.disk, q.ring.queue));
    let labelled: Vec<(&QueueReport, [String; 4])> = queues
        .into_iter()
        .map(|q| {
            let disk = &roster.disks()[q.ring.disk.index()];
            let labels = [
                disk.config.serial.clone(),
                disk.id.to_string(),
                q.ring.queue.to_string(),
                q.worker.to_string(),
            ];
            (q, labels)
        })
        .collect();
    fn labels(texts: &[String; 4]) -> [(&str, &str); 4] {
        let [disk, index, queue, worker] = texts;
        [
            ("disk", disk),
            ("index", index),
            ("queue", queue),
            ("worker", worker),
        ]
    }
    page.family(
        "blkmq_queue_requests_total",
        "counter",
        "Requests accepted, by operation.",
    );
    for (q, texts) in &labelled {
        for (op, count) in [
            ("read", q.mq.read),
            ("write", q.mq.write),
            ("flush", q.mq.flush),
            ("discard", q.mq.discard),
            ("write_zeroes", q.mq.write_zeroes),
        ] {
            let labels = [&labels(texts)[..], &[("op", op)]].concat();
            page.sample("blkmq_queue_requests_total", &labels, count);
        }
    }
    for (name, kind, help, value) in QUEUE_COLUMNS {
        let name = format!("blkmq_queue_{name}");
        page.family(&name, kind, help);
        for (q, texts) in &labelled {
            page.sample(&name, &labels(texts), value(q));
        }
    }
    page.family(
        "blkmq_queue_runs_total",
        "counter",
        "Runs of the queue, by how many requests they handed to the engine.",
    );
    for (q, texts) in &labelled {
        let classes = ["0", "1", "2-3", "4-7", "8-15", "16-31", "32+"];
        for (class, count) in classes.into_iter().zip(q.times.runs.counts()) {
            let labels = [&labels(texts)[..], &[("requests", class)]].concat();
            page.sample("blkmq_queue_runs_total", &labels, count);
        }
    }
    for (name, help, times) in QUEUE_TIMES {
        let name = format!("blkmq_queue_{name}");
        page.family(&name, "histogram", help);
        for (q, texts) in &labelled {
            page.histogram(&name, &labels(texts), times(q));
        }
    }
}

fn workers(page: &mut Page, reports: &[WorkerReport]) {
    type Counter = (&'static str, &'static str, fn(&EngineCounters) -> u64);
    let counters: [Counter; 14] = [
        ("enters", "System calls (io_uring_enter).", |c| c.enters),
        ("sqes", "Submission entries prepared.", |c| c.sqes),
        ("cqes", "Completion entries seen.", |c| c.cqes),
        ("inline", "Commands completed without the kernel.", |c| {
            c.inline
        }),
        (
            "bounced",
            "Commands that went through an aligned buffer.",
            |c| c.bounced,
        ),
        ("continued", "Partial transfers that were continued.", |c| {
            c.continued
        }),
        ("retried", "Operations tried again.", |c| c.retried),
        (
            "discards_ignored",
            "Ranges the image had no way to discard.",
            |c| c.discards_ignored,
        ),
        ("zeroes_written", "Ranges zeroed by writing.", |c| {
            c.zeroes_written
        }),
        ("busy", "Commands refused for the moment.", |c| c.busy),
        ("calls", "Calls to guests written.", |c| c.calls),
        ("calls_folded", "Calls folded into one under way.", |c| {
            c.calls_folded
        }),
        ("rearmed", "Watches of kicks armed again.", |c| c.rearmed),
        (
            "stale",
            "Completions that belonged to nobody any more.",
            |c| c.stale,
        ),
    ];
    for (name, help, value) in counters {
        let name = format!("blkmq_worker_{name}_total");
        page.family(&name, "counter", help);
        for (report, worker) in reports.iter().zip(0u16..) {
            let worker = worker.to_string();
            page.sample(&name, &[("worker", &worker)], value(&report.engine));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_escaped() {
        let mut page = Page::default();
        page.sample("a", &[("b", "x\"y\\z"), ("c", "")], 5);
        assert_eq!(page.0, "a{b=\"x\\\"y\\\\z\",c=\"\"} 5\n");
    }

    #[test]
    fn a_histogram_counts_up_to_each_bound() {
        let mut times = Histogram::new();
        for ns in [10, 1023, 1024, 5_000_000, u64::MAX] {
            times.record(ns);
        }
        let mut page = Page::default();
        page.histogram("t", &[("q", "0")], &times);
        let lines: Vec<&str> = page.0.lines().collect();
        assert_eq!(lines[0], "t_bucket{q=\"0\",le=\"0.000001023\"} 2");
        assert_eq!(lines[1], "t_bucket{q=\"0\",le=\"0.000002047\"} 3");
        assert!(lines.contains(&"t_bucket{q=\"0\",le=\"17.179869183\"} 4"));
        assert!(lines.contains(&"t_bucket{q=\"0\",le=\"+Inf\"} 5"));
        assert!(lines.contains(&"t_count{q=\"0\"} 5"));
    }
}
