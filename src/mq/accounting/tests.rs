use super::super::stats::histogram::Histogram;
use super::*;
use crate::mq::ids::{DriverTag, QueueId, RequestTag, Sector};
use crate::mq::request::{IoPrio, Status};
use crate::mq::tags::TagDepth;
use crate::mq::{Busy, Driver, HctxConfig, Parts};

struct Taken(Vec<DriverTag>);

impl Driver<()> for Taken {
    fn queue_rq(
        &mut self,
        _disk: DiskId,
        _hctx: HctxId,
        tag: DriverTag,
        _request: &Request,
        _parts: Parts<'_, ()>,
    ) -> Result<(), Busy> {
        self.0.push(tag);
        Ok(())
    }
}

/// What came and is with the engine.
struct Flying {
    driver_tag: DriverTag,
    hctx: usize,
    tag: u16,
    op: Op,
    came_ns: u64,
}

struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005);
        self.0 = self.0.wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

/// Counts each request for itself, which is what runs have to come to.
#[derive(Default)]
struct Slow {
    stats: [HctxStats; 2],
    device: [[Histogram; 2]; 2],
    completed: u64,
    account: Account,
}

const OPS: [Op; 4] = [Op::Read, Op::Write, Op::Discard, Op::WriteZeroes];

#[test]
fn runs_come_to_what_counting_each_request_comes_to() {
    let mut random = Random(1);
    let mut mq: Mq<()> = Mq::new(TagDepth::for_disks(1));
    let mut below = Taken(Vec::new());
    let ids: Vec<HctxId> = [1, 3]
        .into_iter()
        .zip(0..)
        .map(|(ctxs, queue)| {
            mq.add_hctx(HctxConfig {
                disk: DiskId(0),
                queue: QueueId(queue),
                ring_size: 16,
                ctxs,
            })
        })
        .collect();
    let mut slow = Slow::default();
    let mut flying: Vec<Flying> = Vec::new();
    let (mut now_ns, mut sector) = (1, 0);
    for round in 0..3000 {
        // Several steps happen in one turn.
        if random.below(3) == 0 {
            now_ns += random.below(1000);
            mq.start_turn(now_ns);
        }
        let hctx = random.below(2) as usize;
        for tag in 0..random.below(6) as u16 {
            if flying.iter().any(|f| (f.hctx, f.tag) == (hctx, tag)) {
                continue;
            }
            let op = OPS[(random.below(8) as usize).min(3)];
            // Never neighbours: nothing is merged.
            sector += 16;
            let request = Request {
                op,
                sector: Sector(sector),
                bytes: 4096,
                segments: 1,
                ioprio: IoPrio::default(),
                fua: true,
                unmap: false,
            };
            mq.plug(ids[hctx], RequestTag(tag), request, (), &mut below);
            let stats = &mut slow.stats[hctx];
            stats.accepted(op, 1);
            stats.dispatched += 1;
            stats.direct += 1;
            slow.account.start(now_ns, op);
            flying.push(Flying {
                driver_tag: DriverTag {
                    index: 0,
                    generation: 0,
                },
                hctx,
                tag,
                op,
                came_ns: now_ns,
            });
        }
        mq.unplug(ids[hctx], &mut below);
        slow.stats[hctx].batches += 1;
        let first = flying.len() - below.0.len();
        for (flying, driver_tag) in flying[first..].iter_mut().zip(below.0.drain(..)) {
            flying.driver_tag = driver_tag;
        }
        for _ in 0..random.below(6) {
            if flying.is_empty() {
                break;
            }
            let ended = flying.remove(random.below(flying.len() as u64) as usize);
            let good = random.below(8) != 0;
            let result = if good { Ok(()) } else { Err(Status::IoErr) };
            mq.complete(ended.driver_tag, result, |_, (), _, _| {});
            let stats = &mut slow.stats[ended.hctx];
            if good {
                stats.succeeded(ended.op, 4096);
            } else {
                stats.errors += 1;
            }
            let times = &mut slow.device[ended.hctx][usize::from(ended.op != Op::Read)];
            times.record(now_ns - ended.came_ns);
            slow.completed += 1;
            slow.account.done(now_ns, ended.op, 8, ended.came_ns);
        }
        if round % 7 != 0 {
            continue;
        }
        assert_eq!(mq.disk_stats(DiskId(0)), slow.account.at(now_ns));
        let mut completed = 0;
        for (at, id) in ids.iter().enumerate() {
            assert_eq!(*mq.stats(*id), slow.stats[at]);
            let [read, other] = &slow.device[at];
            let times = mq.times(*id);
            assert_eq!((&times.device_read, &times.device_other), (read, other));
            let ctxs = mq.ctx_stats(*id).to_vec();
            let sum = |of: fn(&CtxStats) -> u64| ctxs.iter().map(of).sum::<u64>();
            assert_eq!(sum(|ctx| ctx.queued), slow.stats[at].requests);
            assert_eq!(sum(|ctx| ctx.dispatched), slow.stats[at].dispatched);
            completed += sum(|ctx| ctx.completed);
        }
        assert_eq!(completed, slow.completed);
    }
    assert!(slow.completed > 3000, "{} ended", slow.completed);
}

#[test]
fn a_disk_without_iostats_counts_nothing() {
    let mut mq: Mq<()> = Mq::new(TagDepth::for_disks(1));
    let mut below = Taken(Vec::new());
    let config = HctxConfig {
        disk: DiskId(0),
        queue: QueueId(0),
        ring_size: 16,
        ctxs: 1,
    };
    let id = mq.add_hctx(config);
    let mut once = |mq: &mut Mq<()>| {
        let request = Request {
            op: Op::Read,
            sector: Sector(0),
            bytes: 512,
            segments: 1,
            ioprio: IoPrio::default(),
            fua: false,
            unmap: false,
        };
        mq.plug(id, RequestTag(0), request, (), &mut below);
        mq.unplug(id, &mut below);
        let tag = below.0.pop().expect("it was issued");
        mq.complete(tag, Ok(()), |_, (), _, _| {});
    };
    mq.set_iostats(DiskId(0), false);
    once(&mut mq);
    assert_eq!((mq.stats(id).requests, mq.stats(id).dispatched), (0, 0));
    assert_eq!(mq.disk_stats(DiskId(0)), DiskStats::default());
    mq.set_iostats(DiskId(0), true);
    once(&mut mq);
    assert_eq!((mq.stats(id).requests, mq.stats(id).dispatched), (1, 1));
    assert_eq!(mq.disk_stats(DiskId(0)).reads.ios, 1);
}
