//! The parser against a slow reading of the specification: chains as lists of single bytes, over a
//! copy of the guest's memory. It shares nothing with the parser but the numbers in it.

#![expect(
    clippy::cast_possible_truncation,
    reason = "the numbers of these tests are small"
)]

use std::collections::HashMap;

use proptest::collection::vec;
use proptest::prelude::*;

use super::{Bench, R, W};
use crate::mq::ids::Sector;
use crate::mq::request::{Op, Status};
use crate::virtio::abi::Descriptor;
use crate::virtio::geometry::DiskShape;
use crate::virtio::parse::Parsed;
use crate::virtio::testing::{DESC, Guest, shape};

const SIZE: u16 = 16;
const LIMIT: u16 = 24;
const NEXT: u16 = 1;
const INDIRECT: u16 = 4;

/// A byte of a buffer: its address, and which host buffer it belongs to (descriptor, region).
#[derive(Clone, Copy, Debug)]
struct Byte {
    address: u64,
    buffer: (usize, usize),
}

#[derive(Debug, PartialEq)]
enum Outcome {
    /// The ring is broken.
    Broken,
    /// Answered: the used length, and what was written where.
    Answered { used: u32, writes: HashMap<u64, u8> },
    /// To be done.
    Request {
        op: Op,
        sector: u64,
        bytes: u64,
        ioprio: u16,
        fua: bool,
        unmap: bool,
        /// Buffers as guest addresses of all their bytes.
        buffers: Vec<Vec<u64>>,
        ranges: Vec<(u64, u64)>,
        status: u64,
    },
}

struct Oracle<'a> {
    memory: Vec<(u64, Vec<u8>)>,
    shape: &'a DiskShape,
    write_through: bool,
}

impl Oracle<'_> {
    fn region(&self, address: u64) -> Option<usize> {
        self.memory
            .iter()
            .position(|(start, bytes)| address >= *start && address - start < bytes.len() as u64)
    }

    fn byte(&self, address: u64) -> Option<u8> {
        let (start, bytes) = &self.memory[self.region(address)?];
        Some(bytes[(address - start) as usize])
    }

    fn number(&self, address: u64, bytes: u64) -> Option<u64> {
        (0..bytes).try_fold(0, |number, i| {
            let byte = self.byte(address.checked_add(i)?)?;
            Some(number | u64::from(byte) << (8 * i))
        })
    }

    fn descriptor(&self, address: u64) -> Option<(u64, u64, u16, u16)> {
        let flags = self.number(address.checked_add(12)?, 2)?;
        let next = self.number(address.checked_add(14)?, 2)?;
        let len = self.number(address.checked_add(8)?, 4)?;
        Some((self.number(address, 8)?, len, flags as u16, next as u16))
    }

    /// The chain's buffers (address, bytes, writable).
    fn buffers(&self, head: u16) -> Option<Vec<(u64, u64, bool)>> {
        let mut buffers = Vec::new();
        let (mut table, mut len, mut index) = (DESC, SIZE, head);
        let mut inside = false;
        let mut steps = 0;
        loop {
            if steps == len || index >= len {
                return None;
            }
            steps += 1;
            let at = table.checked_add(16 * u64::from(index))?;
            let (address, bytes, flags, next) = self.descriptor(at)?;
            if flags & INDIRECT != 0 {
                let fits = bytes > 0 && bytes.is_multiple_of(16) && bytes / 16 <= u64::from(LIMIT);
                if inside || flags & NEXT != 0 || !fits {
                    return None;
                }
                (table, len, index) = (address, (bytes / 16) as u16, 0);
                (inside, steps) = (true, 0);
            } else {
                buffers.push((address, bytes, flags & W != 0));
                if flags & NEXT == 0 {
                    return Some(buffers);
                }
                index = next;
            }
        }
    }

    fn outcome(&self, head: u16) -> Outcome {
        let Some(chain) = self.buffers(head) else {
            return Outcome::Broken;
        };
        let last = chain
            .iter()
            .rfind(|(_, bytes, writable)| *writable && *bytes > 0);
        let status = last.and_then(|(address, bytes, _)| address.checked_add(bytes - 1));
        let Some(status) = status.filter(|status| self.region(*status).is_some()) else {
            return Outcome::Broken;
        };
        self.served(&chain, status)
            .unwrap_or_else(|code| answered(code, &[], status))
    }

    /// The request or its answer; an error is a status with no data.
    fn served(&self, chain: &[(u64, u64, bool)], status: u64) -> Result<Outcome, u8> {
        let (mut readable, mut writable) = (Vec::new(), Vec::new());
        let mut write_seen = false;
        for (number, &(address, bytes, write)) in chain.iter().enumerate() {
            if write_seen && !write {
                return Err(1);
            }
            write_seen |= write;
            for i in 0..bytes {
                let address = address.checked_add(i).ok_or(1)?;
                let buffer = (number, self.region(address).ok_or(1)?);
                let list = if write { &mut writable } else { &mut readable };
                list.push(Byte { address, buffer });
            }
        }
        writable.pop();
        if readable.len() < 16 {
            return Err(1);
        }
        let out: Vec<Byte> = readable.split_off(16);
        let header: Vec<u8> = readable
            .iter()
            .map(|b| self.byte(b.address).unwrap())
            .collect();
        // Legacy drivers set the highest bit beside the type.
        let kind = u32::from_le_bytes(header[..4].try_into().unwrap()) & 0x7fff_ffff;
        let ioprio = u32::from_le_bytes(header[4..8].try_into().unwrap());
        let sector = u64::from_le_bytes(header[8..].try_into().unwrap());
        let request = |op, sector, bytes, data: &[Byte], ranges, unmap| Outcome::Request {
            op,
            sector,
            bytes,
            ioprio: if ioprio < 65536 { ioprio as u16 } else { 0 },
            fua: self.write_through && op != Op::Read && op != Op::Flush,
            unmap,
            buffers: cut(data),
            ranges,
            status,
        };
        match kind {
            0 | 1 => {
                let (data, other) = if kind == 0 {
                    (&writable, &out)
                } else {
                    (&out, &writable)
                };
                let good = other.is_empty() && !(kind == 1 && self.shape.read_only);
                if !good || !self.fits(sector, data.len() as u64) {
                    return Err(1);
                }
                let op = if kind == 0 { Op::Read } else { Op::Write };
                if data.is_empty() {
                    return Err(0);
                }
                Ok(request(op, sector, data.len() as u64, data, vec![], false))
            }
            4 => Ok(request(Op::Flush, 0, 0, &[], vec![], false)),
            8 if !out.is_empty() => Err(1),
            8 => {
                let serial = self.shape.serial.iter();
                let writes: Vec<_> = writable
                    .iter()
                    .zip(serial)
                    .map(|(at, byte)| (at.address, *byte))
                    .collect();
                Ok(answered(0, &writes, status))
            }
            11 | 13 => self.ranges(kind, &out, &writable).map(|(ranges, unmap)| {
                let first = ranges.iter().map(|range| range.0).min().unwrap();
                let bytes = ranges.iter().map(|range| range.1).sum();
                let op = if kind == 11 {
                    Op::Discard
                } else {
                    Op::WriteZeroes
                };
                request(op, first / 512, bytes, &[], ranges, unmap)
            }),
            _ => Err(2),
        }
    }

    fn fits(&self, sector: u64, bytes: u64) -> bool {
        let (start, bytes) = (u128::from(sector) * 512, u128::from(bytes));
        let block = u128::from(self.shape.logical_block_size);
        let capacity = u128::from(self.shape.capacity.0) * 512;
        start % block == 0 && bytes % block == 0 && start + bytes <= capacity
    }

    fn ranges(
        &self,
        kind: u32,
        out: &[Byte],
        other: &[Byte],
    ) -> Result<(Vec<(u64, u64)>, bool), u8> {
        if !other.is_empty() || self.shape.read_only {
            return Err(1);
        }
        let limits = if kind == 11 {
            self.shape.discard
        } else {
            self.shape.write_zeroes
        };
        let limits = limits.ok_or(2)?;
        let count = out.len() / 16;
        if count == 0 || !out.len().is_multiple_of(16) || count > usize::from(limits.max_ranges) {
            return Err(1);
        }
        let bytes: Vec<u8> = out.iter().map(|b| self.byte(b.address).unwrap()).collect();
        let mut ranges = Vec::new();
        let mut unmap = kind == 13;
        for range in bytes.chunks(16) {
            let sector = u64::from_le_bytes(range[..8].try_into().unwrap());
            let sectors = u32::from_le_bytes(range[8..12].try_into().unwrap());
            let flags = u32::from_le_bytes(range[12..].try_into().unwrap());
            if flags > 1 || (kind == 11 && flags != 0) {
                return Err(2);
            }
            if sectors > limits.max_sectors || !self.fits(sector, u64::from(sectors) * 512) {
                return Err(1);
            }
            if sectors > 0 {
                unmap &= flags == 1;
                ranges.push((sector * 512, u64::from(sectors) * 512));
            }
        }
        if ranges.is_empty() {
            Err(0)
        } else {
            Ok((ranges, unmap))
        }
    }
}

fn answered(code: u8, writes: &[(u64, u8)], status: u64) -> Outcome {
    let used = u32::try_from(writes.len()).unwrap() + 1;
    let mut map: HashMap<u64, u8> = writes.iter().copied().collect();
    map.insert(status, code);
    Outcome::Answered { used, writes: map }
}

/// Bytes, grouped by the buffers they are in.
fn cut(bytes: &[Byte]) -> Vec<Vec<u64>> {
    let chunks = bytes.chunk_by(|a, b| a.buffer == b.buffer);
    chunks
        .map(|chunk| chunk.iter().map(|byte| byte.address).collect())
        .collect()
}

/// What the parser makes of the chain at `head`, in the oracle's terms; and that whatever it left
/// untouched is untouched.
fn parsed(bench: &mut Bench, head: u16) -> Outcome {
    let before = bench.guest.snapshot();
    let parsed = bench.parse_next();
    let mut writes = HashMap::new();
    for ((start, old), (_, new)) in before.iter().zip(bench.guest.snapshot()) {
        for (i, (old, new)) in old.iter().zip(new).enumerate() {
            if *old != new {
                writes.insert(start + i as u64, new);
            }
        }
    }
    match parsed {
        Err(_) => {
            assert!(writes.is_empty());
            assert_eq!((bench.ring.in_flight(), bench.ring.next_avail()), (0, 0));
            Outcome::Broken
        }
        Ok(Parsed::NoRoom(_)) => panic!("the pool is free"),
        Ok(Parsed::Done(used)) => {
            assert_eq!(used.head(), head);
            let len = used.len();
            bench.ring.put_used(used);
            Outcome::Answered { used: len, writes }
        }
        Ok(Parsed::Request(request, io)) => {
            assert!(writes.is_empty());
            assert_eq!(io.head(), head);
            let buffers: Vec<Vec<u64>> = io
                .iovecs()
                .iter()
                .map(|iovec| {
                    let (start, len) = bench.guest_addresses(&[*iovec])[0];
                    (start..start + len).collect()
                })
                .collect();
            let ranges: Vec<_> = io
                .ranges()
                .iter()
                .map(|range| (range.offset_bytes, range.len_bytes))
                .collect();
            assert_eq!(usize::from(request.segments), buffers.len() + ranges.len());
            let status = finish(bench, io, request.bytes);
            Outcome::Request {
                op: request.op,
                sector: request.sector.0,
                bytes: request.bytes,
                ioprio: request.ioprio.0,
                fua: request.fua,
                unmap: request.unmap,
                buffers,
                ranges,
                status,
            }
        }
    }
}

/// Finishes a request and finds its status byte: the only one that becomes what we say.
fn finish(bench: &mut Bench, io: super::GuestIo, bytes: u64) -> u64 {
    let before = bench.guest.snapshot();
    // No memory of these tests has UNSUPP in it before, see `Case::place`.
    let used = io.finish(Status::Unsupp, bytes as u32, &mut bench.pool);
    assert_eq!(u64::from(used.len()), bytes + 1);
    bench.ring.put_used(used);
    let ring = crate::virtio::testing::USED;
    let mut changed = Vec::new();
    for ((start, old), (_, new)) in before.iter().zip(bench.guest.snapshot()) {
        for (i, (old, new)) in old.iter().zip(new).enumerate() {
            let at = start + i as u64;
            let in_ring = (ring..ring + 4 + 8 * u64::from(SIZE)).contains(&at);
            if *old != new && !in_ring {
                assert_eq!(new, 2);
                changed.push(at);
            }
        }
    }
    assert_eq!(changed.len(), 1, "one status byte is written");
    changed[0]
}

/// One buffer of a chain.
#[derive(Clone, Debug)]
struct Buffer {
    address: u64,
    len: u32,
    writable: bool,
}

#[derive(Clone, Debug)]
struct Case {
    header: (u32, u32, u64),
    /// Bytes the header is cut into; what is missing comes in one more buffer.
    header_cuts: Vec<u32>,
    data: Vec<Buffer>,
    /// The status has a buffer of its own.
    status_apart: bool,
    ranges: Vec<(u64, u32, u32)>,
    /// After how many descriptors the rest goes to an indirect table, and where that is.
    indirect: Option<(usize, u64)>,
    /// Descriptors overwritten afterwards: which, and what to do to it.
    damage: Vec<(usize, Damage)>,
    read_only: bool,
    write_through: bool,
    large_blocks: bool,
}

#[derive(Clone, Debug)]
enum Damage {
    Flags(u16),
    Next(u16),
    Len(u32),
    Address(u64),
}

/// Places worth having a buffer at: plain ones, across regions, outside, wrapping.
fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        40 => (0x3000_u64..0x7000).prop_map(|at| at & !15),
        20 => 0x3000_u64..0x7000,
        10 => 0x7e00_u64..0x8010,
        6 => 0x2_0e00_u64..0x2_1000,
        1 => 0x2_1e00_u64..0x2_2010,
        1 => 0x1_0000_u64..0x1_0004,
        1 => Just(u64::MAX - 511),
        1 => Just(u64::MAX),
    ]
}

fn len() -> impl Strategy<Value = u32> {
    prop_oneof![
        60 => prop_oneof![Just(512_u32), Just(1024), Just(4096)],
        3 => prop_oneof![Just(16_u32), Just(20), Just(32), Just(48)],
        3 => Just(0_u32),
        3 => prop_oneof![Just(1_u32), Just(511), Just(513), Just(496)],
        1 => Just(u32::MAX),
    ]
}

fn kind() -> impl Strategy<Value = u32> {
    prop_oneof![
        6 => Just(0_u32),
        6 => Just(1_u32),
        2 => Just(4_u32),
        2 => Just(8_u32),
        3 => Just(11_u32),
        3 => Just(13_u32),
        2 => prop_oneof![Just(0_u32), Just(1), Just(4), Just(8), Just(11), Just(13)]
            .prop_map(|kind| kind | 1 << 31),
        1 => any::<u32>(),
    ]
}

fn sector() -> impl Strategy<Value = u64> {
    prop_oneof![8 => 0_u64..32, 2 => 116_u64..130, 1 => any::<u64>(), 1 => Just(1_u64 << 55)]
}

fn case() -> impl Strategy<Value = Case> {
    let header = (
        kind(),
        prop_oneof![3 => 0_u32..65536, 1 => any::<u32>()],
        sector(),
    );
    let cuts = prop_oneof![3 => Just(vec![16]), 1 => vec(0_u32..9, 0..4), 1 => Just(vec![1; 16])];
    // The direction follows the type mostly; `None` here.
    let buffer = (
        address(),
        len(),
        prop_oneof![40 => Just(None), 1 => any::<bool>().prop_map(Some)],
    );
    let range = (
        prop_oneof![20 => 0_u64..110, 1 => any::<u64>()],
        prop_oneof![20 => 0_u32..18, 1 => any::<u32>()],
        prop_oneof![20 => Just(0_u32), 10 => Just(1_u32), 1 => any::<u32>()],
    );
    let table = prop_oneof![
        4 => Just(0x2800_u64),
        1 => Just(0x2808_u64),
        1 => Just(0x2803_u64),
        1 => Just(0x7fd8_u64),
        1 => Just(0x1_0000_u64 - 40),
        1 => Just(u64::MAX - 20),
    ];
    let damage = prop_oneof![
        any::<u16>().prop_map(|flags| Damage::Flags(flags & 7)),
        (0_u16..26).prop_map(Damage::Next),
        len().prop_map(Damage::Len),
        address().prop_map(Damage::Address),
    ];
    (
        (
            header,
            cuts,
            vec(buffer, 0..11),
            prop_oneof![3 => Just(true), 1 => Just(false)],
        ),
        vec(range, 0..6),
        prop::option::of((prop_oneof![3 => Just(0_usize), 1 => 0_usize..6], table)),
        prop_oneof![3 => Just(vec![]), 2 => vec((0_usize..14, damage), 1..3)],
        (
            prop::bool::weighted(0.1),
            any::<bool>(),
            prop::bool::weighted(0.2),
        ),
    )
        .prop_map(
            |((header, header_cuts, data, status_apart), ranges, indirect, damage, flags)| {
                let reads = matches!(header.0, 0 | 8);
                let ranged = matches!(header.0, 11 | 13);
                let (read_only, write_through, large_blocks) = flags;
                let mut data: Vec<_> = data
                    .into_iter()
                    .map(|(address, len, writable)| Buffer {
                        address,
                        len,
                        writable: writable.unwrap_or(reads),
                    })
                    .collect();
                if ranged && !ranges.is_empty() && data.len() < 6 {
                    let len = u32::try_from(ranges.len() * 16).unwrap();
                    data = vec![Buffer {
                        address: 0x3800,
                        len,
                        writable: false,
                    }];
                }
                if header.0 == 4 && status_apart {
                    data.clear();
                }
                Case {
                    header,
                    header_cuts,
                    data,
                    status_apart,
                    ranges,
                    indirect,
                    damage,
                    read_only,
                    write_through,
                    large_blocks,
                }
            },
        )
}

impl Case {
    /// The chain as buffers, header and status included.
    fn buffers(&self) -> Vec<Buffer> {
        let mut buffers = Vec::new();
        let (mut at, end) = (0x2f80_u64, 0x2f90_u64);
        for cut in &self.header_cuts {
            let len = (end - at).min(u64::from(*cut));
            buffers.push(Buffer {
                address: at,
                len: len as u32,
                writable: false,
            });
            at += len;
        }
        if at < end {
            let len = (end - at) as u32;
            buffers.push(Buffer {
                address: at,
                len,
                writable: false,
            });
        }
        buffers.extend(self.data.iter().cloned());
        let last_writable = buffers
            .last_mut()
            .filter(|last| last.writable && last.len > 1);
        match last_writable {
            Some(last) if !self.status_apart => last.len = last.len.saturating_add(1),
            _ => buffers.push(Buffer {
                address: 0x2fa0,
                len: 1,
                writable: true,
            }),
        }
        buffers
    }

    /// Puts the chain into a new guest and offers it.
    fn place(&self) -> Bench {
        let mut guest = Guest::new(SIZE);
        guest.setup.chain_limit = LIMIT;
        for region in guest.table.regions() {
            guest.write(
                region.gpa,
                &vec![0x5a; usize::try_from(region.len).unwrap()],
            );
        }
        guest.write(0, &[0; 0x2800]);
        let (kind, ioprio, sector) = self.header;
        guest.put_header(0x2f80, kind, ioprio, sector);
        guest.write(0x3800, &super::ranges(&self.ranges));

        let buffers = self.buffers();
        let total = buffers.len();
        let (split, table) = match self.indirect {
            Some((split, table)) if split < total.min(15) => (split, table),
            _ => (total, 0),
        };
        let mut descriptors = Vec::new();
        for (i, buffer) in buffers.iter().enumerate() {
            let at = if i < split { i } else { i - split };
            let last = i + 1 == total;
            let flags = if buffer.writable { W } else { R } | if last { 0 } else { NEXT };
            let next = if last { 0 } else { at as u16 + 1 };
            let Buffer {
                address: addr, len, ..
            } = *buffer;
            descriptors.push(Descriptor {
                addr,
                len,
                flags,
                next,
            });
        }
        for (which, damage) in &self.damage {
            if let Some(descriptor) = descriptors.get_mut(*which) {
                match damage {
                    Damage::Flags(flags) => descriptor.flags = *flags,
                    Damage::Next(next) => descriptor.next = *next,
                    Damage::Len(len) => descriptor.len = *len,
                    Damage::Address(address) => descriptor.addr = *address,
                }
            }
        }
        // What does not fit into the ring or outside memory is not there.
        for (i, descriptor) in descriptors.iter().enumerate() {
            if i < split && i < usize::from(SIZE) {
                guest.put_descriptor(DESC, i as u16, descriptor);
            } else if i >= split {
                let at = table.saturating_add(16 * (i - split) as u64);
                if guest.table.read(at, &mut [0; 16]) {
                    guest.put_descriptor(at, 0, descriptor);
                }
            }
        }
        if split < total {
            let len = 16 * (total - split) as u32;
            let flags = INDIRECT | if total.is_multiple_of(2) { W } else { 0 };
            let whole = Descriptor {
                addr: table,
                len,
                flags,
                next: 0,
            };
            guest.put_descriptor(DESC, split as u16, &whole);
        }
        guest.offer(0);
        let mut bench = Bench::with_guest(guest);
        bench.shape = shape();
        bench.shape.capacity = Sector(128);
        bench.shape.read_only = self.read_only;
        if self.large_blocks {
            bench.shape.logical_block_size = 1024;
        }
        bench.write_through = self.write_through;
        bench
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1024, ..ProptestConfig::default() })]

    #[test]
    fn the_parser_reads_the_specification_as_the_oracle_does(case in case()) {
        let mut bench = case.place();
        let mut expected = Oracle {
            memory: bench.guest.snapshot(),
            shape: &bench.shape,
            write_through: bench.write_through,
        }
        .outcome(0);
        // A write that changes nothing cannot be seen.
        if let Outcome::Answered { writes, .. } = &mut expected {
            let before: HashMap<u64, u8> = writes
                .keys()
                .map(|at| (*at, bench.guest.read(*at, 1)[0]))
                .collect();
            writes.retain(|at, byte| before[at] != *byte);
        }
        if let Outcome::Request { status, .. } = &expected
            && bench.guest.read(*status, 1) == [2]
        {
            // Nor can the status, where it has been placed over a 2.
            return Ok(());
        }
        let outcome = parsed(&mut bench, 0);
        prop_assert_eq!(outcome, expected);
    }
}

/// The generator reaches what it is for: every outcome, and every operation.
#[test]
fn the_cases_are_of_every_kind() {
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;

    let mut runner = TestRunner::deterministic();
    let mut seen: HashMap<String, u32> = HashMap::new();
    for _ in 0..2000 {
        let bench = case().new_tree(&mut runner).unwrap().current().place();
        let oracle = Oracle {
            memory: bench.guest.snapshot(),
            shape: &bench.shape,
            write_through: bench.write_through,
        };
        let name = match oracle.outcome(0) {
            Outcome::Broken => "broken".to_string(),
            Outcome::Answered { used: 1, writes } => {
                format!("answered {:?}", writes.values().next().unwrap())
            }
            Outcome::Answered { .. } => "answered with data".to_string(),
            Outcome::Request { op, buffers, .. } if buffers.len() > 8 => format!("long {op:?}"),
            Outcome::Request { op, .. } => format!("{op:?}"),
        };
        *seen.entry(name).or_default() += 1;
    }
    for name in [
        "broken",
        "answered 0",
        "answered 1",
        "answered 2",
        "answered with data",
        "Read",
        "Write",
        "Flush",
        "Discard",
        "WriteZeroes",
        "long Read",
        "long Write",
    ] {
        assert!(
            seen.get(name).is_some_and(|count| *count >= 5),
            "{name}: {seen:?}"
        );
    }
}
