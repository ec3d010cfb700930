//! Rings: how they start, stop, go on, and when they call.

use crate::support::disk::{finish, finish_all, kind, status};
use crate::support::*;
use std::time::Duration;

const DISK: u64 = 8 << 20;
/// How long something must not happen. Only ever waited for in full when all is well.
const QUIET: Duration = Duration::from_millis(200);

fn push_reads(queue: &mut Queue, gpa: u64, count: u64) {
    for n in 0..count {
        let data = [Seg::writable(gpa, 512)];
        queue
            .push(n, kind::IN, 0, n, &data)
            .expect("the ring has room");
    }
}

fn assert_ok(done: &[Completion]) {
    for done in done {
        assert_eq!((done.status, done.len), (status::OK, 513), "{done:?}");
    }
}

#[test]
fn a_driver_without_call_eventfd_polls() {
    let daemon = Daemon::start(&Spec::image(DISK));
    let setup = QueueSetup {
        call: false,
        ..QueueSetup::default()
    };
    let mut disk = Disk::attach_with(daemon.socket(), &Setup::default(), 2, setup)
        .expect("a session with queues");
    let data = Rng::new(40).bytes(65536);
    disk.write(1, 0, &data);
    assert!(disk.read(0, 0, data.len()) == data);
}

#[test]
fn a_kick_before_the_ring_is_enabled_is_not_lost() {
    let daemon = Daemon::start(&Spec::image(DISK));
    let mut front = Front::connect(daemon.socket(), &Setup::default()).expect("a session");
    let mut queue = front
        .prepare_queue(0, QueueSetup::default())
        .expect("a queue");
    let gpa = front.mem.alloc(512, 512);
    push_reads(&mut queue, gpa, 3);
    queue.publish_quietly();
    queue.kick();
    front.start(&queue).expect("the ring starts");
    assert!(queue.wait(QUIET).is_none(), "a disabled ring is left alone");
    front.enable(0, true).expect("the ring is enabled");
    assert_ok(&finish_all(&mut queue, 3));
}

#[test]
fn a_disabled_ring_is_left_alone_until_it_is_enabled() {
    let daemon = Daemon::start(&Spec::image(DISK));
    let mut disk = Disk::attach(daemon.socket(), 2);
    let gpa = disk.mem().alloc(512, 512);
    for _ in 0..3 {
        disk.front.enable(0, false).expect("the ring is disabled");
        push_reads(&mut disk.queues[0], gpa, 5);
        disk.queues[0].publish_quietly();
        disk.queues[0].kick();
        disk.write(1, 0, &[1; 512]);
        assert!(disk.queues[0].wait(QUIET).is_none());
        disk.front.enable(0, true).expect("the ring is enabled");
        assert_ok(&finish_all(&mut disk.queues[0], 5));
    }
}

#[test]
fn a_queue_enabled_without_addresses_does_no_harm() {
    let daemon = Daemon::start(&Spec::image(DISK));
    let mut disk = Disk::attach(daemon.socket(), 1);
    for index in 1..4 {
        disk.front
            .enable(index, true)
            .expect("an unused queue is enabled");
    }
    disk.write(0, 0, &[7; 512]);
    assert_eq!(disk.read(0, 0, 512), [7; 512]);
    for index in 1..4 {
        disk.front.enable(index, false).expect("and disabled");
    }
    assert_eq!(disk.read(0, 0, 512), [7; 512]);
    let queue = disk
        .front
        .queue(2, QueueSetup::default())
        .expect("and used after all");
    disk.queues.push(queue);
    assert_eq!(disk.read(1, 0, 512), [7; 512]);
}

#[test]
fn call_eventfds_may_come_early_and_often() {
    let daemon = Daemon::start(&Spec::image(DISK));
    let setup = Setup {
        early_calls: 4,
        ..Setup::default()
    };
    let mut disk = Disk::attach_with(daemon.socket(), &setup, 2, QueueSetup::default())
        .expect("a session with queues");
    let gpa = disk.mem().alloc(512, 512);
    for round in 0..10 {
        let call = Event::new().expect("an eventfd");
        let Disk { front, queues, .. } = &mut disk;
        front
            .set_call(&mut queues[0], Some(call))
            .expect("a new call eventfd");
        queues[0].arm(0);
        let before = queues[0].calls;
        push_reads(&mut queues[0], gpa, 1);
        queues[0].publish();
        assert!(
            queues[0].wait_call(DEADLINE) > 0,
            "round {round}: no call on the new eventfd"
        );
        assert_ok(&[finish(&mut queues[0])]);
        assert!(queues[0].calls > before);
    }
    let Disk { front, queues, .. } = &mut disk;
    front
        .set_call(&mut queues[0], None)
        .expect("no call eventfd any more");
    push_reads(&mut queues[0], gpa, 8);
    queues[0].publish();
    assert_ok(&finish_all(&mut queues[0], 8));
}

#[test]
fn a_stopped_ring_goes_on_where_it_was() {
    let daemon = Daemon::start(&Spec::image(DISK));
    // A small ring near the end of its indices: they wrap on the way.
    let setup = QueueSetup {
        size: 16,
        base: 65520,
        ..QueueSetup::default()
    };
    let mut disk = Disk::attach_with(daemon.socket(), &Setup::default(), 1, setup)
        .expect("a session with a queue");
    let gpa = disk.mem().alloc(512, 512);
    for _ in 0..10 {
        let queue = &mut disk.queues[0];
        for count in [1, 7, 3] {
            push_reads(queue, gpa, count);
            queue.publish();
            assert_ok(&finish_all(queue, count as usize));
        }
        let base = disk.front.stop(0).expect("the ring stops");
        assert_eq!(base, disk.queues[0].avail_idx());
        disk.front.start(&disk.queues[0]).expect("the ring starts");
        disk.front.enable(0, true).expect("the ring is enabled");
    }
}

#[test]
fn stopping_a_ring_finishes_what_is_in_flight() {
    let daemon = Daemon::start(&Spec::image(64 << 20));
    let mut disk = Disk::attach(daemon.socket(), 1);
    let len = 256 << 10;
    let gpa = disk.mem().alloc(len, 4096);
    disk.mem().write(gpa, &Rng::new(41).bytes(len));
    for round in 0..20_u64 {
        let queue = &mut disk.queues[0];
        for n in 0..64 {
            let data = [Seg::readable(gpa, len)];
            let sector = (round * 64 + n) % 256 * (len as u64 / SECTOR);
            queue
                .push(n, kind::OUT, 0, sector, &data)
                .expect("the ring has room");
        }
        queue.publish();
        let base = disk.front.stop(0).expect("the ring stops");
        let queue = &mut disk.queues[0];
        assert_eq!(
            queue.device_used_idx(),
            base,
            "what was taken from the ring has been answered"
        );
        // The rest is still in the avail ring: the back end starts at its base and finds it.
        disk.front.set_ring(queue, base).expect("the ring is set");
        disk.front
            .send_call(0, queue.call_fd())
            .expect("the call eventfd is set");
        disk.front
            .send_kick(queue)
            .expect("the kick eventfd is set");
        disk.front.enable(0, true).expect("the ring is enabled");
        queue.kick();
        for done in finish_all(queue, 64) {
            assert_eq!((done.status, done.len), (status::OK, 1));
        }
    }
}

#[test]
fn a_reset_device_starts_again() {
    let daemon = Daemon::start(&Spec::image(DISK));
    let mut disk = Disk::attach(daemon.socket(), 2);
    let data = Rng::new(42).bytes(4096);
    disk.write(1, 64, &data);
    for _ in 0..5 {
        // QEMU stops the rings it started, then resets.
        for index in 0..2 {
            disk.front.stop(index).expect("the ring stops");
        }
        disk.front.reset_device().expect("the device is reset");
        disk.front.send_features().expect("features are set again");
        disk.front.send_memory(false).expect("memory is set again");
        for queue in &mut disk.queues {
            queue.reset(0);
            disk.front.start(queue).expect("the ring starts");
            disk.front
                .enable(queue.index, true)
                .expect("the ring is enabled");
        }
        assert!(disk.read(0, 64, 4096) == data);
        assert!(disk.read(1, 64, 4096) == data);
    }
}

/// Reads `count` sectors in one batch without sleeping, and counts the calls that brings.
fn calls_for(disk: &mut Disk, count: u64, ready: impl Fn(&mut Queue)) -> u64 {
    let gpa = disk.mem().alloc(512, 512);
    let queue = &mut disk.queues[0];
    // A back end may call when it is given the eventfd, and for its first request in any case: both are behind us
    // once a request that asked for its call has got it.
    queue.call_fd().expect("a call eventfd").take();
    queue.arm(0);
    push_reads(queue, gpa, 1);
    queue.publish();
    assert!(queue.wait_call(DEADLINE) > 0, "the call that was asked for");
    assert_ok(&[finish(queue)]);

    ready(queue);
    push_reads(queue, gpa, count);
    queue.publish();
    for _ in 0..count {
        let done = queue.spin(DEADLINE).expect("a completion");
        assert_eq!(done.status, status::OK);
    }
    // The used index is published before the call; after the ring has stopped no call can come any more.
    disk.front.stop(0).expect("the ring stops");
    let calls = disk.queues[0].call_fd().expect("a call eventfd").take();
    disk.front.start(&disk.queues[0]).expect("the ring starts");
    disk.front.enable(0, true).expect("the ring is enabled");
    calls
}

#[test]
fn no_interrupt_is_honoured_without_event_idx() {
    let daemon = Daemon::start(&Spec::image(DISK));
    let setup = Setup {
        features: features::KNOWN & !features::EVENT_IDX,
        ..Setup::default()
    };
    let mut disk = Disk::attach_with(daemon.socket(), &setup, 1, QueueSetup::default())
        .expect("a session with a queue");
    assert_eq!(calls_for(&mut disk, 32, Queue::disarm), 0);
    let calls = calls_for(&mut disk, 32, |queue| queue.arm(0));
    assert!((1..=32).contains(&calls), "{calls} calls");
}

#[test]
fn event_idx_calls_once_and_only_where_it_was_asked() {
    let daemon = Daemon::start(&Spec::image(DISK));
    let mut disk = Disk::attach(daemon.socket(), 1);
    assert_ne!(disk.front.features & features::EVENT_IDX, 0);
    assert_eq!(calls_for(&mut disk, 32, Queue::disarm), 0);
    assert_eq!(
        calls_for(&mut disk, 32, |queue| queue.arm(31)),
        1,
        "at the last"
    );
    assert_eq!(
        calls_for(&mut disk, 32, |queue| queue.arm(0)),
        1,
        "at the first"
    );
    assert_eq!(
        calls_for(&mut disk, 32, |queue| queue.arm(32)),
        0,
        "past the last"
    );
}

#[test]
fn kicks_are_suppressed_under_load() {
    let daemon = Daemon::start(&Spec::null(1 << 30));
    let mut disk = Disk::attach(daemon.socket(), 1);
    let gpa = disk.mem().alloc(512, 512);
    let total = 20_000;
    let queue = &mut disk.queues[0];
    push_reads(queue, gpa, 32);
    queue.publish();
    for n in 0..total {
        let done = queue.spin(DEADLINE).expect("a completion");
        assert_eq!(done.status, status::OK);
        if n + 32 < total {
            push_reads(queue, gpa, 1);
            queue.publish();
        }
    }
    assert!(
        queue.kicks < total / 2,
        "{} kicks for {total} requests",
        queue.kicks
    );
}

/// A million descriptors in one ring are some milliseconds of work, in which another queue of the same worker
/// waited. They are taken a few thousand in a turn, as the calls show: each turn that answers has one.
#[test]
fn a_ring_of_the_longest_chains_is_taken_in_turns() {
    for spec in [Spec::null(1 << 30), Spec::image_of(&vec![7; 1 << 20])] {
        for poll in ["0", "50"] {
            let daemon = Daemon::start_ours(&spec.clone().args(["--poll-us", poll]));
            let memory = Setup {
                memory: vec![(0, 96 << 20)],
                features: Setup::default().features & !features::EVENT_IDX,
                ..Setup::default()
            };
            let setup = QueueSetup {
                size: 1024,
                indirect_len: 1024,
                ..QueueSetup::default()
            };
            let mut disk =
                Disk::attach_with(daemon.socket(), &memory, 1, setup).expect("a session");
            let gpa = disk.mem().alloc(512, 512);
            let segs = vec![Seg::writable(gpa, 1); 1000];
            let queue = &mut disk.queues[0];
            for n in 0..1024 {
                queue.push(n, kind::IN, 0, 0, &segs).expect("room");
            }
            queue.publish();
            let answers = finish_all(queue, 1024);
            assert!(answers.iter().all(|done| done.status == status::IOERR));
            drop(disk);
            let calls = daemon.stop().total(|queue| queue.calls);
            assert!(calls >= 1024 * 1000 / (4096 + 1000), "{calls} turns");
        }
    }
}
