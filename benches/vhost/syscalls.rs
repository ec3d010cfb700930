//! How many system calls a process makes, counted from outside.

use crate::backend::runs;
use rustix::process::{Pid, Signal, kill_process};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A tool at work: perf, which counts in the kernel, or strace, which stops the process at each call.
pub struct Counter {
    child: Option<Child>,
    perf: bool,
    until: Instant,
}

impl Counter {
    /// Counts the calls of all threads of `pid` for `time`.
    pub fn attach(pid: u32, time: Duration) -> Self {
        let perf = runs("perf") && perf_may_count();
        let mut command = if perf {
            let mut command = Command::new("perf");
            command.args(["stat", "-x,", "-e", "raw_syscalls:sys_enter", "-p"]);
            command
        } else {
            let mut command = Command::new("strace");
            command.args(["-f", "-c", "-U", "calls,name", "-p"]);
            command
        };
        let child = command
            .arg(pid.to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .ok();
        Self {
            child,
            perf,
            until: Instant::now() + time,
        }
    }

    /// Stops counting. `None` if the tool could not count.
    pub fn finish(self) -> Option<u64> {
        let child = self.child?;
        std::thread::sleep(self.until.saturating_duration_since(Instant::now()));
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw)?;
        kill_process(pid, Signal::INT).ok()?;
        let output = child.wait_with_output().ok()?;
        let text = String::from_utf8_lossy(&output.stderr);
        if self.perf {
            let line = text.lines().find(|line| line.contains("raw_syscalls"))?;
            line.split(',').next()?.parse().ok()
        } else {
            let total = text
                .lines()
                .find(|line| line.trim_end().ends_with("total"))?;
            total.split_whitespace().next()?.parse().ok()
        }
    }
}

fn perf_may_count() -> bool {
    Command::new("perf")
        .args(["stat", "-x,", "-e", "raw_syscalls:sys_enter", "true"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}
