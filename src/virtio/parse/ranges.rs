//! The ranges of discard and write-zeroes requests (virtio 1.3, section 5.2.6).

use crate::mq::ids::Sector;
use crate::mq::limits::{MAX_RANGES, SECTOR_SIZE};
use crate::mq::request::{Op, Status};
use crate::virtio::abi::{RANGE_BYTES, RANGE_UNMAP};
use crate::virtio::geometry::{DiskShape, RangeLimits};
use crate::virtio::pool::{Extent, Segment};

/// What the ranges of a request come to, leaving empty ones out.
pub(super) struct Ranges {
    /// How many there are.
    pub(super) count: u16,
    /// The first sector of the lowest one.
    pub(super) first: Sector,
    /// The sum of their lengths.
    pub(super) bytes: u64,
    /// All of them may be deallocated.
    pub(super) unmap: bool,
}

/// Copies `bytes` of ranges out of the `readable` first pieces, checks them, and leaves them as
/// extents at the start of `pieces`. An error is the status to answer with.
pub(super) fn read(
    op: Op,
    pieces: &mut [Segment],
    readable: usize,
    bytes: u64,
    limits: RangeLimits,
    shape: &DiskShape,
) -> Result<Ranges, Status> {
    let most = usize::from(limits.max_ranges.min(MAX_RANGES)) * RANGE_BYTES;
    let bytes = usize::try_from(bytes)
        .ok()
        .filter(|&bytes| bytes > 0 && bytes <= most && bytes.is_multiple_of(RANGE_BYTES))
        .ok_or(Status::IoErr)?;
    let mut copy = [0; MAX_RANGES as usize * RANGE_BYTES];
    let copy = &mut copy[..bytes];
    super::take(&mut pieces[..readable], copy);

    let mut ranges = Ranges {
        count: 0,
        first: Sector(u64::MAX),
        bytes: 0,
        unmap: op == Op::WriteZeroes,
    };
    for range in copy.chunks_exact(RANGE_BYTES) {
        let (sector, rest) = range.split_at(8);
        let (sectors, flags) = rest.split_at(4);
        let sector = u64::from_le_bytes(sector.try_into().expect("split at 8"));
        let sectors = u32::from_le_bytes(sectors.try_into().expect("split at 4"));
        let flags = u32::from_le_bytes(flags.try_into().expect("four of sixteen are left"));
        let known = if op == Op::WriteZeroes {
            RANGE_UNMAP
        } else {
            0
        };
        if flags & !known != 0 {
            return Err(Status::Unsupp);
        }
        let len_bytes = u64::from(sectors) * SECTOR_SIZE;
        if sectors > limits.max_sectors || !shape.holds(sector, len_bytes) {
            return Err(Status::IoErr);
        }
        if sectors == 0 {
            continue;
        }
        let sector = Sector(sector);
        let extent = Extent {
            offset_bytes: sector.bytes(),
            len_bytes,
        };
        pieces[usize::from(ranges.count)] = Segment { extent };
        ranges.count += 1;
        ranges.first = ranges.first.min(sector);
        ranges.bytes += len_bytes;
        // Deallocating is a permission (section 5.2.6.2), so it takes all of them to give it.
        ranges.unmap &= flags & RANGE_UNMAP != 0;
    }
    Ok(ranges)
}
