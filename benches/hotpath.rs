//! The way of a request, from the available ring to the used ring, for counting what it costs: ring,
//! parser, blk-mq, the null engine, guest_io, and the decision about a call, in the order of a worker's
//! turn. It makes no system call on the way and reads no clock, so that it does the same each time.
//!
//!     hotpath WORKLOAD BATCHES
//!
//! tests/hotpath.rs runs it under valgrind and holds the counts against its table. Run by hand without
//! arguments it says how long a request takes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use vhost_user_blkmq::engine::{Command, DiskSlot, Engine, Event, Extent, Payload, Target};
use vhost_user_blkmq::mq::elevator::{Kind, Params};
use vhost_user_blkmq::mq::ids::{DiskId, DriverTag, HctxId, QueueId, RequestTag, Sector};
use vhost_user_blkmq::mq::limits::DRIVER_TAGS;
use vhost_user_blkmq::mq::request::{Op, Request, Status};
use vhost_user_blkmq::mq::tags::TagDepth;
use vhost_user_blkmq::mq::{Busy, Driver, HctxConfig, Mq, Parts};
use vhost_user_blkmq::virtio::geometry::DiskShape;
use vhost_user_blkmq::virtio::guest_io::GuestIo;
use vhost_user_blkmq::virtio::memory::MemoryTable;
use vhost_user_blkmq::virtio::parse::{Parsed, parse};
use vhost_user_blkmq::virtio::pool::SegmentPool;
use vhost_user_blkmq::virtio::ring::{Ring, RingSetup};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const RING_SIZE: u16 = 128;
/// As many chains the worker takes at a time.
const SLICE: u16 = 8;
const BLOCK: u32 = 4096;
const REGION_BYTES: usize = 1 << 17;
/// Regions have holes between them.
const REGION_STEP: u64 = 1 << 20;

const DESC: u64 = 0;
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
/// A table of three descriptors, a header and a status byte for each head.
const CHAINS: u64 = 0x4000;

const DESC_NEXT: u16 = 1;
const DESC_WRITE: u16 = 2;
const DESC_INDIRECT: u16 = 4;

/// What is done over and over.
#[derive(Clone, Copy)]
struct Workload {
    name: &'static str,
    /// Requests in a batch, each of which is one turn.
    batch: u16,
    write: bool,
    /// Neighbours, which are merged, instead of requests here and there.
    sequential: bool,
    regions: u64,
    /// The buffers lie in all regions, instead of one.
    scattered: bool,
    elevator: Kind,
    /// What requests do is counted, as it always is but here.
    recorded: bool,
}

const PLAIN: Workload = Workload {
    name: "",
    batch: 32,
    write: false,
    sequential: false,
    regions: 1,
    scattered: false,
    elevator: Kind::None,
    recorded: true,
};

const WORKLOADS: &[Workload] = &[
    Workload {
        name: "read-qd32",
        ..PLAIN
    },
    Workload {
        name: "write-qd32",
        write: true,
        ..PLAIN
    },
    Workload {
        name: "read-qd1",
        batch: 1,
        ..PLAIN
    },
    Workload {
        name: "merged-qd32",
        sequential: true,
        ..PLAIN
    },
    Workload {
        name: "read-qd32-64-regions",
        regions: 64,
        ..PLAIN
    },
    Workload {
        name: "read-qd32-509-regions",
        regions: 509,
        ..PLAIN
    },
    Workload {
        name: "read-qd32-64-regions-scattered",
        regions: 64,
        scattered: true,
        ..PLAIN
    },
    Workload {
        name: "read-qd32-509-regions-scattered",
        regions: 509,
        scattered: true,
        ..PLAIN
    },
    Workload {
        name: "deadline-qd32",
        elevator: Kind::MqDeadline,
        ..PLAIN
    },
    Workload {
        name: "read-qd32-unrecorded",
        recorded: false,
        ..PLAIN
    },
    Workload {
        name: "read-qd1-unrecorded",
        batch: 1,
        recorded: false,
        ..PLAIN
    },
];

/// The engine as the worker shows it to blk-mq (worker/driver.rs).
struct Null<'a> {
    engine: &'a mut Engine,
    slot: DiskSlot,
}

impl Driver<GuestIo> for Null<'_> {
    #[inline]
    fn queue_rq(
        &mut self,
        _disk: DiskId,
        _hctx: HctxId,
        tag: DriverTag,
        request: &Request,
        parts: Parts<'_, GuestIo>,
    ) -> Result<(), Busy> {
        let mut rest = parts.clone();
        let first = rest.next().expect("a request has at least one part");
        let mut merged;
        let mut extents;
        let payload = match request.op {
            Op::Flush => Payload::None,
            Op::Discard | Op::WriteZeroes => {
                extents = std::iter::empty::<Extent>();
                Payload::Extents(&mut extents)
            }
            Op::Read | Op::Write if rest.next().is_none() => Payload::Buffers(first.iovecs()),
            Op::Read | Op::Write => {
                merged = parts.map(GuestIo::iovecs);
                Payload::Merged(&mut merged)
            }
        };
        let command = Command {
            op: request.op,
            offset: request.sector.bytes(),
            bytes: request.bytes,
            fua: request.fua,
            unmap: request.unmap,
            polled: false,
            payload,
        };
        // SAFETY: the null disk touches no buffer, and the guest's memory lives as long as the ring.
        // Unsafe because the engine takes raw buffers.
        unsafe { self.engine.queue_rq(self.slot, tag, command) }.map_err(|_| Busy::RetryLater)
    }
}

/// A guest and its worker.
struct Bench {
    memory: Arc<GuestMemoryMmap>,
    ring: Ring,
    mq: Mq<GuestIo>,
    hctx: HctxId,
    engine: Engine,
    slot: DiskSlot,
    pool: SegmentPool,
    shape: DiskShape,
    avail: u16,
    now_ns: u64,
}

impl Bench {
    fn new(workload: Workload) -> Bench {
        let regions: Vec<_> = (0..workload.regions)
            .map(|nth| (GuestAddress(nth * REGION_STEP), REGION_BYTES))
            .collect();
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&regions).expect("memory"));
        for head in 0..RING_SIZE {
            put_chain(&memory, workload, head);
        }
        let table = MemoryTable::from_guest_memory(Arc::clone(&memory), None).expect("a table");
        let setup = RingSetup {
            size: RING_SIZE,
            desc: DESC,
            avail: AVAIL,
            used: USED,
            next_avail: 0,
            event_idx: true,
            chain_limit: 0,
        };
        let ring = Ring::new(&setup, Arc::new(table)).expect("a ring");
        let mut mq = Mq::new(TagDepth::for_disks(1));
        let hctx = mq.add_hctx(HctxConfig {
            disk: DiskId(0),
            queue: QueueId(0),
            ring_size: RING_SIZE,
            ctxs: 1,
        });
        mq.set_elevator(
            DiskId(0),
            match workload.elevator {
                Kind::MqDeadline => Params::MqDeadline(Default::default()),
                Kind::Kyber => Params::Kyber(Default::default()),
                Kind::None => Params::None,
            },
        );
        mq.set_iostats(DiskId(0), workload.recorded);
        let mut engine = Engine::new(DRIVER_TAGS, 2).expect("io_uring");
        let slot = engine
            .add_disk(Target::Null {
                size_bytes: 1 << 40,
            })
            .expect("a null disk");
        Bench {
            memory,
            ring,
            mq,
            hctx,
            engine,
            slot,
            pool: SegmentPool::new(),
            shape: DiskShape {
                capacity: Sector(1 << 31),
                logical_block_size: 512,
                read_only: false,
                discard: None,
                write_zeroes: None,
                serial: [0; 20],
            },
            avail: 0,
            now_ns: 1,
        }
    }

    /// The guest's part: the chains are all there, and so are their heads in the ring.
    fn offer(&mut self, count: u16) {
        self.avail = self.avail.wrapping_add(count);
        self.memory
            .write_obj(self.avail.to_le(), GuestAddress(AVAIL + 2))
            .expect("the ring's index");
    }

    /// A worker's turns until the batch is answered; how many requests were.
    fn turns(&mut self) -> u16 {
        let mut answered = 0;
        while self.turn(&mut answered) {}
        answered
    }

    /// One turn: reap, publish, drain, run, notify. False when there was nothing to do.
    fn turn(&mut self, answered: &mut u16) -> bool {
        self.now_ns += 1000;
        self.mq.start_turn(self.now_ns);
        let before = *answered;
        let Bench {
            ring,
            mq,
            engine,
            pool,
            ..
        } = self;
        engine
            .reap(&mut |event| finish(ring, mq, pool, answered, event))
            .expect("a ring that works");
        ring.publish();
        let arrived = ring.available().expect("a guest that behaves") > 0;
        if arrived {
            self.drain(answered);
        }
        if self.mq.must_run() {
            self.mq.run(&mut Null {
                engine: &mut self.engine,
                slot: self.slot,
            });
        }
        self.ring.publish();
        let _ = std::hint::black_box(self.ring.should_call());
        arrived || *answered > before || self.engine.has_events()
    }

    /// In slices, as worker/drain.rs does with what is answered at once.
    fn drain(&mut self, answered: &mut u16) {
        let Bench {
            ring,
            mq,
            hctx,
            engine,
            slot,
            pool,
            shape,
            ..
        } = self;
        ring.suppress_kicks();
        loop {
            let mut driver = Null {
                engine,
                slot: *slot,
            };
            for _ in 0..SLICE {
                let Some(head) = ring.pop_head().expect("a guest that behaves") else {
                    break;
                };
                match parse(ring, head, shape, false, pool).expect("a good chain") {
                    Parsed::Request(request, io) => {
                        let tag = RequestTag(io.head());
                        mq.plug(*hctx, tag, request, io, &mut driver);
                    }
                    other => panic!("a request that was not taken: {other:?}"),
                }
            }
            mq.unplug(*hctx, &mut driver);
            if engine.has_inline() {
                engine.reap_inline(&mut |event| finish(ring, mq, pool, answered, event));
            }
            if !ring.has_more() {
                return;
            }
            ring.publish();
        }
    }

    fn batches(&mut self, workload: Workload, count: u64) {
        for _ in 0..count {
            self.offer(workload.batch);
            assert_eq!(self.turns(), workload.batch, "all requests are answered");
        }
    }
}

/// The way back.
fn finish(
    ring: &mut Ring,
    mq: &mut Mq<GuestIo>,
    pool: &mut SegmentPool,
    answered: &mut u16,
    event: Event,
) {
    let Event::Done { tag, result } = event else {
        return;
    };
    let result = result.map(drop).map_err(|_| Status::IoErr);
    mq.complete(tag, result, |_, io, status, read| {
        let read = u32::try_from(read).expect("small requests");
        ring.finish(io, status, read, pool);
        *answered += 1;
    });
}

/// Writes the chain of a head, by way of an indirect table, and the head into the ring.
fn put_chain(memory: &GuestMemoryMmap, workload: Workload, head: u16) {
    let at = CHAINS + u64::from(head) * 128;
    let (header, status) = (at + 64, at + 96);
    let region = if workload.scattered {
        (u64::from(head) * 37 + 5) % workload.regions
    } else {
        0
    };
    let data = region * REGION_STEP + 0x1_0000;
    let buffer = if workload.write { 0 } else { DESC_WRITE };
    let put = |table: u64, nth: u64, addr: u64, len: u32, flags: u16, next: u16| {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        memory
            .write_slice(&bytes, GuestAddress(table + nth * 16))
            .expect("within the memory");
    };
    put(DESC, u64::from(head), at, 48, DESC_INDIRECT, 0);
    put(at, 0, header, 16, DESC_NEXT, 1);
    put(at, 1, data, BLOCK, DESC_NEXT | buffer, 2);
    put(at, 2, status, 1, DESC_WRITE, 0);
    let sector = match workload.sequential {
        true => u64::from(head) * 8,
        false => u64::from(head) * 7919 * 8,
    };
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&u32::from(workload.write).to_le_bytes());
    bytes[8..].copy_from_slice(&sector.to_le_bytes());
    memory
        .write_slice(&bytes, GuestAddress(header))
        .expect("within the memory");
    memory
        .write_obj(head.to_le(), GuestAddress(AVAIL + 4 + 2 * u64::from(head)))
        .expect("within the memory");
}

fn main() {
    // `cargo bench` adds an argument of its own.
    let args: Vec<String> = std::env::args()
        .skip(1)
        .filter(|arg| arg != "--bench")
        .collect();
    match &args[..] {
        [name, batches] => {
            let workload = WORKLOADS.iter().find(|w| w.name == name);
            let workload = *workload.unwrap_or_else(|| panic!("there is no workload {name}"));
            let batches = batches.parse().expect("a number of batches");
            Bench::new(workload).batches(workload, batches);
        }
        [] => time(),
        other => panic!("WORKLOAD BATCHES, not {other:?}"),
    }
}

/// Rounds interleaved, so that a slow moment of the machine hits all rows. Rows that differ in recording
/// alone share their memory, where the place of each thing is worth as much as what they are to show.
fn time() {
    let recorded = |workload: &Workload| Workload {
        name: workload.name.trim_end_matches("-unrecorded"),
        recorded: true,
        ..*workload
    };
    let mut benches: BTreeMap<&str, Bench> = WORKLOADS
        .iter()
        .map(recorded)
        .map(|workload| (workload.name, Bench::new(workload)))
        .collect();
    let mut best = [f64::MAX; WORKLOADS.len()];
    for _ in 0..40 {
        for (workload, best) in WORKLOADS.iter().zip(&mut best) {
            let bench = benches.get_mut(recorded(workload).name);
            let bench = bench.expect("made for every workload");
            bench.mq.set_iostats(DiskId(0), workload.recorded);
            let start = Instant::now();
            bench.batches(*workload, 32_000 / u64::from(workload.batch));
            *best = best.min(start.elapsed().as_secs_f64() / 32_000.0 * 1e9);
        }
    }
    for (workload, best) in WORKLOADS.iter().zip(best) {
        println!("{:<34} {best:>8.1} ns a request", workload.name);
    }
}
