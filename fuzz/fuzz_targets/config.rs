//! The configuration space: every read has the size asked for and the right bytes, every write is a
//! cache mode or refused.

#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use vhost_user_blkmq::virtio::config_space::{
    CONFIG_BYTES, ConfigSpace, Topology, WRITEBACK_OFFSET, WriteCache,
};

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    capacity: u64,
    words: [u32; 7],
    small: [u16; 2],
    bytes: [u8; 2],
    flags: [bool; 2],
    reads: Vec<(u32, u16)>,
    writes: Vec<(u32, &'a [u8])>,
}

fuzz_target!(|input: Input<'_>| {
    let space = ConfigSpace {
        capacity: input.capacity,
        size_max: input.words[0],
        seg_max: input.words[1],
        blk_size: input.words[2],
        topology: Topology {
            physical_block_exp: input.bytes[0],
            alignment_offset: input.bytes[1],
            min_io_size: input.small[0],
            opt_io_size: input.words[3],
        },
        writeback: input.flags[0],
        num_queues: input.small[1],
        max_discard_sectors: input.words[4],
        max_discard_seg: input.words[5],
        discard_sector_alignment: input.words[6],
        max_write_zeroes_sectors: input.words[0],
        max_write_zeroes_seg: input.words[1],
        write_zeroes_may_unmap: input.flags[1],
    };
    let whole = space.bytes();
    assert_eq!(whole[..8], input.capacity.to_le_bytes());
    for (offset, size) in input.reads {
        let bytes = space.read(offset, u32::from(size));
        assert_eq!(bytes.len(), usize::from(size));
        for (at, byte) in (u64::from(offset)..).zip(bytes) {
            let expected = usize::try_from(at).ok().and_then(|at| whole.get(at));
            assert_eq!(byte, expected.copied().unwrap_or(0));
        }
    }
    for (offset, bytes) in input.writes {
        if let Ok(mode) = space.write(offset, bytes) {
            let at = usize::try_from(WRITEBACK_OFFSET.checked_sub(offset).expect("not beyond it"))
                .expect("small");
            assert!(at < CONFIG_BYTES);
            let expected = match bytes[at] {
                0 => WriteCache::WriteThrough,
                1 => WriteCache::WriteBack,
                other => panic!("{other} is no cache mode"),
            };
            assert_eq!(mode, expected);
        }
    }
});
