//! What the disk says about itself.

use crate::support::*;

/// `struct virtio_blk_config` with secure erase and zones (virtio 1.3, 5.2.4).
const LEN_WHOLE: u32 = 96;

#[test]
fn the_config_space_tells_the_truth() {
    let daemon = Daemon::start(&Spec::image((10 << 20) + 3 * SECTOR).queue_size(256).args([
        "--cache",
        "writeback",
        "--discard",
        "on",
    ]));
    let mut front = Front::connect(daemon.socket(), &Setup::default()).expect("a session");
    let config = front.config().expect("a config space");
    assert_eq!(config.capacity, (10 << 20) / SECTOR + 3);
    assert_eq!(config.seg_max, 254, "a ring of 256 less header and status");
    assert_eq!(config.blk_size, 512);
    assert_eq!(config.num_queues, 4);
    assert_eq!(front.max_queues, 4);
    assert_eq!(config.writeback, 1);
    assert!(config.max_discard_sectors > 0);
    assert!(config.max_discard_seg > 0);
    assert!(config.discard_sector_alignment > 0);
    assert!(config.max_write_zeroes_sectors > 0);
    assert!(config.max_write_zeroes_seg > 0);
    let physical = config.blk_size << config.physical_block_exp;
    assert!(
        (512..=65536).contains(&physical),
        "physical block {physical}"
    );
    assert!(config.alignment_offset < 1 << config.physical_block_exp);
    assert_eq!(
        config.opt_io_size % (1 << config.physical_block_exp),
        0,
        "the best size is whole physical blocks"
    );
    for (name, feature) in [
        ("SEG_MAX", features::SEG_MAX),
        ("BLK_SIZE", features::BLK_SIZE),
        ("FLUSH", features::FLUSH),
        ("TOPOLOGY", features::TOPOLOGY),
        ("CONFIG_WCE", features::CONFIG_WCE),
        ("MQ", features::MQ),
        ("DISCARD", features::DISCARD),
        ("WRITE_ZEROES", features::WRITE_ZEROES),
        ("INDIRECT_DESC", features::INDIRECT_DESC),
        ("EVENT_IDX", features::EVENT_IDX),
        ("VERSION_1", features::VERSION_1),
    ] {
        assert_ne!(front.offered & feature, 0, "{name} is offered");
    }
    assert_eq!(front.offered & features::RO, 0, "the disk can be written");
}

#[test]
fn the_config_space_answers_in_the_size_asked_for() {
    let daemon = Daemon::start(&Spec::image(1 << 20));
    let mut front = Front::connect(daemon.socket(), &Setup::default()).expect("a session");
    let whole = front.config_bytes(0, LEN_WHOLE).expect("all of it");
    for len in [
        BlkConfig::LEN_QEMU as u32,
        BlkConfig::LEN_PADDED as u32,
        8,
        LEN_WHOLE,
    ] {
        let bytes = front.config_bytes(0, len).expect("a part of it");
        assert_eq!(bytes, whole[..len as usize], "{len} bytes");
    }
    let middle = front.config_bytes(20, 4).expect("blk_size alone");
    assert_eq!(middle, whole[20..24]);
}

#[test]
fn larger_logical_blocks_are_reported() {
    let daemon = Daemon::start(&Spec::image(1 << 20).args(["--logical-block-size", "4096"]));
    let mut disk = Disk::attach(daemon.socket(), 1);
    let config = disk.front.config().expect("a config space");
    assert_eq!(config.blk_size, 4096);
    assert_eq!(
        config.capacity,
        (1 << 20) / SECTOR,
        "still in 512-byte sectors"
    );
    let data = Rng::new(2).bytes(8192);
    disk.write(0, 16, &data);
    assert!(disk.read(0, 16, 8192) == data);
}

#[test]
fn writethrough_is_reported() {
    let daemon = Daemon::start(&Spec::image(1 << 20).args(["--cache", "writethrough"]));
    let mut front = Front::connect(daemon.socket(), &Setup::default()).expect("a session");
    assert_eq!(front.config().expect("a config space").writeback, 0);
}

#[test]
fn the_cache_mode_byte_can_be_written() {
    let daemon = Daemon::start(&Spec::image(1 << 20).args(["--cache", "writeback"]));
    let mut disk = Disk::attach(daemon.socket(), 1);
    for mode in [0_u8, 1, 0] {
        disk.front
            .set_config(BlkConfig::WRITEBACK_AT, &[mode])
            .expect("CONFIG_WCE is negotiated");
        assert_eq!(disk.front.config().expect("a config space").writeback, mode);
        let data = Rng::new(u64::from(mode)).bytes(4096);
        disk.write(0, 0, &data);
        disk.flush(0);
        assert!(disk.read(0, 0, 4096) == data);
    }
}

/// Cloud Hypervisor before v51 reads it at 0x100, where the configuration space of vhost-user ends.
#[test]
fn the_config_space_is_answered_at_the_offset_of_old_cloud_hypervisors() {
    let daemon = Daemon::start_ours(&Spec::image(1 << 20));
    let mut front = Front::connect(daemon.socket(), &Setup::default()).expect("a session");
    let len = BlkConfig::LEN_PADDED as u32;
    let whole = front.config_bytes(0, len).expect("all of it");
    assert_eq!(front.config_bytes(0x100, len).expect("all of it"), whole);
    // It writes where everybody does.
    front
        .set_config(BlkConfig::WRITEBACK_AT, &[0])
        .expect("a config write");
    assert_eq!(front.config_bytes(0x100, len).expect("all of it")[32], 0);
    front
        .set_config(0x100 + BlkConfig::WRITEBACK_AT, &[1])
        .expect_err("nothing is there");
}
