//! What processes and the machine did, as the kernel counts it.

use std::collections::BTreeMap;
use std::fs;

/// What a process has used since it started.
#[derive(Clone, Debug, Default)]
pub struct Usage {
    /// By thread: nanoseconds on a CPU. The kernel's io_uring threads are the process's too.
    threads: BTreeMap<String, u64>,
    /// User and system time in ticks, threads that ended among them.
    ticks: u64,
    user_ticks: u64,
    children_ticks: u64,
    voluntary: u64,
    involuntary: u64,
}

/// What a process used between two looks.
#[derive(Clone, Copy, Debug, Default)]
pub struct Used {
    /// Nanoseconds on a CPU.
    pub cpu_ns: u64,
    /// Nanoseconds of it in user space, to a tick.
    pub user_ns: u64,
    /// The same of its children that ended.
    pub children_ns: u64,
    /// Context switches because the process waited.
    pub voluntary: u64,
    /// Context switches because another was to run.
    pub involuntary: u64,
}

impl Usage {
    /// Of process `pid` ("self" for this one).
    pub fn of(pid: &str) -> Self {
        let mut usage = Self::default();
        let dir = format!("/proc/{pid}/task");
        for task in fs::read_dir(&dir).into_iter().flatten().flatten() {
            let path = task.path();
            let read = |name: &str| fs::read_to_string(path.join(name)).unwrap_or_default();
            let ns = read("schedstat");
            let ns = ns.split_whitespace().next().and_then(|ns| ns.parse().ok());
            let Some(ns) = ns else { continue };
            let name = task.file_name().to_string_lossy().into_owned();
            usage.threads.insert(name, ns);
            let status = read("status");
            usage.voluntary += field(&status, "voluntary_ctxt_switches:");
            usage.involuntary += field(&status, "nonvoluntary_ctxt_switches:");
        }
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // The name in parentheses may hold anything; utime, stime and cutime are the 12th to 14th after it.
        let after = stat.rsplit_once(')').map_or("", |(_, after)| after);
        let mut times = after.split_whitespace().skip(11);
        let mut ticks = || times.next().and_then(|t| t.parse().ok()).unwrap_or(0);
        usage.user_ticks = ticks();
        usage.ticks = usage.user_ticks + ticks();
        usage.children_ticks = ticks();
        usage
    }

    /// What was used since `before`.
    pub fn since(&self, before: &Self) -> Used {
        let tick_ns = tick_ns();
        let ticked = self.ticks.saturating_sub(before.ticks) * tick_ns;
        let all_alive = before.threads.keys().all(|t| self.threads.contains_key(t));
        let counted: u64 = self
            .threads
            .iter()
            .map(|(thread, ns)| ns.saturating_sub(before.threads.get(thread).copied().unwrap_or(0)))
            .sum();
        Used {
            // A thread that ended took its exact count with it; the ticks keep it.
            cpu_ns: if all_alive { counted } else { ticked },
            user_ns: self.user_ticks.saturating_sub(before.user_ticks) * tick_ns,
            children_ns: self.children_ticks.saturating_sub(before.children_ticks) * tick_ns,
            voluntary: self.voluntary.saturating_sub(before.voluntary),
            involuntary: self.involuntary.saturating_sub(before.involuntary),
        }
    }
}

fn field(status: &str, name: &str) -> u64 {
    status
        .lines()
        .find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
        .unwrap_or(0)
}

fn tick_ns() -> u64 {
    1_000_000_000 / rustix::param::clock_ticks_per_second().max(1)
}

/// What all processes together did to the machine's CPUs.
#[derive(Clone, Copy, Debug, Default)]
pub struct Machine {
    user_ns: u64,
    total_ns: u64,
}

impl Machine {
    /// As of now.
    pub fn now() -> Self {
        let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
        let line = stat.lines().next().unwrap_or_default();
        let ticks: Vec<u64> = line
            .split_whitespace()
            .skip(1)
            // guest and guest_nice, the last two, are counted in user and nice already.
            .take(8)
            .filter_map(|ticks| ticks.parse().ok())
            .collect();
        let tick_ns = tick_ns();
        Self {
            user_ns: ticks.iter().take(2).sum::<u64>() * tick_ns,
            total_ns: ticks.iter().sum::<u64>() * tick_ns,
        }
    }

    /// The share (0 to 1) of all CPU time since `before` that went to the user code of processes
    /// other than those whose user time is `ours`: how far the figures can be trusted.
    pub fn others(&self, before: &Self, ours: u64) -> f64 {
        let total = self.total_ns.saturating_sub(before.total_ns).max(1);
        let user = self.user_ns.saturating_sub(before.user_ns);
        user.saturating_sub(ours) as f64 / total as f64
    }
}

/// Memory of a process in KiB.
#[derive(Clone, Copy, Debug, Default)]
pub struct Resident {
    /// Its own: stack, heap and program.
    pub own: u64,
    /// Shared memory: the guest's, and images in memory.
    pub shared: u64,
}

impl Resident {
    /// Of process `pid`.
    pub fn of(pid: u32) -> Self {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let kib = |name: &str| {
            status
                .lines()
                .find_map(|line| {
                    line.strip_prefix(name)?
                        .split_whitespace()
                        .next()?
                        .parse()
                        .ok()
                })
                .unwrap_or(0)
        };
        Self {
            own: kib("RssAnon:") + kib("RssFile:"),
            shared: kib("RssShmem:"),
        }
    }
}
