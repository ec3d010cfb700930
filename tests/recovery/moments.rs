//! Moments that a campaign rarely meets.

use super::world::{Base, World};
use crate::support::disk::{kind, status};
use crate::support::driver::{NEXT, RawDesc, WRITE};
use crate::support::*;
use rustix::process::Signal;
use std::time::Instant;
use vhost::VhostBackend;

/// So slow that nearly all of what is pushed is in flight when the daemon is killed.
pub const SLOW: [&str; 2] = ["--limit", "iops=1/1"];

/// Pushes `count` reads of a sector each, none of which can be merged with another.
pub fn push_reads(world: &mut World, queue: usize, gpa: u64, count: u16) {
    for token in 0..count {
        let data = [Seg::writable(gpa, 512)];
        let sector = 2 * u64::from(token);
        let pushed = world.queues[queue].push(token.into(), kind::IN, 0, sector, &data);
        assert!(pushed.is_some(), "the ring has room");
    }
    world.queues[queue].publish();
}

/// The same with a daemon that is [`SLOW`]: returns when it has taken all of them, and completed one at most.
pub fn push_held_reads(world: &mut World, queue: usize, gpa: u64, count: u16) {
    push_reads(world, queue, gpa, count);
    let deadline = Instant::now() + DEADLINE;
    while world.in_flight(queue) + 1 < usize::from(count) {
        assert!(Instant::now() < deadline, "not all are taken");
        std::thread::yield_now();
    }
}

pub fn kill(mut daemon: Daemon) {
    daemon.signal(Signal::KILL);
    daemon.wait_exit();
}

pub fn reap_all(world: &mut World, queue: usize) -> Vec<u64> {
    let mut tokens = Vec::new();
    while world.queues[queue].in_flight() > 0 {
        let done = disk::finish(&mut world.queues[queue]);
        assert_eq!((done.status, done.len), (status::OK, 513));
        tokens.push(done.token);
    }
    tokens
}

/// Head 0 is among them, as all others.
#[test]
fn a_full_ring_of_1024_is_completed_once() {
    for base in [Base::Used, Base::Avail] {
        let setup = QueueSetup {
            size: 1024,
            ..QueueSetup::default()
        };
        let mut world = World::new(1 << 20, 2, setup);
        let gpa = world.mem.alloc(4096, 4096);
        // Two daemons are killed on it.
        for round in 0..2 {
            let daemon = world.daemon(&SLOW);
            let _front = world.attach(&daemon, base);
            if round == 0 {
                push_held_reads(&mut world, 1, gpa, 1024);
            }
            assert!(world.in_flight(1) >= 1020);
            kill(daemon);
        }
        let daemon = world.daemon(&[]);
        let _front = world.attach(&daemon, base);
        let mut tokens = reap_all(&mut world, 1);
        tokens.sort_unstable();
        assert_eq!(tokens, (0..1024).collect::<Vec<u64>>());
        assert_eq!(world.in_flight(1), 0);
        assert_eq!(world.queues[1].device_used_idx(), 1024);
    }
}

/// A front end that stops the ring at once, to migrate for instance, gets it with nothing in flight.
#[test]
fn a_ring_that_is_stopped_at_once_has_finished_what_was_in_flight() {
    for disable in [false, true] {
        let mut world = World::new(1 << 20, 1, QueueSetup::default());
        let gpa = world.mem.alloc(4096, 4096);
        let daemon = world.daemon(&SLOW);
        let front = world.attach(&daemon, Base::Used);
        push_held_reads(&mut world, 0, gpa, 100);
        kill(daemon);
        drop(front);

        let daemon = world.daemon(&[]);
        let mut front = world.attach(&daemon, Base::Used);
        if disable {
            front.enable(0, false).expect("a ring can be disabled");
            assert_eq!(world.queues[0].device_used_idx(), 100);
        }
        assert_eq!(front.stop(0).expect("a ring can be stopped"), 100);
        assert_eq!(world.queues[0].device_used_idx(), 100);
        assert_eq!(world.in_flight(0), 0);
        assert_eq!(reap_all(&mut world, 0).len(), 100);
        // It goes on from there.
        world.start(&mut front, Base::Used).expect("queues start");
        push_reads(&mut world, 0, gpa, 10);
        assert_eq!(reap_all(&mut world, 0).len(), 10);
    }
}

/// SIGTERM comes while what the daemon before has left is still being worked on.
#[test]
fn a_daemon_that_ends_finishes_what_the_one_before_has_left() {
    let mut world = World::new(1 << 20, 1, QueueSetup::default());
    let gpa = world.mem.alloc(4096, 4096);
    let daemon = world.daemon(&SLOW);
    let front = world.attach(&daemon, Base::Used);
    push_held_reads(&mut world, 0, gpa, 100);
    kill(daemon);
    drop(front);
    let daemon = world.daemon(&["--limit", "iops=1000/1"]);
    let _front = world.attach(&daemon, Base::Used);
    daemon.stop();
    assert_eq!(world.in_flight(0), 0);
    assert_eq!(world.queues[0].device_used_idx(), 100);
}

/// The ring is not enabled before the daemon ends: its requests stay in the account for the next one.
#[test]
fn a_ring_that_is_never_enabled_stays_as_it_is() {
    let mut world = World::new(1 << 20, 1, QueueSetup::default());
    let gpa = world.mem.alloc(4096, 4096);
    let daemon = world.daemon(&SLOW);
    let front = world.attach(&daemon, Base::Used);
    push_held_reads(&mut world, 0, gpa, 100);
    kill(daemon);
    drop(front);
    let before = world.queues[0].device_used_idx();

    let daemon = world.daemon(&[]);
    let mut front = world.connect(daemon.socket()).expect("a daemon serves");
    front.start(&world.queues[0]).expect("a queue starts");
    let base = front.stop(0).expect("a ring can be stopped");
    assert_eq!(base, 100);
    assert_eq!(world.queues[0].device_used_idx(), before);
    drop(front);
    daemon.stop();
    let daemon = world.daemon(&[]);
    let _front = world.attach(&daemon, Base::Used);
    assert_eq!(reap_all(&mut world, 0).len(), 100);
}

/// The guest's driver begins anew, with a region that the front end keeps.
#[test]
fn a_device_that_is_reset_forgets_what_was_in_flight() {
    let mut world = World::new(1 << 20, 1, QueueSetup::default());
    let gpa = world.mem.alloc(4096, 4096);
    let daemon = world.daemon(&[]);
    let mut front = world.attach(&daemon, Base::Used);
    push_reads(&mut world, 0, gpa, 100);
    reap_all(&mut world, 0);
    front.reset_device().expect("a device can be reset");
    let features = front.features;
    front
        .vhost
        .set_features(features)
        .expect("features are negotiated again");
    world.queues[0].reset(0);
    world.start(&mut front, Base::Used).expect("queues start");
    push_reads(&mut world, 0, gpa, 7);
    assert_eq!(reap_all(&mut world, 0).len(), 7);
    // And so does one whose front end says nothing of it.
    front.stop(0).expect("a ring can be stopped");
    world.queues[0].reset(0);
    world.start(&mut front, Base::Used).expect("queues start");
    push_reads(&mut world, 0, gpa, 7);
    assert_eq!(reap_all(&mut world, 0).len(), 7);
    kill(daemon);
    let daemon = world.daemon(&[]);
    let _front = world.attach(&daemon, Base::Used);
    push_reads(&mut world, 0, gpa, 7);
    assert_eq!(reap_all(&mut world, 0).len(), 7);
}

/// A chain that the guest spoils while nobody serves it is answered like any other bad request.
#[test]
fn a_chain_spoiled_meanwhile_is_answered_with_an_error() {
    let setup = QueueSetup {
        indirect: false,
        ..QueueSetup::default()
    };
    let mut world = World::new(1 << 20, 1, setup);
    let gpa = world.mem.alloc(4096, 4096);
    let daemon = world.daemon(&SLOW);
    let front = world.attach(&daemon, Base::Used);
    push_held_reads(&mut world, 0, gpa, 20);
    kill(daemon);
    drop(front);
    // The data of the last one leaves guest memory.
    let last = 19 * 3 + 1;
    let data = RawDesc {
        addr: 1 << 50,
        len: 512,
        flags: NEXT | WRITE,
        next: last + 1,
    };
    world.queues[0].poke_desc(last, data);
    let daemon = world.daemon(&[]);
    let _front = world.attach(&daemon, Base::Used);
    let mut bad = 0;
    while world.queues[0].in_flight() > 0 {
        let done = disk::finish(&mut world.queues[0]);
        let expected = if done.token == 19 {
            status::IOERR
        } else {
            status::OK
        };
        assert_eq!(done.status, expected, "request {}", done.token);
        bad += u32::from(done.token == 19);
    }
    assert_eq!(bad, 1);
}

/// What a front end says of a ring in the region is checked when the ring starts: that ring does not, others do.
#[test]
fn a_region_that_lies_keeps_its_ring_from_starting() {
    use std::os::unix::fs::FileExt;
    let mut world = World::new(1 << 20, 2, QueueSetup::default());
    let gpa = world.mem.alloc(4096, 4096);
    let daemon = world.daemon(&SLOW);
    let front = world.attach(&daemon, Base::Used);
    push_held_reads(&mut world, 0, gpa, 10);
    kill(daemon);
    drop(front);
    let region = world.inflight.as_ref().expect("there is a region");
    // last_batch_head and used_idx of queue 0.
    for (offset, value) in [(12, 0xffff_u16), (14, 0_u16.wrapping_sub(7))] {
        region
            .file
            .write_all_at(&value.to_ne_bytes(), region.records_at() + offset)
            .expect("a region can be written");
    }
    let daemon = world.daemon(&[]);
    let _front = world.attach(&daemon, Base::Used);
    assert!(
        daemon
            .wait_for_message("not started: the in-flight region's last batch leads to head 65535")
    );
    push_reads(&mut world, 1, gpa, 10);
    assert_eq!(reap_all(&mut world, 1).len(), 10);
    daemon.stop();
}

/// Nothing was ever completed, and the only request in flight has head 0: its record has one byte that is not 0.
#[test]
fn head_0_alone_in_flight_before_the_first_completion_is_not_forgotten() {
    use std::os::unix::fs::FileExt;
    for base in [Base::Used, Base::Avail] {
        let mut world = World::new(1 << 20, 1, QueueSetup::default());
        let gpa = world.mem.alloc(4096, 4096);
        let daemon = world.daemon(&[]);
        let front = world.attach(&daemon, base);
        kill(daemon);
        drop(front);
        let data = [Seg::writable(gpa, 512)];
        let head = world.queues[0].push(7, kind::IN, 0, 0, &data);
        assert_eq!(head, Some(0));
        world.queues[0].publish();
        // As a daemon leaves it that was killed after it took the request.
        let region = world.inflight.as_ref().expect("there is a region");
        region
            .file
            .write_all_at(&[1], region.records_at() + 16)
            .expect("a region can be written");
        assert_eq!(world.in_flight(0), 1);
        let daemon = world.daemon(&[]);
        let mut front = world.attach(&daemon, base);
        assert_eq!(reap_all(&mut world, 0), [7]);
        // And once only.
        assert_eq!(front.stop(0).expect("a ring can be stopped"), 1);
        assert_eq!(world.queues[0].device_used_idx(), 1);
        assert_eq!(world.in_flight(0), 0);
    }
}
