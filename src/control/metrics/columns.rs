//! Which counters there are, under which names.

use crate::engine::EngineCounters;
use crate::mq::stats::diskstats::{Direction, DiskStats};
use crate::mq::stats::histogram::Histogram;
use crate::worker::counts::QueueReport;

use super::seconds;

/// A value of one kind of thing, with a name and what it means.
pub(super) type Column<T> = (&'static str, &'static str, &'static str, fn(&T) -> f64);

pub(super) const DISK_COLUMNS: &[Column<DiskStats>] = &[
    (
        "reads_completed_total",
        "counter",
        "Reads that ended.",
        |s| s.reads.ios as f64,
    ),
    (
        "reads_merged_total",
        "counter",
        "Reads that became part of another.",
        |s| s.reads.merges as f64,
    ),
    (
        "read_bytes_total",
        "counter",
        "Bytes of reads that ended.",
        |s| bytes(s.reads),
    ),
    (
        "read_time_seconds_total",
        "counter",
        "Time that reads took together.",
        |s| seconds(s.reads.time_ns),
    ),
    (
        "writes_completed_total",
        "counter",
        "Writes and write-zeroes that ended.",
        |s| s.writes.ios as f64,
    ),
    (
        "writes_merged_total",
        "counter",
        "Writes that became part of another.",
        |s| s.writes.merges as f64,
    ),
    (
        "written_bytes_total",
        "counter",
        "Bytes of writes that ended.",
        |s| bytes(s.writes),
    ),
    (
        "write_time_seconds_total",
        "counter",
        "Time that writes took together.",
        |s| seconds(s.writes.time_ns),
    ),
    ("io_now", "gauge", "Requests in flight.", |s| {
        s.in_flight as f64
    }),
    (
        "io_time_seconds_total",
        "counter",
        "Time with something in flight, a sum over workers.",
        |s| seconds(s.busy_ns),
    ),
    (
        "io_time_weighted_seconds_total",
        "counter",
        "Requests in flight, summed over time.",
        |s| seconds(s.weighted_ns),
    ),
    (
        "discards_completed_total",
        "counter",
        "Discards that ended.",
        |s| s.discards.ios as f64,
    ),
    (
        "discards_merged_total",
        "counter",
        "Discards that became part of another.",
        |s| s.discards.merges as f64,
    ),
    (
        "discarded_sectors_total",
        "counter",
        "Sectors of 512 bytes that were discarded.",
        |s| s.discards.sectors as f64,
    ),
    (
        "discard_time_seconds_total",
        "counter",
        "Time that discards took together.",
        |s| seconds(s.discards.time_ns),
    ),
    (
        "flush_requests_total",
        "counter",
        "Flushes that ended.",
        |s| s.flushes as f64,
    ),
    (
        "flush_requests_time_seconds_total",
        "counter",
        "Time that flushes took together.",
        |s| seconds(s.flush_ns),
    ),
];

fn bytes(direction: Direction) -> f64 {
    direction.sectors as f64 * 512.0
}

pub(super) const QUEUE_COLUMNS: &[Column<QueueReport>] = &[
    ("ctxs", "gauge", "Staging queues.", |q| {
        f64::from(u32::try_from(q.ctx.len()).unwrap_or(u32::MAX))
    }),
    (
        "read_bytes_total",
        "counter",
        "Bytes read by requests that succeeded.",
        |q| q.mq.bytes_read as f64,
    ),
    (
        "written_bytes_total",
        "counter",
        "Bytes written by requests that succeeded.",
        |q| q.mq.bytes_written as f64,
    ),
    (
        "batches_total",
        "counter",
        "Drains of the ring that found something.",
        |q| q.mq.batches as f64,
    ),
    (
        "direct_total",
        "counter",
        "Requests issued straight from the plug.",
        |q| q.mq.direct as f64,
    ),
    (
        "staged_total",
        "counter",
        "Requests that were staged first.",
        |q| q.mq.staged as f64,
    ),
    (
        "merged_total",
        "counter",
        "Requests that travelled as a part of another.",
        |q| q.mq.merged as f64,
    ),
    (
        "flush_joined_total",
        "counter",
        "Flushes that ended with another.",
        |q| q.mq.flush_joined as f64,
    ),
    (
        "dispatched_total",
        "counter",
        "Requests handed to the engine.",
        |q| q.mq.dispatched as f64,
    ),
    (
        "requeued_total",
        "counter",
        "Requests taken back and sent again.",
        |q| q.mq.requeued as f64,
    ),
    (
        "throttled_total",
        "counter",
        "Times that limits held the queue up.",
        |q| q.mq.throttled as f64,
    ),
    (
        "errors_total",
        "counter",
        "Requests that ended with an error.",
        |q| q.mq.errors as f64,
    ),
    (
        "answered_total",
        "counter",
        "Requests answered without the disk.",
        |q| q.io.answered as f64,
    ),
    ("kicks_total", "counter", "Wake-ups by the guest.", |q| {
        q.io.kicks as f64
    }),
    ("calls_total", "counter", "Interrupts for the guest.", |q| {
        q.io.calls as f64
    }),
];

pub(super) type Times = fn(&QueueReport) -> &Histogram;

pub(super) const QUEUE_TIMES: &[(&str, &str, Times)] = &[
    (
        "staged_seconds",
        "Time from the ring to leaving the ctx or elevator.",
        |q| &q.times.staged,
    ),
    ("dispatch_seconds", "Time from there to the engine.", |q| {
        &q.times.dispatch
    }),
    ("device_read_seconds", "Time in the engine: reads.", |q| {
        &q.times.device_read
    }),
    (
        "device_other_seconds",
        "Time in the engine: all but reads.",
        |q| &q.times.device_other,
    ),
];

pub(super) type Counter = (&'static str, &'static str, fn(&EngineCounters) -> u64);
pub(super) const WORKER_COUNTERS: &[Counter] = &[
    ("enters", "System calls (io_uring_enter).", |c| c.enters),
    ("refused", "System calls refused for the moment.", |c| {
        c.refused
    }),
    ("sqes", "Submission entries prepared.", |c| c.sqes),
    ("cqes", "Completion entries seen.", |c| c.cqes),
    ("inline", "Commands completed without the kernel.", |c| {
        c.inline
    }),
    (
        "copied",
        "Commands copied from or to an image in memory.",
        |c| c.copied,
    ),
    (
        "copy_calls",
        "System calls for the holes of images in memory.",
        |c| c.copy_calls,
    ),
    ("polled", "Transfers the device was polled for.", |c| {
        c.polled
    }),
    (
        "bounced",
        "Commands that went through an aligned buffer.",
        |c| c.bounced,
    ),
    ("continued", "Partial transfers that were continued.", |c| {
        c.continued
    }),
    ("retried", "Operations tried again.", |c| c.retried),
    (
        "discards_ignored",
        "Ranges the image had no way to discard.",
        |c| c.discards_ignored,
    ),
    ("zeroes_written", "Ranges zeroed by writing.", |c| {
        c.zeroes_written
    }),
    ("busy", "Commands refused for the moment.", |c| c.busy),
    ("calls", "Calls to guests written.", |c| c.calls),
    ("calls_folded", "Calls folded into one under way.", |c| {
        c.calls_folded
    }),
    ("rearmed", "Watches of kicks armed again.", |c| c.rearmed),
    (
        "stale",
        "Completions that belonged to nobody any more.",
        |c| c.stale,
    ),
];
