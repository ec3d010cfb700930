//! An image, described for the engine and for the guest.

use std::io;

use crate::config::DiskConfig;
use crate::engine::{FileTarget, Target};
use crate::image::{Image, ImageKind};
use crate::mq::ids::Sector;
use crate::mq::limits::{MAX_RANGES, SECTOR_SIZE};
use crate::virtio::abi::ID_BYTES;
use crate::virtio::config_space::{self, ConfigSpace};
use crate::virtio::geometry::{DiskShape, RangeLimits};

/// The longest range that a guest is offered, in sectors: 64 MiB. Longer ones are done as well, for guests that
/// were offered more by an older daemon, but what takes long is better known to the guest as several requests.
const OFFERED_RANGE_SECTORS: u32 = (64 << 20) / 512;

/// What an engine needs to know of the image, with a descriptor of its own.
pub(super) fn target(config: &DiskConfig, image: &Image) -> io::Result<Target> {
    if image.kind == ImageKind::Null {
        return Ok(Target::Null {
            size_bytes: image.size_bytes,
        });
    }
    Ok(Target::File(FileTarget {
        file: image.file.try_clone()?.into(),
        file_system: image.file_system,
        size_bytes: image.size_bytes,
        direct: image.direct,
        memory_align: image.dio_mem_align,
        offset_align: image.dio_offset_align,
        granularity: image.discard.granularity_bytes,
        block_device: image.kind == ImageKind::BlockDevice,
        // Memory forgets everything with the host, and there is nothing that a flush could change.
        ignore_flush: config.cache.ignores_flush()
            || (image.mapping.as_ref()).is_some_and(|mapping| !mapping.medium().needs_sync()),
        io_poll: image.io_poll,
        mapping: image.mapping.clone(),
    }))
}

/// What requests are checked against.
pub(super) fn shape(config: &DiskConfig, image: &Image) -> DiskShape {
    let mut serial = [0; ID_BYTES];
    let len = config.serial.len().min(ID_BYTES);
    serial[..len].copy_from_slice(&config.serial.as_bytes()[..len]);
    let block = u64::from(config.logical_block_size);
    let ranges = |max_bytes: u64| {
        // The largest multiple of the logical block that 32 bits of sectors can hold.
        let largest = (u64::from(u32::MAX) * SECTOR_SIZE / block) * block / SECTOR_SIZE;
        RangeLimits {
            max_sectors: u32::try_from((max_bytes / SECTOR_SIZE).min(largest)).unwrap_or(u32::MAX),
            max_ranges: MAX_RANGES,
        }
    };
    DiskShape {
        capacity: Sector::of_bytes(image.size_bytes),
        logical_block_size: config.logical_block_size,
        read_only: config.read_only,
        discard: (image.discard.max_bytes > 0).then(|| ranges(image.discard.max_bytes)),
        // Where the image has no shorter way the engine writes the zeroes itself, so any length
        // goes.
        write_zeroes: (!config.read_only).then(|| {
            ranges(match image.write_zeroes.max_bytes {
                0 => u64::MAX,
                max => max,
            })
        }),
        serial,
    }
}

/// What the guest reads in the configuration space, before it changes anything.
pub(super) fn space(config: &DiskConfig, image: &Image, shape: &DiskShape) -> ConfigSpace {
    let block = config.logical_block_size;
    let blocks = |bytes: u32| bytes / block;
    let (discard, zeroes) = (shape.discard, shape.write_zeroes);
    let offered = |limits: RangeLimits| limits.max_sectors.min(OFFERED_RANGE_SECTORS);
    ConfigSpace {
        capacity: shape.capacity.0,
        // Any segment length is taken.
        size_max: 0,
        // A request and its header and status fit into the ring even without indirect descriptors.
        seg_max: u32::from(config.queue_size) - 2,
        blk_size: block,
        topology: config_space::Topology {
            physical_block_exp: u8::try_from(blocks(image.physical_block_bytes).max(1).ilog2())
                .unwrap_or(0),
            alignment_offset: 0,
            min_io_size: u16::try_from(blocks(image.min_io_bytes)).unwrap_or(u16::MAX),
            opt_io_size: blocks(image.opt_io_bytes),
        },
        writeback: true,
        num_queues: config.num_queues,
        max_discard_sectors: discard.map_or(0, offered),
        max_discard_seg: discard.map_or(0, |limits| u32::from(limits.max_ranges)),
        discard_sector_alignment: match discard {
            Some(_) => (image.discard.granularity_bytes.max(block)) / 512,
            None => 0,
        },
        max_write_zeroes_sectors: zeroes.map_or(0, offered),
        max_write_zeroes_seg: zeroes.map_or(0, |limits| u32::from(limits.max_ranges)),
        write_zeroes_may_unmap: zeroes.is_some() && image.write_zeroes.may_unmap,
    }
}
