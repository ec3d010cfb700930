//! The ranges of discard and write-zeroes requests (virtio 1.3, section 5.2.6).

use super::{DiskShape, Extent, MAX_RANGES, Op, RangeLimits, SECTOR_SIZE, Sector, Segment, Status};
use crate::virtio::abi::{RANGE_BYTES, RANGE_UNMAP};

/// Ranges that were found good.
pub(super) struct Ranges {
    pub(super) op: Op,
    /// All of them may be deallocated.
    pub(super) unmap: bool,
    extents: [Extent; MAX_RANGES as usize],
    count: u16,
}

impl Ranges {
    /// Copies `bytes` of ranges out of `pieces` and checks them. On an error, the status to answer
    /// with. Empty ranges are left out.
    pub(super) fn read(
        op: Op,
        pieces: &mut [Segment],
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
        super::take(pieces, copy);

        let none = Extent {
            offset_bytes: 0,
            len_bytes: 0,
        };
        let mut ranges = Ranges {
            op,
            unmap: op == Op::WriteZeroes,
            extents: [none; MAX_RANGES as usize],
            count: 0,
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
            if sectors > 0 {
                // Deallocating is a permission (section 5.2.6.2), so it takes all to give it.
                ranges.unmap &= flags & RANGE_UNMAP != 0;
                let offset_bytes = Sector(sector).bytes();
                ranges.extents[usize::from(ranges.count)] = Extent {
                    offset_bytes,
                    len_bytes,
                };
                ranges.count += 1;
            }
        }
        Ok(ranges)
    }

    pub(super) fn extents(&self) -> &[Extent] {
        &self.extents[..usize::from(self.count)]
    }

    pub(super) fn count(&self) -> u16 {
        self.count
    }

    /// The lowest range's first sector.
    pub(super) fn first(&self) -> Sector {
        let lowest = self
            .extents()
            .iter()
            .map(|extent| extent.offset_bytes)
            .min();
        Sector::of_bytes(lowest.unwrap_or(0))
    }

    /// The sum of their lengths.
    pub(super) fn bytes(&self) -> u64 {
        self.extents().iter().map(|extent| extent.len_bytes).sum()
    }
}
