//! A daemon that is started again with other options than the guest was started with.

use super::moments::{push_reads, reap_all};
use super::world::{Base, World};
use crate::support::disk::{kind, status};
use crate::support::*;

const MIB: u64 = 1 << 20;

/// Serves a guest with `before`, and starts again with `after`: the session is refused with `line`. With
/// `before` the guest goes on.
fn refused(before: &[&str], after: &[&str], line: &str) {
    let mut world = World::new(MIB, 1, QueueSetup::default());
    let gpa = world.mem.alloc(4096, 4096);
    let daemon = world.daemon(before);
    let front = world.attach(&daemon, Base::Used);
    push_reads(&mut world, 0, gpa, 3);
    reap_all(&mut world, 0);
    drop(front);
    daemon.stop();

    let daemon = world.daemon(after);
    let front = world.connect(daemon.socket());
    assert!(front.is_err(), "the guest goes on with {after:?}");
    assert!(daemon.wait_for_message(line), "{line}");
    daemon.stop();

    let daemon = world.daemon(before);
    let _front = world.attach(&daemon, Base::Used);
    push_reads(&mut world, 0, gpa, 3);
    reap_all(&mut world, 0);
}

#[test]
fn another_logical_block_size_is_refused_and_the_line_names_the_option() {
    refused(
        &[],
        &["--logical-block-size", "4096"],
        "logical blocks of 512 bytes, and has 4096 here; start this daemon with --logical-block-size 512",
    );
}

#[test]
fn a_disk_without_discard_is_refused_and_the_line_names_the_option() {
    refused(
        &["--discard", "on"],
        &["--discard", "off"],
        "feature bits 0x2000 were never offered (DISCARD); the guest was started with discard: start this \
         daemon without --discard off",
    );
}

#[test]
fn a_disk_that_became_read_only_is_refused_and_the_line_names_the_option() {
    refused(
        &["--discard", "on"],
        &["--read-only"],
        "feature bits 0x6000 were never offered (DISCARD, WRITE_ZEROES); the guest was started with a disk \
         that can be written: start this daemon without --read-only",
    );
}

/// A driver that uses neither discard nor write-zeroes has no bit that would tell.
#[test]
fn a_read_only_disk_is_refused_to_a_simple_driver_as_well() {
    let mut world = World::new(MIB, 1, QueueSetup::default());
    world.features = features::KNOWN & !(features::DISCARD | features::WRITE_ZEROES);
    let daemon = world.daemon(&[]);
    drop(world.attach(&daemon, Base::Used));
    daemon.stop();
    let daemon = world.daemon(&["--read-only"]);
    assert!(world.connect(daemon.socket()).is_err());
    assert!(daemon.wait_for_message(
        "it was started with a disk that can be written; start this daemon without --read-only"
    ));
}

#[test]
fn a_disk_that_became_writable_is_refused_and_the_line_names_the_option() {
    refused(
        &["--read-only"],
        &[],
        "feature bits 0x20 were never offered (RO); the guest was started with a disk that cannot be written: \
         start this daemon with --read-only",
    );
}

#[test]
fn a_disk_that_became_smaller_is_refused_in_words() {
    let mut world = World::new(MIB, 1, QueueSetup::default());
    let daemon = world.daemon(&[]);
    drop(world.attach(&daemon, Base::Used));
    daemon.stop();
    let image = std::fs::File::options().write(true).open(&world.image);
    let image = image.expect("the image is there");
    image.set_len(MIB / 2).expect("a file can be cut");
    let daemon = world.daemon(&[]);
    assert!(world.connect(daemon.socket()).is_err());
    assert!(daemon.wait_for_message("it was told of 1048576 bytes, and the disk has 524288"));
    daemon.stop();
    image.set_len(2 * MIB).expect("a file can grow");
    let daemon = world.daemon(&[]);
    world.attach(&daemon, Base::Used);
}

/// Without a region nothing tells what the guest was told, and its requests do.
#[test]
fn requests_of_another_block_size_are_explained_once() {
    let mut world = World::new(MIB, 1, QueueSetup::default());
    world.protocol = protocol::KNOWN;
    let gpa = world.mem.alloc(4096, 4096);
    let daemon = world.daemon(&["--logical-block-size", "4096"]);
    let _front = world.attach(&daemon, Base::Used);
    for _ in 0..3 {
        let data = [Seg::writable(gpa, 512)];
        world.queues[0]
            .push(0, kind::IN, 0, 8, &data)
            .expect("room");
        world.queues[0].publish();
        assert_eq!(disk::finish(&mut world.queues[0]).status, status::IOERR);
    }
    let line = "a request of 512 bytes at sector 8 is not whole logical blocks of 4096 bytes";
    assert!(daemon.wait_for_message(line));
    assert_eq!(daemon.stderr().matches(line).count(), 1);
}
