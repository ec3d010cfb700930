use super::*;
use crate::virtio::abi::Descriptor;
use crate::virtio::testing::{DESC, Guest, shape};

mod oracle;

const R: u16 = 0;
const W: u16 = DESC_WRITE;
const HEADER: u64 = 0x3000;
const DATA: u64 = 0x4000;
const STATUS: u64 = 0x3100;
/// What status bytes are before anyone has written them.
const UNTOUCHED: u8 = 0xee;

/// Buffers or ranges: where each starts, and its bytes.
type Pieces = Vec<(u64, u64)>;

/// A guest and a ring of its own for chains of tests.
struct Bench {
    guest: Guest,
    ring: Ring,
    pool: SegmentPool,
    shape: DiskShape,
    write_through: bool,
}

impl Bench {
    fn new() -> Bench {
        Self::with_guest(Guest::new(16))
    }

    fn with_guest(guest: Guest) -> Bench {
        let ring = guest.ring();
        let pool = SegmentPool::new();
        Bench {
            guest,
            ring,
            pool,
            shape: shape(),
            write_through: false,
        }
    }

    /// Offers the chain at `head` and parses it.
    fn parse(&mut self, head: u16) -> Result<Parsed, RingError> {
        self.guest.offer(head);
        self.parse_next()
    }

    fn parse_next(&mut self) -> Result<Parsed, RingError> {
        self.ring.available()?;
        let head = self.ring.pop_head()?.expect("a chain was offered");
        parse(
            &mut self.ring,
            head,
            &self.shape,
            self.write_through,
            &mut self.pool,
        )
    }

    /// Parses `[header | buffers...]`.
    fn chain(&mut self, kind: u32, sector: u64, buffers: &[(u64, u32, u16)]) -> Parsed {
        self.guest.put_header(HEADER, kind, 0, sector);
        self.guest.write(STATUS, &[UNTOUCHED]);
        let buffers = [&[(HEADER, 16, R)], buffers].concat();
        self.guest.put_chain(DESC, 0, &buffers);
        self.parse(0).unwrap()
    }

    /// As `chain`, for one that is answered at once: its status and used length.
    fn answer(&mut self, kind: u32, sector: u64, buffers: &[(u64, u32, u16)]) -> (u8, u32) {
        match self.chain(kind, sector, buffers) {
            Parsed::Done(used) => {
                let len = used.len();
                self.ring.put_used(used);
                (self.guest.read(STATUS, 1)[0], len)
            }
            other => panic!("not answered at once: {other:?}"),
        }
    }

    /// As `chain`, for one that is to be done: what it is, its buffers as (address, bytes), and
    /// its ranges as (bytes from the start, bytes).
    fn request(
        &mut self,
        kind: u32,
        sector: u64,
        buffers: &[(u64, u32, u16)],
    ) -> (Request, Pieces, Pieces) {
        match self.chain(kind, sector, buffers) {
            Parsed::Request(request, io) => {
                assert_eq!(self.guest.read(STATUS, 1), [UNTOUCHED]);
                let data = self.guest_addresses(io.iovecs());
                let ranges = io.ranges().iter();
                let ranges = ranges
                    .map(|range| (range.offset_bytes, range.len_bytes))
                    .collect();
                let used = io.finish(Status::Ok, 0, &mut self.pool);
                assert_eq!(used.len(), 1);
                self.ring.put_used(used);
                assert_eq!(self.guest.read(STATUS, 1), [0]);
                (request, data, ranges)
            }
            other => panic!("not a request: {other:?}"),
        }
    }

    fn guest_addresses(&self, iovecs: &[libc::iovec]) -> Vec<(u64, u64)> {
        let guest_address = |host: u64| {
            self.guest.table.regions().iter().find_map(|region| {
                let offset = host.wrapping_sub(region.host.addr().get() as u64);
                (offset < region.len).then(|| region.gpa + offset)
            })
        };
        iovecs
            .iter()
            .map(|iovec| {
                let address = guest_address(iovec.iov_base.addr() as u64).expect("guest memory");
                (address, iovec.iov_len as u64)
            })
            .collect()
    }
}

const IOERR: (u8, u32) = (1, 1);
const UNSUPP: (u8, u32) = (2, 1);
const OK: (u8, u32) = (0, 1);

#[test]
fn a_read_and_a_write_as_linux_makes_them() {
    let mut bench = Bench::new();
    let buffers = [(DATA, 4096, W), (0x6000, 512, W), (STATUS, 1, W)];
    let (request, data, _) = bench.request(request_type::IN, 3, &buffers);
    let read = Request {
        op: Op::Read,
        sector: Sector(3),
        bytes: 4608,
        segments: 2,
        ioprio: IoPrio(0),
        fua: false,
        unmap: false,
    };
    assert_eq!(request, read);
    assert_eq!(data, [(DATA, 4096), (0x6000, 512)]);

    bench.write_through = true;
    let buffers = buffers.map(|(at, len, _)| (at, len, if at == STATUS { W } else { R }));
    let (request, data, _) = bench.request(request_type::OUT, 3, &buffers);
    assert_eq!(
        request,
        Request {
            op: Op::Write,
            fua: true,
            ..read
        }
    );
    assert_eq!(data, [(DATA, 4096), (0x6000, 512)]);

    // The header says where a flush is, but that means nothing.
    let (request, data, _) = bench.request(request_type::FLUSH, u64::MAX, &[(STATUS, 1, W)]);
    let flush = Request {
        op: Op::Flush,
        sector: Sector(0),
        bytes: 0,
        segments: 0,
        ..read
    };
    assert_eq!(request, flush);
    assert_eq!(data, []);
    let buffers = [(DATA, 512, R), (DATA, 512, W), (STATUS, 1, W)];
    assert_eq!(
        bench.request(request_type::FLUSH, u64::MAX, &buffers).0,
        flush
    );
}

#[test]
fn the_priority_is_kept_and_what_is_none_is_none() {
    let mut bench = Bench::new();
    for (wire, expected) in [
        (0x4003, 0x4003),
        (0xffff, 0xffff),
        (0x1_4003, 0),
        (u32::MAX, 0),
    ] {
        for data in [512, 0x600] {
            // The second one ends with the status byte in the data's buffer.
            let buffers: &[_] = if data == 512 {
                &[(HEADER, 16, R), (DATA, 512, W), (STATUS, 1, W)]
            } else {
                &[(HEADER, 16, R), (DATA, 513, W)]
            };
            bench.guest.put_header(HEADER, request_type::IN, wire, 0);
            bench.guest.put_chain(DESC, 0, buffers);
            let Parsed::Request(request, io) = bench.parse(0).unwrap() else {
                panic!("a good read was not taken");
            };
            assert_eq!(request.ioprio, IoPrio(expected));
            bench
                .ring
                .put_used(io.finish(Status::Ok, 512, &mut bench.pool));
        }
    }
}

#[test]
fn used_lengths_count_what_was_written() {
    let mut bench = Bench::new();
    for (status, bytes, expected) in [(Status::Ok, 512, 513), (Status::IoErr, 0, 1)] {
        let parsed = bench.chain(request_type::IN, 0, &[(DATA, 512, W), (STATUS, 1, W)]);
        let Parsed::Request(_, io) = parsed else {
            panic!("a good read was not taken")
        };
        let used = io.finish(status, bytes, &mut bench.pool);
        assert_eq!((used.head(), used.len()), (0, expected));
        bench.ring.put_used(used);
    }
}

#[test]
fn positions_and_lengths_are_checked() {
    let mut bench = Bench::new();
    let mut read = |sector, len| {
        let parsed = bench.chain(request_type::IN, sector, &[(DATA, len, W), (STATUS, 1, W)]);
        let used = match parsed {
            Parsed::Request(_, io) => io.finish(Status::Ok, len, &mut bench.pool),
            Parsed::Done(used) => used,
            Parsed::NoRoom(_) => panic!("there is room"),
        };
        bench.ring.put_used(used);
        bench.guest.read(STATUS, 1)[0]
    };
    assert_eq!(read(63, 512), 0);
    assert_eq!(read(62, 1024), 0);
    assert_eq!(read(63, 1024), 1, "ends after the last sector");
    assert_eq!(read(64, 512), 1);
    assert_eq!(read(1 << 55, 512), 1, "wraps to zero in bytes");
    assert_eq!(read(u64::MAX, 512), 1);
    assert_eq!(read(0, 511), 1);
    assert_eq!(read(0, 513), 1);
    assert_eq!(read(64, 0), 0, "nothing at the very end");
    assert_eq!(read(65, 0), 1);
}

#[test]
fn unaligned_for_large_blocks() {
    let mut bench = Bench::new();
    bench.shape.logical_block_size = 4096;
    for (sector, len) in [(8, 512), (1, 4096), (4, 4096), (56, 8192)] {
        let buffers = [(DATA, len, W), (STATUS, 1, W)];
        assert_eq!(bench.answer(request_type::IN, sector, &buffers), IOERR);
    }
    bench.request(request_type::IN, 56, &[(DATA, 4096, W), (STATUS, 1, W)]);
}

/// SLOF sets it in the type of every request, with virtio 1.x and without being offered it.
#[test]
fn the_legacy_barrier_bit_is_no_part_of_the_type() {
    const BARRIER: u32 = 1 << 31;
    let mut bench = Bench::new();
    let data = [(DATA, 512, W), (STATUS, 1, W)];
    let (request, buffers, _) = bench.request(request_type::IN | BARRIER, 3, &data);
    assert_eq!((request.op, request.sector), (Op::Read, Sector(3)));
    assert_eq!(buffers, [(DATA, 512)]);
    let data = [(DATA, 512, R), (STATUS, 1, W)];
    let (request, ..) = bench.request(request_type::OUT | BARRIER, 3, &data);
    assert_eq!(request.op, Op::Write);
    let flush = request_type::FLUSH | BARRIER;
    assert_eq!(bench.request(flush, 0, &[(STATUS, 1, W)]).0.op, Op::Flush);
    let id = [(DATA, 20, W), (STATUS, 1, W)];
    assert_eq!(
        bench.answer(request_type::GET_ID | BARRIER, 0, &id),
        (0, 21)
    );
    assert_eq!(bench.answer(7 | BARRIER, 0, &[(STATUS, 1, W)]), UNSUPP);
}

#[test]
fn what_is_odd_about_failing_requests_is_said_once() {
    let mut bench = Bench::new();
    let read = [(DATA, 512, W), (STATUS, 1, W)];
    // Beyond the end, and no whole sector: an ordinary mistake.
    assert_eq!(bench.answer(request_type::IN, 64, &read), IOERR);
    let odd = [(DATA, 511, W), (STATUS, 1, W)];
    assert_eq!(bench.answer(request_type::IN, 0, &odd), IOERR);
    assert_eq!(bench.pool.take_odd(), None);

    bench.shape.logical_block_size = 4096;
    assert_eq!(bench.answer(request_type::IN, 8, &read), IOERR);
    let misaligned = Odd::Misaligned {
        sector: 8,
        bytes: 512,
        block: 4096,
    };
    assert_eq!(bench.pool.take_odd(), Some(misaligned));
    assert!(misaligned.to_string().contains("--logical-block-size"));
    assert_eq!(bench.answer(request_type::IN, 8, &read), IOERR);
    assert_eq!(bench.pool.take_odd(), None);

    assert_eq!(bench.answer(7, 0, &[(STATUS, 1, W)]), UNSUPP);
    assert_eq!(bench.pool.take_odd(), Some(Odd::Unsupported(7)));
    assert_eq!(bench.answer(9, 0, &[(STATUS, 1, W)]), UNSUPP);
    assert_eq!(bench.pool.take_odd(), None);
}

#[test]
fn wrong_directions_and_unknown_types_are_answered() {
    let mut bench = Bench::new();
    let mixed = [(DATA, 512, R), (0x6000, 512, W), (STATUS, 1, W)];
    for kind in [request_type::IN, request_type::OUT, request_type::GET_ID] {
        assert_eq!(bench.answer(kind, 0, &mixed), IOERR);
    }
    assert_eq!(
        bench.answer(request_type::OUT, 0, &[(DATA, 512, W), (STATUS, 1, W)]),
        IOERR
    );
    assert_eq!(
        bench.answer(request_type::IN, 0, &[(DATA, 512, R), (STATUS, 1, W)]),
        IOERR
    );
    // Readable after writable: the status is still the last writable byte.
    let swapped = [(DATA, 512, W), (STATUS, 1, W), (0x6000, 512, R)];
    assert_eq!(bench.answer(request_type::IN, 0, &swapped), IOERR);
    for kind in [2, 3, 5, 14, 15, 16, 0x8000_0002, u32::MAX] {
        assert_eq!(
            bench.answer(kind, 0, &[(DATA, 512, W), (STATUS, 1, W)]),
            UNSUPP
        );
        assert_eq!(bench.answer(kind, 0, &[(STATUS, 1, W)]), UNSUPP);
    }
    // No header, or not a whole one.
    bench
        .guest
        .put_chain(DESC, 0, &[(HEADER, 15, R), (STATUS, 1, W)]);
    let Parsed::Done(used) = bench.parse(0).unwrap() else {
        panic!("half a header was taken")
    };
    assert_eq!(used.len(), 1);
    assert_eq!(bench.guest.read(STATUS, 1), [1]);
    bench.ring.put_used(used);
    // Data outside memory, status inside.
    for (address, len) in [
        (0x1_2000, 512),
        (0xff00, 512),
        (u64::MAX - 511, 512),
        (u64::MAX, 512),
    ] {
        let buffers = [(address, len, W), (STATUS, 1, W)];
        assert_eq!(bench.answer(request_type::IN, 0, &buffers), IOERR);
    }
}

#[test]
fn the_used_length_fits_into_32_bits() {
    // Addresses enough, memory only as it is touched.
    let guest = Guest::with_regions(16, &[(0, 0x1_0000), (1 << 32, 1 << 31)]);
    let mut bench = Bench::with_guest(guest);
    bench.shape.capacity = Sector(1 << 40);
    let half = (1 << 32, 1 << 31, W);
    assert_eq!(
        bench.answer(request_type::IN, 0, &[half, half, (STATUS, 1, W)]),
        IOERR
    );
    let less = (1 << 32, (1 << 31) - 512, W);
    let (request, data, _) = bench.request(request_type::IN, 0, &[half, less, (STATUS, 1, W)]);
    assert_eq!(request.bytes, (1 << 32) - 512);
    assert_eq!(data.len(), 2);
}

#[test]
fn a_read_only_disk_is_not_written() {
    let mut bench = Bench::new();
    bench.shape.read_only = true;
    let status = (STATUS, 1, W);
    for kind in [
        request_type::OUT,
        request_type::DISCARD,
        request_type::WRITE_ZEROES,
    ] {
        assert_eq!(bench.answer(kind, 0, &[(DATA, 512, R), status]), IOERR);
        assert_eq!(bench.answer(kind, 0, &[(DATA, 16, R), status]), IOERR);
        assert_eq!(bench.answer(kind, 0, &[status]), IOERR);
    }
    bench.request(request_type::IN, 0, &[(DATA, 512, W), status]);
    bench.request(request_type::FLUSH, 0, &[status]);
}

#[test]
fn the_serial_goes_where_there_is_room() {
    let mut bench = Bench::new();
    let serial = bench.shape.serial;
    let status = (STATUS, 1, W);
    let mut get = |buffers: &[(u64, u32, u16)]| {
        bench.guest.write(DATA, &[0xcc; 64]);
        let (code, len) = bench.answer(request_type::GET_ID, 0, buffers);
        assert_eq!(code, 0);
        (len, bench.guest.read(DATA, 64))
    };
    let expected = |bytes: usize| [&serial[..bytes], &vec![0xcc; 64 - bytes]].concat();
    assert_eq!(get(&[(DATA, 20, W), status]), (21, expected(20)));
    assert_eq!(get(&[(DATA, 40, W), status]), (21, expected(20)));
    assert_eq!(get(&[(DATA, 7, W), status]), (8, expected(7)));
    assert_eq!(
        get(&[(DATA, 7, W), (DATA + 7, 30, W), status]),
        (21, expected(20))
    );
    assert_eq!(get(&[status]), (1, expected(0)));
}

/// Ranges as the guest writes them.
fn ranges(ranges: &[(u64, u32, u32)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (sector, sectors, flags) in ranges {
        bytes.extend(sector.to_le_bytes());
        bytes.extend(sectors.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
    }
    bytes
}

#[test]
fn ranges_are_checked_and_become_extents() {
    let mut bench = Bench::new();
    bench.write_through = true;
    let take = |bench: &mut Bench, kind, list: &[(u64, u32, u32)]| {
        bench.guest.write(DATA, &ranges(list));
        let bytes = u32::try_from(list.len() * 16).unwrap();
        bench.request(kind, 99, &[(DATA, bytes, R), (STATUS, 1, W)])
    };
    let list = [(10, 32, 0), (2, 1, 0), (40, 0, 0), (63, 1, 0)];
    let (request, data, extents) = take(&mut bench, request_type::DISCARD, &list);
    let discard = Request {
        op: Op::Discard,
        sector: Sector(2),
        bytes: 34 * 512,
        segments: 3,
        ioprio: IoPrio(0),
        fua: true,
        unmap: false,
    };
    assert_eq!(request, discard);
    assert_eq!(data, []);
    assert_eq!(extents, [(5120, 16384), (1024, 512), (63 * 512, 512)]);

    // One that must not be unmapped forbids it for all; an empty one does not count.
    for (second, third, unmap) in [(1, 1, true), (0, 1, false), (1, 0, true)] {
        let list = [(0, 16, 1), (16, 16, second), (32, 0, third)];
        let (request, _, extents) = take(&mut bench, request_type::WRITE_ZEROES, &list);
        assert_eq!((request.op, request.unmap), (Op::WriteZeroes, unmap));
        assert_eq!(extents, [(0, 8192), (8192, 8192)]);
    }

    // More than fit inline.
    let list: Vec<_> = (0..12).map(|i| (i * 5, 5, 1)).collect();
    let (request, _, extents) = take(&mut bench, request_type::WRITE_ZEROES, &list);
    assert_eq!((request.segments, request.bytes), (12, 60 * 512));
    assert_eq!(
        extents,
        (0..12).map(|i| (i * 2560, 2560)).collect::<Vec<_>>()
    );
    assert_eq!(bench.pool.lent(), 0);
}

#[test]
fn bad_ranges_are_answered() {
    let mut bench = Bench::new();
    let answer = |bench: &mut Bench, kind, bytes: &[u8]| {
        bench.guest.write(DATA, bytes);
        let len = u32::try_from(bytes.len()).unwrap();
        bench.answer(kind, 0, &[(DATA, len, R), (STATUS, 1, W)])
    };
    let discard =
        |bench: &mut Bench, list: &[_]| answer(bench, request_type::DISCARD, &ranges(list));
    assert_eq!(discard(&mut bench, &[(63, 2, 0)]), IOERR);
    assert_eq!(discard(&mut bench, &[(0, 33, 0)]), IOERR);
    assert_eq!(discard(&mut bench, &[(0, 1, 0), (1 << 55, 1, 0)]), IOERR);
    assert_eq!(discard(&mut bench, &[(u64::MAX, u32::MAX, 0)]), IOERR);
    assert_eq!(discard(&mut bench, &[(65, 0, 0)]), IOERR);
    assert_eq!(discard(&mut bench, &[(0, 1, 1)]), UNSUPP);
    assert_eq!(discard(&mut bench, &[(0, 1, 2)]), UNSUPP);
    assert_eq!(discard(&mut bench, &[(0, 1, 0); 5]), IOERR);
    assert_eq!(discard(&mut bench, &[]), IOERR);
    assert_eq!(discard(&mut bench, &[(0, 0, 0)]), OK);
    let kind = request_type::WRITE_ZEROES;
    assert_eq!(answer(&mut bench, kind, &ranges(&[(0, 17, 0)])), IOERR);
    assert_eq!(answer(&mut bench, kind, &ranges(&[(0, 1, 3)])), UNSUPP);
    assert_eq!(answer(&mut bench, kind, &[0; 15]), IOERR);
    assert_eq!(answer(&mut bench, kind, &[0; 24]), IOERR);
    assert_eq!(answer(&mut bench, kind, &ranges(&[(0, 1, 0); 13])), IOERR);
    bench.shape.logical_block_size = 4096;
    assert_eq!(discard(&mut bench, &[(1, 8, 0)]), IOERR);
    assert_eq!(discard(&mut bench, &[(0, 9, 0)]), IOERR);
    bench.shape.discard = None;
    assert_eq!(discard(&mut bench, &[(0, 8, 0)]), UNSUPP);
}

#[test]
fn a_chain_that_cannot_be_answered_breaks_the_ring() {
    let mut bench = Bench::new();
    let mut error = |descriptors: &[(u64, u32, u16, u16)]| {
        bench.guest.put_header(HEADER, request_type::IN, 0, 0);
        for (index, &(addr, len, flags, next)) in (0..).zip(descriptors) {
            bench.guest.put_descriptor(
                DESC,
                index,
                &Descriptor {
                    addr,
                    len,
                    flags,
                    next,
                },
            );
        }
        let before = bench.ring.next_avail();
        let error = bench.parse(0).unwrap_err();
        // The ring stands at the chain, with nothing in flight; take it away for the next one.
        assert_eq!(
            (bench.ring.next_avail(), bench.ring.in_flight()),
            (before, 0)
        );
        bench.ring = Ring::new(
            &crate::virtio::ring::RingSetup {
                next_avail: before.wrapping_add(1),
                ..bench.guest.setup
            },
            std::sync::Arc::clone(&bench.guest.table),
        )
        .unwrap();
        error
    };
    let (n, wn, i) = (DESC_NEXT, DESC_NEXT | W, DESC_INDIRECT);
    assert_eq!(
        error(&[(HEADER, 16, R, 0)]),
        RingError::NoStatus { head: 0 }
    );
    assert_eq!(
        error(&[(HEADER, 16, n, 1), (STATUS, 0, W, 0)]),
        RingError::NoStatus { head: 0 }
    );
    let outside = RingError::StatusOutside {
        head: 0,
        address: 0x1_2000,
    };
    assert_eq!(error(&[(HEADER, 16, n, 1), (0x1_2000, 1, W, 0)]), outside);
    let wraps = RingError::StatusOutside {
        head: 0,
        address: u64::MAX,
    };
    assert_eq!(error(&[(HEADER, 16, n, 1), (u64::MAX, 2, W, 0)]), wraps);
    let next = RingError::NextOutOfRange {
        head: 0,
        next: 16,
        len: 16,
    };
    assert_eq!(error(&[(HEADER, 16, n, 16)]), next);
    assert_eq!(error(&[(HEADER, 16, n, 1), (DATA, 512, wn, 16)]), next);
    let looped = RingError::Loop { head: 0, len: 16 };
    assert_eq!(error(&[(HEADER, 16, n, 0)]), looped);
    assert_eq!(error(&[(HEADER, 16, n, 1), (DATA, 512, wn, 1)]), looped);
    let both = RingError::IndirectAndNext { head: 0 };
    assert_eq!(error(&[(0x5000, 48, i | n, 1)]), both);
    for len in [0, 8, 17, 17 * 16, u32::MAX, u32::MAX - 15] {
        let length = RingError::IndirectLength {
            head: 0,
            len,
            limit: 16,
        };
        assert_eq!(error(&[(0x5000, len, i, 0)]), length);
    }
    let outside = |address| RingError::IndirectOutside { head: 0, address };
    assert_eq!(error(&[(0x1_2000, 16, i, 0)]), outside(0x1_2000));
    assert_eq!(error(&[(u64::MAX - 7, 32, i, 0)]), outside(u64::MAX - 7));
}

#[test]
fn indirect_tables_may_loop_nest_and_point_astray_too() {
    let mut bench = Bench::new();
    let table = 0x5000;
    // What follows the table looks like a good end of a chain.
    let end = Descriptor {
        addr: STATUS,
        len: 1,
        flags: W,
        next: 0,
    };
    bench.guest.put_descriptor(table, 2, &end);
    let mut error = |descriptors: &[(u64, u32, u16, u16)]| {
        bench.guest.put_header(HEADER, request_type::IN, 0, 0);
        for (index, &(addr, len, flags, next)) in (0..).zip(descriptors) {
            bench.guest.put_descriptor(
                table,
                index,
                &Descriptor {
                    addr,
                    len,
                    flags,
                    next,
                },
            );
        }
        let len = u32::try_from(descriptors.len() * 16).unwrap();
        let whole = Descriptor {
            addr: table,
            len,
            flags: DESC_INDIRECT,
            next: 0,
        };
        bench.guest.put_descriptor(DESC, 3, &whole);
        bench.guest.offer(3);
        bench.ring.available().unwrap();
        let head = bench.ring.pop_head().unwrap().unwrap();
        parse(&mut bench.ring, head, &bench.shape, false, &mut bench.pool).unwrap_err()
    };
    let (n, wn) = (DESC_NEXT, DESC_NEXT | W);
    let looped = RingError::Loop { head: 3, len: 2 };
    assert_eq!(error(&[(HEADER, 16, n, 1), (DATA, 512, wn, 0)]), looped);
    let next = RingError::NextOutOfRange {
        head: 3,
        next: 2,
        len: 2,
    };
    assert_eq!(error(&[(HEADER, 16, n, 1), (DATA, 512, wn, 2)]), next);
    let nested = RingError::NestedIndirect { head: 3 };
    assert_eq!(
        error(&[(HEADER, 16, n, 1), (table, 32, DESC_INDIRECT, 0)]),
        nested
    );
    assert_eq!(
        error(&[(HEADER, 16, R, 0)]),
        RingError::NoStatus { head: 3 }
    );
}

/// What Windows' driver does: more buffers than seg_max promised, in a table longer than the ring.
#[test]
fn long_chains_are_served_up_to_the_chain_limit() {
    let mut guest = Guest::new(64);
    guest.setup.chain_limit = 256;
    let mut bench = Bench::with_guest(guest);
    bench.shape.capacity = Sector(1 << 20);
    let mut buffers = vec![(HEADER, 16, R)];
    buffers.extend((0..129).map(|i| (DATA + 16 * i, 512, W)));
    buffers.push((STATUS, 1, W));
    bench.guest.put_header(HEADER, request_type::IN, 0, 7);
    let table = 0xa000;
    bench.guest.put_chain(table, 0, &buffers);
    let flags = DESC_INDIRECT;
    let whole = Descriptor {
        addr: table,
        len: 131 * 16,
        flags,
        next: 0,
    };
    bench.guest.put_descriptor(DESC, 5, &whole);
    let Parsed::Request(request, io) = bench.parse(5).unwrap() else {
        panic!("a long read was not taken");
    };
    assert_eq!((request.segments, request.bytes), (129, 129 * 512));
    let expected: Vec<_> = (0..129).map(|i| (DATA + 16 * i, 512)).collect();
    assert_eq!(bench.guest_addresses(io.iovecs()), expected);
    assert_eq!(bench.pool.lent(), 1);
    let used = io.finish(Status::Ok, 129 * 512, &mut bench.pool);
    assert_eq!((used.head(), used.len()), (5, 129 * 512 + 1));
    assert_eq!(bench.pool.lent(), 0);
    bench.ring.put_used(used);
}

#[test]
fn without_a_buffer_of_the_pool_the_rest_waits() {
    let mut bench = Bench::new();
    let buffers: Vec<_> = (0..9)
        .map(|i| (DATA + 512 * i, 512, W))
        .chain([(STATUS, 1, W)])
        .collect();
    let mut lent: Vec<_> = std::iter::from_fn(|| bench.pool.lend()).collect();
    assert_eq!(lent.len(), usize::from(crate::mq::limits::BIG_REQUESTS));
    let Parsed::NoRoom(head) = bench.chain(request_type::IN, 0, &buffers) else {
        panic!("nine segments were taken without room");
    };
    bench.ring.unpop(head);
    // Bad ones need no room.
    let before = bench.ring.next_avail();
    bench.guest.put_header(HEADER, request_type::IN, 0, 64);
    let Parsed::Done(used) = bench.parse_next().unwrap() else {
        panic!("a read behind the end was taken");
    };
    bench.ring.put_used(used);
    assert_eq!(bench.ring.next_avail(), before + 1);
    bench.pool.give_back(lent.pop().unwrap());
    assert_eq!(bench.request(request_type::IN, 0, &buffers).1.len(), 9);
    for buffer in lent {
        bench.pool.give_back(buffer);
    }
}

#[test]
fn a_chain_in_more_pieces_than_there_is_room_for_is_answered() {
    // Each buffer lies in three regions, so that 1022 of them are more than 2048 pieces.
    let regions = [(0, 0x2_0000), (0x2_0000, 0x1000), (0x2_1000, 0x1_0000)];
    let mut guest = Guest::with_regions(1024, &regions);
    (guest.setup.avail, guest.setup.used) = (0x5000, 0x6000);
    guest.setup.event_idx = false;
    for (buffers, expected) in [(600, 1800), (1022, 0)] {
        let mut ring = guest.ring();
        let mut pool = SegmentPool::new();
        let mut shape = shape();
        shape.capacity = Sector(1 << 30);
        let (header, status) = (0xa000, 0xb000);
        guest.put_header(header, request_type::IN, 0, 0);
        let mut chain = vec![(header, 16, R)];
        chain.resize(buffers + 1, (0x1_f000, 0x3000, W));
        chain.push((status, 1, W));
        guest.put_chain(DESC, 0, &chain);
        guest.write(0x5002, &[1, 0, 0, 0]);
        ring.available().unwrap();
        let head = ring.pop_head().unwrap().unwrap();
        match parse(&mut ring, head, &shape, false, &mut pool).unwrap() {
            Parsed::Request(request, io) => {
                assert_eq!(io.iovecs().len(), expected);
                assert_eq!(request.segments, u16::try_from(expected).unwrap());
                let _used = io.finish(Status::Ok, 0, &mut pool);
            }
            Parsed::Done(used) => assert_eq!((used.len(), expected), (1, 0)),
            Parsed::NoRoom(_) => panic!("the pool is free"),
        }
        guest.write(status, &[0]);
    }
}

#[test]
#[should_panic(expected = "the request at head 0 was dropped unfinished")]
#[cfg(debug_assertions)]
fn dropping_a_request_is_a_bug() {
    let mut bench = Bench::new();
    drop(bench.chain(request_type::FLUSH, 0, &[(STATUS, 1, W)]));
}
