//! The features a disk offers.

use virtio_bindings::{virtio_blk, virtio_config, virtio_ring};

use super::config_space::ConfigSpace;
use super::geometry::DiskShape;

/// `VHOST_USER_F_PROTOCOL_FEATURES`: not a virtio feature, but negotiated among them
/// (docs/interop/vhost-user, "Feature negotiation").
pub const VHOST_USER_PROTOCOL_FEATURES: u64 = 1 << 30;
/// `VHOST_F_LOG_ALL`: not a virtio feature either; the front end sets it while it migrates the guest
/// (docs/interop/vhost-user, "Migration").
pub const LOG_ALL: u64 = 1 << 26;
/// `VIRTIO_RING_F_EVENT_IDX`
pub const EVENT_IDX: u64 = 1 << virtio_ring::VIRTIO_RING_F_EVENT_IDX;
/// `VIRTIO_RING_F_INDIRECT_DESC`
pub const INDIRECT_DESC: u64 = 1 << virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;
/// `VIRTIO_F_VERSION_1`
pub const VERSION_1: u64 = 1 << virtio_config::VIRTIO_F_VERSION_1;
/// `VIRTIO_BLK_F_SIZE_MAX`
pub const SIZE_MAX: u64 = 1 << virtio_blk::VIRTIO_BLK_F_SIZE_MAX;
/// `VIRTIO_BLK_F_SEG_MAX`
pub const SEG_MAX: u64 = 1 << virtio_blk::VIRTIO_BLK_F_SEG_MAX;
/// `VIRTIO_BLK_F_RO`
pub const RO: u64 = 1 << virtio_blk::VIRTIO_BLK_F_RO;
/// `VIRTIO_BLK_F_BLK_SIZE`
pub const BLK_SIZE: u64 = 1 << virtio_blk::VIRTIO_BLK_F_BLK_SIZE;
/// `VIRTIO_BLK_F_FLUSH`
pub const FLUSH: u64 = 1 << virtio_blk::VIRTIO_BLK_F_FLUSH;
/// `VIRTIO_BLK_F_TOPOLOGY`
pub const TOPOLOGY: u64 = 1 << virtio_blk::VIRTIO_BLK_F_TOPOLOGY;
/// `VIRTIO_BLK_F_CONFIG_WCE`
pub const CONFIG_WCE: u64 = 1 << virtio_blk::VIRTIO_BLK_F_CONFIG_WCE;
/// `VIRTIO_BLK_F_MQ`
pub const MQ: u64 = 1 << virtio_blk::VIRTIO_BLK_F_MQ;
/// `VIRTIO_BLK_F_DISCARD`
pub const DISCARD: u64 = 1 << virtio_blk::VIRTIO_BLK_F_DISCARD;
/// `VIRTIO_BLK_F_WRITE_ZEROES`
pub const WRITE_ZEROES: u64 = 1 << virtio_blk::VIRTIO_BLK_F_WRITE_ZEROES;

/// The feature bits of a disk of this shape and configuration (virtio 1.3, section 5.2.3 and 6).
///
/// A read-only disk offers no discard and no write-zeroes, whatever its shape says.
pub fn offered(shape: &DiskShape, config: &ConfigSpace) -> u64 {
    let mut features = VERSION_1
        | INDIRECT_DESC
        | EVENT_IDX
        | VHOST_USER_PROTOCOL_FEATURES
        | LOG_ALL
        | SEG_MAX
        | BLK_SIZE
        | TOPOLOGY
        | FLUSH
        | CONFIG_WCE
        | MQ;
    if config.size_max > 0 {
        features |= SIZE_MAX;
    }
    if shape.read_only {
        features |= RO;
    } else {
        if shape.discard.is_some() {
            features |= DISCARD;
        }
        if shape.write_zeroes.is_some() {
            features |= WRITE_ZEROES;
        }
    }
    features
}

/// What a driver that accepted certain features can do about a volatile cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheControl {
    /// It flushes, so that the disk may be in write-back mode.
    Flushes,
    /// It cannot flush, and can choose the mode: `writeback` begins as 0 (virtio 1.3, section 5.2.5.2).
    OnlyChooses,
    /// It can do neither, and may rely on write-through (section 5.2.5.1).
    Nothing,
}

impl CacheControl {
    /// Of a driver that accepted `features`.
    pub fn of(features: u64) -> CacheControl {
        match (features & FLUSH != 0, features & CONFIG_WCE != 0) {
            (true, _) => CacheControl::Flushes,
            (false, true) => CacheControl::OnlyChooses,
            (false, false) => CacheControl::Nothing,
        }
    }
}

/// The names of feature bits, for a message; those without a name by their number.
pub fn names(features: u64) -> String {
    let name = |bit: u32| {
        let known = NAMES.iter().find(|(feature, _)| *feature == 1 << bit);
        known.map_or_else(|| format!("bit {bit}"), |(_, name)| (*name).to_owned())
    };
    let bits = (0..u64::BITS).filter(|bit| features & 1 << bit != 0);
    bits.map(name).collect::<Vec<_>>().join(", ")
}

const NAMES: [(u64, &str); 15] = [
    (SIZE_MAX, "SIZE_MAX"),
    (SEG_MAX, "SEG_MAX"),
    (RO, "RO"),
    (BLK_SIZE, "BLK_SIZE"),
    (FLUSH, "FLUSH"),
    (TOPOLOGY, "TOPOLOGY"),
    (CONFIG_WCE, "CONFIG_WCE"),
    (MQ, "MQ"),
    (DISCARD, "DISCARD"),
    (WRITE_ZEROES, "WRITE_ZEROES"),
    (LOG_ALL, "LOG_ALL"),
    (INDIRECT_DESC, "INDIRECT_DESC"),
    (EVENT_IDX, "EVENT_IDX"),
    (VHOST_USER_PROTOCOL_FEATURES, "PROTOCOL_FEATURES"),
    (VERSION_1, "VERSION_1"),
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mq::ids::Sector;
    use crate::virtio::geometry::RangeLimits;

    fn shape(read_only: bool) -> DiskShape {
        let limits = Some(RangeLimits {
            max_sectors: 8,
            max_ranges: 1,
        });
        DiskShape {
            capacity: Sector(8),
            logical_block_size: 512,
            read_only,
            discard: limits,
            write_zeroes: limits,
            serial: [0; 20],
        }
    }

    #[test]
    fn a_writable_disk_offers_what_its_shape_has() {
        let mut shape = shape(false);
        let config = ConfigSpace::default();
        // The bits by their numbers in the specification.
        let always = 1 << 2 | 1 << 6 | 1 << 9 | 1 << 10 | 1 << 11 | 1 << 12;
        let transport = 1 << 26 | 1 << 28 | 1 << 29 | 1 << 30 | 1 << 32;
        assert_eq!(
            offered(&shape, &config),
            always | transport | 1 << 13 | 1 << 14
        );
        shape.discard = None;
        assert_eq!(offered(&shape, &config), always | transport | 1 << 14);
        shape.write_zeroes = None;
        assert_eq!(offered(&shape, &config), always | transport);
        let config = ConfigSpace {
            size_max: 65536,
            ..config
        };
        assert_eq!(offered(&shape, &config), always | transport | 1 << 1);
    }

    #[test]
    fn a_read_only_disk_offers_nothing_that_writes() {
        let features = offered(&shape(true), &ConfigSpace::default());
        assert_eq!(features & (RO | DISCARD | WRITE_ZEROES), 1 << 5);
    }

    #[test]
    fn a_driver_begins_with_write_back_only_if_it_can_flush() {
        use CacheControl::{Flushes, Nothing, OnlyChooses};
        assert_eq!(CacheControl::of(VERSION_1 | MQ), Nothing);
        assert_eq!(CacheControl::of(VERSION_1 | FLUSH), Flushes);
        assert_eq!(CacheControl::of(VERSION_1 | FLUSH | CONFIG_WCE), Flushes);
        assert_eq!(CacheControl::of(VERSION_1 | CONFIG_WCE), OnlyChooses);
    }

    #[test]
    fn bits_have_the_names_of_the_specification() {
        assert_eq!(names(1 << 13 | 1 << 14), "DISCARD, WRITE_ZEROES");
        assert_eq!(names(RO | 1 << 34), "RO, bit 34");
        assert_eq!(names(0), "");
    }
}
