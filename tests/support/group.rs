//! A control group that bounds how many threads its processes have.

use super::DEADLINE;
use rustix::process::geteuid;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// A group of the pids controller (v1, or v2 where it is mounted by itself), removed at the end.
#[derive(Debug)]
pub struct Group(PathBuf);

impl Group {
    /// An empty one without a bound. `None`, with a word on stderr, where there is none to be had.
    pub fn new() -> Option<Group> {
        static MADE: AtomicU32 = AtomicU32::new(0);
        let v1 = PathBuf::from("/sys/fs/cgroup/pids");
        let v2 = PathBuf::from("/sys/fs/cgroup");
        let controllers = fs::read_to_string(v2.join("cgroup.subtree_control"));
        let has_pids = |list: String| list.split_whitespace().any(|name| name == "pids");
        let root = if v1.is_dir() {
            Some(v1)
        } else {
            controllers.is_ok_and(has_pids).then_some(v2)
        };
        let Some(root) = root.filter(|_| geteuid().is_root()) else {
            eprintln!("skipped: needs root and the pids controller");
            return None;
        };
        let nth = MADE.fetch_add(1, Ordering::Relaxed);
        let group = Group(root.join(format!("blkmq-test-{}-{nth}", std::process::id())));
        fs::create_dir(&group.0).expect("a group");
        Some(group)
    }

    /// Moves a process into it.
    pub fn take(&self, pid: u32) {
        fs::write(self.0.join("cgroup.procs"), pid.to_string()).expect("it moves");
    }

    /// A program in `dir` that starts ours in the group.
    pub fn program(&self, dir: &Path) -> PathBuf {
        let script = dir.join("start");
        let text = format!(
            "#!/bin/sh\necho $$ > {}/cgroup.procs\nexec {} \"$@\"\n",
            self.0.display(),
            env!("CARGO_BIN_EXE_vhost-user-blkmq")
        );
        fs::write(&script, text).expect("a script");
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).expect("its mode");
        script
    }

    /// Bounds the number of threads; `max` is no bound.
    pub fn allow(&self, threads: &str) {
        fs::write(self.0.join("pids.max"), threads).expect("a bound");
    }

    /// As many as there are now.
    pub fn allow_no_more(&self) {
        let now = fs::read_to_string(self.0.join("pids.current")).expect("a count");
        self.allow(now.trim());
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // What fails here shows below.
        let _ = fs::write(self.0.join("pids.max"), "max");
        // It is empty when the process has ended; the group outlives it by moments.
        let begun = Instant::now();
        while fs::remove_dir(&self.0).is_err() && begun.elapsed() < DEADLINE {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}
