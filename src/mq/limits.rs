//! Every limit of the data path, in one place, and how they hang together.

/// The unit of sector numbers (virtio 1.3, section 5.2.4).
pub const SECTOR_SIZE: u64 = 512;

/// The largest ring a front end may set up. QEMU's own limit, and the default of most others.
pub const MAX_RING_SIZE: u16 = 1024;

/// The most virtqueues a disk may offer.
pub const MAX_QUEUES: u16 = 256;

/// How many host buffers one system call takes (`UIO_MAXIOV`, uapi/linux/uio.h).
pub const IOV_MAX: u16 = 1024;

/// Segments kept with each entry of a ring; requests with more borrow a [`MAX_SEGMENTS`] buffer.
pub const INLINE_SEGMENTS: u16 = 8;

/// The most host buffers one request may consist of. Twice the ring: a guest buffer that crosses
/// from one memory region to the next counts twice.
pub const MAX_SEGMENTS: u16 = 2 * MAX_RING_SIZE;

/// How many requests of one disk on one worker can have more than [`INLINE_SEGMENTS`] segments at a
/// time. When all are lent out, the rest waits in the ring.
pub const BIG_REQUESTS: u16 = 64;

/// Ranges in one discard or write-zeroes request (`max_discard_seg`, virtio 1.3, section 5.2.4).
pub const MAX_RANGES: u16 = 32;

/// Driver tags of one worker that serves a few disks: the most operations its engine has in flight. One
/// that serves many has more ([`super::tags::TagDepth`]).
pub const DRIVER_TAGS: u16 = 256;

/// Driver tags of a worker that each of its disks can always have, up to four disks ...
pub const DISK_TAGS: u16 = 32;

/// ... and however many there are.
pub const MIN_DISK_TAGS: u16 = 2;

/// Driver tags that only flushes may take, so that a flood of writes cannot keep a flush out: divided among
/// the worker's disks ...
pub const DISK_FLUSH_TAGS: u16 = 8;

/// ... with so many for each disk at least.
pub const MIN_DISK_FLUSH_TAGS: u16 = 1;

/// Driver tags of a worker that any of its disks can take, at least.
pub const SHARED_TAGS: u16 = 128;

/// Requests a plug holds before it is flushed (`BLK_MAX_REQUEST_COUNT`, block/blk-mq.c).
pub const PLUG_REQUESTS: usize = 32;

/// A plugged request this large flushes the plug (`BLK_PLUG_FLUSH_SIZE`, block/blk-mq.c).
pub const PLUG_FLUSH_BYTES: u64 = 128 * 1024;

/// The largest request merging may build, in bytes.
pub const MAX_MERGED_BYTES: u64 = 1024 * 1024;

/// How far a merge looks back among staged requests (blk_mq_attempt_bio_merge, block/blk-mq-sched.c).
pub const MERGE_LOOKBACK: usize = 8;

/// How many hctxs one worker serves at most, over all disks: each has a call and an err fd in the engine's
/// table, whose places have numbers of 16 bits.
pub const MAX_HCTXS: u16 = 16384;

/// Most events one worker keeps of a trace.
pub const MAX_TRACE_EVENTS: usize = 128 * 1024;

/// Most groups of disks.
pub const MAX_GROUPS: usize = 1024;

const _: () = {
    assert!(MAX_RING_SIZE.is_power_of_two());
    assert!(INLINE_SEGMENTS < MAX_SEGMENTS);
    assert!(MAX_RANGES <= MAX_SEGMENTS);
    assert!(DISK_TAGS + DISK_FLUSH_TAGS + SHARED_TAGS <= DRIVER_TAGS);
    assert!(MAX_MERGED_BYTES < u32::MAX as u64);
    assert!(IOV_MAX <= MAX_SEGMENTS);
};

/// How long an hctx waits that the engine refused without promising a wake-up
/// (`BLK_MQ_RESOURCE_DELAY`, block/blk-mq.c).
pub const RESOURCE_DELAY_NS: u64 = 3_000_000;

/// An hctx that used no driver tag for this long gives up its share of them.
pub const ACTIVITY_DECAY_NS: u64 = 1_000_000_000;
