//! The chain parser: whatever a guest leaves in its memory, a chain is a request within the limits,
//! answered, or the ring is broken; and everything a request names lies in guest memory.

#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use vhost_user_blkmq::mq::limits::{MAX_RANGES, MAX_SEGMENTS};
use vhost_user_blkmq::mq::request::{Op, Status};
use vhost_user_blkmq::virtio::parse::{Parsed, parse};
use vhost_user_blkmq::virtio::pool::SegmentPool;
use vhost_user_blkmq::virtio::ring::Ring;
use vhost_user_blkmq_fuzz::guest::{AVAIL, DATA, DESC, Guest, setup, shape};

fuzz_target!(|input: (u8, u8, u8, bool, &[u8])| {
    let (exponent, what, chains, write_through, bytes) = input;
    let guest = Guest::new();
    let setup = setup(exponent, what & 16 != 0, u16::from(what >> 5) * 16);
    let shape = shape(what);
    // The first bytes are descriptors, the rest is what they point to.
    let table = usize::from(setup.size) * 16;
    guest.write(DESC, &bytes[..table.min(bytes.len())]);
    guest.write(DATA, bytes.get(table..).unwrap_or_default());
    for entry in 0..setup.size {
        guest.set(AVAIL + 4 + 2 * u64::from(entry), entry);
    }
    guest.set(AVAIL + 2, u16::from(chains) % (setup.size + 1));

    let mut ring = Ring::new(&setup, Arc::clone(&guest.table)).expect("the ring is in memory");
    let mut pool = SegmentPool::new();
    let Ok(available) = ring.available() else {
        panic!("no more than the ring's size is available");
    };
    let mut answered = 0;
    while let Ok(Some(head)) = ring.pop_head() {
        match parse(&mut ring, head, &shape, write_through, &mut pool) {
            Ok(Parsed::Request(request, io)) => {
                match request.op {
                    Op::Flush => assert_eq!(request.bytes, 0),
                    Op::Read | Op::Write => {
                        let buffers = io.iovecs();
                        assert!(buffers.len() <= usize::from(MAX_SEGMENTS));
                        let bytes: u64 = buffers.iter().map(|b| b.iov_len as u64).sum();
                        assert_eq!(bytes, request.bytes);
                        for buffer in buffers {
                            assert!(guest.holds(buffer.iov_base.addr(), buffer.iov_len));
                        }
                        let end = request.sector.bytes() + bytes;
                        assert!(end <= shape.capacity.bytes(), "beyond the disk's end");
                        assert!(request.op == Op::Read || !shape.read_only);
                    }
                    Op::Discard | Op::WriteZeroes => {
                        assert!(!shape.read_only);
                        assert!(io.ranges().len() <= usize::from(MAX_RANGES));
                        for range in io.ranges() {
                            let end = range.offset_bytes + range.len_bytes;
                            assert!(range.len_bytes > 0 && end <= shape.capacity.bytes());
                        }
                    }
                }
                let used = io.finish(Status::Ok, 0, &mut pool);
                ring.put_used(used);
                answered += 1;
            }
            Ok(Parsed::Done(used)) => {
                ring.put_used(used);
                answered += 1;
            }
            Ok(Parsed::NoRoom(_)) => panic!("one request at a time always has room"),
            Err(_) => break,
        }
    }
    assert!(answered <= available);
    assert_eq!(pool.lent(), 0);
    ring.publish();
});
