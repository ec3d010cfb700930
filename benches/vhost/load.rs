//! The front end's work: requests on some queues for some time, and what they took.

use crate::histogram::Histogram;
use crate::support::disk::{kind, status};
use crate::support::{Event, Front, Queue, Rng, SECTOR, Seg, Setup};
use crate::workload::Workload;
use std::path::Path;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

/// A back end that answers nothing for so long has failed.
const HANG: Duration = Duration::from_secs(20);
/// The longest sleep of the front end, so that it sees the end of the run.
const NAP: Duration = Duration::from_millis(100);
/// Turns without a completion after which a spinning front end looks at the clock.
const TURNS: u32 = 4096;

const WARM_UP: u8 = 0;
const MEASURE: u8 = 1;
const STOP: u8 = 2;

/// What a run took, as the front end saw it.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Requests answered.
    pub requests: u64,
    /// Requests answered in a second.
    pub iops: f64,
    /// Kicks sent.
    pub kicks: u64,
    /// Calls received.
    pub calls: u64,
    /// Time from a request's publication to its completion.
    pub latency: Histogram,
}

/// A connection with its queues, ready to be driven.
pub struct Rig {
    front: Front,
    lanes: Vec<Lane>,
    workload: Workload,
}

/// One queue and its requests.
struct Lane {
    queue: Queue,
    /// By token.
    slots: Vec<Slot>,
    free: Vec<u32>,
    rng: Rng,
    /// First block, and number of blocks that this queue uses.
    first: u64,
    blocks: u64,
    cursor: u64,
    sectors: u64,
    workload: Workload,
}

struct Slot {
    read: Box<[Seg]>,
    write: Box<[Seg]>,
    sent_ns: u64,
}

fn said(error: vhost::Error) -> String {
    format!("the back end refused: {error}")
}

/// A session with memory for the workload, and the number of blocks on the disk.
fn open(socket: &Path, workload: &Workload) -> Result<(Front, u64), String> {
    let setup = Setup {
        memory: vec![(0, workload.memory())],
        ..Setup::default()
    };
    let mut front = Front::connect(socket, &setup).map_err(said)?;
    let queues = workload.queues as u64;
    if front.max_queues < queues {
        let most = front.max_queues;
        return Err(format!("the back end has {most} queues, not {queues}"));
    }
    let blocks = front.config().map_err(said)?.capacity * SECTOR / workload.block as u64;
    if blocks < queues {
        return Err("the disk has not one block for each queue: use a larger one".to_owned());
    }
    Ok((front, blocks))
}

/// A session with started queues, and how many blocks each of them may have to itself.
///
/// # Errors
///
/// The back end does not offer what the workload needs, or ends the session.
pub fn connect_verified(
    socket: &Path,
    workload: &Workload,
) -> Result<(Front, Vec<Queue>, u64), String> {
    let (mut front, blocks) = open(socket, workload)?;
    let queues: Result<Vec<Queue>, _> = (0..workload.queues)
        .map(|index| front.queue(index, workload.queue_setup()))
        .collect();
    // So many that all of them are written more than once in a few seconds.
    let blocks = (blocks / workload.queues as u64).min(16384);
    Ok((front, queues.map_err(said)?, blocks))
}

impl Lane {
    /// Queues as many requests as the depth allows.
    #[inline]
    fn fill(&mut self, now_ns: u64) {
        while let Some(token) = self.free.pop() {
            let workload = &self.workload;
            let block = if workload.pattern.random {
                let wide = u128::from(self.rng.next()) * u128::from(self.blocks);
                u64::try_from(wide >> 64).expect("less than the number of blocks")
            } else {
                self.cursor = if self.cursor + 1 < self.blocks {
                    self.cursor + 1
                } else {
                    0
                };
                self.cursor
            };
            let read = match workload.pattern.read_percent {
                0 => false,
                100 => true,
                percent => self.rng.below(100) < percent,
            };
            let slot = &mut self.slots[token as usize];
            slot.sent_ns = now_ns;
            let (kind, data) = if read {
                (kind::IN, &slot.read)
            } else {
                (kind::OUT, &slot.write)
            };
            let sector = (self.first + block) * self.sectors;
            let pushed = self.queue.push(u64::from(token), kind, 0, sector, data);
            assert!(pushed.is_some(), "the ring has room for the whole depth");
        }
        self.queue.publish();
    }
}

impl Rig {
    /// Connects to the back end and starts the workload's queues.
    ///
    /// # Errors
    ///
    /// The back end does not offer what the workload needs, or ends the session.
    pub fn connect(socket: &Path, workload: &Workload) -> Result<Self, String> {
        let (mut front, disk_blocks) = open(socket, workload)?;
        let queues = workload.queues;
        let blocks = if workload.pattern.random {
            disk_blocks
        } else {
            disk_blocks / queues as u64
        };
        let mut lanes = Vec::new();
        for index in 0..queues {
            let queue = front
                .prepare_queue(index, workload.queue_setup())
                .map_err(said)?;
            lanes.push(Lane::new(queue, index, blocks, workload));
        }
        for group in 0..workload.threads {
            // The queues of one thread call it through one eventfd, like queues that share an interrupt.
            let call = Event::new().map_err(|error| error.to_string())?;
            for lane in lanes.iter_mut().skip(group).step_by(workload.threads) {
                let call = call.duplicate().map_err(|error| error.to_string())?;
                lane.queue.replace_call(Some(call));
            }
        }
        for lane in &lanes {
            front.start(&lane.queue).map_err(said)?;
            front.enable(lane.queue.index, true).map_err(said)?;
        }
        Ok(Self {
            front,
            lanes,
            workload: workload.clone(),
        })
    }

    /// Runs the workload; `edge` is called when the measured time begins (true) and ends (false).
    ///
    /// # Errors
    ///
    /// A request failed, or the back end stopped answering.
    pub fn run(&mut self, mut edge: impl FnMut(bool)) -> Result<Outcome, String> {
        let threads = self.workload.threads;
        let phase = AtomicU8::new(WARM_UP);
        let origin = Instant::now();
        let mut groups: Vec<Vec<&mut Lane>> = (0..threads).map(|_| Vec::new()).collect();
        for (index, lane) in self.lanes.iter_mut().enumerate() {
            groups[index % threads].push(lane);
        }
        let outcomes: Vec<Result<Outcome, String>> = std::thread::scope(|scope| {
            let spin = self.workload.spin;
            let running: Vec<_> = groups
                .into_iter()
                .map(|group| {
                    let phase = &phase;
                    scope.spawn(move || Driver::new(group, phase, origin, spin).run())
                })
                .collect();
            std::thread::sleep(self.workload.warm_up);
            edge(true);
            phase.store(MEASURE, Ordering::Relaxed);
            std::thread::sleep(self.workload.runtime);
            edge(false);
            phase.store(STOP, Ordering::Relaxed);
            running
                .into_iter()
                .map(|thread| {
                    thread
                        .join()
                        .unwrap_or_else(|_| Err("a thread of the front end panicked".to_owned()))
                })
                .collect()
        });
        let mut sum: Option<Outcome> = None;
        for outcome in outcomes {
            let outcome = outcome?;
            match &mut sum {
                None => sum = Some(outcome),
                Some(sum) => {
                    sum.requests += outcome.requests;
                    sum.iops += outcome.iops;
                    sum.kicks += outcome.kicks;
                    sum.calls += outcome.calls;
                    sum.latency.merge(&outcome.latency);
                }
            }
        }
        sum.filter(|sum| sum.requests > 0)
            .ok_or_else(|| "no request was answered in the measured time".to_owned())
    }

    /// Stops the queues and ends the session.
    pub fn disconnect(mut self) {
        for lane in &self.lanes {
            // A back end that fails here has nothing more to lose.
            let _ = self.front.stop(lane.queue.index);
        }
    }
}

impl Lane {
    fn new(queue: Queue, index: usize, blocks: u64, workload: &Workload) -> Self {
        let part = workload.block / workload.segments;
        let slots: Vec<Slot> = (0..workload.depth)
            .map(|_| {
                let buffer = queue.mem.alloc(workload.block, 4096);
                // Memory a guest uses is there; and data that is not all zeroes.
                queue.mem.fill(buffer, workload.block, 0xa5);
                let at = |n| buffer + (n * part) as u64;
                Slot {
                    read: (0..workload.segments)
                        .map(|n| Seg::writable(at(n), part))
                        .collect(),
                    write: (0..workload.segments)
                        .map(|n| Seg::readable(at(n), part))
                        .collect(),
                    sent_ns: 0,
                }
            })
            .collect();
        Self {
            queue,
            free: (0..slots.len())
                .map(|token| u32::try_from(token).expect("a depth of 16 bits"))
                .collect(),
            slots,
            rng: Rng::new(index as u64 + 1),
            first: if workload.pattern.random {
                0
            } else {
                index as u64 * blocks
            },
            blocks,
            cursor: 0,
            sectors: workload.block as u64 / SECTOR,
            workload: workload.clone(),
        }
    }
}

/// One thread and its queues.
struct Driver<'a> {
    lanes: Vec<&'a mut Lane>,
    phase: &'a AtomicU8,
    origin: Instant,
    spin: bool,
    seen: u8,
    since: Instant,
    requests: u64,
    kicks: u64,
    calls: u64,
    latency: Histogram,
}

impl<'a> Driver<'a> {
    fn new(lanes: Vec<&'a mut Lane>, phase: &'a AtomicU8, origin: Instant, spin: bool) -> Self {
        Self {
            lanes,
            phase,
            origin,
            spin,
            seen: WARM_UP,
            since: origin,
            requests: 0,
            kicks: 0,
            calls: 0,
            latency: Histogram::new(),
        }
    }

    fn now_ns(&self) -> u64 {
        u64::try_from(self.origin.elapsed().as_nanos()).expect("uptime below five centuries")
    }

    fn run(mut self) -> Result<Outcome, String> {
        let now = self.now_ns();
        for lane in &mut self.lanes {
            if self.spin {
                lane.queue.disarm();
            }
            lane.fill(now);
        }
        let mut turns = 0;
        let mut last_answer = Instant::now();
        loop {
            let phase = self.phase.load(Ordering::Relaxed);
            if phase != self.seen {
                self.seen = phase;
                if phase == MEASURE {
                    self.begin();
                } else {
                    return self.end();
                }
            }
            if self.turn(true)? > 0 {
                turns = 0;
                continue;
            }
            if turns == 0 {
                last_answer = Instant::now();
            }
            turns += 1;
            if self.spin {
                std::hint::spin_loop();
            } else {
                self.sleep()?;
            }
            if turns % TURNS == 0 || !self.spin {
                let silent = last_answer.elapsed();
                if silent > HANG {
                    return Err(format!("the back end answered nothing for {silent:.0?}"));
                }
            }
        }
    }

    fn totals(&self) -> (u64, u64) {
        let sum = |count: fn(&Queue) -> u64| self.lanes.iter().map(|l| count(&l.queue)).sum();
        (sum(|queue| queue.kicks), sum(|queue| queue.calls))
    }

    fn begin(&mut self) {
        self.latency.clear();
        self.requests = 0;
        (self.kicks, self.calls) = self.totals();
        self.since = Instant::now();
    }

    fn end(mut self) -> Result<Outcome, String> {
        let seconds = self.since.elapsed().as_secs_f64();
        let (kicks, calls) = self.totals();
        let outcome = Outcome {
            requests: self.requests,
            iops: self.requests as f64 / seconds,
            kicks: kicks - self.kicks,
            calls: calls - self.calls,
            latency: self.latency.clone(),
        };
        let deadline = Instant::now() + HANG;
        while self.lanes.iter().any(|lane| lane.queue.in_flight() > 0) {
            if self.turn(false)? == 0 && !self.spin {
                self.sleep()?;
            }
            if Instant::now() > deadline {
                return Err("the back end did not answer what was left at the end".to_owned());
            }
        }
        Ok(outcome)
    }

    /// Takes what was answered on every queue, and asks for more if `refill` says so.
    #[inline]
    fn turn(&mut self, refill: bool) -> Result<u64, String> {
        let mut answered = 0;
        for at in 0..self.lanes.len() {
            let Some(mut completion) = self.lanes[at].queue.reap() else {
                continue;
            };
            let now = self.now_ns();
            let lane = &mut *self.lanes[at];
            // Requests of one batch went out in one publication, mostly: counted together.
            let (mut sent, mut same) = (0, 0);
            loop {
                if completion.status != status::OK {
                    let status = completion.status;
                    return Err(format!("a request ended with status {status}"));
                }
                let token = u32::try_from(completion.token).expect("a token is a slot's index");
                let slot = &lane.slots[token as usize];
                if slot.sent_ns == sent {
                    same += 1;
                } else {
                    if same > 0 {
                        self.latency.add(now.saturating_sub(sent), same);
                    }
                    (sent, same) = (slot.sent_ns, 1);
                }
                answered += 1;
                lane.free.push(token);
                match lane.queue.reap() {
                    Some(next) => completion = next,
                    None => break,
                }
            }
            self.latency.add(now.saturating_sub(sent), same);
            if refill {
                lane.fill(now);
            }
        }
        self.requests += answered;
        Ok(answered)
    }

    /// Asks for calls, looks once more, and sleeps until one comes.
    fn sleep(&mut self) -> Result<(), String> {
        for lane in &mut self.lanes {
            lane.queue.arm(0);
            if lane.queue.has_completions() {
                return Ok(());
            }
        }
        self.lanes[0].queue.wait_call(NAP);
        Ok(())
    }
}
