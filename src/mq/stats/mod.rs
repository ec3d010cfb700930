//! Counters: plain numbers of the thread that owns them, copied out when somebody asks.

use serde::Serialize;

use self::histogram::{Dispatched, Histogram};
use super::request::Op;

pub(super) mod batch;
pub mod diskstats;
pub mod histogram;
pub(super) mod key;

/// What one hctx did since its ring was first started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct HctxStats {
    /// Requests accepted.
    pub requests: u64,
    /// Reads among them.
    pub read: u64,
    /// Writes among them.
    pub write: u64,
    /// Flushes among them.
    pub flush: u64,
    /// Discards among them.
    pub discard: u64,
    /// Write-zeroes among them.
    pub write_zeroes: u64,
    /// Bytes the guest got from the disk, in requests that succeeded.
    pub bytes_read: u64,
    /// Bytes the guest wrote to the disk, in requests that succeeded.
    pub bytes_written: u64,
    /// Drains of the ring that found something: plugs.
    pub batches: u64,
    /// Requests the engine took straight from the plug.
    pub direct: u64,
    /// Requests that were put into a ctx or the leftovers first.
    pub staged: u64,
    /// Requests that travelled as a part of another.
    pub merged: u64,
    /// Flushes that ended with another one, which began after they came.
    pub flush_joined: u64,
    /// Requests handed to the engine: leaders of merged ones, and parts that were sent again.
    pub dispatched: u64,
    /// Requests that were taken back from the engine and sent again.
    pub requeued: u64,
    /// Times the rate limits of the disk or its group held this queue up.
    pub throttled: u64,
    /// Requests that ended with an error, those the parser rejected not counted.
    pub errors: u64,
}

impl HctxStats {
    #[inline]
    pub(super) fn accepted(&mut self, op: Op, count: u64) {
        self.requests += count;
        *match op {
            Op::Read => &mut self.read,
            Op::Write => &mut self.write,
            Op::Flush => &mut self.flush,
            Op::Discard => &mut self.discard,
            Op::WriteZeroes => &mut self.write_zeroes,
        } += count;
    }

    /// Requests ended well that moved so many bytes together.
    #[inline]
    pub(super) fn succeeded(&mut self, op: Op, bytes: u64) {
        match op {
            Op::Read => self.bytes_read += bytes,
            Op::Write => self.bytes_written += bytes,
            Op::Flush | Op::Discard | Op::WriteZeroes => {}
        }
    }

    /// Adds what another period of the same queue counted.
    pub fn add(&mut self, other: &HctxStats) {
        let HctxStats {
            requests,
            read,
            write,
            flush,
            discard,
            write_zeroes,
            bytes_read,
            bytes_written,
            batches,
            direct,
            staged,
            merged,
            flush_joined,
            dispatched,
            requeued,
            throttled,
            errors,
        } = other;
        for (sum, more) in [
            (&mut self.requests, requests),
            (&mut self.read, read),
            (&mut self.write, write),
            (&mut self.flush, flush),
            (&mut self.discard, discard),
            (&mut self.write_zeroes, write_zeroes),
            (&mut self.bytes_read, bytes_read),
            (&mut self.bytes_written, bytes_written),
            (&mut self.batches, batches),
            (&mut self.direct, direct),
            (&mut self.staged, staged),
            (&mut self.merged, merged),
            (&mut self.flush_joined, flush_joined),
            (&mut self.dispatched, dispatched),
            (&mut self.requeued, requeued),
            (&mut self.throttled, throttled),
            (&mut self.errors, errors),
        ] {
            *sum += more;
        }
    }
}

/// How long requests of one hctx were where. Times are those of the worker's turns: a request that
/// came and went in one turn took none.
#[derive(Clone, Debug, Default)]
pub struct HctxTimes {
    /// From the ring to leaving the ctx or the elevator; of requests that were staged.
    pub staged: Histogram,
    /// From there to the engine, tags and budget permitting; of requests that were staged.
    pub dispatch: Histogram,
    /// From the engine's taking it to its completion, reads.
    pub device_read: Histogram,
    /// The same of everything else.
    pub device_other: Histogram,
    /// How many requests each run of the queue handed to the engine (the kernel's `dispatched`).
    pub runs: Dispatched,
}

impl HctxTimes {
    /// Where the device's times for `op` are counted.
    #[inline]
    pub(super) fn device(&mut self, op: Op) -> &mut Histogram {
        match op {
            Op::Read => &mut self.device_read,
            _ => &mut self.device_other,
        }
    }

    /// Adds what another period of the same queue took.
    pub fn add(&mut self, other: &HctxTimes) {
        self.staged.merge(&other.staged);
        self.dispatch.merge(&other.dispatch);
        self.device_read.merge(&other.device_read);
        self.device_other.merge(&other.device_other);
        self.runs.add(&other.runs);
    }
}

/// What one ctx did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CtxStats {
    /// Requests assigned to it.
    pub queued: u64,
    /// Those that became parts of others.
    pub merged: u64,
    /// Those that were handed to the engine.
    pub dispatched: u64,
    /// Those that ended.
    pub completed: u64,
}
