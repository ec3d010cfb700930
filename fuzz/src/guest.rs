//! A guest's memory with a ring in it.

use std::sync::Arc;

use vhost_user_blkmq::mq::ids::Sector;
use vhost_user_blkmq::virtio::memory::MemoryTable;
use vhost_user_blkmq::virtio::ring::RingSetup;
use vhost_user_blkmq::virtio::geometry::{DiskShape, RangeLimits};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Two adjacent regions, a hole, and a small one.
pub const REGIONS: [(u64, usize); 3] = [(0, 0x4000), (0x4000, 0x4000), (0x1_0000, 0x1000)];
/// Where the descriptor table is, for rings of up to 64 entries.
pub const DESC: u64 = 0;
/// Where the available ring is.
pub const AVAIL: u64 = 0x1000;
/// Where the used ring is.
pub const USED: u64 = 0x2000;
/// Where headers, indirect tables and data may be.
pub const DATA: u64 = 0x3000;

/// Some guest memory.
pub struct Guest {
    memory: Arc<GuestMemoryMmap>,
    /// The same, as the rings see it.
    pub table: Arc<MemoryTable>,
}

impl Guest {
    /// With all bytes zero.
    pub fn new() -> Guest {
        let ranges = REGIONS.map(|(at, len)| (GuestAddress(at), len));
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&ranges).expect("memory"));
        let table = MemoryTable::from_guest_memory(Arc::clone(&memory), None).expect("a table");
        Guest {
            memory,
            table: Arc::new(table),
        }
    }

    /// Writes as far as there is memory.
    pub fn write(&self, at: u64, bytes: &[u8]) {
        let _ = self.memory.write(bytes, GuestAddress(at));
    }

    /// Writes sixteen bits, little-endian.
    pub fn set(&self, at: u64, value: u16) {
        self.write(at, &value.to_le_bytes());
    }

    /// Sixteen bits, little-endian; 0 where there is no memory.
    pub fn get(&self, at: u64) -> u16 {
        let mut bytes = [0; 2];
        let _ = self.memory.read(&mut bytes, GuestAddress(at));
        u16::from_le_bytes(bytes)
    }

    /// Whether `len` bytes from `host` are all in one region.
    pub fn holds(&self, host: usize, len: usize) -> bool {
        self.table.regions().iter().any(|region| {
            let base = region.host.addr().get();
            let end = base + usize::try_from(region.len).expect("small regions");
            host >= base && host.checked_add(len).is_some_and(|last| last <= end)
        })
    }
}

impl Default for Guest {
    fn default() -> Guest {
        Guest::new()
    }
}

/// A ring of `1 << exponent` entries, 64 at most, in [`Guest`].
pub fn setup(exponent: u8, event_idx: bool, chain_limit: u16) -> RingSetup {
    RingSetup {
        size: 1 << (exponent % 7),
        desc: DESC,
        avail: AVAIL,
        used: USED,
        next_avail: 0,
        event_idx,
        chain_limit,
    }
}

/// A small disk that serves what the bits of `what` say.
pub fn shape(what: u8) -> DiskShape {
    DiskShape {
        capacity: Sector(64),
        logical_block_size: if what & 1 == 0 { 512 } else { 4096 },
        read_only: what & 2 != 0,
        discard: (what & 4 == 0).then_some(RangeLimits {
            max_sectors: 32,
            max_ranges: 4,
        }),
        write_zeroes: (what & 8 == 0).then_some(RangeLimits {
            max_sectors: 16,
            max_ranges: 12,
        }),
        serial: *b"a-disk-to-be-fuzzed\0",
    }
}
