use std::sync::Arc;

use super::ids::{DiskId, QueueId, Sector};
use super::limits::RESOURCE_DELAY_NS;
use super::request::{IoPrio, Op};
use super::throttle::{Directions, Limits, Rate, Throttle};
use super::*;

mod abandoned;
mod ending;
mod exhaustive;
mod guarantee;
mod many;
mod merging;
mod sharing;

/// Driver tags for so many disks, each of which has a part and one tag for flushes.
fn tags(disks: u16, of_disk: u16, shared: u16) -> TagDepth {
    TagDepth {
        disks,
        of_disk,
        of_disk_flushes: 1,
        shared,
    }
}

/// What was handed to the engine, and how it is to behave.
#[derive(Default)]
struct Below {
    taken: Vec<(DriverTag, Request, Vec<u32>)>,
    refuse: VecDeque<Option<Busy>>,
}

impl Driver<u32> for Below {
    fn queue_rq(
        &mut self,
        _disk: DiskId,
        _hctx: HctxId,
        tag: DriverTag,
        request: &Request,
        parts: Parts<'_, u32>,
    ) -> Result<(), Busy> {
        if let Some(Some(busy)) = self.refuse.pop_front() {
            return Err(busy);
        }
        self.taken.push((tag, *request, parts.copied().collect()));
        Ok(())
    }
}

struct Bench {
    mq: Mq<u32>,
    below: Below,
    done: Vec<(u32, Status, u64)>,
}

impl Bench {
    fn new(depth: u16) -> Bench {
        Bench {
            mq: Mq::new(tags(1, 0, depth - 1)),
            below: Below::default(),
            done: Vec::new(),
        }
    }

    fn hctx(&mut self, queue: u16, ctxs: u16) -> HctxId {
        self.mq.add_hctx(HctxConfig {
            disk: DiskId(0),
            queue: QueueId(queue),
            ring_size: 64,
            ctxs,
        })
    }

    /// One drain: (tag, request); the payload is hctx × 100 + tag.
    fn drain(&mut self, id: HctxId, requests: &[(u16, Request)]) {
        for (tag, request) in requests {
            let payload = u32::from(id.0) * 100 + u32::from(*tag);
            self.mq
                .plug(id, RequestTag(*tag), *request, payload, &mut self.below);
        }
        self.mq.unplug(id, &mut self.below);
    }

    fn complete(&mut self, nth: usize, result: Result<(), Status>) {
        let (tag, _, _) = self.below.taken.remove(nth);
        let done = &mut self.done;
        self.mq.complete(tag, result, |_, payload, status, read| {
            done.push((payload, status, read));
        });
    }

    /// Limits the disk, from empty buckets on.
    fn limit(&mut self, limits: Limits) {
        let throttle = Throttle::new(Limits::default());
        throttle.set_limits(0, limits);
        self.mq.set_throttle(DiskId(0), Some(Arc::new(throttle)));
    }

    fn run(&mut self) {
        self.mq.run(&mut self.below);
    }

    fn taken(&self) -> Vec<Vec<u32>> {
        self.below.taken.iter().map(|t| t.2.clone()).collect()
    }
}

fn request(op: Op, sector: u64, sectors: u64) -> Request {
    Request {
        op,
        sector: Sector(sector),
        bytes: sectors * 512,
        segments: 1,
        ioprio: IoPrio::default(),
        fua: false,
        unmap: false,
    }
}

fn read(sector: u64) -> Request {
    request(Op::Read, sector, 8)
}

#[test]
fn an_idle_engine_gets_requests_straight_from_the_plug() {
    let mut bench = Bench::new(32);
    let id = bench.hctx(0, 1);
    bench.drain(id, &[(3, read(0)), (5, read(100)), (1, read(200))]);
    assert_eq!(bench.taken(), [[3], [5], [1]], "in the order of the ring");
    let stats = bench.mq.stats(id);
    assert_eq!((stats.direct, stats.staged, stats.batches), (3, 0, 1));
    bench.complete(1, Ok(()));
    bench.complete(0, Err(Status::IoErr));
    assert_eq!(bench.done, [(5, Status::Ok, 4096), (3, Status::IoErr, 0)]);
    assert_eq!((bench.mq.in_flight(id), bench.mq.stats(id).errors), (1, 1));
}

#[test]
fn neighbours_of_one_drain_travel_as_one_and_end_each_for_itself() {
    let mut bench = Bench::new(32);
    let id = bench.hctx(0, 1);
    bench.drain(
        id,
        &[(0, read(16)), (1, read(24)), (2, read(8)), (3, read(64))],
    );
    assert_eq!(bench.taken(), [vec![2, 0, 1], vec![3]], "by sector");
    assert_eq!(bench.below.taken[0].1, request_of(8, 24, 3));
    assert_eq!(bench.mq.stats(id).merged, 2);
    bench.complete(0, Ok(()));
    let each: Vec<_> = bench.done.iter().map(|d| (d.0, d.2)).collect();
    assert_eq!(each, [(2, 4096), (0, 4096), (1, 4096)]);
    assert_eq!(bench.mq.in_flight(id), 1);
}

fn request_of(sector: u64, sectors: u64, segments: u16) -> Request {
    Request {
        segments,
        ..request(Op::Read, sector, sectors)
    }
}

#[test]
fn a_merged_request_that_failed_is_sent_again_in_parts() {
    let mut bench = Bench::new(32);
    let id = bench.hctx(0, 1);
    bench.drain(id, &[(0, read(8)), (1, read(16)), (2, read(0))]);
    bench.complete(0, Err(Status::IoErr));
    assert!(bench.done.is_empty(), "nobody has a status yet");
    assert!(bench.mq.must_run());
    bench.run();
    assert_eq!(bench.taken(), [[2], [0], [1]]);
    bench.complete(1, Err(Status::IoErr));
    bench.complete(0, Ok(()));
    bench.complete(0, Ok(()));
    assert_eq!(
        bench.done,
        [
            (0, Status::IoErr, 0),
            (2, Status::Ok, 4096),
            (1, Status::Ok, 4096)
        ]
    );
    assert_eq!(bench.mq.stats(id).requeued, 3);
    assert_eq!(bench.mq.in_flight(id), 0);
}

#[test]
fn without_tags_requests_are_staged_and_run_when_some_come_back() {
    let mut bench = Bench::new(3);
    let id = bench.hctx(0, 1);
    bench.drain(
        id,
        &[(0, read(0)), (1, read(100)), (2, read(200)), (3, read(300))],
    );
    assert_eq!(bench.taken(), [[0], [1]]);
    assert_eq!(bench.mq.staged(id), 2);
    bench.run();
    assert_eq!(bench.taken().len(), 2, "no completion, no tag");
    bench.complete(0, Ok(()));
    bench.run();
    assert_eq!(bench.taken(), [[1], [2]]);
    bench.complete(0, Ok(()));
    bench.complete(0, Ok(()));
    bench.run();
    assert_eq!(bench.taken(), [[3]]);
}

#[test]
fn a_refusal_without_a_promise_is_tried_again_after_the_delay() {
    let mut bench = Bench::new(32);
    let id = bench.hctx(0, 1);
    bench.below.refuse = [None, Some(Busy::RetryLater)].into();
    bench.mq.start_turn(1000);
    bench.drain(id, &[(0, read(0)), (1, read(100)), (2, read(200))]);
    assert_eq!(bench.taken(), [[0]]);
    assert_eq!(bench.mq.next_deadline_ns(), Some(1000 + RESOURCE_DELAY_NS));
    bench.mq.start_turn(999 + RESOURCE_DELAY_NS);
    bench.run();
    assert_eq!(bench.taken().len(), 1, "too early");
    bench.mq.start_turn(1000 + RESOURCE_DELAY_NS);
    bench.run();
    assert_eq!(bench.taken(), [[0], [1], [2]], "the refused one first");
    assert_eq!(bench.mq.next_deadline_ns(), None);
}

#[test]
fn an_engine_that_refuses_makes_a_staged_queue_busy_and_missing_tokens_do_not() {
    for refusal in [Busy::RetryLater, Busy::UntilCompletion] {
        let mut bench = Bench::new(32);
        let id = bench.hctx(0, 1);
        bench.mq.quiesce(id);
        bench.drain(id, &[(0, read(0)), (1, read(100))]);
        bench.mq.unquiesce(id);
        bench.below.refuse = [Some(refusal)].into();
        bench.run();
        assert!(bench.mq.dispatch_busy(id) > 0, "{refusal:?}");
    }
    let mut bench = Bench::new(32);
    let id = bench.hctx(0, 1);
    let limits = Limits {
        ops: Directions {
            total: Rate {
                per_second: 1,
                burst: 1,
            },
            ..Directions::default()
        },
        ..Limits::default()
    };
    bench.limit(limits);
    bench.mq.quiesce(id);
    bench.drain(id, &[(0, read(0)), (1, read(100))]);
    bench.mq.unquiesce(id);
    bench.run();
    assert!(bench.mq.stats(id).throttled > 0);
    assert_eq!(bench.mq.dispatch_busy(id), 0);
}

#[test]
fn a_promise_nobody_can_keep_becomes_a_delay() {
    let mut bench = Bench::new(32);
    let id = bench.hctx(0, 1);
    bench.below.refuse = [Some(Busy::UntilCompletion)].into();
    bench.drain(id, &[(0, read(0))]);
    assert_eq!(bench.mq.next_deadline_ns(), Some(RESOURCE_DELAY_NS));
}

#[test]
fn while_busy_ctxs_are_served_in_turn() {
    let mut bench = Bench::new(64);
    let id = bench.hctx(0, 2);
    // Two flows that fall into different ctxs.
    let ctxs = Ctxs2::new();
    let (a, b) = ctxs.two_regions();
    bench.below.refuse = [Some(Busy::RetryLater)].into();
    bench.drain(
        id,
        &[
            (0, read(a)),
            (1, read(a + 100)),
            (2, read(a + 200)),
            (3, read(b)),
            (4, read(b + 100)),
        ],
    );
    assert!(bench.mq.dispatch_busy(id) > 0);
    bench.mq.start_turn(RESOURCE_DELAY_NS);
    bench.run();
    let order: Vec<u32> = bench.taken().concat();
    assert_eq!(order[0], 0, "leftovers first");
    let first_two: Vec<bool> = order[1..3].iter().map(|t| *t >= 3).collect();
    assert_ne!(first_two[0], first_two[1], "one of each ctx: {order:?}");
}

/// Finds regions of the disk whose flows fall into different ctxs of two.
struct Ctxs2(hctx::ctx::Ctxs);

impl Ctxs2 {
    fn new() -> Self {
        Ctxs2(hctx::ctx::Ctxs::new(2))
    }

    fn two_regions(&self) -> (u64, u64) {
        let mib = 2048;
        let of = |region: u64| self.0.of(&read(region * mib));
        let other = (1..100).find(|r| of(*r) != of(0)).expect("both are used");
        (0, other * mib)
    }
}

#[test]
fn flows_stay_together_and_use_every_ctx() {
    let ctxs = hctx::ctx::Ctxs::new(4);
    let mut used = [0u32; 4];
    for region in 0..4000u64 {
        let first = ctxs.of(&read(region * 2048));
        let last = ctxs.of(&read(region * 2048 + 2040));
        assert_eq!(first, last, "one region, one ctx");
        used[first.index()] += 1;
    }
    assert!(used.iter().all(|n| *n > 700), "uneven: {used:?}");
}

#[test]
fn a_flush_finds_a_tag_when_writes_hold_all_others() {
    let mut bench = Bench::new(3);
    let id = bench.hctx(0, 1);
    let write = |sector| request(Op::Write, sector, 8);
    bench.drain(id, &[(0, write(0)), (1, write(100))]);
    bench.drain(id, &[(2, request(Op::Flush, 0, 0))]);
    assert_eq!(bench.taken(), [[0], [1], [2]]);
}

#[test]
fn a_quiesced_hctx_takes_in_and_gives_nothing_out() {
    let mut bench = Bench::new(32);
    let id = bench.hctx(0, 1);
    bench.mq.quiesce(id);
    bench.drain(id, &[(0, read(0)), (1, read(8))]);
    bench.run();
    assert!(bench.taken().is_empty());
    assert_eq!(bench.mq.in_flight(id), 2);
    bench.mq.unquiesce(id);
    bench.run();
    assert_eq!(bench.taken(), [[0, 1]]);
}

#[test]
fn ctxs_can_be_recounted_while_requests_are_staged() {
    let mut bench = Bench::new(32);
    let id = bench.hctx(0, 3);
    bench.mq.quiesce(id);
    let requests: Vec<_> = (0..20).map(|i| (i, read(u64::from(i) * 2048))).collect();
    bench.drain(id, &requests);
    bench.mq.set_ctxs(id, 1);
    assert_eq!((bench.mq.ctx_count(id), bench.mq.staged(id)), (1, 20));
    bench.mq.unquiesce(id);
    bench.run();
    let mut all = bench.taken().concat();
    all.sort_unstable();
    assert_eq!(all, (0..20).collect::<Vec<u32>>());
}

#[test]
fn a_neighbour_that_floods_leaves_the_fair_share() {
    let mut bench = Bench::new(17);
    let (flood, quiet) = (bench.hctx(0, 1), bench.hctx(1, 1));
    bench.drain(quiet, &[(0, read(0))]);
    let many: Vec<_> = (0..40).map(|i| (i, read(u64::from(i) * 100))).collect();
    bench.drain(flood, &many);
    assert_eq!(bench.below.taken.len(), 1 + 8, "half of 16 each");
    bench.drain(quiet, &[(1, read(100)), (2, read(300))]);
    assert_eq!(bench.below.taken.len(), 1 + 8 + 2, "room was left");
}

#[test]
fn an_hctx_that_falls_silent_gives_its_share_back() {
    let mut bench = Bench::new(17);
    let (flood, quiet) = (bench.hctx(0, 1), bench.hctx(1, 1));
    bench.mq.start_turn(0);
    bench.drain(quiet, &[(0, read(0))]);
    bench.complete(0, Ok(()));
    assert_eq!(bench.mq.room(quiet), 16);
    bench.drain(flood, &[(0, read(0))]);
    assert_eq!(bench.mq.room(quiet), 8);
    bench.mq.start_turn(ACTIVITY_DECAY_NS);
    bench.mq.start_turn(2 * ACTIVITY_DECAY_NS);
    assert_eq!(bench.mq.room(quiet), 15, "only the flood is left, with one");
}

#[test]
fn a_stale_completion_is_counted_and_harmless() {
    let mut bench = Bench::new(32);
    let id = bench.hctx(0, 1);
    bench.drain(id, &[(0, read(0))]);
    let tag = bench.below.taken[0].0;
    bench.complete(0, Ok(()));
    bench.mq.complete(tag, Ok(()), |_, _, _, _| panic!("twice"));
    assert_eq!(bench.mq.stale_completions(), 1);
}

#[test]
fn hctxs_that_wait_for_one_bucket_take_turns() {
    let mut bench = Bench::new(64);
    let hctxs = [bench.hctx(0, 1), bench.hctx(1, 1)];
    let mut limits = Limits::default();
    limits.ops.total = Rate::per_second(10);
    bench.limit(limits);
    for id in hctxs {
        let many: Vec<_> = (0..40).map(|i| (i, read(u64::from(i) * 100))).collect();
        bench.drain(id, &many);
    }
    bench.run();
    let mut shares = [0; 2];
    for _ in 0..40 {
        let deadline = bench.mq.next_deadline_ns().expect("both wait");
        bench.mq.start_turn(deadline);
        bench.run();
        for (_, _, parts) in std::mem::take(&mut bench.below.taken) {
            shares[parts[0] as usize / 100] += 1;
        }
    }
    assert!(shares.iter().all(|n| *n >= 19), "shares {shares:?}");
}

#[test]
fn a_flush_does_not_wait_for_the_tokens_of_a_write() {
    let mut bench = Bench::new(64);
    let id = bench.hctx(0, 1);
    let mut limits = Limits::default();
    limits.ops.total = Rate::per_second(1);
    bench.limit(limits);
    bench.drain(id, &[(0, request(Op::Write, 0, 8))]);
    assert!(bench.taken().is_empty(), "the bucket begins empty");
    bench.drain(id, &[(1, request(Op::Flush, 0, 0))]);
    bench.run();
    assert_eq!(bench.taken(), [[1]]);
}

#[test]
fn a_flush_finds_its_tag_although_its_hctx_waits_for_others() {
    let mut bench = Bench::new(3);
    let hctxs = [bench.hctx(0, 1), bench.hctx(1, 1)];
    let write = |sector| request(Op::Write, sector, 8);
    for id in hctxs {
        bench.drain(id, &[(0, write(0)), (1, write(100))]);
    }
    assert_eq!(bench.taken(), [[0], [1]]);
    bench.drain(hctxs[0], &[(2, write(200))]);
    bench.drain(hctxs[1], &[(2, request(Op::Flush, 0, 0))]);
    bench.run();
    assert_eq!(bench.taken(), [[0], [1], [102]]);
    bench.complete(0, Ok(()));
    bench.run();
    assert_eq!(
        bench.taken(),
        [[1], [102], [100]],
        "it waits on where it was"
    );
}

/// splitmix64: small, seedable, and the same everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

/// Random drains, refusals, failures and completion orders over several hctxs: every request ends
/// exactly once, a part of a merged request that failed gets a status of its own, and when the
/// engine has answered everything nothing is left behind.
#[test]
fn every_request_ends_exactly_once_whatever_the_engine_does() {
    for seed in 0..200 {
        let mut random = Random(seed);
        let mut bench = Bench::new(2 + random.below(20) as u16);
        let hctxs: Vec<_> = (0..1 + random.below(4))
            .map(|queue| bench.hctx(queue as u16, 1 + random.below(4) as u16))
            .collect();
        let mut free: Vec<Vec<u16>> = hctxs.iter().map(|_| (0..64).collect()).collect();
        let mut expected = 0;
        let mut ended = 0;
        let mut now = 0;
        let feeding = 400;
        for step in 0.. {
            now += random.below(2_000_000);
            bench.mq.start_turn(now);
            while !bench.below.taken.is_empty() && random.below(3) > 0 {
                let nth = random.below(bench.below.taken.len() as u64) as usize;
                let failed = random.below(10) == 0;
                bench.complete(nth, if failed { Err(Status::IoErr) } else { Ok(()) });
            }
            for (payload, status, read) in bench.done.drain(..) {
                assert!(status == Status::Ok || read == 0);
                let (hctx, tag) = ((payload / 100) as usize, (payload % 100) as u16);
                assert!(!free[hctx].contains(&tag), "seed {seed}: {payload} twice");
                free[hctx].push(tag);
                ended += 1;
            }
            bench.below.refuse = (0..random.below(4))
                .map(|_| match random.below(4) {
                    0 => Some(Busy::RetryLater),
                    1 => Some(Busy::UntilCompletion),
                    _ => None,
                })
                .collect();
            if step < feeding {
                let at = random.below(hctxs.len() as u64) as usize;
                let drain: Vec<_> = (0..random.below(1 + free[at].len() as u64 / 2))
                    .map(|_| {
                        let nth = random.below(free[at].len() as u64) as usize;
                        let tag = free[at].swap_remove(nth);
                        let op = match random.below(12) {
                            0 => Op::Flush,
                            1 => Op::Discard,
                            2..=5 => Op::Write,
                            _ => Op::Read,
                        };
                        (tag, request(op, random.below(40) * 8, 8))
                    })
                    .collect();
                expected += drain.len();
                if !drain.is_empty() {
                    bench.drain(hctxs[at], &drain);
                }
            } else {
                bench.below.refuse.clear();
            }
            bench.run();
            if step >= feeding && ended == expected {
                break;
            }
            assert!(
                step < feeding + 4000,
                "seed {seed}: {ended} of {expected} ended"
            );
        }
        for id in hctxs {
            assert_eq!((bench.mq.in_flight(id), bench.mq.staged(id)), (0, 0));
            let (stats, _) = bench.mq.remove_hctx(id);
            assert_eq!(
                stats.requests,
                stats.direct + stats.staged + stats.merged,
                "seed {seed}: each was issued, staged or merged"
            );
        }
        assert_eq!(bench.mq.tags().in_use(), 0);
    }
}

/// A throttle of so many operations a second, `burst` at once.
fn throttle(per_second: u64, burst: u64) -> Arc<Throttle> {
    Arc::new(Throttle::new(iops(per_second, burst)))
}

fn iops(per_second: u64, burst: u64) -> Limits {
    Limits {
        ops: Directions {
            total: Rate { per_second, burst },
            ..Directions::default()
        },
        ..Limits::default()
    }
}

#[test]
fn workers_of_a_disk_take_from_one_limit() {
    let shared = throttle(1000, 3);
    let mut workers = [Bench::new(32), Bench::new(32)];
    let ids = workers.each_mut().map(|worker| {
        let id = worker.hctx(0, 1);
        worker.mq.set_throttle(DiskId(0), Some(Arc::clone(&shared)));
        id
    });
    for (worker, id) in workers.iter_mut().zip(ids) {
        worker.drain(id, &[(0, read(0)), (1, read(100))]);
    }
    assert_eq!(workers[0].taken(), [[0], [1]]);
    assert_eq!(workers[1].taken(), [[0]], "the third of three");
    // It waits for the next token, and until then for nothing else.
    assert_eq!(workers[1].mq.next_deadline_ns(), Some(1_000_000));
    workers[1].complete(0, Ok(()));
    workers[1].run();
    assert!(workers[1].taken().is_empty());
    workers[1].mq.start_turn(1_000_000);
    workers[1].run();
    assert_eq!(workers[1].taken(), [[1]]);
    assert!(workers[1].mq.stats(ids[1]).throttled >= 1);
}

#[test]
fn a_group_refuses_and_a_change_wakes_who_waits() {
    let mut bench = Bench::new(32);
    let id = bench.hctx(0, 1);
    let (disk, group) = (throttle(1000, 2), throttle(1, 1));
    bench.mq.set_throttle(DiskId(0), Some(Arc::clone(&disk)));
    bench.mq.set_group(DiskId(0), Some(Arc::clone(&group)));
    bench.drain(id, &[(0, read(0)), (1, read(100))]);
    assert_eq!(bench.taken(), [[0]]);
    assert_eq!(bench.mq.next_deadline_ns(), Some(1_000_000_000));
    assert_eq!(
        disk.try_take(0, Op::Read, 0),
        Ok(()),
        "the disk lost nothing"
    );

    group.set_limits(0, iops(1_000_000, 1));
    bench.mq.limits_changed();
    bench.mq.start_turn(2_000_000);
    bench.run();
    assert_eq!(bench.taken(), [[0], [1]]);
    assert_eq!(bench.mq.next_deadline_ns(), None);
}

#[test]
fn what_the_engine_refuses_is_not_charged() {
    let mut bench = Bench::new(32);
    let id = bench.hctx(0, 1);
    let (disk, group) = (throttle(10, 1), throttle(10, 1));
    bench.mq.set_throttle(DiskId(0), Some(Arc::clone(&disk)));
    bench.mq.set_group(DiskId(0), Some(Arc::clone(&group)));
    bench.below.refuse = VecDeque::from([Some(Busy::RetryLater)]);
    bench.drain(id, &[(0, read(0))]);
    assert!(bench.taken().is_empty());
    assert_eq!(disk.try_take_with(&group, 0, Op::Read, 0), Ok(()));
    assert!(disk.try_take(0, Op::Read, 0).is_err());
}

#[test]
fn a_request_taken_back_is_the_first_to_go_again() {
    let mut bench = Bench::new(32);
    let id = bench.hctx(0, 1);
    // Neighbours become one, which stays one.
    bench.drain(
        id,
        &[(1, read(0)), (2, read(8)), (3, request(Op::Flush, 0, 0))],
    );
    assert_eq!(bench.taken(), [vec![1, 2], vec![3]]);
    bench.mq.quiesce(id);
    for _ in 0..2 {
        let (tag, ..) = bench.below.taken.remove(0);
        assert!(bench.mq.issued(tag).is_some());
        bench.mq.requeue(tag);
        assert!(bench.mq.issued(tag).is_none());
        bench.mq.requeue(tag);
    }
    assert_eq!(bench.mq.stale_completions(), 2, "taken back once");
    bench.drain(id, &[(4, read(100))]);
    bench.run();
    assert!(bench.taken().is_empty(), "it is quiesced");
    assert_eq!((bench.mq.in_flight(id), bench.mq.tags().in_use()), (4, 0));
    bench.mq.unquiesce(id);
    bench.run();
    assert_eq!(bench.taken(), [vec![3], vec![1, 2], vec![4]]);
    for _ in 0..3 {
        bench.complete(0, Ok(()));
    }
    let order: Vec<u32> = bench.done.iter().map(|done| done.0).collect();
    assert_eq!(order, [3, 1, 2, 4]);
    assert_eq!(bench.mq.stats(id).requeued, 2);
}
