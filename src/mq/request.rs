//! What blk-mq knows of a request: everything that decides its way, nothing of its buffers.

use super::ids::Sector;

/// What the guest asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    /// From the disk to the guest (`VIRTIO_BLK_T_IN`).
    Read,
    /// From the guest to the disk (`VIRTIO_BLK_T_OUT`).
    Write,
    /// Make what was completed before durable (`VIRTIO_BLK_T_FLUSH`).
    Flush,
    /// The content is no longer needed (`VIRTIO_BLK_T_DISCARD`).
    Discard,
    /// The content becomes zero (`VIRTIO_BLK_T_WRITE_ZEROES`).
    WriteZeroes,
}

impl Op {
    /// Whether the operation moves guest data, and so can be merged with its neighbours.
    #[inline]
    pub fn moves_data(self) -> bool {
        matches!(self, Op::Read | Op::Write)
    }
}

/// The guest's I/O priority, as Linux' virtio-blk puts it into each request: class in the upper
/// three bits, level in the lower thirteen (uapi/linux/ioprio.h). A hint from an untrusted guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct IoPrio(pub u16);

/// A request's metadata. Plain data: copied, compared and merged without touching its buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// What to do.
    pub op: Op,
    /// Where: the first sector. Zero for a flush; the lowest range's start for discard and
    /// write-zeroes.
    pub sector: Sector,
    /// How much, in bytes: the data's length, or the sum of the ranges. Zero for a flush.
    pub bytes: u64,
    /// How many host buffers (data) or ranges (discard, write-zeroes) it consists of.
    pub segments: u16,
    /// The guest's priority hint.
    pub ioprio: IoPrio,
    /// Durable when completed, because the disk is in write-through mode (blk-mq's FUA).
    pub fua: bool,
    /// Write-zeroes may free the blocks (`VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP`).
    pub unmap: bool,
}

impl Request {
    /// The first sector after it. Ranges were checked against the capacity, so this does not wrap.
    #[inline]
    pub fn end(&self) -> Sector {
        Sector(self.sector.0 + self.bytes / super::limits::SECTOR_SIZE)
    }
}

/// How a request ended, in the guest's terms (virtio 1.3, section 5.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Status {
    /// `VIRTIO_BLK_S_OK`
    Ok,
    /// `VIRTIO_BLK_S_IOERR`
    IoErr,
    /// `VIRTIO_BLK_S_UNSUPP`
    Unsupp,
}
