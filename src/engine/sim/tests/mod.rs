//! Guests that write and read on simulated disks, everything that can be changed being changed
//! meanwhile, and an oracle that knows what each request must come to.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::*;
use crate::mq::elevator::{DeadlineParams, Kind, KyberParams, Params};
use crate::mq::ids::{HctxId, QueueId, RequestTag, Sector};
use crate::mq::request::{IoPrio, Status};
use crate::mq::stats::HctxStats;
use crate::mq::tags::TagDepth;
use crate::mq::throttle::{Limits, Rate, Throttle};
use crate::mq::{HctxConfig, Mq};

mod power;

const SECTORS: u64 = 1024;
const MOST_SECTORS: u64 = 8;
const RINGS_OF_A_DISK: u16 = 3;

/// A request as its guest sees it.
struct Asked {
    ring: usize,
    tag: u16,
    request: Request,
    /// What each of its sectors holds if it is a write that succeeds.
    version: u64,
    buffer: Vec<u8>,
    /// What the engine's last word makes of it.
    verdict: Option<Status>,
}

/// What a disk may hold, and who is at it.
struct Model {
    /// For each sector the versions it may have: one, unless a write failed or it was discarded.
    versions: Vec<Vec<u64>>,
    readers: Vec<u16>,
    writing: Vec<bool>,
    /// What the disk's statistics have to come to: ios and merges, and sectors, by kind.
    ios: BTreeMap<&'static str, u64>,
    sectors: BTreeMap<&'static str, u64>,
}

fn kind_of(op: Op) -> &'static str {
    match op {
        Op::Read => "read",
        Op::Write | Op::WriteZeroes => "write",
        Op::Discard => "discard",
        Op::Flush => "flush",
    }
}

fn range_of(request: &Request) -> std::ops::Range<usize> {
    let at = |sector: Sector| usize::try_from(sector.0).expect("a small disk");
    at(request.sector)..at(request.end())
}

impl Model {
    fn new() -> Self {
        let sectors = usize::try_from(SECTORS).expect("a small disk");
        Model {
            versions: vec![vec![0]; sectors],
            readers: vec![0; sectors],
            writing: vec![false; sectors],
            ios: BTreeMap::new(),
            sectors: BTreeMap::new(),
        }
    }

    /// Whether a guest in its right mind sends this now: nothing in flight writes there, and nothing
    /// reads what it writes.
    fn is_free(&self, request: &Request) -> bool {
        let reads = request.op == Op::Read;
        range_of(request).all(|at| !self.writing[at] && (reads || self.readers[at] == 0))
    }

    fn lock(&mut self, request: &Request) {
        for at in range_of(request) {
            match request.op {
                Op::Read => self.readers[at] += 1,
                _ => self.writing[at] = true,
            }
        }
    }

    fn ended(&mut self, asked: &Asked, status: Status) {
        let request = &asked.request;
        *self.ios.entry(kind_of(request.op)).or_default() += 1;
        *self.sectors.entry(kind_of(request.op)).or_default() += request.bytes / SECTOR_SIZE;
        for (nth, at) in range_of(request).enumerate() {
            let versions = &mut self.versions[at];
            let new = match request.op {
                Op::Write => asked.version,
                _ => 0,
            };
            match request.op {
                Op::Flush => unreachable!("a flush has no sectors"),
                Op::Read => {
                    self.readers[at] -= 1;
                    if status == Status::Ok {
                        let sector = &asked.buffer[nth * 512..][..512];
                        check_sector(sector, versions, at);
                    }
                    continue;
                }
                Op::Write | Op::WriteZeroes if status == Status::Ok => *versions = vec![new],
                _ if versions.contains(&new) => {}
                _ => versions.push(new),
            }
            self.writing[at] = false;
        }
    }
}

/// A sector holds its version at both ends, so that its first and last byte tell it from others. Where several are possible, it may be torn.
fn check_sector(sector: &[u8], versions: &mut Vec<u64>, at: usize) {
    let head = u64::from_le_bytes(sector[..8].try_into().expect("8 bytes"));
    let tail = u64::from_be_bytes(sector[504..].try_into().expect("8 bytes"));
    assert!(
        versions.contains(&head) && versions.contains(&tail),
        "sector {at} reads {head} and {tail}, not {versions:?}"
    );
    if head == tail {
        *versions = vec![head];
    }
}

/// A virtqueue.
struct Ring {
    disk: u16,
    hctx: Option<HctxId>,
    free: Vec<u16>,
    cursor: u64,
    stopping: bool,
    quiesced: bool,
    recounted: bool,
}

struct World {
    seed: u64,
    mq: Mq<Io>,
    engine: SimEngine,
    random: Random,
    rings: Vec<Ring>,
    /// Of each disk.
    throttles: Vec<Arc<Throttle>>,
    /// Of the one group.
    group: Arc<Throttle>,
    models: Vec<Model>,
    asked: Vec<Option<Asked>>,
    free_ids: Vec<u32>,
    versions: u64,
    sent: u64,
    ended: u64,
    now_ns: u64,
    /// The disk that is being frozen for another elevator.
    frozen: Option<u16>,
    /// How many of four failed requests are held, until the end comes.
    holds: u64,
    sums: HctxStats,
    seen: BTreeMap<&'static str, u64>,
}

/// Says how to see it again.
impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("replay with BLKMQ_SEED={}", self.seed);
        }
    }
}

impl World {
    fn new(seed: u64) -> Self {
        let mut random = Random(seed);
        let tags = 2 + u16::try_from(random.below(30)).unwrap();
        let faults = Faults {
            refused: random.below(60),
            again: random.below(60),
            short: random.below(100),
            unknown: random.below(30),
            flush_fails: random.below(100),
        };
        let disks = 1 + u16::try_from(random.below(3)).unwrap();
        let depth = TagDepth {
            disks,
            of_disk: u16::try_from(random.below(3)).unwrap(),
            of_disk_flushes: 1,
            shared: tags,
        };
        let mut engine = SimEngine::new(depth.total(), random.next(), faults);
        let mut rings = Vec::new();
        for disk in 0..disks {
            let bad = random.below(8);
            engine.add_disk(SECTORS, random.below(2) == 0, random.below(2) == 0, bad);
            rings.extend((0..RINGS_OF_A_DISK).map(|_| Ring {
                disk,
                hctx: None,
                free: Vec::new(),
                cursor: 0,
                stopping: false,
                quiesced: false,
                recounted: false,
            }));
        }
        let mut mq = Mq::new(depth);
        let throttles: Vec<_> = (0..disks).map(|_| Arc::default()).collect();
        for (disk, throttle) in (0..).map(DiskId).zip(&throttles) {
            mq.set_throttle(disk, Some(Arc::clone(throttle)));
        }
        World {
            seed,
            mq,
            engine,
            random,
            rings,
            throttles,
            group: Arc::default(),
            models: (0..disks).map(|_| Model::new()).collect(),
            asked: Vec::new(),
            free_ids: Vec::new(),
            versions: 0,
            sent: 0,
            ended: 0,
            now_ns: 0,
            frozen: None,
            holds: seed % 3,
            sums: HctxStats::default(),
            seen: BTreeMap::new(),
        }
    }

    fn saw(&mut self, what: &'static str) {
        *self.seen.entry(what).or_default() += 1;
    }

    /// One turn of a worker, as in worker/mod.rs; whether there was something to do.
    fn turn(&mut self, feeding: bool) {
        self.engine.now_ns = self.now_ns;
        self.mq.start_turn(self.now_ns);
        self.reap();
        let sent = self.sent;
        if feeding {
            if self.random.below(40) == 0 {
                self.control();
            }
            for ring in 0..self.rings.len() {
                if self.random.below(3) == 0 {
                    self.drain(ring);
                }
            }
        } else {
            for ring in 0..self.rings.len() {
                self.unquiesce(ring);
            }
        }
        if self.mq.must_run() {
            self.mq.run(&mut self.engine);
        }
        self.settle();
        self.pass_time(self.sent > sent);
    }

    fn pass_time(&mut self, arrived: bool) {
        if self.mq.must_run() || arrived {
            self.now_ns += self.random.below(10_000);
            return;
        }
        let due = self.engine.next_due_ns();
        let next = due.into_iter().chain(self.mq.next_deadline_ns()).min();
        let quiesced = self.rings.iter().any(|ring| ring.quiesced);
        assert!(
            next.is_some() || quiesced || self.sent == self.ended,
            "a wake-up is lost: {} requests wait",
            self.sent - self.ended
        );
        self.now_ns = next.unwrap_or(0).max(self.now_ns + 1);
    }

    fn reap(&mut self) {
        let World {
            engine,
            mq,
            asked,
            rings,
            models,
            ended,
            seen,
            random,
            holds,
            ..
        } = self;
        let holds = *holds;
        engine.reap(|tag, ids, result| {
            let status = match result {
                Ok(_) => Status::Ok,
                Err(Errno(libc::EOPNOTSUPP)) => Status::Unsupp,
                Err(_) => Status::IoErr,
            };
            if result.is_err() && holds > 0 && random.below(4) < holds {
                // Held: nobody is told, and it is tried again when somebody says so.
                let (hctx, ..) = mq.issued(tag).expect("it is the engine's last word");
                let disk = rings
                    .iter()
                    .find(|ring| ring.hctx == Some(hctx))
                    .unwrap()
                    .disk;
                for ring in rings.iter_mut().filter(|ring| ring.disk == disk) {
                    ring.quiesced |= ring.hctx.is_some();
                    ring.hctx.into_iter().for_each(|hctx| mq.quiesce(hctx));
                }
                mq.requeue(tag);
                *seen.entry("held").or_default() += 1;
                return;
            }
            let mut over = 0;
            for id in ids {
                let asked = asked[*id as usize].as_mut().expect("not over yet");
                asked.verdict = Some(status);
            }
            let first = asked[ids[0] as usize].as_ref().expect("not over yet");
            let (disk, op) = (rings[first.ring].disk, first.request.op);
            let split = status != Status::Ok && ids.len() > 1 && op.moves_data();
            mq.complete(
                tag,
                result.map(drop).map_err(|_| status),
                |hctx, io, status, read| {
                    let asked = asked[io.id as usize].take().expect("it ends once");
                    let ring = &mut rings[asked.ring];
                    assert_eq!(ring.hctx, Some(hctx));
                    assert_eq!(asked.verdict, Some(status), "not the engine's last word");
                    let got = status == Status::Ok && asked.request.op == Op::Read;
                    assert_eq!(read, if got { asked.request.bytes } else { 0 });
                    ring.free.push(asked.tag);
                    models[usize::from(ring.disk)].ended(&asked, status);
                    over += 1;
                },
            );
            assert_eq!(over, if split { 0 } else { ids.len() });
            *ended += over as u64;
            if split {
                // Those that were merged are counted as merged, and now each ends for itself.
                let ios = &mut models[usize::from(disk)].ios;
                *ios.entry(kind_of(op)).or_default() += ids.len() as u64 - 1;
                *seen.entry("split").or_default() += 1;
            }
            self.free_ids.extend(if split { &[] } else { ids });
        });
    }

    /// The guest's next request on a ring; none if what it wants to do is not to be done now.
    fn next_request(&mut self, ring: usize) -> Option<Request> {
        let random = &mut self.random;
        let ring = &mut self.rings[ring];
        let sectors = 1 + random.below(MOST_SECTORS);
        let stream = random.below(3) > 0 && ring.cursor + sectors <= SECTORS;
        let sector = match stream {
            true => ring.cursor,
            false => random.below(SECTORS - sectors),
        };
        let op = match random.below(100) {
            0..=3 => Op::Flush,
            4..=6 => Op::Discard,
            7..=9 => Op::WriteZeroes,
            10..=50 => Op::Write,
            _ => Op::Read,
        };
        let flush = op == Op::Flush;
        let request = Request {
            op,
            sector: Sector(if flush { 0 } else { sector }),
            bytes: if flush { 0 } else { sectors * SECTOR_SIZE },
            segments: 0,
            ioprio: IoPrio(u16::try_from(random.below(12) / 9).unwrap() << 13),
            fua: op == Op::Write && random.below(20) == 0,
            unmap: op == Op::WriteZeroes && random.below(2) == 0,
        };
        ring.cursor = (sector + sectors) % SECTORS;
        let disk = usize::from(ring.disk);
        // Whether a discard of what cannot be written fails depends on the way it is done.
        let bad = op == Op::Discard && range_of(&request).any(|at| self.engine.disks[disk].bad[at]);
        (!bad && self.models[disk].is_free(&request)).then_some(request)
    }

    /// The guest sends some, and they are drained: one plug.
    fn drain(&mut self, at: usize) {
        let ring = &self.rings[at];
        let Some(hctx) = ring.hctx else { return };
        if ring.stopping || self.frozen == Some(ring.disk) {
            return;
        }
        let most = ring.free.len() as u64;
        let count = self.random.below(1 + most.min(40));
        for _ in 0..count {
            let Some(mut request) = self.next_request(at) else {
                continue;
            };
            let disk = usize::from(self.rings[at].disk);
            self.models[disk].lock(&request);
            let tag = self.rings[at].free.pop().expect("counted");
            self.versions += 1;
            let mut buffer = vec![0xa5; usize::try_from(request.bytes).expect("small")];
            if request.op == Op::Write {
                for sector in buffer.chunks_exact_mut(512) {
                    sector[..8].copy_from_slice(&self.versions.to_le_bytes());
                    sector[504..].copy_from_slice(&self.versions.to_be_bytes());
                }
            }
            let io = self.io(&mut request, &mut buffer);
            self.asked[io.id as usize] = Some(Asked {
                ring: at,
                tag,
                request,
                version: self.versions,
                buffer,
                verdict: None,
            });
            self.sent += 1;
            self.mq
                .plug(hctx, RequestTag(tag), request, io, &mut self.engine);
        }
        self.mq.unplug(hctx, &mut self.engine);
    }

    /// Cuts the buffer into up to three segments.
    fn io(&mut self, request: &mut Request, buffer: &mut [u8]) -> Io {
        let id = self.free_ids.pop().unwrap_or_else(|| {
            self.asked.push(None);
            u32::try_from(self.asked.len() - 1).expect("as many as rings have room for")
        });
        let mut iovecs = Vec::new();
        let mut extents = Vec::new();
        if request.op.moves_data() {
            let mut rest = buffer;
            while !rest.is_empty() {
                let len = match iovecs.len() {
                    0 | 1 if self.random.below(3) == 0 => {
                        1 + usize::try_from(self.random.below(rest.len() as u64)).unwrap()
                    }
                    _ => rest.len(),
                };
                let (part, more) = rest.split_at_mut(len);
                iovecs.push(iovec {
                    iov_base: std::ptr::with_exposed_provenance_mut(
                        part.as_mut_ptr().expose_provenance(),
                    ),
                    iov_len: len,
                });
                rest = more;
            }
        } else if request.bytes > 0 {
            extents.push(Extent {
                offset: request.sector.bytes(),
                len: request.bytes,
            });
        }
        request.segments = u16::try_from(iovecs.len() + extents.len()).expect("a few");
        Io {
            id,
            iovecs,
            extents,
        }
    }

    fn unquiesce(&mut self, ring: usize) {
        let ring = &mut self.rings[ring];
        if std::mem::take(&mut ring.quiesced)
            && let Some(hctx) = ring.hctx
        {
            self.mq.unquiesce(hctx);
        }
    }

    fn limits(&mut self) -> Limits {
        let mut limits = Limits::default();
        match self.random.below(4) {
            0 => limits.ops.total = Rate::per_second(10_000 + self.random.below(100_000)),
            1 => limits.ops.write = Rate::per_second(5_000 + self.random.below(50_000)),
            2 => limits.bytes.read = Rate::per_second(20_000_000 + self.random.below(100_000_000)),
            _ => {}
        }
        limits
    }

    /// Somebody changes something.
    fn control(&mut self) {
        let at = usize::try_from(self.random.below(self.rings.len() as u64)).unwrap();
        let disk = DiskId(self.rings[at].disk);
        let Some(hctx) = self.rings[at].hctx else {
            let ring_size = 8 << self.random.below(4);
            let ctxs = 1 + u16::try_from(self.random.below(4)).unwrap();
            let ring = &mut self.rings[at];
            ring.hctx = Some(self.mq.add_hctx(HctxConfig {
                disk,
                queue: QueueId(0),
                ring_size,
                ctxs,
            }));
            ring.free = (0..ring_size).collect();
            (ring.stopping, ring.recounted) = (false, false);
            return self.saw("started");
        };
        match self.random.below(8) {
            0 => {
                self.rings[at].quiesced = true;
                self.mq.quiesce(hctx);
                self.saw("quiesced");
            }
            1 | 2 => (0..self.rings.len()).for_each(|ring| self.unquiesce(ring)),
            3 => {
                let ctxs = 1 + u16::try_from(self.random.below(4)).unwrap();
                self.mq.set_ctxs(hctx, ctxs);
                self.rings[at].recounted = true;
                self.saw("recounted");
            }
            4 => {
                let limits = self.limits();
                self.throttles[disk.index()].set_limits(self.now_ns, limits);
                self.mq.limits_changed();
                self.saw("limited");
            }
            5 => {
                let limits = self.limits();
                self.group.set_limits(self.now_ns, limits);
                let group = (self.random.below(2) == 0).then(|| Arc::clone(&self.group));
                self.mq.set_group(disk, group);
                self.mq.limits_changed();
            }
            6 if self.frozen.is_none() => self.frozen = Some(disk.0),
            7 => self.rings[at].stopping = true,
            _ => self.tune(disk),
        }
    }

    fn tune(&mut self, disk: DiskId) {
        let (name, value) = match self.mq.elevator(disk) {
            Kind::None => return,
            Kind::MqDeadline => match self.random.below(3) {
                0 => ("fifo_batch", 1 + self.random.below(16)),
                1 => ("async_depth", 1 + self.random.below(16)),
                _ => ("front_merges", self.random.below(2)),
            },
            Kind::Kyber => ("read_lat_nsec", 50_000 + self.random.below(2_000_000)),
        };
        self.mq
            .set_elevator_param(disk, name, value)
            .expect("a parameter it has");
        self.saw("tuned");
    }

    /// What waited for requests in flight to end.
    fn settle(&mut self) {
        for at in 0..self.rings.len() {
            let ring = &self.rings[at];
            let Some(hctx) = ring.hctx else { continue };
            if !ring.stopping && self.frozen != Some(ring.disk) {
                continue;
            }
            // Quiesced, it would never end.
            let stopping = ring.stopping;
            self.unquiesce(at);
            if stopping && self.mq.in_flight(hctx) == 0 {
                self.stop(at, hctx);
            }
        }
        let Some(disk) = self.frozen else { return };
        let drained = self.rings.iter().all(|ring| {
            ring.disk != disk || ring.hctx.is_none_or(|hctx| self.mq.in_flight(hctx) == 0)
        });
        if drained {
            let params = match self.random.below(3) {
                0 => Params::None,
                1 => Params::MqDeadline(DeadlineParams {
                    prio_aging_expire_ms: 1 + u32::try_from(self.random.below(20)).unwrap(),
                    ..DeadlineParams::default()
                }),
                _ => Params::Kyber(KyberParams::default()),
            };
            self.mq.set_elevator(DiskId(disk), params);
            self.frozen = None;
            self.saw(params.kind().name());
        }
    }

    fn stop(&mut self, at: usize, hctx: HctxId) {
        let stats = *self.mq.stats(hctx);
        assert_eq!(stats.requests, stats.direct + stats.staged + stats.merged);
        let mut sum = |of: fn(&mq::stats::CtxStats) -> u64| -> u64 {
            self.mq.ctx_stats(hctx).iter().map(of).sum()
        };
        if !self.rings[at].recounted {
            assert_eq!(sum(|ctx| ctx.queued), stats.requests);
            assert_eq!(sum(|ctx| ctx.completed), stats.requests);
            assert_eq!(sum(|ctx| ctx.merged), stats.merged);
            assert_eq!(sum(|ctx| ctx.dispatched), stats.dispatched);
        }
        self.sums.add(&stats);
        self.mq.remove_hctx(hctx);
        self.rings[at].hctx = None;
        self.saw("stopped");
    }

    fn run(&mut self, requests: u64) {
        let mut turns = 0;
        while self.sent < requests {
            self.turn(true);
            turns += 1;
            assert!(turns < 40 * requests, "{} of {requests} sent", self.sent);
        }
        // What cannot succeed ends with its error now.
        self.holds = 0;
        for ring in &mut self.rings {
            ring.stopping = true;
        }
        while self.rings.iter().any(|ring| ring.hctx.is_some()) || self.frozen.is_some() {
            self.turn(false);
            turns += 1;
            assert!(
                turns < 80 * requests,
                "{} of {} ended",
                self.ended,
                self.sent
            );
        }
        self.check_the_end();
    }

    fn check_the_end(&mut self) {
        assert_eq!(self.sent, self.ended);
        assert_eq!(self.sums.requests, self.sent);
        assert_eq!((self.mq.tags().in_use(), self.engine.in_flight), (0, 0));
        assert_eq!(self.mq.stale_completions(), 0);
        let mut flushes = 0;
        for (at, model) in self.models.iter_mut().enumerate() {
            let stats = self.mq.disk_stats(DiskId(u16::try_from(at).unwrap()));
            assert_eq!(stats.in_flight, 0);
            for (kind, group) in [
                ("read", stats.reads),
                ("write", stats.writes),
                ("discard", stats.discards),
            ] {
                let of = |counts: &BTreeMap<_, _>| counts.get(kind).copied().unwrap_or(0);
                assert_eq!(group.ios + group.merges, of(&model.ios), "{kind}");
                assert_eq!(group.sectors, of(&model.sectors), "{kind}");
            }
            flushes += stats.flushes;
            let bytes = &self.engine.disks[at].bytes;
            for (sector, versions) in model.versions.iter_mut().enumerate() {
                check_sector(&bytes[sector * 512..][..512], versions, sector);
            }
        }
        assert_eq!(flushes + self.sums.flush_joined, self.sums.flush);
        for disk in 0..self.models.len() {
            // Asserts that nothing is held.
            self.mq
                .set_elevator(DiskId(u16::try_from(disk).unwrap()), Params::None);
        }
    }
}

/// As many seeds, and as many requests in all.
const SEEDS: u64 = 40;
const REQUESTS: u64 = 1_000_000;

#[test]
fn a_million_requests_end_as_the_oracle_says() {
    let given = std::env::var("BLKMQ_SEED").map(|seed| seed.parse().expect("a number"));
    let seeds = match given {
        Ok(seed) => vec![seed],
        Err(_) => (1..=SEEDS).collect(),
    };
    let mut seen = BTreeMap::new();
    for seed in &seeds {
        let mut world = World::new(*seed);
        world.run(REQUESTS / SEEDS);
        for (what, times) in std::mem::take(&mut world.seen) {
            *seen.entry(what).or_insert(0) += times;
        }
        let counters = world.engine.counters;
        for (what, times) in [
            ("merged", world.sums.merged),
            ("direct", world.sums.direct),
            ("requeued", world.sums.requeued),
            ("throttled", world.sums.throttled),
            ("errors", world.sums.errors),
            ("flush joined", world.sums.flush_joined),
            ("bounced", counters.bounced),
            ("continued", counters.continued),
            ("retried", counters.retried),
            ("zeroes written", counters.zeroes_written),
        ] {
            *seen.entry(what).or_insert(0) += times;
        }
    }
    println!("{} requests, {seen:?}", REQUESTS);
    if seeds.len() > 1 {
        let never: Vec<_> = seen.iter().filter(|(_, times)| **times == 0).collect();
        assert!(never.is_empty(), "never happened: {never:?}");
        assert!(seen.len() >= 18, "hardly anything happened: {seen:?}");
    }
}
