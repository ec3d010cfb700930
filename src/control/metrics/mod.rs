//! The counters in Prometheus' text format (version 0.0.4): what is there, and under which name.
//!
//! Disks have the names node_exporter gives the fields of /proc/diskstats, with `blkmq_` for `node_`.

use std::fmt::Write as _;
use std::time::UNIX_EPOCH;

use crate::disk::registry::Roster;
use crate::mq::stats::histogram::Histogram;
use crate::worker::counts::{QueueReport, WorkerReport};

use self::columns::{DISK_COLUMNS, QUEUE_COLUMNS, QUEUE_TIMES, WORKER_COUNTERS};

mod columns;

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
        page.sample("blkmq_disk_size_bytes", &labels, disk.size_bytes());
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
    page.family(
        "blkmq_disk_held",
        "gauge",
        "1 while the disk waits, after an error, to be resumed.",
    );
    for ((disk, index), summary) in disks() {
        let labels = [("disk", disk.config.serial.as_str()), ("index", index)];
        page.sample("blkmq_disk_held", &labels, u8::from(summary.held));
    }
    page.family(
        "blkmq_disk_io_errors_total",
        "counter",
        "Operations that failed, by the reason.",
    );
    for ((disk, index), summary) in disks() {
        for (reason, count) in summary.io_errors.list() {
            let labels = [
                ("disk", disk.config.serial.as_str()),
                ("index", index),
                ("reason", reason),
            ];
            page.sample("blkmq_disk_io_errors_total", &labels, count);
        }
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
    for (name, help, value) in WORKER_COUNTERS {
        let name = format!("blkmq_worker_{name}_total");
        page.family(&name, "counter", help);
        for report in reports {
            let worker = report.worker.0.to_string();
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
