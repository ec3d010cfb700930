//! How much of the process one session can use, at most.

use crate::stage::{DISK, Stage};
use crate::support::disk::kind;
use crate::support::front::request::{SET_VRING_CALL, SET_VRING_ERR, SET_VRING_KICK};
use crate::support::*;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use vhost::VhostUserMemoryRegionInfo;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserProtocolFeatures;

const QUEUES: usize = 64;
const REGIONS: usize = 509;
/// What docs/SECURITY.md says.
const FDS_OF_A_QUEUE: usize = 9;
const FDS_OF_A_SESSION: usize = 16;
const THREADS_OF_A_SESSION: usize = 1;
const KIB_OF_A_QUEUE: u64 = 512;
const KIB_OF_A_SESSION: u64 = 4096;

/// What the process uses when nothing changes any more.
pub fn at_rest(stage: &Stage) -> ProcStats {
    daemon_at_rest(&stage.daemon)
}

/// The same of a daemon without a stage.
pub fn daemon_at_rest(daemon: &Daemon) -> ProcStats {
    let mut last = daemon.stats();
    let mut same = 0;
    daemon.wait_stats(|now| {
        let unchanged = (now.fds, now.threads) == (last.fds, last.threads);
        same = if unchanged { same + 1 } else { 0 };
        last.clone_from(now);
        same >= 20
    })
}

fn within(now: &ProcStats, before: &ProcStats) {
    let fds = REGIONS + QUEUES * FDS_OF_A_QUEUE + FDS_OF_A_SESSION;
    assert!(
        now.fds <= before.fds + fds,
        "{} descriptors, {} before",
        now.fds,
        before.fds
    );
    assert!(
        now.threads <= before.threads + THREADS_OF_A_SESSION,
        "{} threads, {} before",
        now.threads,
        before.threads
    );
    let kib = QUEUES as u64 * KIB_OF_A_QUEUE + KIB_OF_A_SESSION;
    assert!(
        now.anon_kib <= before.anon_kib + kib,
        "{} KiB, {} before",
        now.anon_kib,
        before.anon_kib
    );
}

#[test]
fn a_session_stays_below_its_ceiling() {
    let stage = Stage::with(Spec::image(DISK).queues(QUEUES).queue_size(1024));
    stage.serves_again();
    let before = at_rest(&stage);

    // Everything a session can have: regions, queues, descriptors, requests.
    let setup = Setup {
        memory: vec![(0, 128 << 20)],
        protocol: protocol::KNOWN | VhostUserProtocolFeatures::BACKEND_REQ,
        ..Setup::default()
    };
    let mut front = Front::connect(stage.socket(), &setup).expect("a session");
    let file = memfd_create("more", MemfdFlags::CLOEXEC).expect("a memfd");
    ftruncate(&file, REGIONS as u64 * 4096).expect("of this size");
    for n in 1..REGIONS as u64 {
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: (1 << 40) + n * 8192,
            memory_size: 4096,
            userspace_addr: (1 << 44) + n * 8192,
            mmap_offset: n * 4096,
            mmap_handle: file.as_raw_fd(),
        };
        front.vhost.add_mem_region(&region).expect("a region");
    }
    let (_ours, theirs) = UnixStream::pair().expect("sockets");
    front
        .send_raw(21, 1, &[], &[theirs.as_fd()])
        .expect("a back-end channel");
    let setup = QueueSetup {
        size: 1024,
        indirect: false,
        ..QueueSetup::default()
    };
    let mut all: Vec<Queue> = (0..QUEUES)
        .map(|n| front.queue(n, setup).expect("a queue"))
        .collect();
    let err = Event::new().expect("an eventfd");
    for n in 0..QUEUES {
        front
            .send_vring_fd(SET_VRING_ERR, n, Some(err.as_fd()))
            .expect("it is taken");
    }
    let gpa = front.mem.alloc(1 << 20, 4096);
    for queue in &mut all {
        // Reads with more buffers than there is room for beside the ring, as many as fit.
        let segs: Vec<Seg> = (0..30)
            .map(|n| Seg::writable(gpa + n * 4096, 512))
            .collect();
        for n in 0..30 {
            queue.push(n, kind::IN, 0, 0, &segs).expect("room");
        }
        queue.publish();
    }
    for queue in &mut all {
        for _ in 0..30 {
            queue.wait(DEADLINE).expect("it is served");
        }
        // And every entry of the ring once.
        for _ in 0..3 {
            while queue
                .push(0, kind::IN, 0, 0, &[Seg::writable(gpa, 512)])
                .is_some()
            {}
            queue.publish();
            while queue.in_flight() > 0 {
                queue.wait(DEADLINE).expect("it is served");
            }
        }
    }
    let at_the_top = stage.daemon.stats();
    println!("before: {before:?}\nat the top: {at_the_top:?}");
    within(&at_the_top, &before);
    // What the ceiling counts is really there: it is not just high.
    let least = REGIONS + QUEUES * 3;
    assert!(
        at_the_top.fds >= before.fds + least,
        "{} descriptors",
        at_the_top.fds
    );

    // And it cannot be had twice.
    for n in 0..2 * QUEUES {
        let event = Event::new().expect("an eventfd");
        for request in [SET_VRING_CALL, SET_VRING_ERR, SET_VRING_KICK] {
            front
                .send_vring_fd(request, n % QUEUES, Some(event.as_fd()))
                .expect("another");
        }
        front
            .send_raw(21, 1, &[], &[theirs.as_fd()])
            .expect("another channel");
    }
    front.send_memory(false).expect("and other memory");
    within(&stage.daemon.stats(), &before);
    drop((front, all));

    let after = stage
        .daemon
        .wait_stats(|now| now.fds <= before.fds && now.threads <= before.threads);
    println!("after: {after:?}");
    stage.serves_again();
    stage.end();
}

/// The daemon takes as many descriptors as the system lets it have, whatever its parent's soft limit was.
#[test]
fn the_limit_of_open_files_is_raised() {
    let stage = Stage::new();
    let limits =
        std::fs::read_to_string(format!("/proc/{}/limits", stage.daemon.pid())).expect("limits");
    let line = limits
        .lines()
        .find(|line| line.starts_with("Max open files"))
        .expect("a line");
    let numbers: Vec<&str> = line.split_whitespace().skip(3).collect();
    assert_eq!(numbers[0], numbers[1], "soft and hard: {line}");
    stage.end();
}

/// The kernel threads that work for the process's io_urings.
fn kernel_threads(stage: &Stage) -> usize {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", stage.daemon.pid())).expect("threads");
    tasks
        .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok())
        .filter(|name| name.starts_with("iou-wrk"))
        .count()
}

/// A write to a call descriptor that blocks and is full keeps a kernel thread. It is given up when the front end gives
/// another descriptor, or leaves: they do not pile up.
#[test]
fn kernel_threads_do_not_pile_up() {
    use rustix::event::{EventfdFlags, eventfd};
    const QUEUES: usize = 2;
    let stage = Stage::new();
    let mut most = 0;
    for _ in 0..4 {
        let mut disk = stage.attach(QUEUES);
        let gpa = disk.mem().alloc(512, 512);
        for n in 0..50 {
            let call = eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd");
            rustix::io::write(&call, &(u64::MAX - 1).to_ne_bytes()).expect("up to its end");
            let Disk { front, queues, .. } = &mut disk;
            let queue = &mut queues[n % QUEUES];
            front
                .send_vring_fd(SET_VRING_CALL, n % QUEUES, Some(call.as_fd()))
                .expect("it is taken");
            for n in 0..3 {
                queue.arm(0);
                queue
                    .push(n, kind::IN, 0, n, &[Seg::writable(gpa, 512)])
                    .expect("room");
                queue.publish();
                assert_eq!(queue.spin(DEADLINE).expect("it is served").status, 0);
            }
            most = most.max(kernel_threads(&stage));
        }
    }
    println!("{most} kernel threads at most");
    assert!(most > 0, "no write ever waited");
    // Those of calls, of both disks' requests that have to wait, and those that are about to end.
    assert!(most <= 2 * QUEUES + 8, "{most} kernel threads");
    stage.serves_again();
    stage.end();
}
