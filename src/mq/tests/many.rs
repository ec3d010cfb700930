//! As many rings and requests as a front end can set up: what is counted is counted exactly.

use super::elevator::{Kind, Params};
use super::limits::{MAX_QUEUES, MAX_RING_SIZE};
use super::*;

fn rings(bench: &mut Bench, disk: u16, count: u16, ring_size: u16) -> Vec<HctxId> {
    let mut hctx = |queue| {
        bench.mq.add_hctx(HctxConfig {
            disk: DiskId(disk),
            queue: QueueId(queue),
            ring_size,
            ctxs: 1,
        })
    };
    (0..count).map(&mut hctx).collect()
}

/// Every entry of every ring has a request, each for itself.
fn fill(bench: &mut Bench, ids: &[HctxId], op: Op) {
    for id in ids {
        for tag in 0..MAX_RING_SIZE {
            let sector = (u64::from(id.0) * 1024 + u64::from(tag)) * 16;
            let payload = u32::from(id.0) << 16 | u32::from(tag);
            let request = request(op, sector, 8);
            bench
                .mq
                .plug(*id, RequestTag(tag), request, payload, &mut bench.below);
        }
        bench.mq.unplug(*id, &mut bench.below);
    }
}

/// Everything ends.
fn finish(bench: &mut Bench) {
    let mut rounds = 0;
    while bench.mq.must_run() || !bench.below.taken.is_empty() {
        bench.run();
        for _ in 0..bench.below.taken.len() {
            bench.complete(0, Ok(()));
        }
        rounds += 1;
        assert!(rounds < 100_000, "it does not end");
    }
}

#[test]
fn an_elevator_has_room_for_all_that_66_full_rings_have() {
    for kind in [Kind::MqDeadline, Kind::Kyber] {
        for op in [Op::Read, Op::Write] {
            let mut bench = Bench::new(257);
            let ids = rings(&mut bench, 0, 66, MAX_RING_SIZE);
            bench.mq.set_elevator(DiskId(0), Params::from(kind));
            fill(&mut bench, &ids, op);
            finish(&mut bench);
            assert_eq!(bench.done.len(), 66 * 1024, "{kind} {op:?}");
            assert_eq!(bench.mq.disk_stats(DiskId(0)).in_flight, 0);
        }
    }
}

#[test]
fn the_64_queues_there_are_by_default_are_filled_while_a_limit_keeps_them() {
    let mut bench = Bench::new(257);
    let ids = rings(&mut bench, 0, 64, MAX_RING_SIZE);
    bench
        .mq
        .set_elevator(DiskId(0), Params::from(Kind::MqDeadline));
    bench.limit(Limits {
        ops: Directions {
            total: Rate::per_second(1),
            ..Directions::default()
        },
        ..Limits::default()
    });
    fill(&mut bench, &ids, Op::Write);
    bench.run();
    bench.mq.set_throttle(DiskId(0), None);
    finish(&mut bench);
    assert_eq!(bench.done.len(), 64 * 1024);
}

#[test]
fn a_disk_of_which_one_ring_of_66_is_left_has_room_for_its_requests() {
    for kind in [Kind::MqDeadline, Kind::Kyber] {
        let mut bench = Bench::new(257);
        let ids = rings(&mut bench, 0, 66, MAX_RING_SIZE);
        for id in &ids[..65] {
            bench.mq.remove_hctx(*id);
        }
        bench.mq.set_elevator(DiskId(0), Params::from(kind));
        fill(&mut bench, &ids[65..], Op::Read);
        finish(&mut bench);
        assert_eq!(bench.done.len(), 1024, "{kind}");
    }
}

#[test]
fn disks_with_all_their_queues_have_an_hctx_for_each() {
    let mut bench = Bench::new(257);
    for disk in 0..17 {
        let ids = rings(&mut bench, disk, MAX_QUEUES, 1);
        bench.drain(ids[255], &[(0, read(0))]);
    }
    assert!(!bench.mq.is_full());
    assert_eq!(bench.below.taken.len(), 17);
}
