//! Requests that are answered with an error for a reason that the guest's owner should hear of. Each reason is
//! given once for each disk and worker, because a guest can make such requests without end.

use crate::mq::limits::SECTOR_SIZE;
use crate::mq::request::Status;
use crate::virtio::abi::{HEADER_BYTES, Header, request_type};
use crate::virtio::geometry::DiskShape;

/// What is odd about a request. Its text is one line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Odd {
    /// Whole sectors, and not whole logical blocks.
    #[error(
        "a request of {bytes} bytes at sector {sector} is not whole logical blocks of {block} bytes and fails; \
         if the guest was started with another --logical-block-size, start this daemon with that one"
    )]
    Misaligned {
        /// Where it begins.
        sector: u64,
        /// Its length.
        bytes: u64,
        /// The logical block size.
        block: u32,
    },
    /// A type that this device does not know, or does not offer.
    #[error("a request of type {0} is not supported and is answered so")]
    Unsupported(u32),
}

/// Which reasons were given, and one that is to be given.
#[derive(Debug, Default)]
pub(in crate::virtio) struct OddRequests {
    misaligned: bool,
    unsupported: bool,
    now: Option<Odd>,
}

impl OddRequests {
    /// What was odd about the request parsed last, if that was the first of its kind.
    pub fn take(&mut self) -> Option<Odd> {
        self.now.take()
    }

    /// Looks at a request that is answered with `status`. `readable` and `writable` are the bytes of the
    /// chain that the device reads and writes.
    pub fn note(
        &mut self,
        status: Status,
        header: Option<&Header>,
        (readable, writable): (u64, u64),
        shape: &DiskShape,
    ) {
        let Some(header) = header else {
            return;
        };
        match (status, header.kind) {
            (Status::Unsupp, kind) if !self.unsupported => {
                self.unsupported = true;
                self.now = Some(Odd::Unsupported(kind));
            }
            (Status::IoErr, request_type::IN | request_type::OUT) if !self.misaligned => {
                let (sector, block) = (header.sector, shape.logical_block_size);
                // Header and status are not data. A transfer has one direction.
                let bytes = match header.kind {
                    request_type::IN => writable - 1,
                    _ => readable - u64::from(HEADER_BYTES),
                };
                let at = sector.wrapping_mul(SECTOR_SIZE);
                let whole = |unit: u64| (at | bytes).is_multiple_of(unit);
                if whole(SECTOR_SIZE) && !whole(block.into()) {
                    self.misaligned = true;
                    self.now = Some(Odd::Misaligned {
                        sector,
                        bytes,
                        block,
                    });
                }
            }
            _ => {}
        }
    }
}
