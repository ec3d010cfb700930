//! Requests that are answered with an error for a reason that the guest's owner should hear of. Each reason is
//! given once for each disk and worker, because a guest can make such requests without end.

use super::super::abi::{Header, request_type};
use super::super::chain::Layout;
use super::super::geometry::DiskShape;
use super::super::pool::SegmentPool;
use crate::mq::limits::SECTOR_SIZE;
use crate::mq::request::Status;

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
pub(in super::super) struct OddRequests {
    misaligned: bool,
    unsupported: bool,
    now: Option<Odd>,
}

impl SegmentPool {
    /// What was odd about the request parsed last, if that was the first of its kind.
    pub fn take_odd(&mut self) -> Option<Odd> {
        self.odd.now.take()
    }

    /// Looks at a request that is answered with `status`.
    pub(super) fn note_odd(
        &mut self,
        status: Status,
        header: Option<&Header>,
        layout: &Layout,
        shape: &DiskShape,
    ) {
        let Some(header) = header else {
            return;
        };
        let odd = &mut self.odd;
        match (status, header.kind) {
            (Status::Unsupp, kind) if !odd.unsupported => {
                odd.unsupported = true;
                odd.now = Some(Odd::Unsupported(kind));
            }
            (Status::IoErr, request_type::IN | request_type::OUT) if !odd.misaligned => {
                let (sector, block) = (header.sector, shape.logical_block_size);
                // Header and status are not data. A transfer has one direction.
                let bytes = match header.kind {
                    request_type::IN => layout.writable_bytes - 1,
                    _ => layout.readable_bytes - u64::from(super::HEADER_BYTES),
                };
                let at = sector.wrapping_mul(SECTOR_SIZE);
                let whole = |unit: u64| (at | bytes).is_multiple_of(unit);
                if whole(SECTOR_SIZE) && !whole(block.into()) {
                    odd.misaligned = true;
                    odd.now = Some(Odd::Misaligned {
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
