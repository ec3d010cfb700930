//! Cut the power at any moment: whatever a crash leaves, a guest finds in it every write that it was
//! told is durable.
//!
//! The guest numbers what it writes: each sector carries its own number, a generation and a checksum.
//! It believes what virtio promises (virtio 1.3, section 5.2.6.1): what completed before it sent a flush
//! is durable when the flush succeeds; in write-through mode what completes is durable at once. The disk
//! beneath keeps what the kernel promises and nothing beyond ([`Media`]). In between is what runs in
//! production.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::super::media::{Content, Honesty};
use super::*;
use crate::engine::SyncFault;
use crate::mq::HctxConfig;
use crate::mq::elevator::Params;
use crate::mq::ids::{HctxId, QueueId, RequestTag, Sector};
use crate::mq::request::{IoPrio, Status};

mod every;

const DISK: DiskId = DiskId(0);
const RING_SIZE: u16 = 16;

/// One thing done wrong on purpose, to see it found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Broken {
    Nothing,
    /// The disk answers a sync and does nothing.
    SyncIgnored,
    /// The disk takes `RWF_DSYNC` and does nothing about it.
    DsyncIgnored,
    /// Writes are not marked durable in write-through mode.
    FuaDropped,
    /// A flush is answered when the one under way ends, which began before it came.
    FlushJoinsRunning,
    /// A flush is answered without asking the disk.
    FlushSkipped,
    /// Write-through begins without a sync.
    ToggleWithoutSync,
    /// Write-through begins while writes of before are under way.
    ToggleWithoutDrain,
    /// A sync that failed is forgotten.
    FaultForgotten,
}

/// What the guest wrote to a sector, or tried to.
#[derive(Clone, Copy, Debug)]
struct Version {
    /// 0 for zeroes.
    generation: u64,
    /// A discard may be done or not.
    hint: bool,
}

/// A sector as the guest knows it.
struct History {
    versions: Vec<Version>,
    /// The last that was acknowledged.
    acked: usize,
    /// The last that is durable, as the guest was told. A crash leaves this or a later one.
    sure: usize,
    busy: bool,
}

/// A request the guest waits for.
struct Asked {
    ring: usize,
    request: Request,
    /// What it is in the history of each of its sectors; for a flush, what each sector had acknowledged
    /// when it was sent.
    versions: Vec<usize>,
    _buffer: Vec<u8>,
}

struct Ring {
    hctx: HctxId,
    free: Vec<u16>,
    /// Flushes that wait for the one under way, if that is what is broken.
    joined: Vec<u32>,
    flushing: u32,
}

pub(super) struct World {
    seed: String,
    mq: Mq<Io>,
    engine: SimEngine,
    rings: Vec<Ring>,
    histories: Vec<History>,
    asked: BTreeMap<u32, (u16, Asked)>,
    next_id: u32,
    generations: u64,
    /// How requests are sent from now on.
    write_through: bool,
    /// What the guest believes.
    believes: bool,
    toggling: bool,
    direct: bool,
    broken: Broken,
    faults: Arc<SyncFault>,
    /// Sectors about which the guest has learned something since the last look.
    learned: Vec<usize>,
    pub seen: BTreeMap<&'static str, u64>,
}

/// What the kernel does in a turn.
#[derive(Clone, Copy)]
pub(super) enum Kernel {
    /// Ends what is due.
    InTime,
    /// Ends the one, by the order of slots.
    Ends(usize),
    /// Ends nothing.
    Waits,
}

/// What a world is made of.
#[derive(Clone, Copy, Debug)]
pub(super) struct Setup {
    pub sectors: usize,
    pub rings: usize,
    pub tags: u16,
    pub direct: bool,
    pub block_device: bool,
    /// Sectors that can be neither read nor written, in a thousand.
    pub bad: u64,
    pub write_through: bool,
    pub elevator: Params,
    pub faults: Faults,
    pub broken: Broken,
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() && self.broken == Broken::Nothing {
            eprintln!("replay with {}", self.seed);
        }
    }
}

fn checksum(bytes: &[u8]) -> u64 {
    bytes.chunks(8).fold(0xcbf2_9ce4_8422_2325, |hash, word| {
        let word = u64::from_le_bytes(word.try_into().expect("8 bytes"));
        (hash ^ word).wrapping_mul(0x0100_0000_01b3).rotate_left(29)
    })
}

/// A sector as the guest writes it.
fn sector_of(number: usize, generation: u64) -> [u8; 512] {
    let mut sector = [0; 512];
    sector[..8].copy_from_slice(&(number as u64).to_le_bytes());
    sector[8..16].copy_from_slice(&generation.to_le_bytes());
    let mut random = Random(generation ^ (number as u64) << 32);
    for word in sector[16..504].chunks_exact_mut(8) {
        word.copy_from_slice(&random.next().to_le_bytes());
    }
    let sum = checksum(&sector[..504]);
    sector[504..].copy_from_slice(&sum.to_le_bytes());
    sector
}

/// The generation a sector holds, if it is the guest's and whole.
fn generation_of(number: usize, sector: &[u8]) -> Option<u64> {
    if sector.iter().all(|byte| *byte == 0) {
        return Some(0);
    }
    let word = |at: usize| u64::from_le_bytes(sector[at..at + 8].try_into().expect("8 bytes"));
    let whole = word(504) == checksum(&sector[..504]) && word(0) == number as u64;
    whole.then(|| word(8))
}

impl History {
    /// What is wrong with finding this in the sector after a crash.
    fn complaint(&self, number: usize, content: &[u8]) -> Option<String> {
        let Some(generation) = generation_of(number, content) else {
            return Some(format!("sector {number} holds what nobody wrote there"));
        };
        let allowed = &self.versions[self.sure..];
        let fits = allowed.iter().any(|v| v.generation == generation);
        (!fits).then(|| format!("sector {number} holds {generation}, not one of {allowed:?}"))
    }
}

impl World {
    pub fn new(seed: String, random: u64, setup: Setup) -> World {
        let depth = TagDepth {
            disks: 1,
            of_disk: 0,
            of_disk_flushes: 1,
            shared: setup.tags,
        };
        let mut engine = SimEngine::new(depth.total(), random, setup.faults);
        engine.add_disk(
            setup.sectors as u64,
            setup.direct,
            setup.block_device,
            setup.bad,
        );
        let honesty = match setup.broken {
            Broken::SyncIgnored => Honesty::IgnoresSync,
            Broken::DsyncIgnored => Honesty::IgnoresDsync,
            _ => Honesty::Honest,
        };
        engine.disks[0].media = Some(Media::new(setup.sectors, honesty));
        let mut mq = Mq::new(depth);
        let rings = (0..setup.rings)
            .map(|queue| Ring {
                hctx: mq.add_hctx(HctxConfig {
                    disk: DISK,
                    queue: QueueId(u16::try_from(queue).expect("a few")),
                    ring_size: RING_SIZE,
                    ctxs: 1,
                }),
                free: (0..RING_SIZE).collect(),
                joined: Vec::new(),
                flushing: 0,
            })
            .collect();
        mq.set_elevator(DISK, setup.elevator);
        let history = || History {
            versions: vec![Version {
                generation: 0,
                hint: false,
            }],
            acked: 0,
            sure: 0,
            busy: false,
        };
        World {
            seed,
            mq,
            faults: Arc::clone(&engine.disks[0].disk.sync_fault),
            engine,
            rings,
            histories: (0..setup.sectors).map(|_| history()).collect(),
            asked: BTreeMap::new(),
            next_id: 0,
            generations: 0,
            write_through: setup.write_through,
            believes: setup.write_through,
            toggling: false,
            direct: setup.direct,
            broken: setup.broken,
            learned: Vec::new(),
            seen: BTreeMap::new(),
        }
    }

    fn saw(&mut self, what: &'static str) {
        *self.seen.entry(what).or_default() += 1;
    }

    fn media(&mut self) -> &mut Media {
        self.engine.disks[0].media.as_mut().expect("it has one")
    }

    /// Whether the guest may send this now: it never has two requests on one sector.
    pub fn may_send(&self, ring: usize, op: Op, sectors: std::ops::Range<usize>) -> bool {
        let frozen = self.toggling && self.broken != Broken::ToggleWithoutDrain;
        !frozen
            && !self.rings[ring].free.is_empty()
            && (op == Op::Flush || self.histories[sectors].iter().all(|history| !history.busy))
    }

    /// The guest puts a request on a ring; [`Self::unplug`] ends the drain that takes it.
    pub fn send(&mut self, ring: usize, op: Op, sectors: std::ops::Range<usize>) {
        let id = self.next_id;
        self.next_id += 1;
        let mut buffer = Vec::new();
        let mut versions = Vec::new();
        if op == Op::Flush {
            versions.extend(self.histories.iter().map(|history| history.acked));
        } else {
            self.generations += 1;
            for number in sectors.clone() {
                let generation = match op {
                    Op::Write => self.generations,
                    _ => 0,
                };
                buffer.extend(sector_of(number, self.generations));
                let history = &mut self.histories[number];
                history.busy = true;
                history.versions.push(Version {
                    generation,
                    hint: op == Op::Discard,
                });
                versions.push(history.versions.len() - 1);
                self.learned.push(number);
            }
        }
        let bytes = (sectors.len() * 512) as u64;
        let (bytes, first) = match op {
            Op::Flush => (0, 0),
            _ => (bytes, sectors.start as u64),
        };
        // As virtio/parse/mod.rs does.
        let fua = self.write_through && op != Op::Flush && self.broken != Broken::FuaDropped;
        let request = Request {
            op,
            sector: Sector(first),
            bytes,
            segments: u16::from(op != Op::Flush),
            ioprio: IoPrio::default(),
            fua,
            unmap: op == Op::WriteZeroes && self.generations.is_multiple_of(2),
        };
        let mut io = Io {
            id,
            iovecs: Vec::new(),
            extents: Vec::new(),
        };
        if op == Op::Write {
            io.iovecs.push(iovec {
                iov_base: std::ptr::with_exposed_provenance_mut(
                    buffer.as_mut_ptr().expose_provenance(),
                ),
                iov_len: buffer.len(),
            });
        } else if op != Op::Flush {
            io.extents.push(Extent {
                offset: request.sector.bytes(),
                len: bytes,
            });
        }
        let asked = Asked {
            ring,
            request,
            versions,
            _buffer: buffer,
        };
        let at = &mut self.rings[ring];
        let tag = at.free.pop().expect("may_send was asked");
        self.asked.insert(id, (tag, asked));
        if op == Op::Flush {
            match self.broken {
                Broken::FlushSkipped => return self.ended(id, Status::Ok),
                Broken::FlushJoinsRunning if at.flushing > 0 => return at.joined.push(id),
                _ => at.flushing += 1,
            }
        }
        let hctx = at.hctx;
        self.mq
            .plug(hctx, RequestTag(tag), request, io, &mut self.engine);
    }

    /// One drain is one plug.
    pub fn unplug(&mut self, ring: usize) {
        self.mq.unplug(self.rings[ring].hctx, &mut self.engine);
    }

    /// The guest turns write-through on or off. As in disk/write_cache.rs: what it sends from now on is
    /// sent in the new mode, and it hears that write-through is on when what was sent before has ended
    /// and the image is synced.
    pub fn toggle(&mut self) {
        self.write_through = !self.write_through;
        self.toggling = self.write_through;
        self.believes = false;
        self.saw(if self.write_through {
            "to write-through"
        } else {
            "to write-back"
        });
    }

    fn is_drained(&self) -> bool {
        self.asked.is_empty() || self.broken == Broken::ToggleWithoutDrain
    }

    fn settle(&mut self, sync_works: bool) {
        if !self.toggling || !self.is_drained() {
            return;
        }
        self.toggling = false;
        let direct = self.direct;
        if self.broken != Broken::ToggleWithoutSync {
            self.media().sync(sync_works, direct);
        }
        // A sync that failed before makes this one worth nothing.
        if !sync_works || self.engine.disks[0].disk.sync_fault.errno().is_some() {
            self.write_through = false;
            if !direct {
                self.faults.set(Errno(libc::EIO));
            }
            return self.saw("refused");
        }
        self.believes = true;
        for (number, history) in self.histories.iter_mut().enumerate() {
            history.sure = history.sure.max(history.acked);
            self.learned.push(number);
        }
    }

    /// The guest hears that a request is over.
    fn ended(&mut self, id: u32, status: Status) {
        let (tag, asked) = self.asked.remove(&id).expect("it ends once");
        let ring = &mut self.rings[asked.ring];
        ring.free.push(tag);
        if asked.request.op == Op::Flush {
            let result = if status == Status::Ok {
                "flushed"
            } else {
                "flush failed"
            };
            self.saw(result);
            if status == Status::Ok {
                for (number, acked) in asked.versions.into_iter().enumerate() {
                    let history = &mut self.histories[number];
                    if acked > history.sure {
                        history.sure = acked;
                        self.learned.push(number);
                    }
                }
            }
            return;
        }
        let first = usize::try_from(asked.request.sector.0).expect("a small disk");
        for (nth, version) in asked.versions.into_iter().enumerate() {
            let history = &mut self.histories[first + nth];
            history.busy = false;
            if status == Status::Ok && !history.versions[version].hint {
                history.acked = version;
                if self.believes {
                    history.sure = version;
                }
            }
            self.learned.push(first + nth);
        }
        self.saw(match (status, asked.request.op) {
            (Status::Ok, Op::Write) => "written",
            (Status::Ok, _) => "zeroed or discarded",
            _ => "write failed",
        });
    }

    /// A turn of a worker.
    pub fn turn(&mut self, kernel: Kernel, now_ns: u64) {
        if self.broken == Broken::FaultForgotten {
            self.engine.disks[0].disk.sync_fault = Arc::default();
        }
        self.engine.now_ns = match kernel {
            Kernel::InTime => now_ns,
            Kernel::Ends(_) | Kernel::Waits => 0,
        };
        self.mq.start_turn(now_ns);
        let mut over = Vec::new();
        let World { engine, mq, .. } = self;
        let mut on = |tag, _: &[u32], result: Result<u64, Errno>| {
            let result = result.map(drop).map_err(|_| Status::IoErr);
            mq.complete(tag, result, |_, io: Io, status, _| {
                over.push((io.id, status))
            });
        };
        match kernel {
            Kernel::Ends(nth) => engine.reap_nth(nth, &mut on),
            Kernel::InTime | Kernel::Waits => engine.reap(&mut on),
        }
        for (id, status) in over {
            let (_, asked) = &self.asked[&id];
            let (ring, op) = (asked.ring, asked.request.op);
            self.ended(id, status);
            if op == Op::Flush {
                self.rings[ring].flushing -= 1;
                for joined in std::mem::take(&mut self.rings[ring].joined) {
                    self.ended(joined, status);
                }
            }
        }
        self.run();
    }

    pub fn run(&mut self) {
        if self.mq.must_run() {
            self.mq.run(&mut self.engine);
        }
    }

    /// What is wrong with what a crash could leave now, sector by sector. Sectors are independent, and
    /// so is what the guest expects of them: this looks at every image there is.
    pub fn complaint(&mut self) -> Option<String> {
        let mut sectors = self.media().take_changed();
        sectors.append(&mut self.learned);
        sectors.sort_unstable();
        sectors.dedup();
        let media = self.engine.disks[0].media.as_ref().expect("it has one");
        sectors.into_iter().find_map(|number| {
            let history = &self.histories[number];
            let wrong = |content: &Content| history.complaint(number, &content[..]);
            media.may_hold(number).find_map(wrong)
        })
    }

    /// The same for one image, as a guest that boots from it sees it.
    pub fn complaint_of(&self, image: &[u8]) -> Option<String> {
        let sectors = image.chunks_exact(512).zip(&self.histories).enumerate();
        sectors
            .map(|(number, (content, history))| history.complaint(number, content))
            .find_map(|complaint| complaint)
    }
}

// ---- by chance --------------------------------------------------------------------------------------

const SECTORS: usize = 96;

impl World {
    fn by_seed(seed: u64, broken: Broken) -> (World, Random) {
        let mut random = Random(seed ^ 0x0070_6f77_6572);
        let calm = random.below(2) == 0;
        let setup = Setup {
            sectors: SECTORS,
            rings: 1 + usize::try_from(random.below(3)).unwrap(),
            tags: 2 + u16::try_from(random.below(8)).unwrap(),
            direct: random.below(2) == 0,
            block_device: random.below(2) == 0,
            bad: if random.below(4) == 0 { 20 } else { 0 },
            write_through: random.below(2) == 0,
            elevator: match random.below(3) {
                0 => Params::None,
                1 => Params::MqDeadline(Default::default()),
                _ => Params::Kyber(Default::default()),
            },
            faults: Faults {
                refused: random.below(40),
                again: random.below(40),
                short: random.below(100),
                unknown: if random.below(2) == 0 { 20 } else { 0 },
                flush_fails: if calm { 0 } else { 1 + random.below(30) },
            },
            broken,
        };
        let engine = random.next();
        (
            World::new(format!("BLKMQ_SEED={seed}"), engine, setup),
            random,
        )
    }

    fn send_some(&mut self, random: &mut Random, ring: usize) {
        for _ in 0..random.below(6) {
            let op = match random.below(100) {
                0..=14 => Op::Flush,
                15..=19 => Op::Discard,
                20..=24 => Op::WriteZeroes,
                _ => Op::Write,
            };
            let len = 1 + usize::try_from(random.below(4)).unwrap();
            let first = usize::try_from(random.below((SECTORS - len) as u64)).unwrap();
            if self.may_send(ring, op, first..first + len) {
                self.send(ring, op, first..first + len);
                // A neighbour, which may be merged with it.
                let next = first + len..(first + 2 * len).min(SECTORS);
                let merges = op == Op::Write && random.below(3) == 0 && !next.is_empty();
                if merges && self.may_send(ring, op, next.clone()) {
                    self.send(ring, op, next);
                }
            }
        }
        self.unplug(ring);
    }

    /// Runs until so many requests were sent and are over; what a crash could have broken, or how many
    /// images were built.
    fn by_chance(&mut self, random: &mut Random, requests: u32) -> Result<u64, String> {
        let (mut now_ns, mut images, mut turns) = (0, 0, 0);
        while self.next_id < requests || !self.asked.is_empty() || self.toggling {
            turns += 1;
            assert!(turns < 100 * requests, "nothing goes on: {:?}", self.seen);
            self.turn(Kernel::InTime, now_ns);
            if self.next_id < requests {
                if random.below(60) == 0 && !self.toggling {
                    self.toggle();
                }
                for ring in 0..self.rings.len() {
                    if random.below(3) == 0 {
                        self.send_some(random, ring);
                    }
                }
                self.run();
            }
            let works = !random.permille(self.engine.faults.flush_fails);
            self.settle(works);
            if let Some(complaint) = self.complaint() {
                return Err(complaint);
            }
            if turns % 8 == 0 {
                let media = self.engine.disks[0].media.as_ref().expect("it has one");
                let image = media.image(|choices| {
                    usize::try_from(random.below(choices as u64)).expect("a small number")
                });
                if let Some(complaint) = self.complaint_of(&image) {
                    return Err(complaint);
                }
                images += 1;
            }
            let times = self.engine.next_due_ns().into_iter();
            let next = times.chain(self.mq.next_deadline_ns()).min();
            let busy = self.mq.must_run() || random.below(2) == 0;
            now_ns = match next {
                Some(at) if !busy => at.max(now_ns + 1),
                _ => now_ns + 1 + random.below(20_000),
            };
        }
        Ok(images)
    }
}

fn number_from(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().expect("a number"))
}

/// Long by `BLKMQ_ROUNDS`; docs/TESTING.md says what was run.
#[test]
fn what_was_promised_survives_a_power_cut() {
    let seeds = match number_from("BLKMQ_SEED") {
        Some(seed) => seed..=seed,
        None => 1..=number_from("BLKMQ_ROUNDS").unwrap_or(40),
    };
    let mut seen = BTreeMap::new();
    let mut images = 0;
    for seed in seeds.clone() {
        let (mut world, mut random) = World::by_seed(seed, Broken::Nothing);
        match world.by_chance(&mut random, 1500) {
            Ok(built) => images += built,
            Err(complaint) => panic!("after a power cut, {complaint}"),
        }
        let stats: Vec<_> = world
            .rings
            .iter()
            .map(|r| *world.mq.stats(r.hctx))
            .collect();
        let sum = |of: fn(&HctxStats) -> u64| stats.iter().map(of).sum::<u64>();
        for (what, times) in [
            ("merged", sum(|stats| stats.merged)),
            ("flush joined", sum(|stats| stats.flush_joined)),
            ("requeued", sum(|stats| stats.requeued)),
            ("bounced or short", world.engine.counters.continued),
            (
                "dsync refused",
                u64::from(!world.engine.disks[0].disk.can.dsync),
            ),
            ("sync fault", u64::from(world.faults.errno().is_some())),
        ] {
            *world.seen.entry(what).or_default() += times;
        }
        for (what, times) in std::mem::take(&mut world.seen) {
            *seen.entry(what).or_insert(0) += times;
        }
    }
    println!("{images} images built, {seen:?}");
    if seeds.clone().count() > 1 {
        let never: Vec<_> = seen.iter().filter(|(_, times)| **times == 0).collect();
        assert!(never.is_empty(), "never happened: {never:?}");
        assert!(seen.len() >= 14, "hardly anything happened: {seen:?}");
    }
}

/// Each is found: the model can fail, and the test would notice if production did the same.
#[test]
fn what_breaks_the_promise_is_found() {
    for broken in [
        Broken::SyncIgnored,
        Broken::DsyncIgnored,
        Broken::FuaDropped,
        Broken::FlushJoinsRunning,
        Broken::FlushSkipped,
        Broken::ToggleWithoutSync,
        Broken::ToggleWithoutDrain,
        Broken::FaultForgotten,
    ] {
        let found = (1..=40).find_map(|seed| {
            let (mut world, mut random) = World::by_seed(seed, broken);
            world.by_chance(&mut random, 1500).err()
        });
        let found = found.unwrap_or_else(|| panic!("{broken:?} was not found"));
        println!("{broken:?}: {found}");
    }
}
