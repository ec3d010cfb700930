//! A disk that is held after an error (`--on-error`), and whose session ends: the requests that wait stay in the
//! in-flight region, and whoever serves it next goes on with them.

use std::time::{Duration, Instant};

use serde_json::Value;
use vhost_user_blkmq::control::client;

use super::world::{Base, World};
use crate::support::disk::{finish, finish_all, status};
use crate::support::full::Full;
use crate::support::*;

const QUEUES: usize = 2;

/// Writes of each queue that wait, a long one among them.
const WAITING: usize = 9;

/// A front end with an in-flight region, or without.
fn world(full: &Full, tracked: bool) -> World {
    let mut world = World::new(1 << 20, QUEUES, QueueSetup::default());
    world.image = full.image();
    if !tracked {
        world.protocol = protocol::KNOWN;
    }
    world
}

fn daemon(world: &World, more: &[&str]) -> Daemon {
    let control = world.image.with_extension("control");
    let control = control.to_str().expect("a plain name");
    let args = ["--control-path", control, "--on-error", "enospc"];
    world.daemon(&[&args[..], more].concat())
}

fn is_held(world: &World) -> bool {
    let control = world.image.with_extension("control");
    let shown = client::ask(&control, "GET", "/v1/disks/@0", None).expect("an answer");
    let shown: Value = serde_json::from_str(&shown).expect("JSON");
    shown["held"] == true
}

fn wait_held(world: &World) {
    let deadline = Instant::now() + DEADLINE;
    while !is_held(world) {
        assert!(Instant::now() < deadline, "it is not held");
        std::thread::yield_now();
    }
}

/// Neighbours, that are merged and fail together, a long one, and a read that waits behind them.
fn fill_queues(world: &mut World) {
    let gpa = world.mem.alloc(65536, 4096);
    world.mem.fill(gpa, 65536, 7);
    for (at, queue) in world.queues.iter_mut().enumerate() {
        let base = 1024 + at as u64 * 1024;
        for nth in 0..WAITING as u64 - 2 {
            Request::write(base + nth * 8, &[Seg::readable(gpa, 4096)]).push(queue, nth);
        }
        let long: Vec<_> = (0..16)
            .map(|nth| Seg::readable(gpa + nth * 4096, 4096))
            .collect();
        Request::write(base + 512, &long).push(queue, 100);
        let into = world.mem.alloc(4096, 4096);
        Request::read(base, &[Seg::writable(into, 4096)]).push(queue, 101);
        queue.publish();
    }
}

/// Each has ended well, and the data are there.
fn all_end_well(world: &mut World) {
    for queue in &mut world.queues {
        let done = finish_all(queue, queue.in_flight().into());
        assert!(
            done.iter().all(|done| done.status == status::OK),
            "{done:?}"
        );
        assert!(!queue.has_completions());
    }
    let image = std::fs::read(&world.image).expect("the image");
    for at in 0..QUEUES {
        let base = (1024 + at * 1024) * 512;
        let written = |from: usize, len: usize| image[from..from + len].iter().all(|b| *b == 7);
        assert!(written(base, (WAITING - 2) * 4096), "queue {at}");
        assert!(written(base + 512 * 512, 65536), "queue {at}");
    }
}

#[test]
fn what_a_held_disk_has_when_the_daemon_is_stopped_ends_well_with_the_next_one() {
    for scheduler in ["none", "mq-deadline"] {
        let Some(full) = Full::new() else { return };
        let mut world = world(&full, true);
        let args = ["--scheduler", scheduler, "--workers", "2"];
        let first = daemon(&world, &args);
        let front = world.attach(&first, Base::Used);
        fill_queues(&mut world);
        wait_held(&world);
        let (code, _, log) = first.terminate();
        assert!(code.success(), "{log}");
        assert!(log.contains("stay in the in-flight region"), "{log}");
        drop(front);
        let told = |world: &World| world.queues.iter().any(|queue| queue.has_completions());
        // The reads may have ended.
        let wrong = |world: &mut World| {
            let done = world.queues.iter_mut().filter_map(Queue::reap);
            let wrong: Vec<_> = done.filter(|done| done.status != status::OK).collect();
            assert!(wrong.is_empty(), "the guest was told: {wrong:?}");
        };
        wrong(&mut world);
        // One that finds no room holds the disk again; and is stopped as well.
        let second = daemon(&world, &args);
        let front = world.attach(&second, Base::Used);
        wait_held(&world);
        second.stop();
        drop(front);
        wrong(&mut world);
        assert!(!told(&world));
        full.make_room();
        let third = daemon(&world, &args);
        let _front = world.attach(&third, Base::Avail);
        all_end_well(&mut world);
        assert!(!is_held(&world));
        assert_eq!([world.in_flight(0), world.in_flight(1)], [0, 0]);
    }
}

#[test]
fn what_a_held_disk_has_when_its_front_end_leaves_ends_well_when_it_returns() {
    let Some(full) = Full::new() else { return };
    let mut world = world(&full, true);
    let daemon = daemon(&world, &["--workers", "1"]);
    for _ in 0..3 {
        let front = world.attach(&daemon, Base::Used);
        if world.queues[0].in_flight() == 0 {
            fill_queues(&mut world);
        }
        wait_held(&world);
        drop(front);
    }
    full.make_room();
    let _front = world.attach(&daemon, Base::Used);
    all_end_well(&mut world);
    assert!(!is_held(&world));
}

/// Nothing could be told from the ring.
#[test]
fn without_a_region_what_is_held_ends_with_its_error_when_the_daemon_is_stopped() {
    let Some(full) = Full::new() else { return };
    let mut world = world(&full, false);
    let daemon = daemon(&world, &[]);
    let _front = world.attach(&daemon, Base::Used);
    let gpa = world.mem.alloc(4096, 4096);
    Request::write(1024, &[Seg::readable(gpa, 4096)]).push(&mut world.queues[0], 0);
    world.queues[0].publish();
    wait_held(&world);
    let (_, _, log) = daemon.terminate();
    assert_eq!(finish(&mut world.queues[0]).status, status::IOERR);
    assert!(
        log.contains("1 requests that wait after an error are tried once more"),
        "{log}"
    );
}

/// With requests at the engine that end well or badly while the session ends.
#[test]
fn a_disk_that_fails_while_the_daemon_stops_leaves_what_failed_to_the_next_one() {
    let Some(full) = Full::new() else { return };
    let mut world = world(&full, true);
    // It goes out when the daemon stops, and fails then.
    let limited = ["--limit", "bps=512"];
    let first = daemon(&world, &limited);
    let front = world.attach(&first, Base::Used);
    let gpa = world.mem.alloc(65536, 4096);
    world.mem.fill(gpa, 65536, 7);
    Request::write(0, &[Seg::readable(gpa, 65536)]).push(&mut world.queues[0], 0);
    world.queues[0].publish();
    assert_eq!(finish(&mut world.queues[0]).status, status::OK);
    fill_queues(&mut world);
    let deadline = Instant::now() + DEADLINE;
    while world.in_flight(0) < WAITING || world.in_flight(1) < WAITING {
        assert!(Instant::now() < deadline, "not all are taken");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(!is_held(&world), "it waits for the limit");
    first.stop();
    drop(front);
    full.make_room();
    let second = daemon(&world, &[]);
    let _front = world.attach(&second, Base::Used);
    all_end_well(&mut world);
}
