use proptest::prelude::*;

use super::super::super::ids::{RequestTag, Sector};
use super::super::super::request::IoPrio;
use super::*;

const MS: u64 = 1_000_000;

impl Kyber {
    /// All that decides what is dispatched, as long as too few requests have ended for latencies to
    /// be compared with their targets.
    pub(in crate::mq) fn digest(&self, state: &mut Vec<u64>) {
        for domain in &self.domains {
            state.extend([u64::MAX, domain.depth.into(), domain.taken.into()]);
            for slot in domain.queue.newest_first(&self.store) {
                let node = self.store.get(slot);
                let id = node.queued.id;
                state.push(u64::from(id.hctx.0) << 16 | u64::from(id.tag.0));
                state.push(node.at_head.into());
            }
        }
        state.extend([self.current as u64, self.batching.into()]);
    }
}

fn id(hctx: u16, tag: u16) -> RequestId {
    RequestId {
        hctx: HctxId(hctx),
        tag: RequestTag(tag),
    }
}

fn request(op: Op, sector: u64) -> Request {
    Request {
        op,
        sector: Sector(sector),
        bytes: 8 * 512,
        segments: 1,
        ioprio: IoPrio(0),
        fua: false,
        unmap: false,
    }
}

fn queued(op: Op, tag: u16, queued_ns: u64) -> Queued {
    Queued {
        id: id(0, tag),
        request: request(op, u64::from(tag) * 100),
        queued_ns,
    }
}

fn kyber() -> Kyber {
    Kyber::new(KyberParams::default(), 1024)
}

fn times(queued_ns: u64, started_ns: u64, completed_ns: u64) -> Times {
    Times {
        queued_ns,
        started_ns,
        completed_ns,
    }
}

#[test]
fn domains_take_turns_by_their_batches() {
    let mut kyber = kyber();
    let mut tag = 0;
    for (op, count) in [
        (Op::Read, 40),
        (Op::Write, 20),
        (Op::Discard, 3),
        (Op::WriteZeroes, 2),
    ] {
        for _ in 0..count {
            kyber.insert(queued(op, tag, 0), false);
            tag += 1;
        }
    }
    let domain = |tag: u16| match tag {
        0..40 => 'R',
        40..60 => 'W',
        60..63 => 'D',
        _ => 'O',
    };
    let order: String = std::iter::from_fn(|| kyber.dispatch())
        .map(|id| domain(id.tag.0))
        .collect();
    let turn = |reads, writes, rest| "R".repeat(reads) + &"W".repeat(writes) + rest;
    assert_eq!(
        order,
        turn(16, 8, "DO") + &turn(16, 8, "DO") + &turn(8, 4, "D")
    );
}

#[test]
fn a_domain_without_tokens_holds_nobody_else_up() {
    let mut kyber = kyber();
    for tag in 0..300 {
        kyber.insert(queued(Op::Read, tag, 0), false);
    }
    let first: Vec<_> = std::iter::from_fn(|| kyber.dispatch()).collect();
    assert_eq!(first.len(), 256);
    assert_eq!(kyber.tokens(Domain::Read), (256, 256));
    assert!(!kyber.has_work() && kyber.len() == 44);
    kyber.insert(queued(Op::Write, 300, 0), false);
    assert!(kyber.has_work());
    assert_eq!(kyber.dispatch(), Some(id(0, 300)));
    kyber.completed(&request(Op::Read, 0), times(0, 0, 1));
    assert_eq!(kyber.dispatch(), Some(id(0, 256)));
    assert_eq!(kyber.dispatch(), None);
}

#[test]
fn what_came_back_has_its_token_returned_and_goes_first() {
    let mut kyber = kyber();
    for tag in 0..3 {
        kyber.insert(queued(Op::Write, tag, 0), false);
    }
    assert_eq!(kyber.dispatch(), Some(id(0, 0)));
    assert_eq!(kyber.dispatch(), Some(id(0, 1)));
    kyber.requeued(queued(Op::Write, 1, 0));
    assert_eq!(kyber.tokens(Domain::Write), (1, 128));
    let rest: Vec<_> = std::iter::from_fn(|| kyber.dispatch()).collect();
    assert_eq!(rest, [id(0, 1), id(0, 2)]);
}

#[test]
fn the_newest_of_the_same_hctx_are_merged_with() {
    let mut kyber = kyber();
    for tag in 0..10 {
        kyber.insert(queued(Op::Read, tag, 0), false);
    }
    let find = |kyber: &Kyber, hctx, sector| {
        let merge = kyber.find_merge(HctxId(hctx), &request(Op::Read, sector))?;
        Some((merge.leader.tag.0, merge.side))
    };
    assert_eq!(find(&kyber, 0, 508), Some((5, MergeSide::Back)));
    assert_eq!(find(&kyber, 0, 492), Some((5, MergeSide::Front)));
    assert_eq!(find(&kyber, 1, 508), None, "another hctx");
    assert_eq!(find(&kyber, 0, 108), None, "the ninth from the end");
    let merge = kyber
        .find_merge(HctxId(0), &request(Op::Read, 508))
        .expect("fits");
    let mut now = request(Op::Read, 500);
    now.bytes *= 2;
    kyber.merged(merge, &now);
    assert_eq!(find(&kyber, 0, 516), Some((5, MergeSide::Back)));
    kyber.insert(queued(Op::Read, 60, 0), true);
    assert_eq!(find(&kyber, 0, 6008), None, "at the head");
}

/// Completes `count` requests of one kind that took `latency_ns` in the engine and waited for none.
fn complete(kyber: &mut Kyber, op: Op, count: u16, latency_ns: u64, at_ns: u64) {
    for tag in 0..count {
        kyber.insert(queued(op, tag, at_ns - latency_ns), false);
        while kyber.dispatch().is_some() {}
        let times = times(at_ns - latency_ns, at_ns - latency_ns, at_ns);
        kyber.completed(&request(op, 0), times);
    }
}

#[test]
fn when_writes_are_slow_reads_get_fewer_tokens_until_they_suffer() {
    let mut kyber = kyber();
    // Writes far above their 10 ms, reads in the first quarter of their 2 ms.
    complete(&mut kyber, Op::Write, 500, 60 * MS, 100 * MS);
    complete(&mut kyber, Op::Read, 500, MS / 4, 100 * MS);
    assert_eq!(kyber.tokens(Domain::Read), (0, 256), "not yet compared");
    complete(&mut kyber, Op::Discard, 1, MS, 200 * MS);
    assert_eq!(kyber.tokens(Domain::Read).1, 256 / 4);
    assert_eq!(kyber.tokens(Domain::Write).1, 128, "of 256, clamped");
    // Too few new samples: nothing moves.
    complete(&mut kyber, Op::Read, 10, MS / 4, 300 * MS);
    assert_eq!(kyber.tokens(Domain::Read).1, 64);
    // In all they take longer than they should, for want of tokens: they get more.
    for _ in 0..500 {
        kyber.insert(queued(Op::Read, 0, 396 * MS), false);
        kyber.dispatch();
        let times = times(396 * MS, 400 * MS - MS / 4, 400 * MS);
        kyber.completed(&request(Op::Read, 0), times);
    }
    complete(&mut kyber, Op::Read, 1, MS / 4, 500 * MS);
    assert_eq!(kyber.tokens(Domain::Read).1, 128, "bucket 7: twice as many");
}

#[test]
fn a_second_is_enough_with_fewer_samples() {
    let mut kyber = kyber();
    complete(&mut kyber, Op::Write, 1, 60 * MS, 100 * MS);
    complete(&mut kyber, Op::Read, 1, MS / 4, 100 * MS);
    complete(&mut kyber, Op::Discard, 1, MS, 1099 * MS);
    assert_eq!(kyber.tokens(Domain::Read).1, 256);
    complete(&mut kyber, Op::Discard, 1, MS, 1199 * MS);
    assert_eq!(kyber.tokens(Domain::Read).1, 64);
}

#[test]
fn a_tenth_may_be_slow() {
    for (slow, depth) in [(50, 256), (51, 64)] {
        let mut kyber = kyber();
        complete(&mut kyber, Op::Write, slow, 60 * MS, 100 * MS);
        complete(&mut kyber, Op::Write, 500 - slow, MS, 100 * MS);
        complete(&mut kyber, Op::Read, 500, MS / 4, 100 * MS);
        complete(&mut kyber, Op::Discard, 1, MS, 200 * MS);
        assert_eq!(kyber.tokens(Domain::Read).1, depth, "{slow} of 500 slow");
    }
}

#[test]
fn what_was_seen_before_the_congestion_counts_once() {
    let mut kyber = kyber();
    complete(&mut kyber, Op::Read, 500, MS / 4, 100 * MS);
    complete(&mut kyber, Op::Discard, 1, MS, 200 * MS);
    for at in [250, 350] {
        complete(&mut kyber, Op::Write, 500, 60 * MS, at * MS);
        complete(&mut kyber, Op::Discard, 1, MS, (at + 50) * MS);
        assert_eq!(kyber.tokens(Domain::Read).1, 64, "at {at} ms");
    }
}

#[test]
fn depth_never_falls_below_one() {
    let mut kyber = kyber();
    for round in 1..20 {
        let at = round * 200 * MS;
        complete(&mut kyber, Op::Write, 500, 60 * MS, at);
        complete(&mut kyber, Op::Read, 500, 1, at);
        complete(&mut kyber, Op::Discard, 1, MS, at + 100 * MS);
    }
    assert_eq!(kyber.tokens(Domain::Read).1, 1);
    assert_eq!(kyber.tokens(Domain::Other).1, 16, "has no target");
}

/// The rules, in plain lists.
struct Oracle {
    targets: [u64; 3],
    queues: [Vec<u16>; 4],
    taken: [u64; 4],
    depth: [u64; 4],
    /// Buckets of single samples, and when the first came: engine, total.
    samples: [[(Vec<u64>, u64); 2]; 3],
    remembered: [Option<u64>; 3],
    turn: usize,
    batch: u32,
    update_at: Option<u64>,
}

const MAX_DEPTH: [u64; 4] = [256, 128, 64, 16];
const OPS: [Op; 4] = [Op::Read, Op::Write, Op::Discard, Op::WriteZeroes];

impl Oracle {
    fn new() -> Oracle {
        Oracle {
            targets: [2 * MS, 10 * MS, 5000 * MS],
            queues: Default::default(),
            taken: [0; 4],
            depth: MAX_DEPTH,
            samples: Default::default(),
            remembered: [None; 3],
            turn: 0,
            batch: 0,
            update_at: None,
        }
    }

    fn dispatch(&mut self) -> Option<(usize, u16)> {
        let batches = [16, 8, 1, 1];
        let can = |o: &Oracle, d: usize| !o.queues[d].is_empty() && o.taken[d] < o.depth[d];
        if self.batch >= batches[self.turn] || !can(self, self.turn) {
            self.batch = 0;
            let next = (1..=4)
                .map(|n| (self.turn + n) % 4)
                .find(|d| can(self, *d))?;
            self.turn = next;
        }
        self.batch += 1;
        self.taken[self.turn] += 1;
        Some((self.turn, self.queues[self.turn].remove(0)))
    }

    fn bucket(&self, domain: usize, latency: u64) -> u64 {
        let quarter = self.targets[domain] / 4;
        (0..7).find(|b| latency <= (b + 1) * quarter).unwrap_or(7)
    }

    fn complete(&mut self, domain: usize, times: Times) {
        self.taken[domain] -= 1;
        if domain == 3 {
            return;
        }
        let now = times.completed_ns;
        for (which, since) in [times.started_ns, times.queued_ns].into_iter().enumerate() {
            let bucket = self.bucket(domain, now - since);
            let (samples, first) = &mut self.samples[domain][which];
            if samples.is_empty() {
                *first = now;
            }
            samples.push(bucket);
        }
        match self.update_at {
            None => self.update_at = Some(now + 100 * MS),
            Some(at) if now >= at => {
                self.update_at = Some(now + 100 * MS);
                self.update(now);
            }
            Some(_) => {}
        }
    }

    fn percentile(&mut self, domain: usize, which: usize, percent: usize, now: u64) -> Option<u64> {
        let (samples, first) = &mut self.samples[domain][which];
        if samples.is_empty() || (samples.len() < 500 && now - *first < 1000 * MS) {
            return None;
        }
        samples.sort_unstable();
        let nth = (samples.len() * percent).div_ceil(100) - 1;
        let bucket = samples[nth];
        samples.clear();
        Some(bucket)
    }

    fn update(&mut self, now: u64) {
        let engine: Vec<_> = (0..3).map(|d| self.percentile(d, 0, 90, now)).collect();
        let congested = engine.iter().flatten().any(|bucket| *bucket > 3);
        let totals: Vec<_> = (0..3).map(|d| self.percentile(d, 1, 99, now)).collect();
        for (domain, new) in totals.into_iter().enumerate() {
            let seen = new.or(self.remembered[domain]);
            self.remembered[domain] = if congested { None } else { seen };
            let bucket = if congested { seen } else { new };
            if let Some(bucket) = bucket.filter(|bucket| congested || *bucket > 3) {
                let depth = self.depth[domain] * (bucket + 1) / 4;
                self.depth[domain] = depth.clamp(1, MAX_DEPTH[domain]);
            }
        }
    }
}

/// How long some requests took, in quarters of their domain's target and nanoseconds beyond: in the
/// engine, and before.
#[derive(Clone, Debug)]
struct Took {
    fast: (u64, u64),
    slow: (u64, u64),
    /// One in so many is slow.
    period: u64,
    waited: u64,
}

impl Took {
    fn times(&self, nth: u64, target: u64, now: u64) -> Times {
        let (quarters, beyond) = match nth % self.period {
            0 => self.slow,
            _ => self.fast,
        };
        let quarter = target / 4;
        let started = now - quarters * quarter - beyond;
        times(started - self.waited * quarter, started, now)
    }
}

#[derive(Clone, Debug)]
enum Step {
    Insert(usize, u16),
    Dispatch(u16),
    Complete(u16, Took),
    /// So many of a domain come, are dispatched and complete, after one another.
    Serve(usize, u16, Took),
    Advance(u64),
}

fn step() -> impl Strategy<Value = Step> {
    let domain = || prop_oneof![4 => Just(0usize), 4 => Just(1), 1 => Just(2), 1 => Just(3)];
    let latency = || (0u64..6, 0u64..3);
    let took = || {
        (latency(), latency(), 5u64..30, 0u64..4).prop_map(|(fast, slow, period, waited)| Took {
            fast,
            slow,
            period,
            waited,
        })
    };
    prop_oneof![
        (domain(), 1u16..120).prop_map(|(domain, count)| Step::Insert(domain, count)),
        (1u16..400).prop_map(Step::Dispatch),
        (1u16..300, took()).prop_map(|(count, took)| Step::Complete(count, took)),
        (domain(), 1u16..700, took())
            .prop_map(|(domain, count, took)| Step::Serve(domain, count, took)),
        (0u64..400).prop_map(Step::Advance),
    ]
}

/// The scheduler and its oracle, side by side.
struct Pair {
    kyber: Kyber,
    oracle: Oracle,
    now: u64,
    tag: u16,
    below: std::collections::VecDeque<usize>,
}

impl Pair {
    fn insert(&mut self, domain: usize) {
        self.kyber
            .insert(queued(OPS[domain], self.tag, self.now), false);
        self.oracle.queues[domain].push(self.tag);
        self.tag += 1;
    }

    fn dispatch(&mut self) -> Result<bool, TestCaseError> {
        let oracle = &self.oracle;
        let ready = |d: usize| !oracle.queues[d].is_empty() && oracle.taken[d] < oracle.depth[d];
        prop_assert_eq!(self.kyber.has_work(), (0..4).any(ready));
        let expected = self.oracle.dispatch();
        let id = self.kyber.dispatch();
        prop_assert_eq!(id.map(|id| id.tag.0), expected.map(|e| e.1));
        self.below.extend(expected.map(|e| e.0));
        Ok(expected.is_some())
    }

    fn complete(&mut self, nth: u64, took: &Took) -> Result<(), TestCaseError> {
        let Some(domain) = self.below.pop_front() else {
            return Ok(());
        };
        let target = self.oracle.targets.get(domain).copied().unwrap_or(MS);
        let times = took.times(nth, target, self.now);
        self.kyber.completed(&request(OPS[domain], 0), times);
        self.oracle.complete(domain, times);
        for (at, domain) in Domain::ALL.into_iter().enumerate() {
            let (taken, depth) = self.kyber.tokens(domain);
            let expected = (self.oracle.taken[at], self.oracle.depth[at]);
            prop_assert_eq!((u64::from(taken), u64::from(depth)), expected);
        }
        Ok(())
    }

    fn take(&mut self, step: Step) -> Result<(), TestCaseError> {
        match step {
            Step::Insert(domain, count) => (0..count).for_each(|_| self.insert(domain)),
            Step::Dispatch(count) => {
                for _ in 0..count {
                    if !self.dispatch()? {
                        break;
                    }
                }
            }
            Step::Complete(count, took) => {
                for nth in 0..count {
                    self.complete(nth.into(), &took)?;
                }
            }
            Step::Serve(domain, count, took) => {
                for nth in 0..count {
                    self.insert(domain);
                    self.dispatch()?;
                    self.complete(nth.into(), &took)?;
                }
            }
            Step::Advance(ms) => self.now += ms * MS,
        }
        Ok(())
    }
}

proptest! {
    /// Every decision and every number of tokens is the oracle's.
    #[test]
    fn it_decides_as_the_model_does(steps in prop::collection::vec(step(), 1..60)) {
        let mut pair = Pair {
            kyber: Kyber::new(KyberParams::default(), 65536),
            oracle: Oracle::new(),
            now: 100_000 * MS,
            tag: 0,
            below: Default::default(),
        };
        for step in steps {
            pair.take(step)?;
        }
    }
}
