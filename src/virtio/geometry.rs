//! The disk as the guest knows it.

use super::abi::ID_BYTES;
use crate::mq::ids::Sector;
use crate::mq::limits::SECTOR_SIZE;

/// What discard or write-zeroes requests of a disk may ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RangeLimits {
    /// Sectors in one range.
    pub max_sectors: u32,
    /// Ranges in one request, at most [`MAX_RANGES`](crate::mq::limits::MAX_RANGES); more are not
    /// served.
    pub max_ranges: u16,
}

/// What a disk's requests are checked against.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskShape {
    /// Sectors, of 512 bytes; less than 2^55, so that every position fits into 64 bits of bytes.
    pub capacity: Sector,
    /// Bytes; a power of two of at least 512. Requests start and end at multiples of it.
    pub logical_block_size: u32,
    /// Nothing that changes the disk is served.
    pub read_only: bool,
    /// Discard is served, within these limits.
    pub discard: Option<RangeLimits>,
    /// Write-zeroes is served, within these limits.
    pub write_zeroes: Option<RangeLimits>,
    /// The answer to GET_ID: shorter ones end with a zero byte.
    pub serial: [u8; ID_BYTES],
}

impl DiskShape {
    /// Whether `bytes` from `sector` are whole logical blocks of the disk.
    #[inline]
    pub(super) fn holds(&self, sector: u64, bytes: u64) -> bool {
        debug_assert!(self.logical_block_size.is_power_of_two());
        debug_assert!(u64::from(self.logical_block_size) >= SECTOR_SIZE);
        // A product that wraps still has its low bits, and its high ones are checked below.
        let unaligned = sector.wrapping_mul(SECTOR_SIZE) | bytes;
        unaligned & u64::from(self.logical_block_size - 1) == 0
            && sector <= self.capacity.0
            && bytes / SECTOR_SIZE <= self.capacity.0 - sector
    }
}
