//! What a caller and the engine say to each other: commands, events, refusals, and the engine's limits.

use std::fmt;

use crate::mq::ids::DriverTag;
use crate::mq::limits::{IOV_MAX, MAX_RANGES, MAX_SEGMENTS};
use crate::mq::request::Op;

/// Disks one engine serves at most: the size of the ring's registered file table.
pub const MAX_DISKS: u16 = 1024;

/// Aligned buffers for requests whose guest buffers O_DIRECT cannot take: those that each disk can always
/// have, whatever other disks hold.
pub const BOUNCE_OF_DISK: u16 = 2;

/// Those that any disk can take beyond that.
pub const BOUNCE_SHARED: u16 = 14;

/// The size of each of them, in bytes. Larger requests go through one buffer piece by piece.
pub const BOUNCE_BYTES: u32 = 256 * 1024;

/// How much of a large copy is done before another has its turn, in bytes: about 10 µs.
pub const COPY_SLICE_BYTES: u64 = 64 * 1024;

/// How much is copied in one turn of the worker, in bytes, give or take a slice.
pub const COPY_TURN_BYTES: u64 = 128 * 1024;

/// A copy of so many bytes at most goes before all larger ones.
pub const COPY_SMALL_BYTES: u64 = 16 * 1024;

/// The most that one transfer moves at a time past the page cache, in bytes. The submitting call looks up each
/// of its pages, which takes some 100 µs.
pub const DIRECT_PIECE_BYTES: u32 = 4 * 1024 * 1024;

/// The same through the page cache, where the submitting call copies: about 50 µs.
pub const CACHED_PIECE_BYTES: u32 = 256 * 1024;

/// How much the submitting calls of one turn copy, in bytes, give or take a piece. What is beyond, and not
/// small, waits for the next turn.
pub const TURN_BYTES: u32 = 1024 * 1024;

/// How many bytes past the page cache cost the submitting call as much as one that it copies.
pub const DIRECT_PER_CACHED: u32 = 16;

/// How much zeroing by writing does at a time, in bytes.
pub const ZERO_BYTES: u32 = 1024 * 1024;

/// How often an operation that makes no progress (`EAGAIN`, `EINTR`) is tried again before the
/// guest hears of it. The delays between add up to about half a second.
pub const RETRIES: u8 = 10;

const _: () = {
    assert!(BOUNCE_BYTES.is_multiple_of(4096) && ZERO_BYTES.is_multiple_of(4096));
    assert!(IOV_MAX <= MAX_SEGMENTS);
    assert!(MAX_RANGES <= 256);
    // A piece ends where every device's blocks do.
    assert!(
        DIRECT_PIECE_BYTES.is_multiple_of(BOUNCE_BYTES)
            && (CACHED_PIECE_BYTES as u64) > COPY_SMALL_BYTES
    );
};

/// A disk of this engine, as [`super::Engine::add_disk`] numbers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DiskSlot(pub(crate) u16);

/// A host error number (`errno`), positive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Errno(pub i32);

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        std::io::Error::from_raw_os_error(self.0).fmt(f)
    }
}

/// Why a request could not be taken now, and who makes it worth trying again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Busy {
    /// A completion of this engine will free what is missing (blk-mq's `BLK_STS_DEV_RESOURCE`).
    WakesOnCompletion,
    /// Nobody will say: the host lacks something for the moment, try again after a while (blk-mq's
    /// `BLK_STS_RESOURCE`).
    RetryLater,
}

/// A range of the disk, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[repr(C)]
pub struct Extent {
    /// Where it starts.
    pub offset: u64,
    /// How long it is.
    pub len: u64,
}

/// What a request works on.
pub enum Payload<'a> {
    /// Nothing (flush).
    None,
    /// The host buffers of one request (read, write).
    Buffers(&'a [libc::iovec]),
    /// The host buffers of a merged request, one slice for each part, [`MAX_SEGMENTS`] in all at most.
    /// The slices are copied before `queue_rq` returns; the buffers they name are not.
    Merged(&'a mut dyn Iterator<Item = &'a [libc::iovec]>),
    /// The ranges of a discard or write-zeroes, [`MAX_RANGES`] at most; copied.
    Extents(&'a mut dyn Iterator<Item = Extent>),
}

impl fmt::Debug for Payload<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Payload::None => f.write_str("None"),
            Payload::Buffers(b) => write!(f, "Buffers({})", b.len()),
            Payload::Merged(_) => f.write_str("Merged(..)"),
            Payload::Extents(_) => f.write_str("Extents(..)"),
        }
    }
}

/// One operation for a disk.
#[derive(Debug)]
pub struct Command<'a> {
    /// What to do.
    pub op: Op,
    /// Where on the disk, in bytes. Unused for flush, discard and write-zeroes.
    pub offset: u64,
    /// How much, in bytes: exactly the sum of the payload's buffers or ranges.
    pub bytes: u64,
    /// Durable when done.
    pub fua: bool,
    /// Write-zeroes may free the blocks.
    pub unmap: bool,
    /// Whoever asks polls for the answer (`REQ_POLLED`).
    pub polled: bool,
    /// Its buffers or ranges.
    pub payload: Payload<'a>,
}

/// What [`super::Engine::reap`] reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A command is over, as a whole or failed; its buffers belong to the caller again.
    Done {
        /// The tag it was queued with.
        tag: DriverTag,
        /// The bytes of the command, or the error that ended it.
        result: Result<u64, Errno>,
    },
    /// A watched eventfd was written to. One event may stand for several writes.
    Kick(u32),
    /// The [`super::Waker`] was used. One event may stand for several uses.
    Message,
    /// A watched fd hung up or cannot be polled; it will not report again.
    WatchLost {
        /// What it was watched as.
        token: u32,
        /// Why; `EPIPE` for a hang-up.
        error: Errno,
    },
    /// A call fd cannot be written to; later calls on it do nothing.
    CallLost {
        /// What it was added as.
        token: u32,
        /// Why.
        error: Errno,
    },
}

/// What an engine has done since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EngineCounters {
    /// System calls (`io_uring_enter`).
    pub enters: u64,
    /// Those of them that the kernel refused for the moment (`EAGAIN`, `EBUSY`, `ENOMEM`, `EINTR`).
    pub refused: u64,
    /// Submission entries prepared.
    pub sqes: u64,
    /// Completion entries seen.
    pub cqes: u64,
    /// Commands completed without the kernel (null disk, flush of an unsafe disk, small copies).
    pub inline: u64,
    /// Commands that were copied from or to an image in memory.
    pub copied: u64,
    /// System calls of such copies, where the image may have a hole.
    pub copy_calls: u64,
    /// Commands that went through an aligned buffer.
    pub bounced: u64,
    /// Transfers whose completion the device was polled for.
    pub polled: u64,
    /// Partial transfers that were continued.
    pub continued: u64,
    /// Operations tried again after `EAGAIN` or `EINTR`.
    pub retried: u64,
    /// Transfers that could not go on without waiting, and were given to a kernel thread.
    pub punted: u64,
    /// Operations that the kernel gave up because it could start no thread, and that were tried again.
    pub threadless: u64,
    /// Steps that waited in the engine because their disk has enough of them with the kernel.
    pub waited: u64,
    /// Discarded ranges the disk had no way to discard.
    pub discards_ignored: u64,
    /// Ranges zeroed by writing, because the disk had no shorter way.
    pub zeroes_written: u64,
    /// Commands refused for the moment.
    pub busy: u64,
    /// Calls written, and calls that were folded into one still under way.
    pub calls: u64,
    /// See `calls`.
    pub calls_folded: u64,
    /// Watches the kernel ended and that were armed again.
    pub rearmed: u64,
    /// Completions that belonged to nobody any more.
    pub stale: u64,
}
