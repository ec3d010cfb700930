//! Many daemons, each killed at a random moment under load.

use super::world::{Base, Killer, World};
use crate::support::disk::{kind, status};
use crate::support::*;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// The unit of the load, in bytes and in sectors.
const BLOCK: usize = 4096;
const BLOCK_SECTORS: u64 = BLOCK as u64 / SECTOR;
/// Most blocks of one request.
const MOST: usize = 8;
/// Blocks of the disk that each queue has to itself.
const BLOCKS: usize = 512;
/// Requests of each queue in flight.
const DEPTH: usize = 32;
const QUEUES: usize = 4;

/// What the request in a place is about.
#[derive(Clone, Copy, Debug)]
enum Task {
    Read,
    /// With this number in every block.
    Write(u64),
    Zeroes,
    Flush,
    /// One that fails.
    Beyond,
}

#[derive(Clone, Copy, Debug)]
struct Place {
    task: Task,
    first: usize,
    count: usize,
}

/// One queue's load.
struct Load {
    queue: usize,
    /// Where its buffers are: `DEPTH` of `MOST` blocks.
    buffers: u64,
    places: [Option<Place>; DEPTH],
    /// The number in each block; 0: zeroes.
    blocks: Vec<u64>,
    /// A request is at work on the block.
    busy: Vec<bool>,
    pushed: u64,
    completed: u64,
}

impl Load {
    fn new(world: &World, queue: usize) -> Load {
        Load {
            queue,
            buffers: world.mem.alloc(DEPTH * MOST * BLOCK, 4096),
            places: [None; DEPTH],
            blocks: vec![0; BLOCKS],
            busy: vec![false; BLOCKS],
            pushed: 0,
            completed: 0,
        }
    }

    fn buffer(&self, place: usize) -> u64 {
        self.buffers + (place * MOST * BLOCK) as u64
    }

    fn first_sector(&self, block: usize) -> u64 {
        (self.queue * BLOCKS + block) as u64 * BLOCK_SECTORS
    }

    /// The content of a block of this queue's with this number.
    fn content(&self, block: usize, number: u64) -> Vec<u8> {
        if number == 0 {
            return vec![0; BLOCK];
        }
        let name = ((self.queue * BLOCKS + block) as u64) << 40 | number;
        Rng::new(name).bytes(BLOCK)
    }

    /// Fills the free places and shows the device what is new.
    fn push(&mut self, world: &mut World, rng: &mut Rng) {
        for at in 0..DEPTH {
            if self.places[at].is_none() && !self.push_one(world, at, rng) {
                break;
            }
        }
        world.queues[self.queue].publish();
    }

    fn push_one(&mut self, world: &mut World, at: usize, rng: &mut Rng) -> bool {
        let count = rng.between(1, MOST as u64) as usize;
        let first = rng.below((BLOCKS - count) as u64) as usize;
        let blocks = first..first + count;
        let task = match rng.below(32) {
            0 => Task::Flush,
            1 => Task::Beyond,
            _ if self.busy[blocks.clone()].contains(&true) => return true,
            2 => Task::Zeroes,
            3..=16 => Task::Read,
            _ => Task::Write(self.pushed + 1),
        };
        let buffer = self.buffer(at);
        let mut sector = self.first_sector(first);
        let mut data = Vec::new();
        let pieces = |writable| -> Vec<Seg> {
            // Uneven pieces now and then, so that chains differ in length.
            let cut = if count > 1 { BLOCK } else { 512 };
            [(buffer, cut), (buffer + cut as u64, count * BLOCK - cut)]
                .map(|(gpa, len)| match writable {
                    true => Seg::writable(gpa, len),
                    false => Seg::readable(gpa, len),
                })
                .to_vec()
        };
        let kind = match task {
            Task::Flush => kind::FLUSH,
            Task::Beyond => {
                sector = 1 << 40;
                data = pieces(true);
                kind::IN
            }
            Task::Read => {
                world.mem.fill(buffer, count * BLOCK, 0xa5);
                data = pieces(true);
                kind::IN
            }
            Task::Write(number) => {
                for (i, block) in blocks.clone().enumerate() {
                    let at = buffer + (i * BLOCK) as u64;
                    world.mem.write(at, &self.content(block, number));
                }
                data = pieces(false);
                kind::OUT
            }
            Task::Zeroes => {
                let range = disk::Range::new(sector, (count as u64 * BLOCK_SECTORS) as u32);
                world.mem.write(buffer, &range.to_bytes());
                data.push(Seg::readable(buffer, 16));
                sector = 0;
                kind::WRITE_ZEROES
            }
        };
        let queue = &mut world.queues[self.queue];
        if queue.push(at as u64, kind, 0, sector, &data).is_none() {
            return false;
        }
        if !matches!(task, Task::Flush | Task::Beyond) {
            self.busy[blocks].fill(true);
        }
        self.places[at] = Some(Place { task, first, count });
        self.pushed += 1;
        true
    }

    /// Takes what is completed. That each head is one in flight, the queue sees to; the token says which
    /// request it was.
    fn reap(&mut self, world: &mut World) {
        while let Some(done) = world.queues[self.queue].reap() {
            let at = done.token as usize;
            let place = self.places[at].take().expect("a request is completed once");
            self.completed += 1;
            let Place { task, first, count } = place;
            let blocks = first..first + count;
            let good = if matches!(task, Task::Beyond) {
                status::IOERR
            } else {
                status::OK
            };
            assert_eq!(done.status, good, "queue {}: {place:?}", self.queue);
            match task {
                Task::Flush | Task::Beyond => continue,
                Task::Read => {
                    assert_eq!(done.len as usize, count * BLOCK + 1);
                    let found = world.mem.read_vec(self.buffer(at), count * BLOCK);
                    for (block, found) in blocks.clone().zip(found.chunks(BLOCK)) {
                        let number = self.blocks[block];
                        assert!(
                            found == self.content(block, number),
                            "queue {}: block {block} is not what write {number} put there",
                            self.queue
                        );
                    }
                }
                Task::Write(number) => self.blocks[blocks.clone()].fill(number),
                Task::Zeroes => self.blocks[blocks.clone()].fill(0),
            }
            self.busy[blocks].fill(false);
        }
    }

    /// Whether a request is in flight.
    fn is_busy(&self) -> bool {
        self.places.iter().any(Option::is_some)
    }
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |value| value.parse().expect("a number"))
}

fn seed() -> u64 {
    let now = std::time::SystemTime::UNIX_EPOCH
        .elapsed()
        .expect("a clock");
    let seed = number("BLKMQ_SEED", now.as_nanos() as u64);
    // Shown when the test fails.
    println!("BLKMQ_SEED={seed}");
    seed
}

/// Kills `rounds` daemons with these arguments, each some time after it began to listen.
fn campaign(rounds: u64, args: &[&str], setup: QueueSetup) {
    let mut rng = Rng::new(seed());
    let mut world = World::new((QUEUES * BLOCKS * BLOCK) as u64, QUEUES, setup);
    let mut loads: Vec<Load> = (0..QUEUES).map(|queue| Load::new(&world, queue)).collect();
    let (mut at_work, mut early, mut resumed) = (0, 0, 0);
    let mut slowest = Duration::ZERO;
    for _ in 0..rounds {
        let began = Instant::now();
        let mut daemon = world.daemon(args);
        slowest = slowest.max(began.elapsed());
        // One in four is killed while the front end still negotiates or the rings begin.
        let most_us = if rng.one_in(4) { 2_000 } else { 25_000 };
        let killer = Killer::of(&daemon, Duration::from_micros(rng.below(most_us)));
        let base = if rng.one_in(2) {
            Base::Used
        } else {
            Base::Avail
        };
        let front = world.connect(daemon.socket()).and_then(|mut front| {
            world.start(&mut front, base)?;
            Ok(front)
        });
        match &front {
            Ok(_) => at_work += 1,
            // Only because it was killed.
            Err(_) => early += 1,
        }
        while !killer.killed.load(Ordering::Acquire) {
            for load in &mut loads {
                load.reap(&mut world);
                load.push(&mut world, &mut rng);
            }
            std::thread::yield_now();
        }
        killer.join();
        daemon.wait_exit();
        // The guest goes on for a while without anybody who serves it.
        for load in &mut loads {
            if rng.one_in(2) {
                load.reap(&mut world);
                load.push(&mut world, &mut rng);
            }
        }
        resumed += (0..QUEUES)
            .map(|queue| world.in_flight(queue))
            .sum::<usize>();
    }

    // The last one lives, and all that is in flight comes to its end.
    let daemon = world.daemon(args);
    let front = world.attach(&daemon, Base::Used);
    let deadline = Instant::now() + DEADLINE;
    while loads.iter().any(Load::is_busy) {
        assert!(Instant::now() < deadline, "requests were lost");
        for load in &mut loads {
            load.reap(&mut world);
        }
        std::thread::yield_now();
    }
    for (index, load) in loads.iter().enumerate() {
        assert_eq!(load.completed, load.pushed);
        assert_eq!(world.in_flight(index), 0);
    }
    drop(front);
    daemon.stop();
    // And the image is what was written, whoever looks.
    let image = std::fs::read(&world.image).expect("the image can be read");
    for load in &loads {
        for block in 0..BLOCKS {
            let at = (load.queue * BLOCKS + block) * BLOCK;
            let number = load.blocks[block];
            assert!(
                image[at..at + BLOCK] == load.content(block, number),
                "block {block} of queue {} is not what write {number} put there",
                load.queue
            );
        }
    }
    let completed: u64 = loads.iter().map(|load| load.completed).sum();
    println!(
        "{rounds} daemons killed, {at_work} at work and {early} before; {completed} requests, \
         {resumed} taken up again; the slowest start took {slowest:?}"
    );
    assert!(
        resumed > 0,
        "nothing was in flight when daemons were killed"
    );
}

/// Indirect chains.
#[test]
fn requests_survive_daemons_that_are_killed() {
    campaign(number("BLKMQ_ROUNDS", 60), &[], QueueSetup::default());
}

/// Chains in the ring itself, staged by an elevator and a limit, on one worker, with a call eventfd's
/// decisions by flags.
#[test]
fn requests_that_wait_in_a_scheduler_survive_too() {
    let args = [
        "--scheduler",
        "mq-deadline",
        "--limit",
        "iops=20000",
        "--workers",
        "1",
    ];
    let setup = QueueSetup {
        indirect: false,
        event_idx: false,
        size: 256,
        ..QueueSetup::default()
    };
    campaign(number("BLKMQ_ROUNDS", 30), &args, setup);
}
