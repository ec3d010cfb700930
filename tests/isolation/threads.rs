//! A host that lets the process have no more threads.

use std::fs;
use std::path::PathBuf;

use rustix::process::geteuid;

use super::neighbours::{Pair, sparse, use_in_every_way};
use crate::support::*;

/// A control group that bounds how many threads there are (v1, or v2 where it is mounted by itself).
struct Group(PathBuf);

impl Group {
    /// With this process in it, and no bound. `None`, with a word on stderr, where there is none to be had.
    fn with(pid: u32) -> Option<Group> {
        let roots = ["/sys/fs/cgroup/pids", "/sys/fs/cgroup"].map(PathBuf::from);
        let root = roots.into_iter().find(|root| {
            let is_v2 = fs::read_to_string(root.join("cgroup.subtree_control"));
            geteuid().is_root()
                && (root.ends_with("pids") && root.is_dir()
                    || is_v2.is_ok_and(|list| list.split_whitespace().any(|name| name == "pids")))
        });
        let Some(root) = root else {
            eprintln!("skipped: needs root and the pids controller");
            return None;
        };
        let group = Group(root.join(format!("blkmq-test-{pid}")));
        fs::create_dir(&group.0).expect("a group");
        fs::write(group.0.join("cgroup.procs"), pid.to_string()).expect("it moves");
        Some(group)
    }

    fn allow(&self, threads: &str) {
        fs::write(self.0.join("pids.max"), threads).expect("a bound");
    }

    /// As many as there are now.
    fn allow_no_more(&self) {
        let now = fs::read_to_string(self.0.join("pids.current")).expect("a count");
        self.allow(now.trim());
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.allow("max");
        // It is empty when the process has ended; the group outlives it by moments.
        for _ in 0..500 {
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }
}

/// A flush, a discard and zeroes want a kernel thread, and the kernel gives them up where it may start none. The guest
/// waits instead of being told that its data is lost, and the log names the limit.
#[test]
fn a_host_without_threads_is_waited_for_and_no_flush_fails() {
    let dir = tempfile::tempdir().expect("a directory");
    let image = dir.path().join("disk.img");
    sparse(&image, 16 << 20);
    let pair = Pair::start(&image, &[]);
    let mut disk = pair.attach();
    let other = pair.attach_other();
    let Some(group) = Group::with(pair.daemon.pid()) else {
        return;
    };
    group.allow_no_more();
    let queue = &mut disk.queues[0];
    queue.push(1, disk::kind::FLUSH, 0, 0, &[]).expect("room");
    queue.publish();
    assert!(
        pair.daemon.wait_for_message("pids.max, TasksMax="),
        "the limit is named"
    );
    assert!(!disk.queues[0].has_completions(), "nothing has failed");
    group.allow("max");
    let flushed = disk::finish(&mut disk.queues[0]);
    assert_eq!(flushed.status, disk::status::OK);
    assert!(pair.daemon.wait_for_message("can start threads again"));
    use_in_every_way(&mut disk, 0);
    pair.end(disk, other);
}
