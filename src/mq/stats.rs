//! Counters: plain numbers of the thread that owns them, copied out when somebody asks.

use serde::Serialize;

use super::request::{Op, Request, Status};

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
    /// Requests that were taken back from the engine and sent again.
    pub requeued: u64,
    /// Requests that ended with an error, those the parser rejected not counted.
    pub errors: u64,
}

impl HctxStats {
    #[inline]
    pub(super) fn accepted(&mut self, request: &Request) {
        self.requests += 1;
        *match request.op {
            Op::Read => &mut self.read,
            Op::Write => &mut self.write,
            Op::Flush => &mut self.flush,
            Op::Discard => &mut self.discard,
            Op::WriteZeroes => &mut self.write_zeroes,
        } += 1;
    }

    #[inline]
    pub(super) fn completed(&mut self, op: Op, bytes: u64, status: Status) {
        match (status, op) {
            (Status::Ok, Op::Read) => self.bytes_read += bytes,
            (Status::Ok, Op::Write) => self.bytes_written += bytes,
            (Status::Ok, _) => {}
            _ => self.errors += 1,
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
            requeued,
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
            (&mut self.requeued, requeued),
            (&mut self.errors, errors),
        ] {
            *sum += more;
        }
    }
}
