use proptest::prelude::*;

use super::super::super::ids::RequestTag;
use super::super::super::limits::MERGE_LOOKBACK;
use super::super::{Merge, MergeSide};
use super::*;

const MS: u64 = 1_000_000;
const RT: u16 = 1 << 13;
const BE: u16 = (2 << 13) | 4;
const IDLE: u16 = 3 << 13;

impl Deadline {
    /// All that decides what is dispatched when; `timed` says whether deadlines can pass.
    pub(in crate::mq) fn digest(&self, timed: bool, state: &mut Vec<u64>) {
        let number = |id: RequestId| u64::from(id.hctx.0) << 16 | u64::from(id.tag.0);
        for class in &self.classes {
            state.extend([u64::MAX, class.unfinished as u64]);
            let lists = [&class.head, &class.queues[0].fifo, &class.queues[1].fifo];
            for list in lists {
                state.push(u64::MAX);
                for slot in list.newest_first(&self.store) {
                    let node = self.store.get(slot);
                    state.extend([number(node.queued.id), node.at_head.into()]);
                    state.extend(timed.then_some(node.deadline_ns));
                }
            }
            state.extend(class.queues.iter().map(|queues| queues.last.0));
        }
        let Batch {
            dir,
            count,
            starved,
        } = self.batch;
        state.extend([dir as u64, count.into(), starved.into()]);
        if self.last_merge != NONE {
            state.push(number(self.store.get(self.last_merge).queued.id));
        }
    }
}

fn id(hctx: u16, tag: u16) -> RequestId {
    RequestId {
        hctx: HctxId(hctx),
        tag: RequestTag(tag),
    }
}

fn request(op: Op, sector: u64, ioprio: u16) -> Request {
    Request {
        op,
        sector: Sector(sector),
        bytes: 8 * 512,
        segments: 1,
        ioprio: IoPrio(ioprio),
        fua: false,
        unmap: false,
    }
}

/// A scheduler whose requests are of hctx 0, and what they were.
struct Bench {
    deadline: Deadline,
    requests: Vec<Request>,
}

impl Bench {
    fn new() -> Bench {
        Bench::with(DeadlineParams::default())
    }

    fn with(params: DeadlineParams) -> Bench {
        Bench {
            deadline: Deadline::new(params, 256),
            requests: Vec::new(),
        }
    }

    fn add(&mut self, op: Op, sector: u64, ioprio: u16, now_ns: u64) -> u16 {
        let tag = self.requests.len() as u16;
        let request = request(op, sector, ioprio);
        self.requests.push(request);
        let queued = self.queued(tag, now_ns);
        self.deadline.insert(queued, false);
        tag
    }

    fn queued(&self, tag: u16, queued_ns: u64) -> Queued {
        Queued {
            id: id(0, tag),
            request: self.requests[usize::from(tag)],
            queued_ns,
        }
    }

    fn dispatch(&mut self, now_ns: u64) -> Option<u16> {
        let ready = self.deadline.has_work(now_ns);
        let tag = self.deadline.dispatch(now_ns).map(|id| id.tag.0);
        assert_eq!(ready, tag.is_some());
        tag
    }

    fn complete(&mut self, tag: u16) {
        self.deadline.completed(&self.requests[usize::from(tag)]);
    }

    /// Everything that can be dispatched at that time.
    fn all(&mut self, now_ns: u64) -> Vec<u16> {
        std::iter::from_fn(|| self.dispatch(now_ns)).collect()
    }
}

#[test]
fn one_direction_goes_up_and_then_begins_with_the_oldest() {
    let mut bench = Bench::new();
    for sector in [500, 100, 300, 200] {
        bench.add(Op::Read, sector, 0, 0);
    }
    assert_eq!(bench.dispatch(0), Some(1), "the first at or after 0");
    bench.add(Op::Read, 50, 0, 0);
    assert_eq!(bench.all(0), [3, 2, 0, 4], "upwards, then what is left");
}

#[test]
fn the_same_sector_is_served_in_the_order_of_arrival() {
    let mut bench = Bench::new();
    for _ in 0..5 {
        bench.add(Op::Write, 64, 0, 0);
    }
    assert_eq!(bench.all(0), [0, 1, 2, 3, 4]);
}

#[test]
fn writes_wait_for_two_batches_of_reads() {
    let mut bench = Bench::new();
    let writes: Vec<_> = (0..40)
        .map(|i| bench.add(Op::Write, 10_000 + i * 100, 0, 0))
        .collect();
    for i in 0..64 {
        bench.add(Op::Read, i * 100, 0, 0);
    }
    let order: Vec<bool> = bench.all(0).iter().map(|t| writes.contains(t)).collect();
    let batches: Vec<(bool, usize)> = order
        .chunk_by(|a, b| a == b)
        .map(|batch| (batch[0], batch.len()))
        .collect();
    assert_eq!(
        batches,
        [(false, 32), (true, 16), (false, 32), (true, 24)],
        "two read batches of 16, one of writes, and again"
    );
}

#[test]
fn an_expired_request_waits_for_the_end_of_the_batch_only() {
    let mut bench = Bench::new();
    let old = bench.add(Op::Read, 0, 0, 0);
    let far = bench.add(Op::Read, 1000, 0, 0);
    // The position is beyond the old one from here on.
    bench.deadline.classes[Class::Be as usize].queues[Dir::Read as usize].last = Sector(1000);
    assert_eq!(bench.dispatch(0), Some(far), "begins a batch");
    let late = 500 * MS;
    for i in 1..40 {
        bench.add(Op::Read, 1000 + i * 100, 0, late);
    }
    let order = bench.all(late);
    assert_eq!(order[15], old, "16 of the batch, then the expired one");
    let mut early = Bench::new();
    early.add(Op::Read, 0, 0, 1);
    early.deadline.classes[Class::Be as usize].queues[Dir::Read as usize].last = Sector(1000);
    for i in 0..40 {
        early.add(Op::Read, 1000 + i * 100, 0, late);
    }
    assert_eq!(early.all(late)[40], 0, "a nanosecond before, it is last");
}

#[test]
fn lower_classes_wait_until_the_higher_are_done_in_the_engine_too() {
    let mut bench = Bench::new();
    let idle = bench.add(Op::Read, 0, IDLE, 0);
    let be = bench.add(Op::Read, 100, BE, 0);
    let rt = bench.add(Op::Write, 200, RT, 0);
    assert_eq!(bench.all(0), [rt]);
    bench.complete(rt);
    assert_eq!(bench.all(0), [be]);
    assert!(bench.all(0).is_empty());
    bench.complete(be);
    assert_eq!(bench.all(0), [idle]);
}

#[test]
fn classes_nobody_knows_are_best_effort() {
    for bits in [0, 2, 4, 5, 6, 7] {
        assert_eq!(Class::of(IoPrio((bits << 13) | 7)), Class::Be);
    }
    assert_eq!(Class::of(IoPrio(RT | 3)), Class::Rt);
    assert_eq!(Class::of(IoPrio(IDLE)), Class::Idle);
}

#[test]
fn who_waited_for_ten_seconds_goes_although_higher_classes_are_not_done() {
    let mut bench = Bench::new();
    let idle = bench.add(Op::Read, 0, IDLE, 0);
    let be = bench.add(Op::Read, 100, BE, 5);
    let rt = bench.add(Op::Read, 200, RT, 6);
    assert_eq!(bench.all(6), [rt]);
    let aged = 10_000 * MS;
    assert_eq!(bench.deadline.next_deadline_ns(6), Some(500 * MS));
    assert_eq!(bench.deadline.next_deadline_ns(600 * MS), Some(aged));
    assert!(bench.all(aged - 1).is_empty());
    assert_eq!(bench.all(aged), [idle]);
    assert_eq!(bench.deadline.next_deadline_ns(aged), Some(aged + 5));
    assert_eq!(bench.all(aged + 5), [be]);
    assert_eq!(bench.deadline.next_deadline_ns(aged + 5), None);
}

#[test]
fn a_class_alone_has_no_time_to_wait_for() {
    let mut bench = Bench::new();
    bench.add(Op::Read, 0, IDLE, 0);
    assert_eq!(bench.deadline.next_deadline_ns(0), None);
    assert!(bench.deadline.has_work(0));
}

#[test]
fn what_came_back_and_what_was_put_first_goes_first() {
    let mut bench = Bench::new();
    for sector in [0, 100, 200] {
        bench.add(Op::Write, sector, 0, 0);
    }
    assert_eq!(bench.dispatch(0), Some(0));
    assert_eq!(bench.dispatch(0), Some(1));
    let back = bench.queued(1, 0);
    bench.deadline.requeued(back);
    assert_eq!(bench.deadline.unfinished(Class::Be), 3);
    assert_eq!(bench.all(0), [1, 2]);
    bench.requests.push(request(Op::Read, 900, 0));
    let first = bench.queued(3, 0);
    bench.add(Op::Read, 0, 0, 0);
    bench.deadline.insert(first, true);
    assert_eq!(bench.all(0), [3, 4]);
    (0..5).for_each(|tag| bench.complete(tag));
    assert_eq!(bench.deadline.unfinished(Class::Be), 0);
}

#[test]
fn discards_and_write_zeroes_are_writes() {
    let mut bench = Bench::new();
    bench.add(Op::Discard, 0, 0, 0);
    bench.add(Op::WriteZeroes, 100, 0, 0);
    bench.add(Op::Read, 500, 0, 0);
    assert_eq!(bench.all(0), [2, 0, 1]);
}

#[test]
fn neighbours_are_found_on_both_sides_of_their_hctx() {
    let mut bench = Bench::new();
    bench.add(Op::Read, 100, 0, 0);
    bench.add(Op::Read, 900, 0, 0);
    let find = |bench: &Bench, hctx, request: &Request| {
        let merge = bench.deadline.find_merge(HctxId(hctx), request)?;
        Some((merge.leader.tag.0, merge.side))
    };
    let behind = request(Op::Read, 108, 0);
    let before = request(Op::Read, 92, 0);
    assert_eq!(find(&bench, 0, &behind), Some((0, MergeSide::Back)));
    assert_eq!(find(&bench, 0, &before), Some((0, MergeSide::Front)));
    assert_eq!(find(&bench, 1, &behind), None, "another hctx");
    let others = [
        request(Op::Write, 108, 0),
        request(Op::Read, 108, BE),
        request(Op::Read, 109, 0),
        Request {
            fua: true,
            ..behind
        },
        Request { bytes: 0, ..behind },
        Request {
            bytes: 1024 * 1024,
            ..behind
        },
    ];
    for other in others {
        assert_eq!(find(&bench, 0, &other), None, "{other:?}");
    }
    bench.deadline.set_params(DeadlineParams {
        front_merges: false,
        ..DeadlineParams::default()
    });
    assert_eq!(find(&bench, 0, &before), None);
    assert_eq!(find(&bench, 0, &behind), Some((0, MergeSide::Back)));
    bench.all(0);
    assert_eq!(find(&bench, 0, &behind), None, "dispatched");
}

#[test]
fn a_filled_gap_joins_its_sides_with_the_earlier_deadline() {
    let mut bench = Bench::new();
    let first = bench.add(Op::Read, 500, 0, 5);
    let back = bench.add(Op::Read, 116, 0, 10);
    let front = bench.add(Op::Read, 100, 0, 20);
    let gap = request(Op::Read, 108, 0);
    let merge = bench.deadline.find_merge(HctxId(0), &gap).expect("fits");
    assert_eq!((merge.leader.tag.0, merge.side), (front, MergeSide::Back));
    let mut now = request(Op::Read, 100, 0);
    now.bytes += gap.bytes;
    let join = bench.deadline.merged(merge, &now).expect("they touch");
    assert_eq!((join.front.tag.0, join.back.tag.0), (front, back));
    now.bytes += gap.bytes;
    bench.deadline.joined(join, &now);
    assert_eq!(bench.deadline.unfinished(Class::Be), 2);
    let slot = join.front_slot;
    assert_eq!(bench.deadline.store.get(slot).queued.queued_ns, 10);
    assert_eq!(bench.deadline.store.get(slot).deadline_ns, 500 * MS + 10);
    let fifo = &bench.deadline.queues(Class::Be, Dir::Read).fifo;
    let oldest = fifo.front().expect("two wait");
    let oldest = bench.deadline.store.get(oldest).queued.id.tag.0;
    assert_eq!(
        oldest, first,
        "its place is that of the earlier, not the first"
    );
    assert_eq!(bench.all(0), [front, first]);
    assert_eq!(bench.deadline.len(), 0);
}

#[test]
fn reserving_keeps_what_is_queued() {
    let mut deadline = Deadline::new(DeadlineParams::default(), 2);
    for tag in 0..100u16 {
        deadline.reserve(usize::from(tag) + 1);
        let request = request(Op::Read, u64::from(tag) * 100, 0);
        let queued = Queued {
            id: id(0, tag),
            request,
            queued_ns: 0,
        };
        deadline.insert(queued, false);
    }
    let next = request(Op::Read, 508, 0);
    let merge = deadline.find_merge(HctxId(0), &next).expect("tag 5");
    assert_eq!(merge.leader, id(0, 5));
    let mut order = Vec::new();
    deadline.drain(0, |id| order.push(id.tag.0));
    assert_eq!(order, (0..100).collect::<Vec<_>>());
    assert_eq!(deadline.unfinished(Class::Be), 0);
}

/// What the model says, in plain lists searched from end to end.
#[derive(Default)]
struct Oracle {
    params: DeadlineParams,
    /// In the order of arrival; those put first are in `heads`.
    queued: Vec<Waiting>,
    heads: [Vec<Waiting>; 3],
    unfinished: [usize; 3],
    position: [[u64; 2]; 3],
    writing: bool,
    batching: u32,
    starved: u32,
    order: u64,
}

#[derive(Clone, Copy, Debug)]
struct Waiting {
    id: RequestId,
    request: Request,
    queued_ns: u64,
    deadline_ns: u64,
    /// Place among those that begin at the same sector.
    order: u64,
}

impl Waiting {
    fn class(&self) -> usize {
        match self.request.ioprio.0 >> 13 {
            1 => 0,
            3 => 2,
            _ => 1,
        }
    }

    fn write(&self) -> bool {
        self.request.op != Op::Read
    }
}

impl Oracle {
    fn waiting(&mut self, queued: Queued) -> Waiting {
        self.order += 1;
        let expire_ms = match queued.request.op {
            Op::Read => self.params.read_expire_ms,
            _ => self.params.write_expire_ms,
        };
        Waiting {
            id: queued.id,
            request: queued.request,
            queued_ns: queued.queued_ns,
            deadline_ns: queued.queued_ns + u64::from(expire_ms) * MS,
            order: self.order,
        }
    }

    fn insert(&mut self, queued: Queued, at_head: bool) {
        let waiting = self.waiting(queued);
        self.unfinished[waiting.class()] += 1;
        if at_head {
            self.heads[waiting.class()].insert(0, waiting);
        } else {
            self.queued.push(waiting);
        }
    }

    fn requeued(&mut self, queued: Queued) {
        let waiting = self.waiting(queued);
        self.heads[waiting.class()].insert(0, waiting);
    }

    fn find(&self, id: RequestId) -> usize {
        self.queued.iter().position(|w| w.id == id).expect("queued")
    }

    /// The lowest at or after the position.
    fn ahead(&self, class: usize, write: bool) -> Option<Waiting> {
        let from = self.position[class][usize::from(write)];
        let lists = self.queued.iter().copied();
        lists
            .filter(|w| w.class() == class && w.write() == write && w.request.sector.0 >= from)
            .min_by_key(|w| (w.request.sector.0, w.order))
    }

    fn oldest(&self, class: usize, write: bool) -> Option<Waiting> {
        let mut lists = self.queued.iter().copied();
        lists.find(|w| w.class() == class && w.write() == write)
    }

    fn pick(&mut self, class: usize, now_ns: u64, age_ns: u64) -> Option<Waiting> {
        let old_enough = |w: &Waiting| w.queued_ns + age_ns <= now_ns;
        if let Some(first) = self.heads[class].first().copied() {
            if !old_enough(&first) {
                return None;
            }
            return Some(self.heads[class].remove(0));
        }
        let (mut writing, mut batching, mut starved) = (self.writing, self.batching, self.starved);
        let picked = match self.ahead(class, writing) {
            Some(next) if batching < self.params.fifo_batch => next,
            _ => {
                let reads = self.oldest(class, false);
                let writes = self.oldest(class, true);
                writing = match (reads, writes) {
                    (None, None) => return None,
                    (None, Some(_)) => true,
                    (Some(_), None) => false,
                    (Some(_), Some(_)) => {
                        let enough = starved >= self.params.writes_starved;
                        starved += 1;
                        enough
                    }
                };
                if writing {
                    starved = 0;
                }
                batching = 0;
                let oldest = self.oldest(class, writing)?;
                match self.ahead(class, writing) {
                    Some(next) if oldest.deadline_ns > now_ns => next,
                    _ => oldest,
                }
            }
        };
        if !old_enough(&picked) {
            return None;
        }
        (self.writing, self.batching, self.starved) = (writing, batching + 1, starved);
        self.position[class][usize::from(writing)] = picked.request.sector.0;
        self.queued.retain(|w| w.id != picked.id);
        Some(picked)
    }

    fn dispatch(&mut self, now_ns: u64) -> Option<Waiting> {
        if self.unfinished.iter().filter(|n| **n > 0).count() >= 2 {
            let age_ns = u64::from(self.params.prio_aging_expire_ms) * MS;
            for class in [1, 2] {
                if let Some(aged) = self.pick(class, now_ns, age_ns) {
                    return Some(aged);
                }
            }
        }
        for class in 0..3 {
            let picked = self.pick(class, now_ns, 0);
            if picked.is_some() || self.unfinished[class] > 0 {
                return picked;
            }
        }
        None
    }

    /// Whether the two may be one request, `front` first.
    fn one(front: &Request, back: &Request) -> bool {
        front.op == back.op
            && matches!(front.op, Op::Read | Op::Write)
            && front.ioprio == back.ioprio
            && front.sector.0 + front.bytes / 512 == back.sector.0
    }

    fn mergeable(&self, hctx: HctxId, new: &Request) -> bool {
        self.queued.iter().any(|w| {
            w.id.hctx == hctx
                && (Self::one(&w.request, new)
                    || (self.params.front_merges && Self::one(new, &w.request)))
        })
    }
}

#[derive(Clone, Debug)]
enum Step {
    Insert {
        hctx: u16,
        op: Op,
        sector: u64,
        ioprio: u16,
        at_head: bool,
        merge: bool,
    },
    Dispatch(usize),
    Complete(prop::sample::Index),
    Requeue(prop::sample::Index),
    Advance(u64),
    TakeHctx(u16),
    Params(DeadlineParams),
}

fn params() -> impl Strategy<Value = DeadlineParams> {
    (
        0u32..40,
        0u32..80,
        0u32..4,
        0u32..6,
        any::<bool>(),
        0u32..90,
    )
        .prop_map(
            |(read, write, starved, batch, front_merges, aging)| DeadlineParams {
                read_expire_ms: read,
                write_expire_ms: write,
                writes_starved: starved,
                fifo_batch: batch,
                front_merges,
                prio_aging_expire_ms: aging,
                async_depth: None,
            },
        )
}

fn step() -> impl Strategy<Value = Step> {
    let op = prop_oneof![
        4 => Just(Op::Read),
        4 => Just(Op::Write),
        1 => Just(Op::Discard),
        1 => Just(Op::WriteZeroes)
    ];
    let ioprio = prop_oneof![Just(RT), Just(BE), Just(0), Just(IDLE)];
    let head = prop::bool::weighted(0.1);
    prop_oneof![
        8 => (0u16..2, op, 0u64..24, ioprio, head, any::<bool>()).prop_map(
            |(hctx, op, place, ioprio, at_head, merge)| Step::Insert {
                hctx, op, sector: place * 8, ioprio, at_head, merge
            }),
        5 => (1usize..5).prop_map(Step::Dispatch),
        5 => any::<prop::sample::Index>().prop_map(Step::Complete),
        1 => any::<prop::sample::Index>().prop_map(Step::Requeue),
        4 => (0u64..25).prop_map(Step::Advance),
        1 => (0u16..2).prop_map(Step::TakeHctx),
        1 => params().prop_map(Step::Params),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Every decision is the oracle's; `has_work` and `next_deadline_ns` tell the truth about it.
    #[test]
    fn it_decides_as_the_model_does(first in params(), steps in prop::collection::vec(step(), 1..150)) {
        let mut deadline = Deadline::new(first, 256);
        let mut oracle = Oracle { params: first, batching: u32::MAX, ..Oracle::default() };
        let mut below: Vec<Waiting> = Vec::new();
        let mut now_ns = 0;
        for (tag, step) in steps.into_iter().enumerate() {
            match step {
                Step::Insert { hctx, op, sector, ioprio, at_head, merge } => {
                    let id = id(hctx, tag as u16);
                    let request = request(op, sector, ioprio);
                    let found = deadline.find_merge(id.hctx, &request);
                    if deadline.len() <= MERGE_LOOKBACK {
                        prop_assert_eq!(found.is_some(), oracle.mergeable(id.hctx, &request));
                    }
                    match found {
                        Some(found) if merge => merge_both(&mut deadline, &mut oracle, found, &request)?,
                        _ => {
                            let queued = Queued { id, request, queued_ns: now_ns };
                            deadline.insert(queued, at_head);
                            oracle.insert(queued, at_head);
                        }
                    }
                }
                Step::Dispatch(count) => for _ in 0..count {
                    let expected = oracle.dispatch(now_ns);
                    prop_assert_eq!(deadline.has_work(now_ns), expected.is_some());
                    if expected.is_none() {
                        let until = deadline.next_deadline_ns(now_ns);
                        let quiet = until.unwrap_or(now_ns + 1000 * MS);
                        prop_assert!(quiet > now_ns);
                        for at in (now_ns..quiet).step_by(usize::try_from(MS / 2).unwrap()) {
                            prop_assert!(!deadline.has_work(at), "at {} of {:?}", at, until);
                        }
                    }
                    let id = deadline.dispatch(now_ns);
                    prop_assert_eq!(id, expected.map(|w| w.id));
                    below.extend(expected);
                },
                Step::Complete(at) if !below.is_empty() => {
                    let done = below.swap_remove(at.index(below.len()));
                    deadline.completed(&done.request);
                    oracle.unfinished[done.class()] -= 1;
                }
                Step::Requeue(at) if !below.is_empty() => {
                    let back = below.swap_remove(at.index(below.len()));
                    let queued = Queued { id: back.id, request: back.request, queued_ns: back.queued_ns };
                    deadline.requeued(queued);
                    oracle.requeued(queued);
                }
                Step::Complete(_) | Step::Requeue(_) => {}
                Step::Advance(ms) => now_ns += ms * MS,
                Step::TakeHctx(hctx) => {
                    let mut taken = Vec::new();
                    deadline.take_hctx(HctxId(hctx), |id| taken.push(id));
                    let of = |w: &Waiting| w.id.hctx == HctxId(hctx);
                    let mut gone: Vec<Waiting> = oracle.queued.iter().copied().filter(of).collect();
                    oracle.queued.retain(|w| !of(w));
                    for head in &mut oracle.heads {
                        gone.extend(head.iter().copied().filter(of));
                        head.retain(|w| !of(w));
                    }
                    gone.iter().for_each(|w| oracle.unfinished[w.class()] -= 1);
                    let key = |id: &RequestId| id.tag.0;
                    taken.sort_by_key(key);
                    let mut gone: Vec<RequestId> = gone.iter().map(|w| w.id).collect();
                    gone.sort_by_key(key);
                    prop_assert_eq!(taken, gone);
                }
                Step::Params(params) => {
                    deadline.set_params(params);
                    oracle.params = params;
                }
            }
            let classes = Class::ALL.map(|class| deadline.unfinished(class));
            prop_assert_eq!(classes, oracle.unfinished);
            let waiting = oracle.queued.len() + oracle.heads.iter().map(Vec::len).sum::<usize>();
            prop_assert_eq!(deadline.len(), waiting);
        }
    }
}

/// Applies a merge the scheduler offers to it and to the oracle, and what it leads to.
fn merge_both(
    deadline: &mut Deadline,
    oracle: &mut Oracle,
    merge: Merge,
    new: &Request,
) -> Result<(), TestCaseError> {
    let at = oracle.find(merge.leader);
    let leader = &mut oracle.queued[at];
    match merge.side {
        MergeSide::Back => prop_assert!(Oracle::one(&leader.request, new)),
        MergeSide::Front => {
            prop_assert!(oracle.params.front_merges && Oracle::one(new, &leader.request));
            leader.request.sector = new.sector;
            oracle.order += 1;
            leader.order = oracle.order;
        }
    }
    leader.request.bytes += new.bytes;
    leader.request.segments += new.segments;
    let now = leader.request;
    let touching = oracle.queued.iter().any(|w| {
        w.id.hctx == merge.leader.hctx
            && match merge.side {
                MergeSide::Back => Oracle::one(&now, &w.request),
                MergeSide::Front => Oracle::one(&w.request, &now),
            }
    });
    let Some(join) = deadline.merged(merge, &now) else {
        prop_assert!(
            !touching || deadline.len() > MERGE_LOOKBACK,
            "a join was missed"
        );
        return Ok(());
    };
    let (front, back) = (oracle.find(join.front), oracle.find(join.back));
    let gone = oracle.queued[back];
    prop_assert!(Oracle::one(&oracle.queued[front].request, &gone.request));
    let mut stays = oracle.queued[front];
    stays.request.bytes += gone.request.bytes;
    stays.request.segments += gone.request.segments;
    if gone.deadline_ns < stays.deadline_ns {
        (stays.deadline_ns, stays.queued_ns) = (gone.deadline_ns, gone.queued_ns);
        oracle.queued[back] = stays;
        oracle.queued.remove(front);
    } else {
        oracle.queued[front] = stays;
        oracle.queued.remove(back);
    }
    oracle.unfinished[gone.class()] -= 1;
    deadline.joined(join, &stays.request);
    Ok(())
}
