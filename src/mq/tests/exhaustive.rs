//! Every interleaving of a small world: two hctxs, one or two driver tags, four requests, and an
//! engine that refuses and fails at each step where it may.
//!
//! The world cannot be copied, so a path is a list of choices and is played again from the start:
//! it is cheap. A state that was seen before is not explored again; from there the path is finished
//! in a friendly way instead, so that a wake-up which is lost, or a queue that runs for ever, shows
//! wherever a path ends.

use std::collections::HashSet;
use std::fmt::Write;
use std::hash::{DefaultHasher, Hash, Hasher};

use super::elevator::{DeadlineParams, Elevator, KyberParams, Params};
use super::ids::{DiskId, QueueId};
use super::request::{IoPrio, Op};
use super::throttle::{Directions, Limits, Rate};
use super::*;

/// The path: which alternative was taken at each point, of how many.
#[derive(Debug, Default)]
struct Path {
    taken: Vec<(usize, usize)>,
    at: usize,
}

impl Path {
    fn pick(&mut self, alternatives: usize) -> usize {
        if self.at == self.taken.len() {
            self.taken.push((0, alternatives));
        }
        let (taken, of) = self.taken[self.at];
        assert_eq!(of, alternatives, "the same path leads elsewhere");
        self.at += 1;
        taken
    }

    /// Goes on to the next path; false after the last.
    fn advance(&mut self) -> bool {
        self.at = 0;
        while let Some((taken, of)) = self.taken.pop() {
            if taken + 1 < of {
                self.taken.push((taken + 1, of));
                return true;
            }
        }
        false
    }
}

/// A small world.
#[derive(Clone)]
struct Plan {
    name: &'static str,
    /// Ordinary driver tags; there is a reserved one besides.
    tags: u16,
    /// The disk of each hctx.
    disks: [u16; 2],
    ctxs: u16,
    elevator: Params,
    limits: Option<Limits>,
    /// For each hctx, the requests of its ring.
    requests: [Vec<Request>; 2],
    refusals: u8,
    failures: u8,
    /// How often an hctx is quiesced.
    quiesces: u8,
    /// How often the number of ctxs changes.
    recounts: u8,
}

/// What was handed over: hctx × 10 + tag for each part.
type Taken = (DriverTag, Request, Vec<u32>);

struct Engine {
    path: Path,
    friendly: bool,
    /// All there are.
    tags: u16,
    refusals: u8,
    quiesced: [bool; 2],
    requests: [Vec<Request>; 2],
    taken: Vec<Taken>,
    issued: u32,
    /// Admissions that cost a token.
    paid: u64,
}

impl Engine {
    fn request(&self, payload: u32) -> &Request {
        &self.requests[payload as usize / 10][payload as usize % 10]
    }
}

impl Driver<u32> for Engine {
    fn queue_rq(
        &mut self,
        _disk: DiskId,
        _hctx: HctxId,
        tag: DriverTag,
        request: &Request,
        parts: Parts<'_, u32>,
    ) -> Result<(), Busy> {
        let parts: Vec<u32> = parts.copied().collect();
        let hctx = parts[0] / 10;
        assert!(parts.iter().all(|p| p / 10 == hctx), "{parts:?}");
        assert!(!self.quiesced[hctx as usize], "{parts:?} while quiesced");
        let mut end = request.sector;
        for part in &parts {
            let own = *self.request(*part);
            assert_eq!((own.op, own.sector), (request.op, end), "{parts:?}");
            end = own.end();
            for (other, _, there) in &self.taken {
                assert!(!there.contains(part), "{part} is issued twice");
                assert_ne!(other.index, tag.index, "a tag is used twice");
            }
        }
        assert_eq!(end, request.end(), "{parts:?}");
        assert!(self.taken.len() < usize::from(self.tags));
        let flushing = |t: &&Taken| t.1.op == Op::Flush && t.2[0] / 10 == hctx;
        if request.op == Op::Flush {
            assert!(self.taken.iter().find(flushing).is_none(), "two flushes");
        }
        if !self.friendly && self.refusals > 0 {
            let refusal = match self.path.pick(3) {
                0 => None,
                1 => Some(Busy::UntilCompletion),
                _ => Some(Busy::RetryLater),
            };
            if let Some(busy) = refusal {
                self.refusals -= 1;
                return Err(busy);
            }
        }
        self.issued += 1;
        self.paid += u64::from(request.op != Op::Flush);
        self.taken.push((tag, *request, parts));
        Ok(())
    }
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Drain(usize, usize),
    Complete(usize, Result<(), Status>),
    Run,
    Wait,
    Quiesce(usize),
    Unquiesce(usize),
    Recount(usize),
}

struct World<'a> {
    plan: &'a Plan,
    mq: Mq<u32>,
    hctxs: [HctxId; 2],
    engine: Engine,
    fed: [usize; 2],
    failures: u8,
    quiesces: u8,
    recounts: u8,
    now_ns: u64,
    ended: Vec<u32>,
    steps: Vec<Step>,
    told: bool,
}

impl<'a> World<'a> {
    fn new(plan: &'a Plan, path: Path) -> Self {
        let disks = plan.disks.iter().collect::<HashSet<_>>().len();
        let disks = u16::try_from(disks).expect("two at most");
        let mut mq = Mq::new(tags(disks, 0, plan.tags));
        let hctxs = [0, 1].map(|at| {
            mq.add_hctx(HctxConfig {
                disk: DiskId(plan.disks[at]),
                queue: QueueId(0),
                ring_size: 4,
                ctxs: plan.ctxs,
            })
        });
        for disk in plan.disks {
            mq.set_elevator(DiskId(disk), plan.elevator);
            if let Some(limits) = plan.limits {
                mq.set_throttle(DiskId(disk), Some(Arc::new(Throttle::new(limits))));
            }
        }
        World {
            plan,
            mq,
            hctxs,
            engine: Engine {
                path,
                friendly: false,
                tags: plan.tags + disks,
                refusals: plan.refusals,
                quiesced: [false; 2],
                requests: plan.requests.clone(),
                taken: Vec::new(),
                issued: 0,
                paid: 0,
            },
            fed: [0; 2],
            failures: plan.failures,
            quiesces: plan.quiesces,
            recounts: plan.recounts,
            now_ns: 0,
            ended: Vec::new(),
            steps: Vec::new(),
            told: false,
        }
    }

    fn is_over(&self) -> bool {
        self.ended.len() == self.plan.requests.iter().map(Vec::len).sum::<usize>()
    }

    /// What can happen next; the friendly things first.
    fn possible(&self) -> Vec<Step> {
        let mut steps = Vec::new();
        if self.mq.must_run() {
            steps.push(Step::Run);
        }
        for at in 0..self.engine.taken.len() {
            steps.push(Step::Complete(at, Ok(())));
            if self.failures > 0 {
                steps.push(Step::Complete(at, Err(Status::IoErr)));
            }
        }
        for at in 0..2 {
            let left = self.plan.requests[at].len() - self.fed[at];
            steps.extend((1..=left).rev().map(|count| Step::Drain(at, count)));
            if self.engine.quiesced[at] {
                steps.push(Step::Unquiesce(at));
            } else if self.quiesces > 0 {
                steps.push(Step::Quiesce(at));
            }
            if self.recounts > 0 {
                steps.push(Step::Recount(at));
            }
        }
        if self.mq.next_deadline_ns().is_some() {
            steps.push(Step::Wait);
        }
        steps
    }

    /// Whether requests wait that nobody refused or limits, with nothing in flight and no turn to
    /// come.
    fn waits_for_nothing(&self) -> bool {
        let free = self.plan.limits.is_none() && self.engine.refusals == self.plan.refusals;
        let fed: usize = self.fed.iter().sum();
        free && fed > self.ended.len()
            && self.engine.taken.is_empty()
            && self.engine.quiesced == [false; 2]
            && !self.mq.must_run()
    }

    fn apply(&mut self, step: Step) {
        self.steps.push(step);
        match step {
            Step::Drain(at, count) => {
                let id = self.hctxs[at];
                for tag in self.fed[at]..self.fed[at] + count {
                    let request = self.plan.requests[at][tag];
                    let payload = u32::try_from(at * 10 + tag).unwrap();
                    let tag = RequestTag(u16::try_from(tag).unwrap());
                    self.mq.plug(id, tag, request, payload, &mut self.engine);
                }
                self.mq.unplug(id, &mut self.engine);
                self.fed[at] += count;
            }
            Step::Complete(at, result) => self.complete(at, result),
            Step::Run => self.mq.run(&mut self.engine),
            Step::Wait => {
                let deadline = self.mq.next_deadline_ns().expect("there is one");
                self.now_ns = self.now_ns.max(deadline);
                self.mq.start_turn(self.now_ns);
            }
            Step::Quiesce(at) => {
                self.quiesces -= 1;
                self.engine.quiesced[at] = true;
                self.mq.quiesce(self.hctxs[at]);
            }
            Step::Unquiesce(at) => {
                self.engine.quiesced[at] = false;
                self.mq.unquiesce(self.hctxs[at]);
            }
            Step::Recount(at) => {
                self.recounts -= 1;
                let id = self.hctxs[at];
                let count = 3 - u16::try_from(self.mq.ctx_count(id)).unwrap();
                self.mq.set_ctxs(id, count);
            }
        }
    }

    /// The engine answers. A part of a merged read or write that failed is still to come; whoever
    /// ends has the status of this answer, which is the last one it got.
    fn complete(&mut self, at: usize, result: Result<(), Status>) {
        self.failures -= u8::from(result.is_err());
        let (tag, request, mut parts) = self.engine.taken.remove(at);
        let mut ended = Vec::new();
        let engine = &self.engine;
        self.mq.complete(tag, result, |_, payload, status, read| {
            assert_eq!(status, result.err().unwrap_or(Status::Ok));
            let own = engine.request(payload);
            let got = status == Status::Ok && own.op == Op::Read;
            assert_eq!(read, if got { own.bytes } else { 0 });
            ended.push(payload);
        });
        if result.is_err() && parts.len() > 1 && request.op.moves_data() {
            parts.clear();
        }
        ended.sort_unstable();
        parts.sort_unstable();
        assert_eq!(ended, parts, "who ended with this answer");
        for payload in ended {
            assert!(!self.ended.contains(&payload), "{payload} ended twice");
            self.ended.push(payload);
        }
    }

    /// All that decides what can happen from here on. When something happened matters where there
    /// are limits, and then the state is another at another time.
    fn digest(&mut self) -> u64 {
        let timed = self.plan.limits.is_some();
        let mut state = Vec::with_capacity(64);
        let mut text = String::new();
        for at in 0..2 {
            let member = self.mq.member(self.hctxs[at]);
            let (hctx, place) = (&mut member.hctx, member.place);
            for _ in 0..hctx.leftovers.len() {
                let tag = hctx
                    .leftovers
                    .pop_front(&mut hctx.table)
                    .expect("not empty");
                hctx.leftovers.push_back(&mut hctx.table, tag);
                state.push(u64::from(tag.0));
            }
            for tag in 0..self.fed[at] {
                state.push(u64::MAX);
                if self.ended.contains(&u32::try_from(at * 10 + tag).unwrap()) {
                    continue;
                }
                let tag = RequestTag(u16::try_from(tag).unwrap());
                let entry = hctx.table.get(tag);
                state.extend([
                    u64::from(entry.key.ctx().0),
                    entry.started.into(),
                    entry.elevated.into(),
                ]);
                state.extend(hctx.table.parts(tag).map(|part| u64::from(*part)));
            }
            let next = hctx.flush.next.map_or(u64::MAX, |tag| tag.0.into());
            state.extend([
                u64::from(hctx.dispatch_busy),
                hctx.flush.running.into(),
                next,
                hctx.held.into(),
                hctx.active.into(),
                place as u64,
            ]);
            write!(text, "{:?}", hctx.ctxs).unwrap();
        }
        for disk in self.plan.disks {
            let queue = self.mq.queue_of(DiskId(disk));
            match &queue.elevator {
                None => {}
                Some(Elevator::Deadline(elevator)) => elevator.digest(timed, &mut state),
                Some(Elevator::Kyber(elevator)) => elevator.digest(&mut state),
            }
            if timed {
                write!(text, "{:?}", queue.throttle).unwrap();
            }
        }
        let mut taken: Vec<&[u32]> = self.engine.taken.iter().map(|t| &t.2[..]).collect();
        taken.sort_unstable();
        let lists = (
            &self.mq.runnable,
            &self.mq.waiting,
            self.mq.next_deadline_ns(),
        );
        let left = [
            self.engine.refusals,
            self.failures,
            self.quiesces,
            self.recounts,
        ];
        let mut hasher = DefaultHasher::new();
        (state, text, taken, lists, left, self.mq.completed_since_run).hash(&mut hasher);
        (self.fed, self.engine.quiesced, timed.then_some(self.now_ns)).hash(&mut hasher);
        hasher.finish()
    }

    /// From here on nothing is refused and nothing fails, and all that can be done is done.
    fn finish(&mut self) {
        self.engine.friendly = true;
        (self.failures, self.quiesces, self.recounts) = (0, 0, 0);
        for _ in 0..100 {
            if self.is_over() {
                return self.check_the_end();
            }
            let step = self.possible().first().copied();
            self.apply(step.expect("a wake-up is lost: requests wait and nothing can happen"));
        }
        panic!("100 steps and no end: {:?} ended", self.ended);
    }

    fn check_the_end(&mut self) {
        assert_eq!(self.mq.tags().in_use(), 0);
        for at in 0..2 {
            let id = self.hctxs[at];
            assert_eq!((self.mq.in_flight(id), self.mq.staged(id)), (0, 0));
        }
        for disk in self.plan.disks {
            self.mq.fold();
            let queue = self.mq.queue_of(DiskId(disk));
            assert_eq!(queue.account.in_flight(), [0, 0]);
            assert!(!queue.elevator_waits());
            if queue.elevator.is_some() {
                let write = request(Op::Write, 0, 8);
                assert!(queue.may_insert(&write), "the async limit leaks");
            }
        }
        if self.plan.limits.is_some() {
            // One operation a second for each disk, and one at once.
            let seconds = self.now_ns / 1_000_000_000;
            let disks: HashSet<u16> = self.plan.disks.into();
            let most = (seconds + 1) * disks.len() as u64;
            assert!(
                self.engine.paid <= most,
                "{} in {seconds} s",
                self.engine.paid
            );
        }
        let issued: u64 = self
            .hctxs
            .map(|id| self.mq.stats(id).dispatched)
            .iter()
            .sum();
        assert_eq!(issued, u64::from(self.engine.issued));
    }
}

/// Says how the world came to where a test failed.
impl Drop for World<'_> {
    fn drop(&mut self) {
        if !self.told {
            eprintln!("{}: {:?}", self.plan.name, self.steps);
            eprintln!("the choices: {:?}", self.engine.path.taken);
        }
    }
}

/// Plays every path and returns how many states there are.
fn explore(plan: &Plan) -> usize {
    let mut seen = HashSet::new();
    let mut path = Path::default();
    loop {
        let known = path.taken.len();
        let mut world = World::new(plan, path);
        play(&mut world, known, &mut seen);
        world.told = true;
        path = std::mem::take(&mut world.engine.path);
        if !path.advance() {
            return seen.len();
        }
    }
}

/// Plays one path, of which the first `known` choices have been made before.
fn play(world: &mut World, known: usize, seen: &mut HashSet<u64>) {
    while !world.is_over() {
        if world.engine.path.at >= known && !seen.insert(world.digest()) {
            return world.finish();
        }
        let steps = world.possible();
        assert!(
            !steps.is_empty(),
            "a wake-up is lost: requests wait and nothing can happen"
        );
        assert!(
            !world.waits_for_nothing(),
            "requests wait for a time though nothing keeps them"
        );
        let step = steps[world.engine.path.pick(steps.len())];
        world.apply(step);
    }
    world.check_the_end();
}

const ONE_DISK: [u16; 2] = [0, 0];
const TWO_DISKS: [u16; 2] = [0, 1];

fn write(sector: u64) -> Request {
    request(Op::Write, sector, 8)
}

fn flush() -> Request {
    request(Op::Flush, 0, 0)
}

/// Two that merge, one alone, and a flush.
fn mixed() -> [Vec<Request>; 2] {
    [vec![read(0), read(8)], vec![write(100), flush()]]
}

/// Nothing merges, everything is for the async limit.
fn writes() -> [Vec<Request>; 2] {
    [vec![write(0), write(5000)], vec![write(100), write(10_000)]]
}

fn flushes() -> [Vec<Request>; 2] {
    [vec![flush(), flush(), flush()], vec![write(0)]]
}

/// A merge of three, and a neighbour that may not join.
fn merges() -> [Vec<Request>; 2] {
    [vec![write(8), write(0), write(16)], vec![write(24)]]
}

fn plan(name: &'static str, requests: [Vec<Request>; 2]) -> Plan {
    Plan {
        name,
        tags: 2,
        disks: ONE_DISK,
        ctxs: 1,
        elevator: Params::None,
        limits: None,
        requests,
        refusals: 1,
        failures: 1,
        quiesces: 0,
        recounts: 0,
    }
}

fn deadline(async_depth: Option<u16>) -> Params {
    Params::MqDeadline(DeadlineParams {
        async_depth,
        ..DeadlineParams::default()
    })
}

fn kyber() -> Params {
    Params::Kyber(KyberParams::default())
}

fn one_a_second() -> Option<Limits> {
    Some(Limits {
        ops: Directions {
            total: Rate::per_second(1),
            ..Directions::default()
        },
        ..Limits::default()
    })
}

/// Of two priority classes.
fn classes() -> [Vec<Request>; 2] {
    let of = |class: u16, request| Request {
        ioprio: IoPrio(class << 13),
        ..request
    };
    let (rt, idle) = (1, 3);
    [
        vec![of(rt, read(0)), of(idle, read(8))],
        vec![of(idle, write(100)), of(rt, write(5000))],
    ]
}

/// Explores the plan for both topologies and all elevators.
fn explore_all(plan: &Plan) {
    for (disks, elevator) in [
        (ONE_DISK, Params::None),
        (ONE_DISK, deadline(None)),
        (ONE_DISK, deadline(Some(1))),
        (ONE_DISK, kyber()),
        (TWO_DISKS, Params::None),
        (TWO_DISKS, deadline(Some(1))),
        (TWO_DISKS, kyber()),
    ] {
        let plan = Plan {
            disks,
            elevator,
            ..plan.clone()
        };
        let states = explore(&plan);
        println!(
            "{} {disks:?} {}: {states} states",
            plan.name,
            elevator.kind()
        );
        assert!(states > 100, "hardly anything happened: {states} states");
    }
}

#[test]
fn a_merge_a_single_and_a_flush() {
    explore_all(&plan("mixed", mixed()));
}

#[test]
fn writes_that_do_not_touch() {
    explore_all(&plan("writes", writes()));
}

#[test]
fn flushes_beside_a_write() {
    explore_all(&plan("flushes", flushes()));
}

#[test]
fn a_merge_of_three_that_fails() {
    explore_all(&plan("merges", merges()));
}

#[test]
fn priority_classes() {
    explore_all(&plan("classes", classes()));
}

#[test]
fn one_driver_tag() {
    for (name, requests) in [("mixed", mixed()), ("merges", merges())] {
        explore_all(&Plan {
            tags: 1,
            ..plan(name, requests)
        });
    }
}

#[test]
fn hctxs_that_are_quiesced() {
    explore_all(&Plan {
        quiesces: 1,
        refusals: 0,
        ..plan("writes", writes())
    });
}

#[test]
fn ctxs_that_are_recounted() {
    explore_all(&Plan {
        ctxs: 2,
        recounts: 1,
        refusals: 0,
        failures: 0,
        ..plan("writes", writes())
    });
}

#[test]
fn one_operation_a_second() {
    explore_all(&Plan {
        limits: one_a_second(),
        refusals: 0,
        ..plan("mixed", mixed())
    });
}

/// Takes minutes, and is for an optimized build.
#[test]
#[ignore = "explores millions of states: cargo test --release --lib exhaustive -- --ignored"]
fn all_of_it_with_more_refusals_and_failures() {
    let worlds = [
        ("mixed", mixed()),
        ("writes", writes()),
        ("flushes", flushes()),
        ("merges", merges()),
        ("classes", classes()),
    ];
    for (name, requests) in worlds {
        for tags in [1, 2] {
            for limits in [None, one_a_second()] {
                explore_all(&Plan {
                    tags,
                    limits,
                    // With limits, the time makes many states of one.
                    refusals: if limits.is_some() { 1 } else { 2 },
                    quiesces: u8::from(limits.is_none()),
                    ..plan(name, requests.clone())
                });
            }
        }
        explore_all(&Plan {
            refusals: 1,
            failures: 2,
            ctxs: 2,
            recounts: 1,
            ..plan(name, requests)
        });
    }
}
