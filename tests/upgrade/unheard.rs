//! A cache mode that the guest chose with a daemon before the one that is taken over from, which has not heard of it.

use std::path::Path;
use std::sync::Arc;

use rustix::process::Signal;

use super::notes::{ARGS, UNKNOWN, ask_without_notes, attach};
use super::region::{choose, is_write_through, setup};
use super::support::front::Inflight;
use super::support::*;
use super::{Lineage, MIB};

/// The daemon is killed and started again; its front end does not come back yet.
fn restart(lineage: &mut Lineage) {
    lineage.daemon.signal(Signal::KILL);
    lineage.daemon.wait_exit();
    let spec = lineage.spec.clone().args(ARGS);
    lineage.daemon = lineage.daemon.beside(&spec);
    let listens = lineage.daemon.wait_for_message("listening on");
    assert!(listens, "{}", lineage.daemon.stderr());
}

/// A front end that comes back, with its region if it has one, and has started no ring yet.
fn connect(socket: &Path, mem: &Arc<GuestMemory>, region: Option<&Inflight>) -> Front {
    let setup = match region {
        Some(_) => setup(),
        None => Setup::default(),
    };
    let mut front = Front::connect_with(socket, &setup, Arc::clone(mem)).expect("it is served");
    if let Some(region) = region {
        front.set_inflight(region).expect("it is taken");
    }
    front
}

fn go_on(front: &mut Front, queue: &mut Queue) {
    front.start(queue).expect("it starts");
    front.enable(0, true).expect("it is enabled");
    Request::flush().run(queue);
}

fn is_cautious(lineage: &Lineage) {
    assert!(is_write_through(lineage));
    let said = lineage.daemon.stderr();
    assert!(said.contains(UNKNOWN), "{said}");
}

#[test]
fn write_through_chosen_before_a_restart_is_kept_by_a_take_over_before_the_front_end_returns() {
    let mut lineage = Lineage::start(Spec::image(8 * MIB), &ARGS);
    let mut front = Front::connect(lineage.daemon.socket(), &Setup::default()).expect("a session");
    let mut queue = front.queue(0, QueueSetup::default()).expect("a queue");
    Request::flush().run(&mut queue);
    choose(&mut front, 0);
    let mem = Arc::clone(&front.mem);
    drop(front);
    restart(&mut lineage);
    // It goes from one to the next, and none hears of it.
    lineage.upgrade(&ARGS);
    lineage.upgrade(&ARGS);
    assert!(!is_write_through(&lineage), "no guest has been seen");
    let mut front = connect(lineage.daemon.socket(), &mem, None);
    go_on(&mut front, &mut queue);
    is_cautious(&lineage);
    // What is in doubt stays so, and what is chosen then is known.
    lineage.upgrade(&ARGS);
    assert!(is_write_through(&lineage));
    choose(&mut front, 1);
    lineage.upgrade(&ARGS);
    assert!(!is_write_through(&lineage));
    let said = lineage.daemon.stderr();
    assert!(!said.contains(UNKNOWN), "{said}");
}

/// Its region says nothing, because a daemon had it that keeps no notes; its rings run nowhere when the disk goes over.
#[test]
fn no_note_is_written_of_a_choice_that_no_daemon_has_heard_of() {
    for is_connected in [false, true] {
        let mut lineage = Lineage::start(Spec::image(8 * MIB), &ARGS);
        let (mut front, region, mut queue) = attach(&lineage);
        choose(&mut front, 0);
        let mem = Arc::clone(&front.mem);
        let actor = ask_without_notes(&lineage, 4);
        restart(&mut lineage);
        drop((actor, front));
        assert!(!region.has_notes());

        let meanwhile = is_connected.then(|| connect(lineage.daemon.socket(), &mem, Some(&region)));
        lineage.upgrade(&ARGS);
        assert!(!region.has_notes(), "connected: {is_connected}");
        let mut front =
            meanwhile.unwrap_or_else(|| connect(lineage.daemon.socket(), &mem, Some(&region)));
        go_on(&mut front, &mut queue);
        is_cautious(&lineage);
        assert!(region.has_notes(), "it is known what the guest has");
        drop(front);
        restart(&mut lineage);
        let mut front = connect(lineage.daemon.socket(), &mem, Some(&region));
        go_on(&mut front, &mut queue);
        assert!(is_write_through(&lineage), "the note was true");
    }
}

/// It is known of a driver that begins, with a region or without, that it has chosen nothing.
#[test]
fn a_guest_whose_driver_began_here_has_write_back_after_any_number_of_take_overs() {
    for tracked in [false, true] {
        let mut lineage = Lineage::start(Spec::image(8 * MIB), &ARGS);
        let setup = if tracked { setup() } else { Setup::default() };
        let mut front = Front::connect(lineage.daemon.socket(), &setup).expect("a session");
        let region = tracked.then(|| front.new_inflight(1, 128).expect("a region"));
        if let Some(region) = &region {
            front.set_inflight(region).expect("it is taken");
        }
        let mut queue = front.queue(0, QueueSetup::default()).expect("a queue");
        for _ in 0..2 {
            Request::flush().run(&mut queue);
            lineage.upgrade(&ARGS);
            assert!(!is_write_through(&lineage));
        }
        // Its front end leaves and returns.
        let mem = Arc::clone(&front.mem);
        drop(front);
        let mut front = connect(lineage.daemon.socket(), &mem, region.as_ref());
        go_on(&mut front, &mut queue);
        assert!(!is_write_through(&lineage), "tracked: {tracked}");
        let said = lineage.daemon.stderr();
        assert!(!said.contains(UNKNOWN), "{said}");
    }
}
