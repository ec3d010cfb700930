//! What is held after an error, and is let go of or sent in another mode.

use super::elevator::{Kind, Params};
use super::*;

const ALL: [Kind; 3] = [Kind::None, Kind::MqDeadline, Kind::Kyber];

fn write(sector: u64) -> Request {
    request(Op::Write, sector, 8)
}

/// Two rings: of the first a merged write has failed and is held, others wait, a flush among them.
fn held(elevator: Kind) -> (Bench, [HctxId; 2]) {
    let mut bench = Bench::new(64);
    let ids = [bench.hctx(0, 2), bench.hctx(1, 1)];
    bench.mq.set_elevator(DiskId(0), Params::from(elevator));
    bench.drain(ids[0], &[(0, write(0)), (1, write(8)), (2, read(100))]);
    bench.run();
    for id in ids {
        bench.mq.quiesce(id);
    }
    let at = |bench: &Bench| {
        let mut taken = bench.below.taken.iter();
        taken.position(|(_, request, _)| request.op == Op::Write)
    };
    while let Some(nth) = at(&bench) {
        let (tag, ..) = bench.below.taken.remove(nth);
        bench.mq.requeue(tag);
    }
    bench.run();
    let flush = request(Op::Flush, 0, 0);
    let discard = request(Op::Discard, 5000, 8);
    bench.drain(
        ids[0],
        &[(3, write(3000)), (4, flush), (5, discard), (6, read(9000))],
    );
    bench.drain(ids[1], &[(0, write(7000)), (1, read(7100))]);
    bench.run();
    (bench, ids)
}

#[test]
fn a_ring_that_is_let_go_of_leaves_nothing_behind_and_others_keep_what_they_have() {
    for elevator in ALL {
        let (mut bench, ids) = held(elevator);
        assert!(bench.mq.is_issued(ids[0]), "{elevator}");
        bench.complete(0, Ok(()));
        assert!(!bench.mq.is_issued(ids[0]), "{elevator}");
        let mut abandoned = Vec::new();
        bench.mq.abandon(ids[0], |payload| abandoned.push(payload));
        abandoned.sort_unstable();
        assert_eq!(abandoned, [0, 1, 3, 4, 5, 6], "{elevator}");
        bench.mq.remove_hctx(ids[0]);
        bench.mq.unquiesce(ids[1]);
        bench.run();
        while !bench.below.taken.is_empty() {
            bench.complete(0, Ok(()));
            bench.run();
        }
        assert_eq!(bench.done.len(), 3, "{elevator}");
        // Which it checks, with the disk's account, which has nothing in flight.
        bench.mq.set_elevator(DiskId(0), Params::None);
    }
}

#[test]
fn what_is_held_when_write_through_begins_is_sent_as_durable() {
    for elevator in ALL {
        let (mut bench, ids) = held(elevator);
        bench.complete(0, Ok(()));
        bench.mq.make_durable(DiskId(0));
        for id in ids {
            bench.mq.unquiesce(id);
        }
        bench.run();
        let mut sent = 0;
        while let Some((_, request, _)) = bench.below.taken.first() {
            let changes = !matches!(request.op, Op::Read | Op::Flush);
            assert_eq!(request.fua, changes, "{elevator}: {request:?}");
            sent += 1;
            bench.complete(0, Ok(()));
            bench.run();
        }
        assert_eq!(sent, 7, "{elevator}");
    }
}
