//! What blk-mq itself costs for each request, without rings and without an engine.
//!
//! Batches of 32 random reads of 4 KiB go through plug, dispatch and completion; whoever plays the
//! engine only remembers the tags. Times are the best of many rounds, in nanoseconds a request:
//! differences between the rows say what staging and each elevator add.
//!
//!     cargo bench --bench mq

use std::hint::black_box;
use std::time::Instant;

use vhost_user_blkmq::mq::elevator::{Kind, Params};
use vhost_user_blkmq::mq::ids::{DiskId, DriverTag, HctxId, QueueId, RequestTag, Sector};
use vhost_user_blkmq::mq::request::{IoPrio, Op, Request};
use vhost_user_blkmq::mq::tags::TagDepth;
use vhost_user_blkmq::mq::trace::Action;
use vhost_user_blkmq::mq::{Busy, Driver, HctxConfig, Mq, Parts};

const BATCH: u16 = 32;
const BATCHES: usize = 2000;
const ROUNDS: usize = 40;

/// The size of what the worker's payload is.
type Payload = u64;

struct Tags(Vec<DriverTag>);

impl Driver<Payload> for Tags {
    #[inline]
    fn queue_rq(
        &mut self,
        _disk: DiskId,
        _hctx: HctxId,
        tag: DriverTag,
        request: &Request,
        parts: Parts<'_, Payload>,
    ) -> Result<(), Busy> {
        black_box((request, parts.count()));
        self.0.push(tag);
        Ok(())
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Way {
    Direct,
    Staged,
    Elevator(Kind),
    Traced,
    Sequential,
    Unrecorded,
}

fn main() {
    let rows = [
        ("none, direct issue", Way::Direct),
        ("none, staging forced", Way::Staged),
        ("mq-deadline", Way::Elevator(Kind::MqDeadline)),
        ("kyber", Way::Elevator(Kind::Kyber)),
        ("none, direct issue, trace of everything", Way::Traced),
        ("none, sequential: 32 merged into one", Way::Sequential),
        ("none, direct issue, nothing recorded", Way::Unrecorded),
    ];
    let mut best = [f64::MAX; 7];
    // Rounds interleaved, so that a slow moment of the machine hits all rows.
    for _ in 0..ROUNDS {
        for (best, (_, way)) in best.iter_mut().zip(rows) {
            *best = best.min(round(way));
        }
    }
    println!("{:<42} {:>12}  {:>8}", "", "ns/request", "added");
    for (best_ns, (name, _)) in best.iter().zip(rows) {
        println!("{name:<42} {best_ns:>12.1}  {:>+8.1}", best_ns - best[0]);
    }
}

fn round(way: Way) -> f64 {
    let mut mq: Mq<Payload> = Mq::new(TagDepth::for_disks(1));
    let hctx = mq.add_hctx(HctxConfig {
        disk: DiskId(0),
        queue: QueueId(0),
        ring_size: 128,
        ctxs: 1,
    });
    match way {
        Way::Elevator(kind) => mq.set_elevator(DiskId(0), Params::from(kind)),
        Way::Traced => mq.trace().start(4096, &Action::ALL),
        Way::Unrecorded => mq.set_iostats(DiskId(0), false),
        Way::Direct | Way::Staged | Way::Sequential => {}
    }
    let mut tags = Tags(Vec::with_capacity(usize::from(BATCH)));
    let mut random = 1u64;
    let mut now_ns = 1;
    let started = Instant::now();
    for _ in 0..BATCHES {
        now_ns += 10_000;
        mq.start_turn(now_ns);
        if way == Way::Staged {
            mq.quiesce(hctx);
        }
        for tag in 0..BATCH {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            let sector = match way {
                Way::Sequential => u64::from(tag) * 8,
                _ => (random >> 40) * 16,
            };
            let request = Request {
                op: Op::Read,
                sector: Sector(sector),
                bytes: 4096,
                segments: 1,
                ioprio: IoPrio(0x4004),
                fua: false,
                unmap: false,
            };
            mq.plug(hctx, RequestTag(tag), request, random, &mut tags);
        }
        mq.unplug(hctx, &mut tags);
        if way == Way::Staged {
            mq.unquiesce(hctx);
        }
        // A scheduler may give out less than all at a time.
        let mut left = BATCH;
        while left > 0 {
            mq.run(&mut tags);
            now_ns += 1000;
            mq.start_turn(now_ns);
            while let Some(tag) = tags.0.pop() {
                mq.complete(tag, Ok(()), |id: HctxId, payload, status, read| {
                    black_box((id, payload, status, read));
                    left -= 1;
                });
            }
        }
    }
    #[expect(
        clippy::cast_precision_loss,
        reason = "a number of nanoseconds to be shown"
    )]
    let ns = started.elapsed().as_nanos() as f64;
    #[expect(clippy::cast_precision_loss, reason = "a number of requests")]
    let requests = (BATCHES * usize::from(BATCH)) as f64;
    ns / requests
}
