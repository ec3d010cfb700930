//! What is waited for to end does not wait for its limits.

use super::elevator::{Kind, Params};
use super::*;

const ALL: [Kind; 3] = [Kind::None, Kind::MqDeadline, Kind::Kyber];

/// A disk with two rings of ten requests each, which may do one operation a second.
fn limited(elevator: Kind) -> (Bench, [HctxId; 2]) {
    let mut bench = Bench::new(64);
    let ids = [bench.hctx(0, 1), bench.hctx(1, 1)];
    bench.mq.set_elevator(DiskId(0), Params::from(elevator));
    let throttle = Throttle::new(Limits {
        ops: Directions {
            total: Rate {
                per_second: 1,
                burst: 1,
            },
            ..Directions::default()
        },
        ..Limits::default()
    });
    bench.mq.set_throttle(DiskId(0), Some(Arc::new(throttle)));
    for (id, first) in ids.iter().zip([0, 100_000]) {
        let ten: Vec<_> = (0..10)
            .map(|tag| (tag, read(first + u64::from(tag) * 100)))
            .collect();
        bench.drain(*id, &ten);
    }
    bench.run();
    assert_eq!(bench.below.taken.len(), 1, "{elevator}");
    (bench, ids)
}

#[test]
fn what_a_ring_has_taken_goes_out_without_tokens_when_it_is_to_end_and_other_rings_wait() {
    for elevator in ALL {
        let (mut bench, ids) = limited(elevator);
        bench.mq.set_ending(ids[1], true);
        bench.run();
        let of_second =
            |bench: &Bench| bench.taken().concat().iter().filter(|p| **p >= 100).count();
        assert_eq!(of_second(&bench), 10, "{elevator}");
        assert_eq!(bench.below.taken.len() - of_second(&bench), 1, "{elevator}");
        // What is taken meanwhile, as of a ring that ends what was in flight before, goes too.
        bench.drain(
            ids[1],
            &[(10, read(200_000)), (11, request(Op::Write, 300_000, 8))],
        );
        bench.run();
        assert_eq!(of_second(&bench), 12, "{elevator}");
        while !bench.below.taken.is_empty() {
            bench.complete(0, Ok(()));
        }
        assert_eq!(bench.mq.in_flight(ids[1]), 0, "{elevator}");
        assert_eq!(bench.mq.in_flight(ids[0]), 9, "{elevator}");
        bench.mq.remove_hctx(ids[1]);
        // And all of it is owed: the other ring's next request goes when it is paid.
        let owed_ns = bench.mq.owes_until_ns(DiskId(0));
        assert_eq!(owed_ns / 1_000_000_000, 13, "{elevator}");
        bench.mq.start_turn(owed_ns - 1);
        bench.run();
        assert_eq!(bench.below.taken.len(), 0, "{elevator}");
        bench.mq.start_turn(owed_ns);
        bench.run();
        assert_eq!(bench.below.taken.len(), 1, "{elevator}");
    }
}

#[test]
fn a_ring_that_goes_on_after_all_is_limited_again() {
    for elevator in ALL {
        let (mut bench, ids) = limited(elevator);
        for id in ids {
            bench.mq.set_ending(id, true);
        }
        bench.run();
        assert_eq!(bench.below.taken.len(), 20, "{elevator}");
        while !bench.below.taken.is_empty() {
            bench.complete(0, Ok(()));
        }
        for id in ids {
            bench.mq.set_ending(id, false);
        }
        bench.drain(ids[0], &[(0, read(0))]);
        bench.run();
        assert!(bench.below.taken.is_empty(), "{elevator}");
        // Limits that are lifted end the debt.
        bench.mq.set_throttle(DiskId(0), None);
        assert_eq!(bench.mq.owes_until_ns(DiskId(0)), 0);
        bench.run();
        assert_eq!(bench.below.taken.len(), 1, "{elevator}");
    }
}
