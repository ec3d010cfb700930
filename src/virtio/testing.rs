//! A guest for tests: some memory, a ring in it, and a driver's view of both.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::abi::{DESC_NEXT, Descriptor};
use super::geometry::{DiskShape, RangeLimits};
use super::memory::MemoryTable;
use super::ring::{Ring, RingSetup};
use crate::mq::ids::Sector;

/// Where the guest's memory is: two adjacent regions, a hole, and two adjacent ones again.
pub(super) const REGIONS: [(u64, usize); 4] = [
    (0, 0x8000),
    (0x8000, 0x8000),
    (0x2_0000, 0x1000),
    (0x2_1000, 0x1000),
];

/// Where the ring's parts are, for any size up to 256.
pub(super) const DESC: u64 = 0;
pub(super) const AVAIL: u64 = 0x1000;
pub(super) const USED: u64 = 0x2000;

pub(super) struct Guest {
    pub(super) memory: Arc<GuestMemoryMmap>,
    pub(super) table: Arc<MemoryTable>,
    pub(super) setup: RingSetup,
}

impl Guest {
    pub(super) fn new(size: u16) -> Guest {
        Self::with_regions(size, &REGIONS)
    }

    pub(super) fn with_regions(size: u16, regions: &[(u64, usize)]) -> Guest {
        let ranges: Vec<_> = regions
            .iter()
            .map(|&(at, len)| (GuestAddress(at), len))
            .collect();
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap());
        let table = Arc::new(MemoryTable::from_guest_memory(Arc::clone(&memory), None).unwrap());
        let setup = RingSetup {
            size,
            desc: DESC,
            avail: AVAIL,
            used: USED,
            next_avail: 0,
            event_idx: true,
            chain_limit: 0,
        };
        Guest {
            memory,
            table,
            setup,
        }
    }

    pub(super) fn ring(&self) -> Ring {
        Ring::new(&self.setup, Arc::clone(&self.table)).unwrap()
    }

    pub(super) fn write(&self, at: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
    }

    pub(super) fn read(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory
            .read_slice(&mut bytes, GuestAddress(at))
            .unwrap();
        bytes
    }

    /// All memory, region by region.
    pub(super) fn snapshot(&self) -> Vec<(u64, Vec<u8>)> {
        self.table
            .regions()
            .iter()
            .map(|region| {
                (
                    region.gpa,
                    self.read(region.gpa, usize::try_from(region.len).unwrap()),
                )
            })
            .collect()
    }

    /// A 16-bit field, accessed as a driver on another thread does.
    pub(super) fn field(&self, at: u64) -> &AtomicU16 {
        let host = self.table.host(at, 2).unwrap().cast();
        assert!(host.is_aligned());
        // SAFETY: two aligned bytes of memory that `self` keeps mapped. Unsafe because the ring
        // under test accesses them too, atomically as well.
        unsafe { AtomicU16::from_ptr(host.as_ptr()) }
    }

    pub(super) fn set(&self, at: u64, value: u16) {
        self.field(at).store(value.to_le(), Ordering::Release);
    }

    pub(super) fn get(&self, at: u64) -> u16 {
        u16::from_le(self.field(at).load(Ordering::Acquire))
    }

    pub(super) fn put_descriptor(&self, table: u64, index: u16, descriptor: &Descriptor) {
        let mut bytes = Vec::new();
        bytes.extend(descriptor.addr.to_le_bytes());
        bytes.extend(descriptor.len.to_le_bytes());
        bytes.extend(descriptor.flags.to_le_bytes());
        bytes.extend(descriptor.next.to_le_bytes());
        self.write(table + u64::from(index) * 16, &bytes);
    }

    /// Buffers (address, bytes, flags) as a chain in the descriptors from `first`.
    pub(super) fn put_chain(&self, table: u64, first: u16, buffers: &[(u64, u32, u16)]) {
        let last = buffers.len() - 1;
        for (i, &(addr, len, flags)) in buffers.iter().enumerate() {
            let index = first + u16::try_from(i).unwrap();
            let flags = flags | if i < last { DESC_NEXT } else { 0 };
            self.put_descriptor(
                table,
                index,
                &Descriptor {
                    addr,
                    len,
                    flags,
                    next: index + 1,
                },
            );
        }
    }

    pub(super) fn put_header(&self, at: u64, kind: u32, ioprio: u32, sector: u64) {
        let mut bytes = Vec::new();
        bytes.extend(kind.to_le_bytes());
        bytes.extend(ioprio.to_le_bytes());
        bytes.extend(sector.to_le_bytes());
        self.write(at, &bytes);
    }

    pub(super) fn avail_index(&self) -> u16 {
        self.get(AVAIL + 2)
    }

    /// Makes a chain available.
    pub(super) fn offer(&self, head: u16) {
        let index = self.avail_index();
        let entry = u64::from(index % self.setup.size);
        self.set(AVAIL + 4 + 2 * entry, head);
        self.set(AVAIL + 2, index.wrapping_add(1));
    }

    pub(super) fn used_index(&self) -> u16 {
        self.get(USED + 2)
    }

    /// The used element of an index: head and length.
    pub(super) fn used(&self, index: u16) -> (u32, u32) {
        let bytes = self.read(USED + 4 + 8 * u64::from(index % self.setup.size), 8);
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        (word(0), word(4))
    }

    pub(super) fn used_event(&self) -> u64 {
        AVAIL + 4 + 2 * u64::from(self.setup.size)
    }

    pub(super) fn avail_event(&self) -> u64 {
        USED + 4 + 8 * u64::from(self.setup.size)
    }
}

/// A disk that serves everything: 64 sectors.
pub(super) fn shape() -> DiskShape {
    DiskShape {
        capacity: Sector(64),
        logical_block_size: 512,
        read_only: false,
        discard: Some(RangeLimits {
            max_sectors: 32,
            max_ranges: 4,
        }),
        write_zeroes: Some(RangeLimits {
            max_sectors: 16,
            max_ranges: 12,
        }),
        serial: *b"serial-of-the-disk\0\0",
    }
}
