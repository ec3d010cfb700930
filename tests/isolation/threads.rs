//! A host that lets the process have no more threads.

use super::neighbours::{Pair, sparse, use_in_every_way};
use crate::support::*;

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
    let Some(group) = Group::new() else {
        return;
    };
    group.take(pair.daemon.pid());
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
