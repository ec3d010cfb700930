//! The ring: whatever its setup says, whatever a guest writes into it between two looks, in whatever
//! order the worker asks it things, it is refused, broken or right; never out of its memory.

#![no_main]

use std::sync::Arc;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use vhost_user_blkmq::mq::request::Status;
use vhost_user_blkmq::virtio::parse::{Parsed, parse};
use vhost_user_blkmq::virtio::pool::SegmentPool;
use vhost_user_blkmq::virtio::ring::{Ring, RingSetup};
use vhost_user_blkmq_fuzz::guest::{DATA, Guest, setup, shape};

#[derive(Arbitrary, Debug)]
enum Step {
    /// The guest writes anywhere.
    Poke(u16, [u8; 4]),
    /// The guest makes more available, or less.
    Avail(u16),
    /// The guest says when it wants a call.
    UsedEvent(u16),
    /// The guest asks for no interrupts, or for them again.
    AvailFlags(u16),
    /// A good chain at this head: a flush.
    Chain(u8),
    Drain(u8),
    Finish(u8),
    Publish,
    Call,
    Suppress,
    Arm,
    Memory,
}

#[derive(Arbitrary, Debug)]
struct Input {
    exponent: u8,
    event_idx: bool,
    next_avail: u16,
    /// A setup that need not be in memory: size and addresses.
    wild: Option<(u16, u64, u64, u64)>,
    steps: Vec<Step>,
}

fuzz_target!(|input: Input| {
    let guest = Guest::new();
    let mut setup = RingSetup {
        next_avail: input.next_avail,
        ..setup(input.exponent, input.event_idx, 0)
    };
    if let Some((size, desc, avail, used)) = input.wild {
        let wild = RingSetup {
            size,
            desc,
            avail,
            used,
            ..setup
        };
        match Ring::new(&wild, Arc::clone(&guest.table)) {
            Ok(_) => setup = wild,
            Err(_) => return,
        }
    }
    guest.set(setup.avail.wrapping_add(2), input.next_avail);
    let Ok(mut ring) = Ring::new(&setup, Arc::clone(&guest.table)) else {
        return;
    };
    let shape = shape(0);
    let mut pool = SegmentPool::new();
    let mut pending = Vec::new();
    for step in input.steps {
        match step {
            Step::Poke(at, bytes) => guest.write(u64::from(at), &bytes),
            Step::Avail(index) => guest.set(setup.avail.wrapping_add(2), index),
            Step::UsedEvent(index) => guest.set(
                setup.avail.wrapping_add(4 + 2 * u64::from(setup.size)),
                index,
            ),
            Step::AvailFlags(flags) => guest.set(setup.avail, flags),
            Step::Chain(head) => {
                let head = u64::from(head) % u64::from(setup.size);
                let entry = guest.get(setup.avail.wrapping_add(2)) % setup.size;
                guest.write(DATA, &4u32.to_le_bytes());
                let mut descriptor = Vec::new();
                descriptor.extend(DATA.to_le_bytes());
                descriptor.extend(17u32.to_le_bytes());
                descriptor.extend(2u32.to_le_bytes());
                guest.write(setup.desc.wrapping_add(16 * head), &descriptor);
                guest.write(
                    setup.avail.wrapping_add(4 + 2 * u64::from(entry)),
                    &u16::try_from(head).unwrap_or(0).to_le_bytes(),
                );
            }
            Step::Drain(most) => {
                if ring.available().is_err() {
                    return;
                }
                for _ in 0..most {
                    let Ok(Some(head)) = ring.pop_head() else {
                        break;
                    };
                    match parse(&mut ring, head, &shape, false, &mut pool) {
                        Ok(Parsed::Request(_, io)) => pending.push(io),
                        Ok(Parsed::Done(used)) => ring.put_used(used),
                        Ok(Parsed::NoRoom(head)) => {
                            ring.unpop(head);
                            break;
                        }
                        // A broken ring is never asked for more, but what it gave still ends.
                        Err(_) => {
                            for io in pending.drain(..) {
                                ring.put_used(io.finish(Status::IoErr, 0, &mut pool));
                            }
                            ring.publish();
                            return;
                        }
                    }
                }
                assert!(ring.in_flight() <= ring.size());
                assert_eq!(usize::from(ring.in_flight()), pending.len());
            }
            Step::Finish(which) => {
                if !pending.is_empty() {
                    let io = pending.swap_remove(usize::from(which) % pending.len());
                    ring.put_used(io.finish(Status::Ok, 0, &mut pool));
                }
            }
            Step::Publish => {
                ring.publish();
            }
            Step::Call => {
                ring.publish();
                ring.should_call();
            }
            Step::Suppress => ring.suppress_kicks(),
            Step::Arm => {
                ring.arm_kicks();
            }
            Step::Memory => {
                if ring.in_flight() == 0 && ring.set_memory(Arc::clone(&guest.table)).is_err() {
                    return;
                }
            }
        }
    }
    for io in pending {
        ring.put_used(io.finish(Status::Ok, 0, &mut pool));
    }
    assert_eq!(ring.in_flight(), 0);
});
