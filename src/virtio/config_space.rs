//! `struct virtio_blk_config`, the device's configuration space (virtio 1.3, section 5.2.4).

/// Bytes of the configuration space up to the end of the write-zeroes fields. Front ends ask for
/// 57 (QEMU) or 60 (Cloud Hypervisor, Firecracker) bytes, or for more.
pub const CONFIG_BYTES: usize = 60;

/// Where the `writeback` byte is, the only one the driver may write.
pub const WRITEBACK_OFFSET: u32 = 32;

/// How the disk would like to be used (section 5.2.4; `VIRTIO_BLK_F_TOPOLOGY`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Topology {
    /// Logical blocks in a physical block, as an exponent of two.
    pub physical_block_exp: u8,
    /// Offset of the first aligned logical block, in logical blocks.
    pub alignment_offset: u8,
    /// Smallest I/O without a penalty, in logical blocks.
    pub min_io_size: u16,
    /// Best I/O for streaming, in logical blocks; zero for no preference.
    pub opt_io_size: u32,
}

/// The values of the configuration space. Fields of features that are not offered are zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ConfigSpace {
    /// Sectors, of 512 bytes.
    pub capacity: u64,
    /// Bytes in one segment at most; zero when there is no such limit.
    pub size_max: u32,
    /// Data segments in one request at most.
    pub seg_max: u32,
    /// Logical block size, in bytes.
    pub blk_size: u32,
    /// What the image's storage prefers.
    pub topology: Topology,
    /// The cache mode: true for write-back, false for write-through.
    pub writeback: bool,
    /// Virtqueues offered.
    pub num_queues: u16,
    /// Sectors in one discard range at most.
    pub max_discard_sectors: u32,
    /// Ranges in one discard request at most.
    pub max_discard_seg: u32,
    /// What discard ranges should be aligned to, in sectors.
    pub discard_sector_alignment: u32,
    /// Sectors in one write-zeroes range at most.
    pub max_write_zeroes_sectors: u32,
    /// Ranges in one write-zeroes request at most.
    pub max_write_zeroes_seg: u32,
    /// Write-zeroes with unmap can really deallocate.
    pub write_zeroes_may_unmap: bool,
}

/// What a write to the configuration space asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteCache {
    /// Completed writes need not be durable before a flush.
    WriteBack,
    /// Completed writes are durable.
    WriteThrough,
}

impl WriteCache {
    /// As users call it.
    pub fn name(self) -> &'static str {
        match self {
            WriteCache::WriteBack => "write-back",
            WriteCache::WriteThrough => "write-through",
        }
    }
}

/// A write to the configuration space that the driver must not make.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Not just the `writeback` byte.
    #[error(
        "the driver wrote {len} bytes at {offset} of the configuration space; \
         only the byte at {WRITEBACK_OFFSET} can be written"
    )]
    ReadOnly {
        /// Where it wrote.
        offset: u32,
        /// How many bytes.
        len: usize,
    },
    /// A cache mode that does not exist.
    #[error("the driver wrote {0} to the cache mode, which is 0 or 1")]
    CacheMode(u8),
}

impl ConfigSpace {
    /// The bytes the guest sees, little-endian.
    pub fn bytes(&self) -> [u8; CONFIG_BYTES] {
        let mut bytes = [0; CONFIG_BYTES];
        let mut at = 0;
        let mut put = |field: &[u8]| {
            bytes[at..at + field.len()].copy_from_slice(field);
            at += field.len();
        };
        put(&self.capacity.to_le_bytes());
        put(&self.size_max.to_le_bytes());
        put(&self.seg_max.to_le_bytes());
        put(&[0; 4]); // Geometry, which is not offered.
        put(&self.blk_size.to_le_bytes());
        put(&[
            self.topology.physical_block_exp,
            self.topology.alignment_offset,
        ]);
        put(&self.topology.min_io_size.to_le_bytes());
        put(&self.topology.opt_io_size.to_le_bytes());
        put(&[u8::from(self.writeback), 0]);
        put(&self.num_queues.to_le_bytes());
        put(&self.max_discard_sectors.to_le_bytes());
        put(&self.max_discard_seg.to_le_bytes());
        put(&self.discard_sector_alignment.to_le_bytes());
        put(&self.max_write_zeroes_sectors.to_le_bytes());
        put(&self.max_write_zeroes_seg.to_le_bytes());
        put(&[u8::from(self.write_zeroes_may_unmap), 0, 0, 0]);
        debug_assert_eq!(at, CONFIG_BYTES);
        bytes
    }

    /// Exactly `size` bytes from `offset`, with zeros where the configuration space has ended.
    pub fn read(&self, offset: u32, size: u32) -> Vec<u8> {
        let bytes = self.bytes();
        let offset = usize::try_from(offset)
            .unwrap_or(usize::MAX)
            .min(CONFIG_BYTES);
        let size = usize::try_from(size).unwrap_or(usize::MAX);
        let end = offset.saturating_add(size).min(CONFIG_BYTES);
        let mut answer = bytes[offset..end].to_vec();
        answer.resize(size, 0);
        answer
    }

    /// What a write of `bytes` at `offset` asks for. It changes nothing here: the new mode becomes
    /// visible when the disk has adopted it.
    pub fn write(&self, offset: u32, bytes: &[u8]) -> Result<WriteCache, ConfigError> {
        match (offset, bytes) {
            (WRITEBACK_OFFSET, [0]) => Ok(WriteCache::WriteThrough),
            (WRITEBACK_OFFSET, [1]) => Ok(WriteCache::WriteBack),
            (WRITEBACK_OFFSET, [mode]) => Err(ConfigError::CacheMode(*mode)),
            _ => Err(ConfigError::ReadOnly {
                offset,
                len: bytes.len(),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::offset_of;
    use virtio_bindings::virtio_blk::virtio_blk_config as C;

    /// A value in each field that no other field has.
    fn sample() -> ConfigSpace {
        ConfigSpace {
            capacity: 0x0102_0304_0506_0708,
            size_max: 0x1112_1314,
            seg_max: 0x2122_2324,
            blk_size: 0x3132_3334,
            topology: Topology {
                physical_block_exp: 0x41,
                alignment_offset: 0x42,
                min_io_size: 0x4344,
                opt_io_size: 0x4546_4748,
            },
            writeback: true,
            num_queues: 0x5152,
            max_discard_sectors: 0x6162_6364,
            max_discard_seg: 0x7172_7374,
            discard_sector_alignment: 0x8182_8384,
            max_write_zeroes_sectors: 0x9192_9394,
            max_write_zeroes_seg: 0xa1a2_a3a4,
            write_zeroes_may_unmap: true,
        }
    }

    #[test]
    fn every_field_is_where_the_kernels_header_has_it() {
        let bytes = sample().bytes();
        let at = |offset: usize, expected: &[u8]| {
            assert_eq!(
                &bytes[offset..offset + expected.len()],
                expected,
                "at {offset}"
            );
        };
        at(offset_of!(C, capacity), &[8, 7, 6, 5, 4, 3, 2, 1]);
        at(offset_of!(C, size_max), &[0x14, 0x13, 0x12, 0x11]);
        at(offset_of!(C, seg_max), &[0x24, 0x23, 0x22, 0x21]);
        at(offset_of!(C, geometry), &[0; 4]);
        at(offset_of!(C, blk_size), &[0x34, 0x33, 0x32, 0x31]);
        at(offset_of!(C, physical_block_exp), &[0x41]);
        at(offset_of!(C, alignment_offset), &[0x42]);
        at(offset_of!(C, min_io_size), &[0x44, 0x43]);
        at(offset_of!(C, opt_io_size), &[0x48, 0x47, 0x46, 0x45]);
        at(offset_of!(C, wce), &[1, 0]);
        at(offset_of!(C, num_queues), &[0x52, 0x51]);
        at(
            offset_of!(C, max_discard_sectors),
            &[0x64, 0x63, 0x62, 0x61],
        );
        at(offset_of!(C, max_discard_seg), &[0x74, 0x73, 0x72, 0x71]);
        at(
            offset_of!(C, discard_sector_alignment),
            &[0x84, 0x83, 0x82, 0x81],
        );
        at(
            offset_of!(C, max_write_zeroes_sectors),
            &[0x94, 0x93, 0x92, 0x91],
        );
        at(
            offset_of!(C, max_write_zeroes_seg),
            &[0xa4, 0xa3, 0xa2, 0xa1],
        );
        at(offset_of!(C, write_zeroes_may_unmap), &[1, 0, 0, 0]);
        assert_eq!(offset_of!(C, wce), WRITEBACK_OFFSET as usize);
        assert_eq!(offset_of!(C, max_secure_erase_sectors), CONFIG_BYTES);
    }

    #[test]
    fn reads_answer_with_exactly_what_was_asked_for() {
        let config = sample();
        let bytes = config.bytes();
        assert_eq!(config.read(0, 57), bytes[..57]);
        assert_eq!(config.read(0, 60), bytes);
        assert_eq!(config.read(0, 256), [&bytes[..], &[0; 196]].concat());
        assert_eq!(config.read(58, 4), [0; 4]);
        assert_eq!(config.read(32, 1), [1]);
        assert_eq!(config.read(60, 3), [0; 3]);
        assert_eq!(config.read(u32::MAX, 2), [0; 2]);
        assert!(config.read(0, 0).is_empty());
    }

    #[test]
    fn only_the_cache_mode_can_be_written() {
        let config = sample();
        assert_eq!(config.write(32, &[0]), Ok(WriteCache::WriteThrough));
        assert_eq!(config.write(32, &[1]), Ok(WriteCache::WriteBack));
        assert_eq!(config.write(32, &[2]), Err(ConfigError::CacheMode(2)));
        for (offset, bytes) in [
            (0, &[1][..]),
            (31, &[0, 1]),
            (32, &[1, 0]),
            (32, &[]),
            (33, &[1]),
        ] {
            let error = ConfigError::ReadOnly {
                offset,
                len: bytes.len(),
            };
            assert_eq!(config.write(offset, bytes), Err(error));
        }
    }
}
