//! What is noted of a guest when the disk goes to a process that keeps no notes, such as the last release.

use std::os::unix::fs::FileExt;
use std::time::Instant;

use rustix::process::Signal;
use tempfile::TempDir;

use super::refused::Actor;
use super::region::{choose, come_back, is_write_through};
use super::support::front::Inflight;
use super::support::*;
use super::{Lineage, MIB};

pub(super) const ARGS: [&str; 4] = ["--cache", "writeback", "--serial", "s"];
/// What the log says of a guest whose choice is not known.
pub(super) const UNKNOWN: &str = "whether it chose write-through is not known";
const TAKEN: u32 = 6;

/// A front end with a region and a ring that was used.
pub(super) fn attach(lineage: &Lineage) -> (Front, Inflight, Queue) {
    let (front, region, mut queues) = super::region::attach(&lineage.daemon, 1);
    let mut queue = queues.remove(0);
    Request::flush().run(&mut queue);
    assert!(region.has_notes());
    (front, region, queue)
}

/// A process that takes over and says nothing of notes, up to the moment that decides.
pub(super) fn ask_without_notes(lineage: &Lineage, step: u32) -> Actor {
    let (mut actor, head) = Actor::ask(lineage, "[1]");
    assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
    actor.go(step);
    actor
}

/// The front end goes to a daemon that is started anew, and the guest goes on.
fn restart(
    lineage: &Lineage,
    front: Front,
    region: &Inflight,
    queue: &mut Queue,
) -> (Daemon, Front) {
    let next = lineage.daemon.beside(&lineage.spec.clone().args(ARGS));
    let front = come_back(front, &next, region, std::slice::from_ref(queue));
    Request::flush().run(queue);
    (next, front)
}

/// What its guest chooses there is not noted, so what was noted before may not be believed.
#[test]
fn a_daemon_that_keeps_no_notes_is_handed_a_region_without_any() {
    let mut lineage = Lineage::start(Spec::image(8 * MIB), &ARGS);
    let (front, region, mut queue) = attach(&lineage);
    assert!(!is_write_through(&lineage));
    let mut actor = ask_without_notes(&lineage, 4);
    assert!(!region.has_notes());
    actor.say(TAKEN, "");
    assert!(lineage.daemon.wait_exit().success());
    assert!(!region.has_notes());
    // Its guest may have chosen write-through. The next daemon does not know.
    let (next, front) = restart(&lineage, front, &region, &mut queue);
    assert!(next.wait_for_message(UNKNOWN));
    assert!(is_write_through(&lineage));
    assert!(region.has_notes(), "now it is known what the guest has");
    lineage.daemon = next;
    lineage.daemon.signal(Signal::KILL);
    lineage.daemon.wait_exit();
    // The one after that knows that it is not known, and it ends when the driver begins anew.
    let (next, mut front) = restart(&lineage, front, &region, &mut queue);
    assert!(is_write_through(&lineage));
    assert!(!next.stderr().contains(UNKNOWN), "{}", next.stderr());
    front.reset_device().expect("a device can be reset");
    assert!(!is_write_through(&lineage));
    drop(actor);
}

/// It is cautious where the old daemon dies between the two, and nothing is lost where it does not.
#[test]
fn notes_come_back_when_a_take_over_fails_and_are_not_believed_when_the_daemon_dies_before() {
    let mut lineage = Lineage::start(Spec::image(8 * MIB), &ARGS);
    let (mut front, region, mut queue) = attach(&lineage);
    for (writeback, step) in [(0, 3), (1, 4), (0, 4)] {
        choose(&mut front, writeback);
        drop(ask_without_notes(&lineage, step));
        let deadline = Instant::now() + DEADLINE;
        while !region.has_notes() {
            assert!(Instant::now() < deadline, "the notes do not come back");
            std::thread::yield_now();
        }
    }
    lineage.daemon.signal(Signal::KILL);
    lineage.daemon.wait_exit();
    let (next, mut front) = restart(&lineage, front, &region, &mut queue);
    assert!(next.wait_for_message("goes on with write-through"));
    assert!(!next.stderr().contains(UNKNOWN), "{}", next.stderr());
    lineage.daemon = next;
    choose(&mut front, 1);
    assert!(!is_write_through(&lineage));

    let actor = ask_without_notes(&lineage, 4);
    lineage.daemon.signal(Signal::KILL);
    lineage.daemon.wait_exit();
    drop(actor);
    let (next, mut front) = restart(&lineage, front, &region, &mut queue);
    assert!(next.wait_for_message(UNKNOWN));
    assert!(is_write_through(&lineage));
    lineage.daemon = next;
    // What it chooses from then on is known.
    choose(&mut front, 1);
    lineage.daemon.signal(Signal::KILL);
    lineage.daemon.wait_exit();
    let (next, _front) = restart(&lineage, front, &region, &mut queue);
    assert!(!is_write_through(&lineage));
    assert!(!next.stderr().contains(UNKNOWN), "{}", next.stderr());
}

/// A process that keeps notes finds them right, whoever dies.
#[test]
fn a_daemon_that_keeps_notes_is_handed_them_as_they_are() {
    let mut lineage = Lineage::start(Spec::image(8 * MIB), &ARGS);
    let (mut front, region, mut queue) = attach(&lineage);
    choose(&mut front, 0);
    choose(&mut front, 1);
    let (mut actor, _) = Actor::ask(&lineage, "[1]");
    actor.plan = actor.plan.replacen('{', r#"{"keeps_notes": true,"#, 1);
    actor.go(4);
    assert!(region.has_notes());
    lineage.daemon.signal(Signal::KILL);
    lineage.daemon.wait_exit();
    let (next, _front) = restart(&lineage, front, &region, &mut queue);
    assert!(!is_write_through(&lineage));
    assert!(!next.stderr().contains(UNKNOWN), "{}", next.stderr());
}

/// Its front end takes the region to the new daemon by itself.
#[test]
fn a_session_that_is_closed_for_a_daemon_that_keeps_no_notes_leaves_none() {
    let lineage = Lineage::start(Spec::image(8 * MIB), &ARGS);
    let (front, region, _queue) = attach(&lineage);
    // Its guest is being migrated, so it cannot be handed over.
    let features = front.features | 1 << 26;
    front
        .send_raw(2, 1, &features.to_ne_bytes(), &[])
        .expect("it is sent");
    let (mut actor, _) = Actor::ask(&lineage, "[1]");
    actor.plan = actor.plan.replacen('{', r#"{"close_unready": true,"#, 1);
    actor.go(4);
    assert!(front.is_closed());
    assert!(!region.has_notes());
}

/// One that would note something else, and fails at the disk after that.
#[test]
fn a_new_daemon_writes_no_notes_before_the_disks_are_its_own() {
    let dir = TempDir::new().expect("a directory");
    let other = dir.path().join("other.sock");
    let disk = format!("socket-path={},engine=null,size=1M", other.display());
    let spec = Spec::image(8 * MIB).args(["--disk", &disk]);
    let mut lineage = Lineage::start(spec, &ARGS);
    let (mut front, region, mut queue) = attach(&lineage);
    let second = Front::connect(&other, &Setup::default()).expect("a session");
    assert_ne!(second.features & 1 << 13, 0, "its guest can discard");
    let notes = || {
        let mut bytes = [0; 128];
        let read = region.file.read_exact_at(&mut bytes, region.notes_at());
        read.map(|()| bytes).expect("there is room for notes")
    };
    let before = notes();
    // The same disks, so that it gets as far as to set them up.
    let with = format!("{disk},discard=off");
    let control = lineage.control();
    let control = control.to_str().expect("a plain name");
    let new = Spec::path(lineage.daemon.image())
        .args(["--control-path", control, "--take-over", control])
        .args(["--disk", &with, "--cache", "writethrough", "--serial", "s"]);
    let mut new = lineage.daemon.beside(&new);
    assert_eq!(new.wait_exit().code(), Some(1));
    let said = new.stderr();
    assert!(
        said.contains("feature bits 0x2000 were never offered"),
        "{said}"
    );
    assert_eq!(notes(), before);
    Request::flush().run(&mut queue);
    choose(&mut front, 0);
    assert_ne!(notes(), before);
    assert!(lineage.daemon.is_running());
}
