//! In-flight regions whose sizes are not what the front end's rings have.

use super::moments::{SLOW, kill, push_held_reads, reap_all};
use super::world::{Base, World};
use crate::support::*;

/// QEMU 10.0.13 asks for a region for its `queue-size`, 128 by default, and makes every ring 1024 long.
#[test]
fn rings_of_1024_are_recovered_from_a_region_asked_for_128() {
    for base in [Base::Used, Base::Avail] {
        let setup = QueueSetup {
            size: 1024,
            ..QueueSetup::default()
        };
        let mut world = World::new(1 << 20, 3, setup);
        world.inflight_queue_size = 128;
        let gpa = world.mem.alloc(4096, 4096);
        let daemon = world.daemon(&SLOW);
        let front = world.attach(&daemon, base);
        for queue in [0, 2] {
            push_held_reads(&mut world, queue, gpa, 1000);
        }
        kill(daemon);
        drop(front);
        let daemon = world.daemon(&[]);
        let _front = world.attach(&daemon, base);
        for queue in [0, 2] {
            let mut tokens = reap_all(&mut world, queue);
            tokens.sort_unstable();
            assert_eq!(tokens, (0..1000).collect::<Vec<u64>>());
        }
        assert_eq!(world.in_flight(0) + world.in_flight(2), 0);
    }
}

/// The daemon is upgraded by a crash, or a restart, from a version whose records have the size said.
#[test]
fn a_region_of_an_older_version_is_taken_up_and_kept() {
    let mut world = World::new(1 << 20, 4, QueueSetup::default());
    world.use_old_region();
    let gpa = world.mem.alloc(4096, 4096);
    // The layout did not change, so what this version leaves in it the older one might have left.
    for round in 0..2 {
        let daemon = world.daemon(&SLOW);
        let _front = world.attach(&daemon, Base::Used);
        if round == 0 {
            for queue in 0..4 {
                push_held_reads(&mut world, queue, gpa, 100);
            }
        }
        for queue in 0..4 {
            assert!(world.in_flight(queue) >= 98, "queue {queue}");
        }
        kill(daemon);
    }
    let daemon = world.daemon(&[]);
    let _front = world.attach(&daemon, Base::Used);
    for queue in 0..4 {
        let mut tokens = reap_all(&mut world, queue);
        tokens.sort_unstable();
        assert_eq!(tokens, (0..100).collect::<Vec<u64>>());
        assert_eq!(world.in_flight(queue), 0);
    }
}
