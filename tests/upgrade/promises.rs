//! What a guest was told and chose, through an upgrade and what follows it.

use super::region::{attach, choose, come_back, is_write_through};
use super::support::*;
use super::{Lineage, MIB};
use rustix::process::Signal;

const ARGS: [&str; 4] = ["--cache", "writeback", "--serial", "s"];

/// The old daemon has written down what its guest chose, the new one writes on, and the old one no more.
#[test]
fn a_cache_mode_chosen_after_an_upgrade_survives_a_crash() {
    let mut lineage = Lineage::start(Spec::image(8 * MIB), &ARGS);
    let (mut front, region, mut queues) = attach(&lineage.daemon, 1);
    for chosen in [0, 1, 0] {
        Request::flush().run(&mut queues[0]);
        choose(&mut front, chosen);
        lineage.upgrade(&ARGS);
        assert_eq!(is_write_through(&lineage), chosen == 0);
    }
    // Chosen while the newest one serves.
    choose(&mut front, 1);
    choose(&mut front, 0);
    lineage.daemon.signal(Signal::KILL);
    lineage.daemon.wait_exit();
    let spec = lineage.spec.clone().args(ARGS);
    let next = lineage.daemon.beside(&spec);
    let mut front = come_back(front, &next, &region, &queues);
    assert_eq!(front.config().expect("a config").writeback, 0);
    assert!(next.wait_for_message("goes on with write-through"));
}

/// A guest whose choice the old daemon did not know has write-through from the new one as well, and no longer
/// than its driver goes on.
#[test]
fn a_guest_in_doubt_stays_so_until_its_driver_begins_anew() {
    let mut lineage = Lineage::start(Spec::image(8 * MIB), &ARGS);
    let mut front = Front::connect(lineage.daemon.socket(), &Setup::default()).expect("a session");
    // Served before, by another daemon.
    let ring = QueueSetup {
        base: 7,
        ..QueueSetup::default()
    };
    let mut queue = front.queue(0, ring).expect("a queue");
    for _ in 0..2 {
        assert!(is_write_through(&lineage));
        lineage.upgrade(&ARGS);
        Request::flush().run(&mut queue);
    }
    assert_eq!(front.config().expect("a config").writeback, 1);
    front.reset_device().expect("a device can be reset");
    front
        .send_features()
        .expect("features are negotiated again");
    queue.reset(0);
    front.start(&queue).expect("it starts");
    front.enable(0, true).expect("it is enabled");
    assert!(!is_write_through(&lineage));
    lineage.upgrade(&ARGS);
    assert!(!is_write_through(&lineage));
}
