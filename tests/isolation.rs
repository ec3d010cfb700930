//! A disk whose storage misbehaves beside one that does not, on the same worker: file systems that are frozen, a
//! server that hangs, requests that are huge, discards that take long, a host without threads. What the other disk
//! asks for is answered all the same, and the process can be looked at and ended.
//!
//! What the other disk feels is measured by
//!
//! ```sh
//! cargo test --release --test isolation -- --ignored --nocapture --exact pace::what_the_neighbour_feels
//! ```
//!
//! Mounts and control groups need root. Without it these tests say so and prove nothing.

#![allow(
    clippy::cast_possible_truncation,
    reason = "test code: sizes and offsets are small and known"
)]

#[path = "isolation/bounces.rs"]
mod bounces;
#[path = "isolation/deeds.rs"]
mod deeds;
#[path = "support/fuse.rs"]
mod fuse;
#[path = "isolation/killed.rs"]
mod killed;
#[path = "isolation/neighbours.rs"]
mod neighbours;
#[path = "isolation/pace.rs"]
mod pace;
#[path = "isolation/scene.rs"]
mod scene;
#[path = "isolation/sizes.rs"]
mod sizes;
mod support;
#[path = "isolation/threads.rs"]
mod threads;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use neighbours::{Frozen, Pair, Party, TIMES};
use rustix::process::Signal;
use support::disk::{Range, finish, finish_all, kind, status};
use support::*;

/// Frozen disks of one worker beside one that is not.
const FROZEN: usize = 40;

/// Everything that a disk with a frozen file system can have in kernel threads it has there, 40 times. The disk beside
/// them writes, reads, flushes, discards and zeroes as ever.
#[test]
fn forty_frozen_disks_leave_the_others_their_kernel_threads() {
    let Some(frozen) = Frozen::new(FROZEN) else {
        return;
    };
    let party = Party::start(&frozen.images(), &[]);
    let mut disks = party.attach_all();
    let cold = frozen.freeze();
    for disk in &mut disks {
        neighbours::push_everything(disk, 10);
    }
    let mut other = party.attach_other();
    for round in 0..TIMES {
        neighbours::use_in_every_way(&mut other, round);
    }
    drop(cold);
    for disk in &mut disks {
        let count = usize::from(disk.queues[0].in_flight());
        let ends = finish_all(&mut disk.queues[0], count);
        assert!(ends.iter().all(|end| end.status == status::OK));
    }
    party.end(disks, other);
}

/// With `--timeout`, what hangs is named, and status and an end of the process do not wait for it.
#[test]
fn a_server_that_hangs_holds_up_its_own_disk_and_nothing_else() {
    let Some(mount) = fuse::FuseMount::new(&[("disk.img", 16 << 20)]) else {
        return;
    };
    let pair = Pair::start(&mount.path("disk.img"), &["--timeout", "1"]);
    let mut disk = pair.attach();
    let mut other = pair.attach_other();
    disk.write(0, 0, &[7; 8192]);
    mount.hang();
    neighbours::push_everything(&mut disk, 10);
    assert!(mount.wait_for_waiting(1), "the server was asked");
    for round in 0..TIMES {
        neighbours::use_in_every_way(&mut other, round);
    }
    assert!(pair.daemon.wait_for_message("has not come back"));
    let seen = pair.status();
    assert_eq!(seen["disks"][0]["connected"], true, "{seen}");
    // The second signal is for what does not end.
    terminate_twice(&pair.daemon);
    assert!(
        pair.daemon
            .wait_for_message("ending without what is in flight of disk")
    );
    mount.release();
    let mut daemon = pair.daemon;
    assert_eq!(daemon.wait_exit().code(), Some(1));
}

/// Signals that come together, as from timeout(1) or a terminal that closes, are one: what is in flight is finished.
#[test]
fn signals_that_come_together_leave_nothing_in_flight() {
    let Some(mount) = fuse::FuseMount::new(&[("disk.img", 16 << 20)]) else {
        return;
    };
    let pair = Pair::start(&mount.path("disk.img"), &[]);
    let mut disk = pair.attach();
    mount.hang();
    neighbours::push_everything(&mut disk, 1);
    assert!(mount.wait_for_waiting(1), "the server was asked");
    pair.daemon.signal(Signal::TERM);
    pair.daemon.signal(Signal::HUP);
    assert!(pair.daemon.wait_for_message("finishing what is in flight"));
    pair.daemon.signal(Signal::TERM);
    pair.daemon.signal(Signal::HUP);
    mount.release();
    let count = usize::from(disk.queues[0].in_flight());
    let ends = finish_all(&mut disk.queues[0], count);
    assert!(ends.iter().all(|end| end.status == status::OK), "{ends:?}");
    let mut daemon = pair.daemon;
    assert_eq!(daemon.wait_exit().code(), Some(0));
}

/// The same requests, and the server goes on.
#[test]
fn what_a_server_did_not_answer_ends_when_it_does() {
    let Some(mount) = fuse::FuseMount::new(&[("disk.img", 16 << 20)]) else {
        return;
    };
    let pair = Pair::start(&mount.path("disk.img"), &[]);
    let mut disk = pair.attach();
    let mut other = pair.attach_other();
    mount.hang();
    neighbours::push_everything(&mut disk, 10);
    assert!(mount.wait_for_waiting(1), "the server was asked");
    neighbours::use_in_every_way(&mut other, 0);
    mount.release();
    let count = usize::from(disk.queues[0].in_flight());
    let ends = finish_all(&mut disk.queues[0], count);
    assert!(ends.iter().all(|end| end.status == status::OK), "{ends:?}");
    pair.end(disk, other);
}

/// A second signal ends the process at once, with a line that names the disk; the kernel keeps it until the file system
/// goes on.
#[test]
fn a_frozen_file_system_does_not_hold_up_the_end_for_ever() {
    let Some(frozen) = Frozen::new(1) else {
        return;
    };
    let pair = Pair::start(&frozen.images()[0], &["--serial", "cold"]);
    let mut disk = pair.attach();
    let cold = frozen.freeze();
    neighbours::push_everything(&mut disk, 10);
    neighbours::use_in_every_way(&mut pair.attach_other(), 0);
    terminate_twice(&pair.daemon);
    assert!(pair.daemon.wait_for_message("in flight of disk cold"));
    drop(cold);
    let mut daemon = pair.daemon;
    assert_eq!(daemon.wait_exit().code(), Some(1));
}

/// Reads of many MiB out of the page cache, some GiB altogether: the submitting call copies a part at a time.
#[test]
fn huge_reads_of_the_page_cache_leave_others_their_turns() {
    const BYTES: usize = 128 << 20;
    let dir = tempfile::tempdir().expect("a directory");
    let image = dir.path().join("disk.img");
    neighbours::sparse(&image, BYTES as u64);
    let pair = Pair::start(&image, &["--cache", "writeback"]);
    let setup = Setup {
        memory: vec![(0, 192 << 20)],
        ..Setup::default()
    };
    let disk = Disk::attach_with(pair.daemon.socket(), &setup, 1, QueueSetup::default());
    let mut disk = disk.expect("it is served");
    let mut other = pair.attach_other();
    let gpa = disk.mem().alloc(BYTES, 4096);
    let before = other.read(0, 0, 4096);
    let queue = &mut disk.queues[0];
    for n in 0..24 {
        let whole = [Seg::writable(gpa, BYTES)];
        queue.push(n, kind::IN, 0, 0, &whole).expect("room");
    }
    queue.publish();
    let (mut answered, begun) = (0, Instant::now());
    while !disk.queues[0].has_completions() {
        assert!(begun.elapsed() < DEADLINE, "they do not end");
        assert!(other.read(0, 0, 4096) == before);
        answered += 1;
    }
    // All are begun and go on in turn, so that none ends before the others are nearly there.
    assert!(answered > 20, "only {answered} reads meanwhile");
    let ends = finish_all(&mut disk.queues[0], 24);
    assert!(
        ends.iter()
            .all(|end| end.status == status::OK && end.len as usize == BYTES + 1)
    );
    pair.end(disk, other);
}

/// A discard of a file with thousands of extents lets the reads of its own disk through, and keeps what lies beside it.
#[test]
fn a_discard_of_many_extents_lets_reads_of_its_disk_through() {
    const EXTENTS: u64 = 8000;
    let Some(frozen) = Frozen::of(1, 256 << 20, 96 << 20) else {
        return;
    };
    let path = frozen.images()[0].clone();
    let image = File::options().write(true).open(&path).expect("an image");
    for extent in 0..EXTENTS {
        image
            .write_all_at(&[1; 4096], extent * 8192)
            .expect("written");
    }
    image
        .write_all_at(&[9; 4096], EXTENTS * 8192)
        .expect("written");
    image.sync_all().expect("on the disk");
    drop(image);
    let pair = Pair::start(&path, &[]);
    let mut disk = Disk::attach(pair.daemon.socket(), 2);
    let range = Range::new(0, (EXTENTS * 16) as u32);
    let discard = Request::ranges(kind::DISCARD, disk.mem(), &[range]);
    discard.push(&mut disk.queues[0], 0);
    disk.queues[0].publish();
    let begun = Instant::now();
    let mut answered = 0;
    while !disk.queues[0].has_completions() {
        assert_eq!(disk.read(1, EXTENTS * 16, 4096), [9; 4096]);
        answered += 1;
        assert!(begun.elapsed() < DEADLINE, "the discard does not end");
    }
    assert_eq!(finish(&mut disk.queues[0]).status, status::OK);
    assert!(answered > 10, "only {answered} reads meanwhile");
    assert_eq!(disk.read(1, 0, 8192), [0; 8192]);
    assert_eq!(disk.read(1, (EXTENTS - 1) * 16, 4096), [0; 4096]);
    pair.daemon.stop();
}

/// A discard that an older daemon's guest was allowed, larger than what is offered now, is done.
#[test]
fn a_discard_larger_than_what_is_offered_is_done() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("disk.img");
    neighbours::sparse(&path, 1 << 40);
    let pair = Pair::start(&path, &[]);
    let mut disk = pair.attach();
    let offered = disk.front.config().expect("a config").max_discard_sectors;
    let sectors = (1 << 40) / SECTOR;
    assert!(u64::from(offered) < sectors);
    let begun = Instant::now();
    let done = disk.clear(0, kind::DISCARD, Range::new(0, sectors as u32));
    assert_eq!(done.status, status::OK);
    assert!(begun.elapsed() < DEADLINE);
    pair.daemon.stop();
}

/// Ends a daemon that does not finish what is in flight: the second signal counts a second after the first.
fn terminate_twice(daemon: &Daemon) {
    daemon.signal(Signal::TERM);
    assert!(daemon.wait_for_message("finishing what is in flight"));
    std::thread::sleep(Duration::from_millis(1100));
    daemon.signal(Signal::TERM);
}

/// A plain name.
fn text(path: &Path) -> &str {
    path.to_str().expect("a plain name")
}
