//! No schedule of one disk keeps a request of another from being issued.
//!
//! A hostile disk with two hctxs sends reads, writes and flushes, which come back when it likes or never,
//! counts as active or not, has an elevator or none. At each moment the other disk sends a read and a flush,
//! which are its own part of the tags, and both are with the engine before the turn is over.

use super::elevator::{Kind, Params};
use super::limits::ACTIVITY_DECAY_NS;
use super::*;

const HOSTILE: DiskId = DiskId(0);
const OTHER: DiskId = DiskId(1);
const RING_SIZE: u16 = 32;

#[derive(Clone, Copy, Debug)]
enum Step {
    /// So many requests of an hctx in one drain, apart from each other.
    Drain(usize, u16, Op),
    /// The oldest or the newest with the engine comes back.
    Oldest,
    Newest,
    Fail,
    Run,
    /// Until the next deadline, or long enough to count as idle.
    Wait,
    /// The engine refuses the next one.
    Refuse,
}

const STEPS: [Step; 11] = [
    Step::Drain(0, 3, Op::Read),
    Step::Drain(1, 3, Op::Read),
    Step::Drain(0, 1, Op::Write),
    Step::Drain(0, 1, Op::Flush),
    Step::Drain(1, 1, Op::Flush),
    Step::Oldest,
    Step::Newest,
    Step::Fail,
    Step::Run,
    Step::Wait,
    Step::Refuse,
];

struct World {
    bench: Bench,
    hostile: [HctxId; 2],
    other: HctxId,
    /// Request tags of the hostile hctxs that are free.
    free: [Vec<u16>; 2],
    sectors: u64,
    now_ns: u64,
    refuse: bool,
}

impl World {
    fn new(elevator: Kind) -> World {
        let mut mq = Mq::new(tags(2, 1, 2));
        let mut hctx = |disk, queue| {
            mq.add_hctx(HctxConfig {
                disk,
                queue: QueueId(queue),
                ring_size: RING_SIZE,
                ctxs: 1,
            })
        };
        let hostile = [hctx(HOSTILE, 0), hctx(HOSTILE, 1)];
        let other = hctx(OTHER, 0);
        mq.set_elevator(HOSTILE, Params::from(elevator));
        World {
            bench: Bench {
                mq,
                below: Below::default(),
                done: Vec::new(),
            },
            hostile,
            other,
            free: [0, 1].map(|_| (0..RING_SIZE).rev().collect()),
            sectors: 0,
            now_ns: 0,
            refuse: false,
        }
    }

    fn complete(&mut self, nth: usize, result: Result<(), Status>) {
        self.bench.complete(nth, result);
        for (payload, ..) in self.bench.done.drain(..) {
            let (hctx, tag) = (payload / 100, u16::try_from(payload % 100).unwrap());
            if let Some(at) = self.hostile.iter().position(|id| u32::from(id.0) == hctx) {
                self.free[at].push(tag);
            }
        }
    }

    fn apply(&mut self, step: Step) {
        let last = self.bench.below.taken.len().checked_sub(1);
        match step {
            Step::Drain(at, count, op) => {
                let mut drained = Vec::new();
                for _ in 0..count {
                    let Some(tag) = self.free[at].pop() else {
                        break;
                    };
                    self.sectors += 100;
                    let asked = match op {
                        Op::Flush => request(Op::Flush, 0, 0),
                        op => request(op, self.sectors, 8),
                    };
                    drained.push((tag, asked));
                }
                let refused = std::mem::take(&mut self.refuse);
                self.bench.below.refuse = [refused.then_some(Busy::UntilCompletion)].into();
                self.bench.drain(self.hostile[at], &drained);
                self.bench.below.refuse.clear();
            }
            Step::Oldest if last.is_some() => self.complete(0, Ok(())),
            Step::Newest if last.is_some() => self.complete(last.unwrap(), Ok(())),
            Step::Fail if last.is_some() => self.complete(0, Err(Status::IoErr)),
            Step::Oldest | Step::Newest | Step::Fail => {}
            Step::Run => self.bench.run(),
            Step::Wait => {
                let next = self.bench.mq.next_deadline_ns();
                self.now_ns = next.unwrap_or(self.now_ns + ACTIVITY_DECAY_NS);
                self.bench.mq.start_turn(self.now_ns);
            }
            Step::Refuse => self.refuse = true,
        }
    }

    /// The other disk sends its part, and gets it.
    fn check(&mut self) {
        let before = self.bench.below.taken.len();
        let own = [(0, read(0)), (1, request(Op::Flush, 0, 0))];
        self.bench.drain(self.other, &own);
        self.bench.run();
        let of_other = u32::from(self.other.0) * 100;
        let taken = &self.bench.below.taken;
        for tag in [0, 1] {
            let issued = taken.iter().any(|t| t.2 == [of_other + tag]);
            assert!(issued, "{tag} waits behind {:?}", &taken[..before]);
        }
        // They come back, and what waits of the hostile disk takes nothing of that part.
        while let Some(nth) = self
            .bench
            .below
            .taken
            .iter()
            .position(|t| t.2[0] >= of_other)
        {
            self.complete(nth, Ok(()));
        }
    }
}

/// Every schedule of so many steps, and all their beginnings.
fn every_schedule(elevator: Kind, length: usize) -> u32 {
    let mut path: Vec<usize> = Vec::new();
    let mut count = 0;
    loop {
        let mut world = World::new(elevator);
        let steps: Vec<Step> = path.iter().map(|at| STEPS[*at]).collect();
        for step in &steps {
            world.apply(*step);
        }
        let checked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| world.check()));
        assert!(checked.is_ok(), "{elevator}: {steps:?}");
        count += 1;
        if path.len() < length {
            path.push(0);
            continue;
        }
        while path.last().is_some_and(|at| at + 1 == STEPS.len()) {
            path.pop();
        }
        match path.last_mut() {
            Some(at) => *at += 1,
            None => return count,
        }
    }
}

#[test]
fn no_short_schedule_of_one_disk_keeps_anothers_requests_from_being_issued() {
    for (elevator, length) in [(Kind::None, 4), (Kind::MqDeadline, 3), (Kind::Kyber, 3)] {
        let count = every_schedule(elevator, length);
        println!("{elevator}: {count} schedules");
    }
}

#[test]
#[ignore = "minutes: half a million schedules"]
fn no_schedule_of_five_steps_keeps_anothers_requests_from_being_issued() {
    for elevator in [Kind::None, Kind::MqDeadline, Kind::Kyber] {
        let count = every_schedule(elevator, 5);
        println!("{elevator}: {count} schedules");
    }
}

#[test]
fn no_long_schedule_of_one_disk_keeps_anothers_requests_from_being_issued() {
    for seed in 1..=30 {
        let mut random = Random(seed);
        let kinds = [Kind::None, Kind::MqDeadline, Kind::Kyber];
        let mut world = World::new(kinds[usize::try_from(random.below(3)).unwrap()]);
        // Some give back as much as they take, others hardly anything.
        let hoard = random.below(10);
        for _ in 0..300 {
            let step = STEPS[usize::try_from(random.below(STEPS.len() as u64)).unwrap()];
            let gives = matches!(step, Step::Oldest | Step::Newest | Step::Fail);
            if gives && random.below(10) < hoard {
                continue;
            }
            world.apply(step);
            world.check();
        }
    }
}
