//! What the kernel says about a process.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// What `/proc` says about a process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProcStats {
    /// Open file descriptors.
    pub fds: usize,
    /// Threads of the program; the kernel's io_uring threads are not counted.
    pub threads: usize,
    /// Resident memory in KiB.
    pub rss_kib: u64,
    /// Resident memory of its own, in KiB: not what it shares with others, as guest memory and code.
    pub anon_kib: u64,
    /// Context switches of each thread, voluntary and not.
    pub switches: BTreeMap<u32, u64>,
    /// User and system time of each thread in clock ticks.
    pub ticks: BTreeMap<u32, u64>,
}

impl ProcStats {
    /// Looks at process `pid`.
    pub fn of(pid: u32) -> Self {
        let proc = PathBuf::from(format!("/proc/{pid}"));
        let mut stats = Self {
            fds: entries(&proc.join("fd")).len(),
            anon_kib: field(&text(&proc.join("status")), "RssAnon:"),
            rss_kib: field(&text(&proc.join("status")), "VmRSS:"),
            ..Self::default()
        };
        for task in entries(&proc.join("task")) {
            let Ok(tid) = task.parse() else { continue };
            let dir = proc.join("task").join(&task);
            // The kernel's own threads for io_uring are listed here too. They come and go as the kernel pleases, wake
            // every five seconds to see whether they are still needed, and make no system calls.
            if text(&dir.join("comm")).starts_with("iou-") {
                continue;
            }
            let status = text(&dir.join("status"));
            let switches = field(&status, "voluntary_ctxt_switches:")
                + field(&status, "nonvoluntary_ctxt_switches:");
            stats.switches.insert(tid, switches);
            // The name in parentheses may hold anything; utime and stime are the 12th and 13th fields after it.
            let stat = text(&dir.join("stat"));
            let after = stat.rsplit_once(')').map_or("", |(_, after)| after);
            let ticks = after
                .split_whitespace()
                .skip(11)
                .take(2)
                .filter_map(|ticks| ticks.parse::<u64>().ok())
                .sum();
            stats.ticks.insert(tid, ticks);
            stats.threads += 1;
        }
        stats
    }
}

fn entries(dir: &Path) -> Vec<String> {
    // A thread may end while it is looked at: what is gone is not listed.
    fs::read_dir(dir).map_or_else(
        |_| Vec::new(),
        |entries| {
            entries
                .filter_map(Result::ok)
                .map(|entry| entry.file_name().to_string_lossy().into_owned())
                .collect()
        },
    )
}

fn text(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

fn field(status: &str, name: &str) -> u64 {
    status
        .lines()
        .find_map(|line| line.strip_prefix(name))
        .and_then(|rest| rest.split_whitespace().next()?.parse().ok())
        .unwrap_or(0)
}
