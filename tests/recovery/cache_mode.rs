//! The cache mode that a guest has chosen, and what becomes of it when the daemon is started again.
//!
//! A driver chooses once. Its front end connects again without its knowledge, so whatever it was promised has to
//! hold with the next daemon.

use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;

use super::moments::{kill, push_reads, reap_all};
use super::world::{Base, World};
use crate::support::*;

/// What the log says of a guest whose choice is not known.
const UNKNOWN: &str = "whether it chose write-through is not known";

/// A daemon with a control socket.
fn daemon(world: &World, cache: &str) -> Daemon {
    let control = world.image.with_extension("control");
    let control = control.to_str().expect("a path in UTF-8");
    world.daemon(&["--cache", cache, "--control-path", control])
}

/// Whether writes are durable when they complete.
fn is_write_through(world: &World) -> bool {
    let mut stream = UnixStream::connect(world.image.with_extension("control"))
        .expect("the control socket is there");
    stream
        .write_all(b"GET /v1/disks/0 HTTP/1.1\r\nConnection: close\r\n\r\n")
        .expect("a request can be sent");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    let body = answer.split("\r\n\r\n").nth(1).expect("a body");
    let disk: serde_json::Value = serde_json::from_str(body).expect("JSON");
    disk["write_through"].as_bool().expect("a boolean")
}

fn writeback_byte(front: &mut Front) -> u8 {
    front.config().expect("a configuration space").writeback
}

fn choose(front: &mut Front, writeback: u8) {
    front
        .set_config(BlkConfig::WRITEBACK_AT, &[writeback])
        .expect("the cache mode can be written");
}

/// A few requests, after which the rings show that they were served.
fn use_rings(world: &mut World, gpa: u64) {
    for queue in 0..world.queues.len() {
        push_reads(world, queue, gpa, 3);
        assert_eq!(reap_all(world, queue).len(), 3);
    }
}

#[test]
fn write_through_that_a_guest_chose_survives_a_restart_and_a_kill() {
    let mut world = World::new(1 << 20, 2, QueueSetup::default());
    let gpa = world.mem.alloc(4096, 4096);
    let mut first = daemon(&world, "writeback");
    let mut front = world.attach(&first, Base::Used);
    use_rings(&mut world, gpa);
    assert_eq!(writeback_byte(&mut front), 1);
    choose(&mut front, 0);
    for round in 0..4 {
        drop(front);
        match round % 2 {
            0 => kill(first),
            _ => {
                first.stop();
            }
        }
        first = daemon(&world, "writeback");
        front = world.attach(&first, Base::Used);
        assert_eq!(writeback_byte(&mut front), 0, "round {round}");
        assert!(is_write_through(&world), "round {round}");
        use_rings(&mut world, gpa);
    }
    // The guest changes its mind, and that holds as well.
    choose(&mut front, 1);
    drop(front);
    kill(first);
    let second = daemon(&world, "writeback");
    let mut front = world.attach(&second, Base::Used);
    assert_eq!(writeback_byte(&mut front), 1);
    assert!(!is_write_through(&world));
    assert!(!second.stderr().contains(UNKNOWN), "{}", second.stderr());
}

/// No restart gives write-through to a guest that never asked for it.
#[test]
fn write_back_is_kept_where_nothing_was_chosen() {
    let mut world = World::new(1 << 20, 2, QueueSetup::default());
    let gpa = world.mem.alloc(4096, 4096);
    for round in 0..3 {
        let daemon = daemon(&world, "writeback");
        let mut front = world.attach(&daemon, Base::Used);
        assert_eq!(writeback_byte(&mut front), 1, "round {round}");
        assert!(!is_write_through(&world), "round {round}");
        use_rings(&mut world, gpa);
        assert!(!daemon.stderr().contains(UNKNOWN), "{}", daemon.stderr());
        kill(daemon);
    }
}

/// A guest that was started with a disk in write-through mode does not flush.
#[test]
fn write_through_of_the_options_is_kept_until_the_driver_begins_anew() {
    let mut world = World::new(1 << 20, 1, QueueSetup::default());
    let gpa = world.mem.alloc(4096, 4096);
    let first = daemon(&world, "writethrough");
    let front = world.attach(&first, Base::Used);
    use_rings(&mut world, gpa);
    drop(front);
    first.stop();
    let second = daemon(&world, "writeback");
    let mut front = world.attach(&second, Base::Used);
    assert_eq!(writeback_byte(&mut front), 0);
    assert!(is_write_through(&world));
    drop(front);
    second.stop();
    // The driver begins anew: its front end drops the region and asks for another.
    world.inflight = None;
    world.queues[0].reset(0);
    let third = daemon(&world, "writeback");
    let mut front = world.attach(&third, Base::Used);
    assert_eq!(writeback_byte(&mut front), 1);
    assert!(!is_write_through(&world));
}

fn overwrite_notes(world: &World, byte: u8) {
    let region = world.inflight.as_ref().expect("there is a region");
    let written = region.file.write_all_at(&[byte; 128], region.notes_at());
    written.expect("a region can be written");
}

/// The front end keeps the notes and can change them. It can give its guest write-through, and cannot take
/// away what the options say.
#[test]
fn notes_that_were_changed_take_no_write_through_away() {
    for scribble in [false, true] {
        let mut world = World::new(1 << 20, 1, QueueSetup::default());
        let gpa = world.mem.alloc(4096, 4096);
        let first = daemon(&world, "writeback");
        let front = world.attach(&first, Base::Used);
        use_rings(&mut world, gpa);
        drop(front);
        kill(first);
        if scribble {
            overwrite_notes(&world, 0x5a);
        }
        // The notes say write-back, or nothing.
        let second = daemon(&world, "writethrough");
        let mut front = world.attach(&second, Base::Used);
        assert_eq!(writeback_byte(&mut front), 0);
        assert!(is_write_through(&world));
        drop(front);
        kill(second);
        if scribble {
            overwrite_notes(&world, 0xa5);
            let third = daemon(&world, "writeback");
            let _front = world.attach(&third, Base::Used);
            assert!(third.wait_for_message(UNKNOWN));
            assert!(
                is_write_through(&world),
                "what cannot be read may have said so"
            );
        }
    }
}

/// A front end without an in-flight region, or with one of a version without notes.
#[test]
fn a_guest_whose_choice_is_not_known_has_write_through_until_its_driver_begins_anew() {
    for old_region in [false, true] {
        let mut world = World::new(1 << 20, 2, QueueSetup::default());
        let gpa = world.mem.alloc(4096, 4096);
        match old_region {
            true => world.use_old_region(),
            false => world.protocol = protocol::KNOWN,
        }
        // A driver begins with this daemon, so all is known.
        let first = daemon(&world, "writeback");
        let mut front = world.attach(&first, Base::Used);
        use_rings(&mut world, gpa);
        for index in 0..2 {
            front.stop(index).expect("a ring can be stopped");
        }
        world.start(&mut front, Base::Used).expect("queues start");
        assert!(!is_write_through(&world));
        drop(front);
        let front = world.attach(&first, Base::Used);
        assert!(!is_write_through(&world));
        drop(front);
        first.stop();

        // The guest goes on, and this one does not know what it has chosen.
        let second = daemon(&world, "writeback");
        let mut front = world.attach(&second, Base::Used);
        assert!(second.wait_for_message(UNKNOWN));
        assert!(is_write_through(&world));
        assert_eq!(second.stderr().matches(UNKNOWN).count(), 1, "one line");
        use_rings(&mut world, gpa);
        for index in 0..2 {
            front.stop(index).expect("a ring can be stopped");
        }
        world.start(&mut front, Base::Used).expect("queues start");
        assert!(is_write_through(&world), "the rings were only stopped");

        // It begins anew.
        front.reset_device().expect("a device can be reset");
        front
            .send_features()
            .expect("features are negotiated again");
        for queue in &mut world.queues {
            queue.reset(0);
        }
        world.start(&mut front, Base::Used).expect("queues start");
        assert!(!is_write_through(&world));
        use_rings(&mut world, gpa);
        drop(front);
        second.stop();

        // Or it chooses.
        let third = daemon(&world, "writeback");
        let mut front = world.attach(&third, Base::Used);
        assert!(third.wait_for_message(UNKNOWN));
        choose(&mut front, 1);
        assert!(!is_write_through(&world));
    }
}

/// A driver that cannot choose flushes, or has write-through anyway: nothing is doubtful.
#[test]
fn a_guest_that_cannot_choose_is_not_in_doubt() {
    let mut world = World::new(1 << 20, 1, QueueSetup::default());
    let gpa = world.mem.alloc(4096, 4096);
    world.protocol = protocol::KNOWN;
    world.features = features::KNOWN & !features::CONFIG_WCE;
    for _ in 0..2 {
        let daemon = daemon(&world, "writeback");
        let _front = world.attach(&daemon, Base::Used);
        assert!(!is_write_through(&world));
        use_rings(&mut world, gpa);
        assert!(!daemon.stderr().contains(UNKNOWN), "{}", daemon.stderr());
        kill(daemon);
    }
}

/// A ring whose index has come back to 0 was served before all the same.
#[test]
fn a_guest_whose_index_wrapped_to_0_is_not_taken_for_a_new_one() {
    let setup = QueueSetup {
        size: 4,
        base: 0_u16.wrapping_sub(3),
        indirect: true,
        ..QueueSetup::default()
    };
    let mut world = World::new(1 << 20, 1, setup);
    world.protocol = protocol::KNOWN;
    let gpa = world.mem.alloc(4096, 4096);
    let first = daemon(&world, "writeback");
    let front = world.attach(&first, Base::Used);
    use_rings(&mut world, gpa);
    assert_eq!(world.queues[0].device_used_idx(), 0);
    drop(front);
    first.stop();
    let second = daemon(&world, "writeback");
    let _front = world.attach(&second, Base::Used);
    assert!(second.wait_for_message(UNKNOWN));
    assert!(is_write_through(&world));
}

/// It cannot flush, so `writeback` begins as 0 (virtio 1.3, section 5.2.5.2), and it may choose.
#[test]
fn a_driver_that_can_choose_and_not_flush_begins_with_write_through() {
    let mut world = World::new(1 << 20, 1, QueueSetup::default());
    world.features = features::KNOWN & !features::FLUSH;
    let daemon = daemon(&world, "writeback");
    let mut front = world.attach(&daemon, Base::Used);
    assert_eq!(writeback_byte(&mut front), 0);
    assert!(is_write_through(&world));
    choose(&mut front, 1);
    assert_eq!(writeback_byte(&mut front), 1);
    assert!(!is_write_through(&world));
    // The same features again, as while a guest migrates.
    front.send_features().expect("features can be sent again");
    assert!(!is_write_through(&world));
}

/// A guest that comes from another host brings rings with a history, and a region that is made for it here.
#[test]
fn a_guest_that_arrives_has_what_the_options_say_and_one_line_says_so() {
    let mut world = World::new(1 << 20, 1, QueueSetup::default());
    let gpa = world.mem.alloc(4096, 4096);
    let first = daemon(&world, "writeback");
    let front = world.attach(&first, Base::Used);
    use_rings(&mut world, gpa);
    drop(front);
    first.stop();
    world.inflight = None;
    let second = daemon(&world, "writeback");
    let _front = world.attach(&second, Base::Used);
    assert!(second.wait_for_message("a guest arrives that ran elsewhere and has write-back here"));
    assert!(!is_write_through(&world));
}
