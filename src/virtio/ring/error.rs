//! What can be wrong with a ring.

use std::fmt;

use crate::mq::limits::{MAX_HCTXS, MAX_RING_SIZE};
use crate::virtio::inflight::InflightError;

/// The parts of a split ring (section 2.7).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RingPart {
    /// The descriptor table.
    Descriptors,
    /// The available ring.
    Available,
    /// The used ring.
    Used,
}

impl fmt::Display for RingPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            RingPart::Descriptors => "descriptor table",
            RingPart::Available => "available ring",
            RingPart::Used => "used ring",
        })
    }
}

/// Why a ring cannot be set up, or cannot go on. All but the first six come from what the guest
/// or its front end did meanwhile, and mean that the ring is broken: nothing more can be taken from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// Not a size a split ring can have here.
    #[error("ring size {0} is not a power of two from 1 to {MAX_RING_SIZE}")]
    Size(u16),
    /// A part is not aligned as section 2.7 wants it, in the guest or where it is mapped.
    #[error("{part} at {address:#x} is not aligned to {align} bytes")]
    Unaligned {
        /// Which part.
        part: RingPart,
        /// Its guest-physical address.
        address: u64,
        /// The alignment, in bytes.
        align: u64,
    },
    /// A part is not, or not all, in one region of guest memory.
    #[error("{part} at {address:#x} ({len} bytes) is not in one region of guest memory")]
    PartOutside {
        /// Which part.
        part: RingPart,
        /// Its guest-physical address.
        address: u64,
        /// Its bytes.
        len: u64,
    },
    /// The front end's dirty log has no bits for the used ring.
    #[error("the dirty log does not reach to the used ring's {len} bytes at {address:#x}")]
    LogShort {
        /// Where the used ring is logged: a guest-physical address.
        address: u64,
        /// Its bytes.
        len: u64,
    },
    /// The worker has as many rings as it can have.
    #[error("its worker serves {MAX_HCTXS} rings, which is the most")]
    TooMany,
    /// The front end's dirty log was truncated.
    #[error("the file of the dirty log was made shorter")]
    LogLost,
    /// A part of the guest's memory was taken away; see [`crate::sys::sigbus`].
    #[error(
        "its memory is gone: a file of the guest's memory was truncated, or a page of it failed"
    )]
    MemoryLost,
    /// The front end's account of what is in flight is none.
    #[error(transparent)]
    Inflight(#[from] InflightError),
    /// More was made available than the ring has entries.
    #[error("available index {index} is more than the ring's {size} entries after {next}")]
    AvailJump {
        /// What the guest wrote.
        index: u16,
        /// The entry that comes next.
        next: u16,
        /// The ring's size.
        size: u16,
    },
    /// An available entry names a descriptor that does not exist.
    #[error("available head {head} is outside the ring's {size} descriptors")]
    HeadOutOfRange {
        /// What the guest wrote.
        head: u16,
        /// The ring's size.
        size: u16,
    },
    /// An available entry names a chain that has not been used yet.
    #[error("head {head} was made available again while it is in flight")]
    HeadInFlight {
        /// What the guest wrote.
        head: u16,
    },
    /// A chain goes on at a descriptor that does not exist.
    #[error("the chain at head {head} goes on at descriptor {next} of a table of {len}")]
    NextOutOfRange {
        /// The chain's head.
        head: u16,
        /// What the guest wrote.
        next: u16,
        /// Descriptors in the ring or the indirect table.
        len: u16,
    },
    /// A chain has more descriptors than the table it is in.
    #[error("the chain at head {head} loops: more than {len} descriptors")]
    Loop {
        /// The chain's head.
        head: u16,
        /// Descriptors in the ring or the indirect table.
        len: u16,
    },
    /// INDIRECT and NEXT in one descriptor (section 2.7.5.3.1 forbids it).
    #[error("the chain at head {head} has a descriptor that is both INDIRECT and NEXT")]
    IndirectAndNext {
        /// The chain's head.
        head: u16,
    },
    /// INDIRECT within an indirect table (section 2.7.5.3.1 forbids it).
    #[error("the chain at head {head} has an indirect table within an indirect table")]
    NestedIndirect {
        /// The chain's head.
        head: u16,
    },
    /// An indirect table that is empty, too long, or not a whole number of descriptors.
    #[error(
        "the chain at head {head} has an indirect table of {len} bytes, not 16 times 1 to {limit}"
    )]
    IndirectLength {
        /// The chain's head.
        head: u16,
        /// What the guest wrote, in bytes.
        len: u32,
        /// The most descriptors accepted.
        limit: u16,
    },
    /// An indirect table outside guest memory.
    #[error("the chain at head {head} has an indirect descriptor at {address:#x}, outside memory")]
    IndirectOutside {
        /// The chain's head.
        head: u16,
        /// Guest-physical address of the descriptor that could not be read.
        address: u64,
    },
    /// A chain with no byte to write a status to.
    #[error("the chain at head {head} has no writable byte for the status")]
    NoStatus {
        /// The chain's head.
        head: u16,
    },
    /// A chain whose status byte is outside guest memory.
    #[error("the chain at head {head} has its status byte at {address:#x}, outside memory")]
    StatusOutside {
        /// The chain's head.
        head: u16,
        /// Guest-physical address of the status byte.
        address: u64,
    },
}
