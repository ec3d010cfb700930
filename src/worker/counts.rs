//! What workers count, and what they trace, as they hand it out.

use std::time::Duration;

use serde::Serialize;

use super::io_errors::DiskFaults;
use crate::engine::EngineCounters;
use crate::mq::ids::{DiskId, RingId, WorkerId};
use crate::mq::stats::diskstats::DiskStats;
use crate::mq::stats::{CtxStats, HctxStats, HctxTimes};
use crate::mq::trace::Event;

/// What a ring itself counted, beside blk-mq.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct RingStats {
    /// Kicks seen: wake-ups by the guest. Requests found while looking anyway need none.
    pub kicks: u64,
    /// Calls made: interrupts for the guest.
    pub calls: u64,
    /// Requests answered without the disk: GET_ID, and what the parser rejected.
    pub answered: u64,
}

/// What one worker counted.
#[derive(Clone, Debug)]
pub struct WorkerReport {
    /// Who it is.
    pub worker: WorkerId,
    /// It does not answer now, and these are the counts of its last answer.
    pub stuck: bool,
    /// For each virtqueue it serves or served.
    pub queues: Vec<QueueReport>,
    /// For each disk.
    pub disks: Vec<(DiskId, DiskStats)>,
    /// For each disk.
    pub faults: Vec<(DiskId, DiskFaults)>,
    /// For each disk that the engine has something of, for how long it has had the oldest request.
    pub oldest: Vec<(DiskId, Duration)>,
    /// Its engine's work.
    pub engine: EngineCounters,
}

/// One virtqueue's counts, over all the times it was started.
#[derive(Clone, Debug)]
pub struct QueueReport {
    /// Which one.
    pub ring: RingId,
    /// Who served it last.
    pub worker: u16,
    /// What each ctx did since the queue has that many.
    pub ctx: Vec<CtxStats>,
    /// blk-mq's counts.
    pub mq: HctxStats,
    /// How long its requests were where.
    pub times: Box<HctxTimes>,
    /// The ring's counts.
    pub io: RingStats,
}

impl QueueReport {
    /// Nothing counted yet.
    pub fn new(ring: RingId, worker: u16) -> Self {
        QueueReport {
            ring,
            worker,
            ctx: Vec::new(),
            mq: HctxStats::default(),
            times: Box::default(),
            io: RingStats::default(),
        }
    }

    /// Adds what another period of the same queue counted; ctxs come and go, so theirs is the last.
    pub fn add(&mut self, ctx: Vec<CtxStats>, mq: &HctxStats, times: &HctxTimes, io: &RingStats) {
        self.ctx = ctx;
        self.mq.add(mq);
        self.times.add(times);
        self.io.kicks += io.kicks;
        self.io.calls += io.calls;
        self.io.answered += io.answered;
    }
}

/// One traced event, with the virtqueue it is about.
#[derive(Clone, Copy, Debug)]
pub struct Traced {
    /// Where it happened.
    pub ring: RingId,
    /// Who recorded it.
    pub worker: WorkerId,
    /// What happened.
    pub event: Event,
}

/// What one worker traced.
#[derive(Clone, Debug, Default)]
pub struct TraceReport {
    /// Oldest first.
    pub events: Vec<Traced>,
    /// How many were overwritten since the start of the trace before anybody took them.
    pub lost: u64,
}
