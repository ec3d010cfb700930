//! Requests that have to be copied: the worker's bounce buffers.

use super::neighbours::{Frozen, Pair};
use super::*;

/// More than a worker has buffers.
const STUCK: u64 = 40;

/// Copied, because direct I/O does not take such an address.
fn odd(gpa: u64) -> u64 {
    gpa + 1
}

#[test]
fn copies_of_a_frozen_disk_leave_its_neighbour_bounce_buffers() {
    let Some(frozen) = Frozen::of(1, 64 << 20, 16 << 20) else {
        return;
    };
    let pair = Pair::start(&frozen.images()[0], &[]);
    let mut disk = pair.attach();
    let mut other = pair.attach_other();
    other.write(0, 0, &[7; 4096]);
    let cold = frozen.freeze();
    let gpa = disk.mem().alloc(8192, 4096);
    for n in 0..STUCK {
        let segs = [Seg::readable(odd(gpa), 4096)];
        disk.queues[0]
            .push(n, kind::OUT, 0, n * 16, &segs)
            .expect("room");
    }
    disk.queues[0].publish();
    let deadline = Instant::now() + DEADLINE;
    loop {
        let seen = pair.status();
        if seen["disks"][0]["stats"]["in_flight"] == STUCK {
            break;
        }
        assert!(Instant::now() < deadline, "{seen}");
    }
    let gpa = other.mem().alloc(8192, 4096);
    for n in 0..100 {
        let segs = [Seg::writable(odd(gpa), 4096)];
        other.queues[0]
            .push(n, kind::IN, 0, 0, &segs)
            .expect("room");
        other.queues[0].publish();
        assert_eq!(finish(&mut other.queues[0]).status, status::OK);
    }
    let mut seen = [0; 4096];
    other.mem().read(odd(gpa), &mut seen);
    assert!(seen == [7; 4096], "the disk's data");
    drop(cold);
    let ends = finish_all(&mut disk.queues[0], STUCK as usize);
    assert!(ends.iter().all(|end| end.status == status::OK));
    pair.end(disk, other);
}
