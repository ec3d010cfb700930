//! A new daemon that the host lets have too few threads, at every one of them.

use std::time::Duration;

use super::support::*;
use super::{Lineage, MIB, under_load};

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
