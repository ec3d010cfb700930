//! The daemon's state as a table for people, from the JSON it answers with.

use std::fmt::Write as _;

use serde_json::Value;

use crate::disk::summary::bytes;

/// The table for the answer to `GET /v1/disks`. What an older daemon does not say shows as `-`.
pub fn status(overview: &Value) -> String {
    let mut out = String::new();
    let empty = Vec::new();
    let list = |value: &Value| value.as_array().unwrap_or(&empty).clone();
    for disk in list(&overview["disks"]) {
        let _ = writeln!(
            out,
            "disk {} (@{}): {}, {}{}{}, {}",
            text(&disk["serial"]),
            text(&disk["index"]),
            disk["size_bytes"].as_u64().map_or("-".to_owned(), bytes),
            text(&disk["image"]),
            engine(&disk),
            if disk["read_only"] == true {
                ", read-only"
            } else {
                ""
            },
            match disk["connected"] == true {
                true => "connected",
                false => "no front end",
            }
        );
        let _ = writeln!(
            out,
            "  scheduler {}{}",
            text(&disk["scheduler"]),
            params(&disk)
        );
        let _ = writeln!(out, "  limits    {}", limits(&disk["limits"]));
        if let Some(group) = disk["group"].as_str() {
            let _ = writeln!(out, "  group     {group}");
        }
        if disk["held"] == true {
            let _ = writeln!(
                out,
                "  HELD after an error: remove the cause (see the log), then: blkmqctl resume @{}",
                text(&disk["index"])
            );
        }
        let stats = &disk["stats"];
        let _ = writeln!(
            out,
            "  reads {}, writes {}, discards {}, flushes {}, in flight {}",
            text(&stats["reads"]["ios"]),
            text(&stats["writes"]["ios"]),
            text(&stats["discards"]["ios"]),
            text(&stats["flushes"]),
            text(&stats["in_flight"])
        );
        queues(&mut out, &list(&disk["queues"]));
    }
    out
}

/// `, mmap (tmpfs)`, `, io_uring`.
fn engine(disk: &Value) -> String {
    match (disk["engine"].as_str(), disk["medium"].as_str()) {
        (Some(engine), Some(medium)) => format!(", {engine} ({medium})"),
        (Some(engine), None) => format!(", {engine}"),
        (None, _) => String::new(),
    }
}

/// Columns: heading, and the field of a queue or of its times.
const COLUMNS: [(&str, &[&str]); 12] = [
    ("queue", &["queue"]),
    ("worker", &["worker"]),
    ("ctxs", &["ctxs"]),
    ("requests", &["requests"]),
    ("batches", &["batches"]),
    ("direct", &["direct"]),
    ("staged", &["staged"]),
    ("merged", &["merged"]),
    ("throttled", &["throttled"]),
    ("errors", &["errors"]),
    ("rd p99 us", &["times", "device_read", "p99_ns"]),
    ("wr p99 us", &["times", "device_other", "p99_ns"]),
];

fn queues(out: &mut String, queues: &[Value]) {
    if queues.is_empty() {
        out.push_str("  no queue was started\n");
        return;
    }
    let width = |heading: &str| heading.len().max(6) + 2;
    for (heading, _) in COLUMNS {
        let _ = write!(out, "{heading:>width$}", width = width(heading));
    }
    out.push('\n');
    for queue in queues {
        for (heading, path) in COLUMNS {
            let value = path.iter().fold(queue, |value, field| &value[field]);
            let shown = match value.as_u64() {
                Some(ns) if heading.ends_with("us") => (ns / 1000).to_string(),
                _ => text(value),
            };
            let _ = write!(out, "{shown:>width$}", width = width(heading));
        }
        out.push('\n');
    }
}

fn params(disk: &Value) -> String {
    let params = disk["scheduler_params"].as_object();
    params
        .into_iter()
        .flatten()
        .map(|(name, value)| format!(" {name}={}", text(value)))
        .collect()
}

/// `iops=100/10, bps=...`, or `none`.
pub fn limits(limits: &Value) -> String {
    let shown: Vec<String> = limits
        .as_object()
        .into_iter()
        .flatten()
        .map(|(key, limit)| format!("{key}={}/{}", text(&limit["rate"]), text(&limit["burst"])))
        .collect();
    match shown.is_empty() {
        true => "none".to_owned(),
        false => shown.join(", "),
    }
}

fn text(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_shown_with_its_queues() {
        let overview = serde_json::json!({ "disks": [{
            "serial": "a", "index": 0, "size_bytes": 3 << 29, "image": null, "engine": "mmap", "medium": "tmpfs", "connected": true,
            "scheduler": "kyber", "scheduler_params": { "read_lat_nsec": 5 },
            "limits": { "iops": { "rate": 100, "burst": 10 } }, "group": "g",
            "stats": { "reads": { "ios": 7 } },
            "queues": [{ "queue": 3, "requests": 9, "times": { "device_read": { "p99_ns": 5999 } } }],
        }]});
        let text = status(&overview);
        for part in [
            "disk a (@0): 1.5 GiB, -, mmap (tmpfs), connected",
            "scheduler kyber read_lat_nsec=5",
            "limits    iops=100/10",
            "group     g",
            "reads 7, writes -",
        ] {
            assert!(text.contains(part), "{part} in:\n{text}");
        }
        let row: Vec<&str> = text
            .lines()
            .last()
            .expect("a row")
            .split_whitespace()
            .collect();
        assert_eq!(row[..4], ["3", "-", "-", "9"]);
        assert_eq!(row[10], "5");
    }
}
