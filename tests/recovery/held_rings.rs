//! A disk that is held after an error, and whose rings are enabled, disabled and stopped meanwhile: what is held is sent
//! when the disk is resumed, or once when its ring has to be empty, and never by itself.

use serde_json::Value;
use vhost_user_blkmq::control::client;

use super::world::{Base, World};
use crate::support::disk::{finish, finish_all, status};
use crate::support::full::Full;
use crate::support::*;

const QUEUES: usize = 4;

/// More than enough for a worker that tries again without end to do so.
const LOOKS: usize = 50;

fn world(full: &Full) -> World {
    let mut world = World::new(1 << 20, QUEUES, QueueSetup::default());
    world.image = full.image();
    world
}

fn daemon(world: &World, more: &[&str]) -> Daemon {
    let control = world.image.with_extension("control");
    let control = control.to_str().expect("a plain name");
    let args = ["--control-path", control, "--on-error", "stop"];
    world.daemon(&[&args[..], more].concat())
}

fn ask(world: &World, method: &str, path: &str) -> Value {
    let control = world.image.with_extension("control");
    let shown = client::ask(&control, method, path, None).expect("an answer");
    serde_json::from_str(&shown).unwrap_or_default()
}

/// Whether it is held, and how often it was out of room.
fn shown(world: &World) -> (bool, u64) {
    let disk = ask(world, "GET", "/v1/disks/@0");
    let failed = disk["io_errors"]["no_space"].as_u64().expect("a count");
    (disk["held"] == true, failed)
}

/// How often it was out of room until it was held.
fn wait_held(world: &World) -> u64 {
    let deadline = std::time::Instant::now() + DEADLINE;
    loop {
        match shown(world) {
            (true, failed) => break failed,
            _ => assert!(std::time::Instant::now() < deadline, "it is not held"),
        }
    }
}

/// Each look is answered by the worker, which has had turns enough by the last one.
fn nothing_is_tried(world: &World) {
    let before = shown(world);
    assert!(before.0, "it is held");
    for _ in 0..LOOKS {
        assert_eq!(shown(world), before);
    }
}

/// A write in each queue, which finds no room; all are taken, and none is sent before the daemon is killed.
fn leave_behind(world: &mut World, args: &[&str]) {
    let mut daemon = daemon(world, &[args, &["--limit", "bps=512"]].concat());
    let front = world.attach(&daemon, Base::Used);
    let gpa = world.mem.alloc(65536, 4096);
    // There is room for this one, and it uses the limit up.
    Request::write(0, &[Seg::readable(gpa, 65536)]).push(&mut world.queues[0], 0);
    world.queues[0].publish();
    assert_eq!(finish(&mut world.queues[0]).status, status::OK);
    for (at, queue) in world.queues.iter_mut().enumerate() {
        let sector = 1024 + at as u64 * 1024;
        Request::write(sector, &[Seg::readable(gpa, 4096)]).push(queue, 0);
        queue.publish();
    }
    let deadline = std::time::Instant::now() + DEADLINE;
    while (0..QUEUES).any(|queue| world.in_flight(queue) == 0) {
        assert!(std::time::Instant::now() < deadline, "not all are taken");
        std::thread::yield_now();
    }
    daemon.signal(rustix::process::Signal::KILL);
    daemon.wait_exit();
    drop(front);
}

fn all_end_well(world: &mut World) {
    for queue in &mut world.queues {
        let done = finish_all(queue, queue.in_flight().into());
        let ok = done.iter().all(|done| done.status == status::OK);
        assert!(ok, "{done:?}");
    }
}

/// Starts all rings, as QEMU does, and enables them one after the other with the disk held from the first on.
fn return_to(world: &mut World, daemon: &Daemon) -> Front {
    let mut front = world.connect(daemon.socket()).expect("a daemon serves");
    for queue in &world.queues {
        front.start(queue).expect("it starts");
    }
    for index in 0..QUEUES {
        front.enable(index, true).expect("it is enabled");
        wait_held(world);
    }
    front
}

#[test]
fn rings_that_are_enabled_one_by_one_on_a_held_disk_try_nothing_until_it_is_resumed() {
    for (scheduler, workers) in [("none", "1"), ("mq-deadline", "1"), ("none", "2")] {
        let args = ["--scheduler", scheduler, "--workers", workers];
        let Some(full) = Full::new() else { return };
        let mut world = world(&full);
        leave_behind(&mut world, &args);
        // What is held is left behind once more by the first of these.
        for resumes in [false, true] {
            let daemon = daemon(&world, &args);
            let front = return_to(&mut world, &daemon);
            let failed = wait_held(&world);
            assert!(
                failed <= QUEUES as u64,
                "{failed} tries of {QUEUES} requests"
            );
            nothing_is_tried(&world);
            if resumes {
                full.make_room();
                ask(&world, "POST", "/v1/disks/@0/resume");
                all_end_well(&mut world);
                assert!(!shown(&world).0);
            }
            let (code, _, log) = daemon.terminate();
            assert!(code.success(), "{log}");
            drop(front);
            assert!(!world.queues.iter().any(|queue| queue.has_completions()));
        }
    }
}

/// What a ring has that must be empty ends with its error; what the others have stays, and so does what comes later.
#[test]
fn a_ring_of_a_held_disk_that_is_disabled_or_stopped_ends_what_it_has_and_the_others_wait() {
    let Some(full) = Full::new() else { return };
    let mut world = world(&full);
    leave_behind(&mut world, &["--workers", "1"]);
    // Of the first ring the worker has the request; of the others it has not taken what the record says.
    let daemon = daemon(&world, &["--workers", "1"]);
    let mut front = return_to(&mut world, &daemon);
    for index in 0..2 {
        front.enable(index, false).expect("it is disabled");
        assert_eq!(finish(&mut world.queues[index]).status, status::IOERR);
        front.enable(index, true).expect("it is enabled");
        nothing_is_tried(&world);
    }
    let base = front.stop(2).expect("it is stopped");
    assert_eq!(base, world.queues[2].avail_idx());
    assert_eq!(finish(&mut world.queues[2]).status, status::IOERR);
    nothing_is_tried(&world);
    let gpa = world.mem.alloc(4096, 4096);
    Request::write(8192, &[Seg::readable(gpa, 4096)]).push(&mut world.queues[0], 1);
    world.queues[0].publish();
    nothing_is_tried(&world);
    full.make_room();
    ask(&world, "POST", "/v1/disks/@0/resume");
    assert_eq!(finish(&mut world.queues[0]).status, status::OK);
    assert_eq!(finish(&mut world.queues[3]).status, status::OK);
}
