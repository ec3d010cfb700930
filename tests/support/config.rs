//! The virtio-blk configuration space (virtio 1.3, 5.2.4), taken apart.

/// The fields of `struct virtio_blk_config` up to the write-zeroes limits (60 bytes).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlkConfig {
    /// Size of the disk in 512-byte sectors.
    pub capacity: u64,
    /// Longest segment in bytes (SIZE_MAX).
    pub size_max: u32,
    /// Most data segments in a request (SEG_MAX).
    pub seg_max: u32,
    /// Logical block size in bytes (BLK_SIZE).
    pub blk_size: u32,
    /// Logical blocks in a physical one, as a power of two (TOPOLOGY).
    pub physical_block_exp: u8,
    /// Offset of the first aligned logical block (TOPOLOGY).
    pub alignment_offset: u8,
    /// Suggested minimum I/O size in logical blocks (TOPOLOGY).
    pub min_io_size: u16,
    /// Optimal sustained I/O size in logical blocks (TOPOLOGY).
    pub opt_io_size: u32,
    /// 1: writeback, 0: writethrough (FLUSH, CONFIG_WCE).
    pub writeback: u8,
    /// Request queues (MQ).
    pub num_queues: u16,
    /// Most sectors in a discard segment (DISCARD).
    pub max_discard_sectors: u32,
    /// Most segments in a discard (DISCARD).
    pub max_discard_seg: u32,
    /// Alignment of discards in sectors (DISCARD).
    pub discard_sector_alignment: u32,
    /// Most sectors in a write-zeroes segment (WRITE_ZEROES).
    pub max_write_zeroes_sectors: u32,
    /// Most segments in a write-zeroes (WRITE_ZEROES).
    pub max_write_zeroes_seg: u32,
    /// 1: write-zeroes may unmap (WRITE_ZEROES).
    pub write_zeroes_may_unmap: u8,
}

impl BlkConfig {
    /// Bytes up to and with write_zeroes_may_unmap: what QEMU asks for.
    pub const LEN_QEMU: usize = 57;
    /// The same with its padding: what Cloud Hypervisor and Firecracker ask for.
    pub const LEN_PADDED: usize = 60;
    /// Offset of `writeback`, the only byte a driver may write.
    pub const WRITEBACK_AT: u32 = 32;

    /// Takes at least [`BlkConfig::LEN_QEMU`] bytes apart.
    pub fn parse(bytes: &[u8]) -> Self {
        assert!(bytes.len() >= Self::LEN_QEMU, "the space is too short");
        let u16_at = |at| u16::from_le_bytes(*bytes[at..].first_chunk().expect("checked above"));
        let u32_at = |at| u32::from_le_bytes(*bytes[at..].first_chunk().expect("checked above"));
        let u64_at = |at| u64::from_le_bytes(*bytes[at..].first_chunk().expect("checked above"));
        Self {
            capacity: u64_at(0),
            size_max: u32_at(8),
            seg_max: u32_at(12),
            blk_size: u32_at(20),
            physical_block_exp: bytes[24],
            alignment_offset: bytes[25],
            min_io_size: u16_at(26),
            opt_io_size: u32_at(28),
            writeback: bytes[32],
            num_queues: u16_at(34),
            max_discard_sectors: u32_at(36),
            max_discard_seg: u32_at(40),
            discard_sector_alignment: u32_at(44),
            max_write_zeroes_sectors: u32_at(48),
            max_write_zeroes_seg: u32_at(52),
            write_zeroes_may_unmap: bytes[56],
        }
    }
}
