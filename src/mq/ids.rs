//! Names for things that are numbers, so that one cannot be passed for another.
//!
//! Sizes are bytes unless the type says sectors; a sector is always 512 bytes, whatever the disk's
//! logical block size is (virtio 1.3, section 5.2.4).

use std::fmt;

use super::limits::SECTOR_SIZE;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $inner:ty) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub $inner);

        impl $name {
            /// The number as an array index.
            #[inline]
            pub fn index(self) -> usize {
                usize::from(self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

id!(
    /// A disk of this process, in the order of the configuration.
    DiskId,
    u16
);
id!(
    /// A virtqueue of one disk, as the front end numbers it.
    QueueId,
    u16
);
id!(
    /// A hardware context of one worker: a slot of the worker's table, not the virtqueue's number.
    HctxId,
    u16
);
id!(
    /// A staging queue (ctx) of one hctx: its position among that hctx's ctxs.
    CtxId,
    u16
);
id!(
    /// The request tag: the head descriptor's index, unique in its hctx while the request is in
    /// flight (blk-mq's internal tag).
    RequestTag,
    u16
);
id!(
    /// A worker thread.
    WorkerId,
    u16
);

/// A virtqueue of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RingId {
    /// Its disk.
    pub disk: DiskId,
    /// Its number there.
    pub queue: QueueId,
}

impl fmt::Display for RingId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "disk {} queue {}", self.disk, self.queue)
    }
}

/// One request of one worker: which hctx, and which tag in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RequestId {
    /// The hctx whose table holds the request.
    pub hctx: HctxId,
    /// Its place there.
    pub tag: RequestTag,
}

/// The driver tag: a slot of the worker's in-flight table, and how often that slot has been used.
///
/// It travels through the engine as part of the completion's user data; the generation makes a
/// completion that comes after its slot was given to someone else recognizable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DriverTag {
    /// The slot.
    pub index: u16,
    /// Incremented at each use of the slot, wrapping.
    pub generation: u16,
}

/// A position or a length in units of 512 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Sector(pub u64);

impl Sector {
    /// The position in bytes.
    ///
    /// Sectors are checked against the disk's capacity before one of these is made, so the product
    /// does not overflow.
    #[inline]
    pub fn bytes(self) -> u64 {
        self.0 * SECTOR_SIZE
    }

    /// The sector a byte position falls in.
    #[inline]
    pub fn of_bytes(bytes: u64) -> Self {
        Sector(bytes / SECTOR_SIZE)
    }
}
