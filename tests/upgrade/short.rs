//! A new daemon that the host lets have too few threads, at every one of them.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::process::geteuid;

use super::support::*;
use super::{Lineage, MIB, under_load};

/// A control group of the pids controller (v1) for processes that are started by a script.
struct Group(PathBuf);

impl Group {
    /// `None`, with a word on stderr, where there is none to be had.
    fn new() -> Option<Group> {
        let root = Path::new("/sys/fs/cgroup/pids");
        if !geteuid().is_root() || !root.is_dir() {
            eprintln!("skipped: needs root and the pids controller");
            return None;
        }
        let group = Group(root.join(format!("blkmq-short-{}", std::process::id())));
        fs::create_dir(&group.0).expect("a group");
        Some(group)
    }

    fn allow(&self, threads: &str) {
        fs::write(self.0.join("pids.max"), threads).expect("a bound");
    }

    /// A program that starts ours in the group.
    fn program(&self, dir: &Path) -> PathBuf {
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
}

impl Drop for Group {
    fn drop(&mut self) {
        // It is empty when the process has ended; the group outlives it by moments.
        let begun = Instant::now();
        while fs::remove_dir(&self.0).is_err() && begun.elapsed() < DEADLINE {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Before the last step of a take-over the new daemon has all threads that it needs. Whichever it cannot have, the old
/// daemon has its disks.
#[test]
fn a_new_daemon_that_lacks_a_thread_leaves_the_disks_to_the_old_one() {
    let mut lineage = Lineage::start(Spec::image(64 * MIB), &[]);
    let Some(group) = Group::new() else {
        return;
    };
    let mut disk = Disk::attach(lineage.daemon.socket(), 4);
    let program = group.program(lineage.dir.path());
    let spec = lineage.spec.clone().program(Some(&program));
    let mut why = Vec::new();
    under_load(&mut disk, |progress| {
        for threads in 1..100 {
            group.allow(&threads.to_string());
            let mut new = lineage.daemon.beside(&spec);
            while new.is_running() && lineage.daemon.is_running() {
                std::thread::sleep(Duration::from_millis(1));
            }
            if !lineage.daemon.is_running() {
                assert!(new.is_running(), "no daemon is left: {}", new.stderr());
                lineage.daemon = new;
                // It has its own threads, and none for the kernel's part of some requests.
                group.allow("max");
                progress();
                break;
            }
            why.push(new.terminate().2);
            progress();
        }
    });
    // With a thread alone it says so, though none is left to write the log.
    let first = why.first().expect("one thread is too few");
    assert!(first.contains("cannot start the log's thread"), "{first}");
    // The last thread that a daemon starts is that of a disk.
    let last = why.last().expect("two threads are too few");
    assert!(
        last.contains("start a disk's thread") || last.contains("cannot be started"),
        "{last}"
    );
    drop(disk);
    lineage.daemon.stop();
}
