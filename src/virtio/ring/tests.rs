use super::*;
use crate::mq::request::Status;
use crate::virtio::abi::{DESC_INDIRECT, DESC_WRITE, request_type};
use crate::virtio::guest_io::Used;
use crate::virtio::parse::{Parsed, parse};
use crate::virtio::pool::SegmentPool;
use crate::virtio::testing::{AVAIL, DESC, Guest, USED, shape};
use std::sync::atomic::{AtomicU32, fence};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

/// Pops what is available and puts it straight back as used.
fn turn_around(ring: &mut Ring) -> u16 {
    ring.available().unwrap();
    let mut count = 0;
    while let Some(head) = ring.pop_head().unwrap() {
        let head = ring.commit(head);
        ring.put_used(Used::new(head, u32::from(head) + 100));
        count += 1;
    }
    count
}

#[test]
fn set_up_refuses_what_the_specification_forbids() {
    let guest = Guest::new(8);
    let error = |change: fn(&mut RingSetup)| {
        let mut setup = guest.setup;
        change(&mut setup);
        Ring::new(&setup, Arc::clone(&guest.table)).unwrap_err()
    };
    for size in [0, 3, 2048, 65535] {
        let setup = RingSetup {
            size,
            ..guest.setup
        };
        let result = Ring::new(&setup, Arc::clone(&guest.table));
        assert_eq!(result.unwrap_err(), RingError::Size(size));
    }
    let unaligned = |part, address, align| RingError::Unaligned {
        part,
        address,
        align,
    };
    let outside = |part, address, len| RingError::PartOutside { part, address, len };
    assert_eq!(
        error(|s| s.desc = 8),
        unaligned(RingPart::Descriptors, 8, 16)
    );
    assert_eq!(
        error(|s| s.avail = 0x1001),
        unaligned(RingPart::Available, 0x1001, 2)
    );
    assert_eq!(
        error(|s| s.used = 0x2002),
        unaligned(RingPart::Used, 0x2002, 4)
    );
    // Across two regions, in a hole, wrapping.
    assert_eq!(
        error(|s| s.desc = 0x7fc0),
        outside(RingPart::Descriptors, 0x7fc0, 128)
    );
    assert_eq!(
        error(|s| s.avail = 0x1_2000),
        outside(RingPart::Available, 0x1_2000, 22)
    );
    assert_eq!(error(|s| s.used = !3), outside(RingPart::Used, !3, 70));
    // Without EVENT_IDX the fields behind the rings need not exist.
    let setup = RingSetup {
        used: 0x2_2000 - 68,
        event_idx: false,
        ..guest.setup
    };
    assert!(Ring::new(&setup, Arc::clone(&guest.table)).is_ok());
    let setup = RingSetup {
        event_idx: true,
        ..setup
    };
    assert!(Ring::new(&setup, Arc::clone(&guest.table)).is_err());
}

#[test]
fn indices_go_on_from_where_they_were_and_wrap() {
    let mut guest = Guest::new(4);
    guest.set(AVAIL + 2, 0xfffe);
    guest.set(USED + 2, 0xfffb);
    guest.setup.next_avail = 0xfffe;
    let mut ring = guest.ring();
    assert_eq!(ring.available(), Ok(0));
    assert!(!ring.publish());
    let mut used = 0xfffb_u16;
    for round in 0..10_u16 {
        for i in 0..3 {
            guest.offer((round + i) % 4);
        }
        assert_eq!(turn_around(&mut ring), 3);
        assert_eq!(
            guest.used_index(),
            used,
            "nothing is visible before it is published"
        );
        assert!(ring.publish());
        assert!(!ring.publish());
        for i in 0..3 {
            let head = u32::from((round + i) % 4);
            assert_eq!(guest.used(used.wrapping_add(i)), (head, head + 100));
        }
        used = used.wrapping_add(3);
        assert_eq!(guest.used_index(), used);
        assert_eq!(ring.next_avail(), 0xfffe_u16.wrapping_add(3 * (round + 1)));
    }
}

#[test]
fn only_what_available_saw_is_popped() {
    let guest = Guest::new(4);
    let mut ring = guest.ring();
    guest.offer(2);
    assert_eq!(ring.pop_head(), Ok(None));
    assert_eq!(ring.available(), Ok(1));
    guest.offer(1);
    let head = ring.pop_head().unwrap().unwrap();
    assert_eq!(head.index(), 2);
    assert_eq!(ring.pop_head(), Ok(None));
    assert_eq!(ring.in_flight(), 1);
    // Given back, it comes again, before the rest.
    ring.unpop(head);
    assert_eq!((ring.in_flight(), ring.next_avail()), (0, 0));
    assert_eq!(ring.available(), Ok(2));
    let heads: Vec<_> = std::iter::from_fn(|| ring.pop_head().unwrap())
        .map(|head| head.index())
        .collect();
    assert_eq!(heads, [2, 1]);
    assert_eq!(ring.in_flight(), 2);
}

#[test]
#[should_panic(expected = "only the head popped last")]
fn giving_back_an_earlier_head_is_a_bug() {
    let guest = Guest::new(4);
    let mut ring = guest.ring();
    guest.offer(2);
    guest.offer(1);
    ring.available().unwrap();
    let first = ring.pop_head().unwrap().unwrap();
    let _second = ring.pop_head().unwrap().unwrap();
    ring.unpop(first);
}

#[test]
#[should_panic(expected = "head 2 is not in flight")]
fn using_a_head_twice_is_a_bug() {
    let guest = Guest::new(4);
    let mut ring = guest.ring();
    ring.put_used(Used::new(2, 1));
}

#[test]
fn a_broken_available_ring_is_named_and_left_as_it_was() {
    let guest = Guest::new(4);
    let mut ring = guest.ring();
    guest.set(AVAIL + 2, 5);
    let jump = RingError::AvailJump {
        index: 5,
        next: 0,
        size: 4,
    };
    assert_eq!(ring.available(), Err(jump));
    assert_eq!(ring.pop_head(), Ok(None));
    guest.set(AVAIL + 2, 0xffff);
    assert!(matches!(
        ring.available(),
        Err(RingError::AvailJump { index: 0xffff, .. })
    ));
    // As many as there are entries is fine; the same head again is not, nor one out of range.
    guest.set(AVAIL + 2, 4);
    guest.set(AVAIL + 4, 3);
    guest.set(AVAIL + 6, 3);
    assert_eq!(ring.available(), Ok(4));
    let head = ring.pop_head().unwrap().unwrap();
    for _ in 0..2 {
        assert_eq!(ring.pop_head(), Err(RingError::HeadInFlight { head: 3 }));
    }
    guest.set(AVAIL + 6, 4);
    assert_eq!(
        ring.pop_head(),
        Err(RingError::HeadOutOfRange { head: 4, size: 4 })
    );
    assert_eq!((ring.in_flight(), ring.next_avail()), (1, 1));
    let head = ring.commit(head);
    ring.put_used(Used::new(head, 1));
    guest.set(AVAIL + 6, 3);
    assert_eq!(ring.pop_head().unwrap().unwrap().index(), 3);
}

/// Every combination of published elements and used_event around some indices, 0xffff → 0 among
/// them, against a walk over the indices.
#[test]
fn calls_follow_used_event() {
    const SIZE: u16 = 8;
    for base in [0_u16, 1, 0x7ffc, 0x7fff, 0xfff8, 0xfffd, 0xffff] {
        for count in 0..=SIZE {
            for distance in 0..40_u16 {
                let event = base.wrapping_add(distance).wrapping_sub(16);
                let guest = Guest::new(SIZE);
                guest.set(USED + 2, base);
                let mut ring = guest.ring();
                assert_eq!(ring.should_call(), base != 0, "yes if it was served before");
                assert!(!ring.should_call());
                for head in 0..count {
                    guest.offer(head);
                }
                guest.set(guest.used_event(), event);
                assert_eq!(turn_around(&mut ring), count);
                assert!(!ring.should_call(), "nothing is published yet");
                assert_eq!(ring.publish(), count > 0);
                let passed = (0..count).any(|i| base.wrapping_add(i) == event);
                assert_eq!(
                    ring.should_call(),
                    passed,
                    "{base} + {count}, event {event}"
                );
                assert!(!ring.should_call(), "one decision for what was published");
            }
        }
    }
}

#[test]
fn a_decision_covers_all_batches_since_the_last_one() {
    let guest = Guest::new(4);
    let mut ring = guest.ring();
    assert!(!ring.should_call(), "nobody waits for anything");
    guest.set(guest.used_event(), 1);
    for _ in 0..3 {
        guest.offer(0);
        turn_around(&mut ring);
        ring.publish();
    }
    assert!(ring.should_call());
    // All the way round without a decision: whatever used_event says, it has been passed.
    guest.set(guest.used_event(), 2);
    for _ in 0..65_536 {
        guest.offer(0);
        turn_around(&mut ring);
        ring.publish();
    }
    assert!(ring.should_call());
    assert!(!ring.should_call());
}

#[test]
fn who_takes_over_a_served_ring_calls_once() {
    let mut guest = Guest::new(4);
    guest.setup.next_avail = 3;
    guest.set(guest.used_event(), 9);
    let mut ring = guest.ring();
    assert!(
        ring.should_call(),
        "the one before may have died before its call"
    );
    assert!(!ring.should_call());
    ring.request_call();
    assert!(ring.should_call(), "the call fd was replaced");
}

#[test]
fn a_fresh_ring_owes_no_call_to_a_new_call_fd() {
    let guest = Guest::new(4);
    let mut ring = guest.ring();
    ring.request_call();
    assert!(!ring.should_call());
    guest.offer(0);
    turn_around(&mut ring);
    ring.publish();
    ring.request_call();
    assert!(ring.should_call());
}

#[test]
fn without_event_idx_flags_decide() {
    let mut guest = Guest::new(4);
    guest.setup.event_idx = false;
    let mut ring = guest.ring();
    let mut once = |flags: u16| {
        guest.set(AVAIL, flags);
        guest.offer(1);
        turn_around(&mut ring);
        ring.publish();
        ring.should_call()
    };
    assert!(once(0));
    assert!(!once(1));
    assert!(once(0));
    assert!(once(2), "an unknown flag means nothing");
    ring.suppress_kicks();
    assert_eq!(guest.get(USED), 1);
    assert!(!ring.arm_kicks());
    assert_eq!(guest.get(USED), 0);
    ring.suppress_kicks();
    guest.offer(0);
    assert!(ring.arm_kicks());
}

#[test]
fn arming_asks_for_the_first_chain_not_seen() {
    let guest = Guest::new(4);
    let mut ring = guest.ring();
    guest.offer(0);
    guest.offer(1);
    assert!(ring.arm_kicks(), "two came before");
    assert_eq!(ring.available(), Ok(2));
    // One is left in the ring for want of room: a kick is wanted for the third, not for it.
    let _first = ring.pop_head().unwrap().unwrap();
    ring.suppress_kicks();
    assert!(!ring.arm_kicks());
    assert_eq!(guest.get(guest.avail_event()), 2);
    assert_eq!(guest.get(USED), 0, "no flag is set with EVENT_IDX");
    guest.offer(2);
    assert!(ring.arm_kicks());
}

#[test]
fn memory_changes_are_checked_and_only_between_requests() {
    let guest = Guest::new(4);
    let mut ring = guest.ring();
    guest.offer(3);
    let other = Guest::new(4);
    other.offer(1);
    other.offer(2);
    ring.set_memory(Arc::clone(&other.table)).unwrap();
    assert_eq!(ring.available(), Ok(2));
    assert_eq!(ring.pop_head().unwrap().unwrap().index(), 1);
    ring.put_used(Used::new(1, 7));
    ring.publish();
    assert_eq!(other.used(0), (1, 7));
    assert_eq!(guest.used_index(), 0);

    let small = Guest::with_regions(4, &[(0, 0x1000)]);
    assert!(matches!(
        ring.set_memory(Arc::clone(&small.table)),
        Err(RingError::PartOutside {
            part: RingPart::Available,
            ..
        })
    ));
    assert_eq!(
        ring.pop_head().unwrap().unwrap().index(),
        2,
        "it stays on the old table"
    );
}

#[test]
fn looking_ahead_reads_nothing_outside_the_memory_of_now() {
    let guest = Guest::new(4);
    let mut ring = guest.ring();
    let far = u64::MAX - 0xfff;
    guest.put_chain(0x4000, 0, &[(0x3000, 16, 0), (0x5000, 1, DESC_WRITE)]);
    guest.put_chain(0x4100, 0, &[(far, 16, 0), (0x5000, 1, DESC_WRITE)]);
    guest.put_chain(DESC, 0, &[(0x4000, 32, DESC_INDIRECT)]);
    guest.put_chain(DESC, 1, &[(far, 32, DESC_INDIRECT)]);
    guest.put_chain(DESC, 2, &[(0x4100, 32, DESC_INDIRECT)]);
    guest.put_chain(DESC, 3, &[(far, 16, 0)]);
    (0..4).for_each(|head| guest.offer(head));
    let all = |ring: &mut Ring| {
        // More than were offered, and more than are remembered.
        (0..40).for_each(|after| ring.fetch_descriptor(after));
        (0..40).for_each(|after| ring.fetch_table(after));
        (0..40).for_each(|after| ring.fetch_header(after));
    };
    all(&mut ring);
    assert_eq!(ring.available(), Ok(4));
    all(&mut ring);
    for head in 0..4 {
        let popped = ring.pop_head().unwrap().unwrap();
        assert_eq!(ring.commit(popped), head);
        ring.put_used(Used::new(head, 0));
    }

    let other = Guest::new(4);
    ring.set_memory(Arc::clone(&other.table)).unwrap();
    drop(guest);
    other.put_chain(DESC, 0, &[(0x4000, 32, DESC_INDIRECT)]);
    // The available index goes on from 4; what was remembered lies in memory that is gone.
    (0..8).for_each(|nth| other.offer(nth % 4));
    assert_eq!(ring.available(), Ok(4));
    (0..4).for_each(|after| ring.fetch_table(after));
    (0..4).for_each(|after| ring.fetch_header(after));
    assert_eq!(ring.pop_head().unwrap().unwrap().index(), 0);
}

#[test]
#[should_panic(expected = "under requests in flight")]
fn a_memory_change_under_a_request_is_a_bug() {
    let guest = Guest::new(4);
    let mut ring = guest.ring();
    guest.offer(3);
    ring.available().unwrap();
    let _head = ring.pop_head().unwrap();
    let _ = ring.set_memory(Arc::clone(&guest.table));
}

#[test]
fn a_ring_dropped_under_a_request_keeps_what_the_request_points_to() {
    let guest = Guest::new(4);
    let mut pool = SegmentPool::new();
    let mut ring = guest.ring();
    guest.put_header(0x3000, request_type::IN, 0, 0);
    guest.put_chain(
        DESC,
        0,
        &[
            (0x3000, 16, 0),
            (0x4000, 512, DESC_WRITE),
            (0x5000, 1, DESC_WRITE),
        ],
    );
    guest.offer(0);
    ring.available().unwrap();
    let head = ring.pop_head().unwrap().unwrap();
    let Ok(Parsed::Request(_, io)) = parse(&mut ring, head, &shape(), false, &mut pool) else {
        panic!("a good read was not taken");
    };
    drop(ring);
    let weak = Arc::downgrade(&guest.memory);
    drop(guest);
    assert!(weak.upgrade().is_some());
    assert_eq!(io.iovecs().len(), 1);
    assert_eq!(io.iovecs()[0].iov_len, 512);
    assert_eq!(io.finish(Status::Ok, 512, &mut pool).len(), 513);
}

/// virtio-queue's mock driver, which knows nothing of our helpers, as the producer.
#[test]
fn a_mock_driver_of_others_is_understood() {
    use virtio_queue::desc::{RawDescriptor, split};
    use virtio_queue::mock::MockSplitQueue;

    let guest = Guest::new(16);
    let queue = MockSplitQueue::create(&*guest.memory, vm_memory::GuestAddress(0x6000), 16);
    let descriptor = |addr, len, flags, next| {
        RawDescriptor::from(split::Descriptor::new(addr, len, flags, next))
    };
    let mut chains = Vec::new();
    for i in 0..5_u16 {
        let at = 0x3000 + u64::from(i) * 0x400;
        guest.put_header(at, request_type::OUT, 0, u64::from(i));
        chains.push(descriptor(at, 16, 1, 3 * i + 1));
        chains.push(descriptor(at + 0x100, 512, 1, 3 * i + 2));
        chains.push(descriptor(at + 0x300, 1, 2, 0));
    }
    queue.add_desc_chains(&chains, 0).unwrap();
    let setup = RingSetup {
        desc: queue.desc_table_addr().0,
        avail: queue.avail_addr().0,
        used: queue.used_addr().0,
        ..guest.setup
    };
    let mut ring = Ring::new(&setup, Arc::clone(&guest.table)).unwrap();
    let mut pool = SegmentPool::new();
    assert_eq!(ring.available(), Ok(5));
    for i in 0..5_u16 {
        let head = ring.pop_head().unwrap().unwrap();
        assert_eq!(head.index(), 3 * i);
        let parsed = parse(&mut ring, head, &shape(), true, &mut pool).unwrap();
        let Parsed::Request(request, io) = parsed else {
            panic!("a good write was not taken");
        };
        assert_eq!(
            (request.sector.0, request.bytes, request.fua),
            (u64::from(i), 512, true)
        );
        let used = io.finish(Status::IoErr, 0, &mut pool);
        ring.put_used(used);
        assert_eq!(guest.read(0x3300 + u64::from(i) * 0x400, 1), [1]);
    }
    ring.publish();
    assert_eq!(u16::from_le(queue.used().idx().load()), 5);
    for i in 0..5_u16 {
        let element = queue.used().ring().ref_at(usize::from(i)).unwrap().load();
        assert_eq!((element.id(), element.len()), (u32::from(3 * i), 1));
    }
}

/// Longer than any scheduler hiccup: when it runs out, a wake-up was lost.
const LOST: Duration = Duration::from_secs(60);

/// A driver and a device on two threads, each asleep whenever it may be: no wake-up is lost, in
/// either direction.
fn sleep_and_wake(event_idx: bool) {
    const CHAINS: u16 = 30_000;
    let mut guest = Guest::new(4);
    guest.setup.event_idx = event_idx;
    let mut ring = guest.ring();
    let (kick, kicked) = sync_channel::<()>(1);
    let (call, called) = sync_channel::<()>(1);
    // As an eventfd does: a wake-up that nobody has taken yet is enough.
    let wake = |bell: &SyncSender<()>| {
        let _already_awake = bell.try_send(());
    };
    let sleep = |bell: &Receiver<()>| bell.recv_timeout(LOST).expect("a wake-up was lost");

    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (kicked, call) = (kicked, call);
            let mut done = 0;
            while done < CHAINS {
                ring.suppress_kicks();
                let count = turn_around(&mut ring);
                done += count;
                if ring.publish() && ring.should_call() {
                    wake(&call);
                }
                if count == 0 && !ring.arm_kicks() {
                    sleep(&kicked);
                }
            }
        });
        scope.spawn(|| {
            let (kick, called) = (kick, called);
            let (mut offered, mut used) = (0_u16, 0_u16);
            while used < CHAINS {
                // One or two at a time, so that both sides run dry again and again.
                let old = offered;
                while offered < CHAINS && offered - used < 1 + used % 2 {
                    guest.offer(offered % 4);
                    offered += 1;
                }
                fence(Ordering::SeqCst);
                let wanted = if event_idx {
                    let event = guest.get(guest.avail_event());
                    (old..offered).contains(&event)
                } else {
                    guest.get(USED) & 1 == 0
                };
                if old != offered && wanted {
                    wake(&kick);
                }
                if event_idx {
                    guest.set(guest.used_event(), used);
                } else {
                    guest.set(AVAIL, 0);
                }
                fence(Ordering::SeqCst);
                if guest.used_index() == used {
                    sleep(&called);
                }
                if !event_idx {
                    guest.set(AVAIL, 1);
                }
                used = guest.used_index();
            }
        });
    });
}

#[test]
fn no_wake_up_is_lost_with_event_idx() {
    sleep_and_wake(true);
}

#[test]
fn no_wake_up_is_lost_with_flags() {
    sleep_and_wake(false);
}

/// Lets two threads begin each round at the same moment, as nearly as two cores can.
fn rounds(own: &AtomicU32, other: &AtomicU32, count: u32, mut round: impl FnMut(u32)) {
    for number in 1..=count {
        own.store(number, Ordering::Release);
        let mut spins = 0_u32;
        while other.load(Ordering::Acquire) < number {
            spins += 1;
            if spins.is_multiple_of(4096) {
                std::thread::yield_now();
            }
            std::hint::spin_loop();
        }
        round(number - 1);
    }
}

/// The two places where both sides write their own word and read the other's: at least one of
/// them sees the other, which on every machine takes a fence on both sides.
#[test]
fn one_of_two_who_look_at_each_other_sees_the_other() {
    const ROUNDS: u32 = 30_000;
    let guest = Guest::new(4);
    let mut ring = guest.ring();
    let _first = ring.should_call();
    let (device_round, driver_round) = (AtomicU32::new(0), AtomicU32::new(0));
    let (mut looks_again, mut calls) = (Vec::new(), Vec::new());
    let (mut kicks, mut sees_used) = (Vec::new(), Vec::new());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // Even rounds: a chain is offered while kicks are armed. Odd ones: it is used while
            // the driver arms calls.
            rounds(&device_round, &driver_round, ROUNDS, |round| {
                if round.is_multiple_of(2) {
                    looks_again.push(ring.arm_kicks());
                } else {
                    turn_around(&mut ring);
                    ring.publish();
                    calls.push(ring.should_call());
                }
            });
        });
        scope.spawn(|| {
            let mut count = 0_u16;
            rounds(&driver_round, &device_round, ROUNDS, |round| {
                if round.is_multiple_of(2) {
                    guest.offer(count % 4);
                    fence(Ordering::SeqCst);
                    kicks.push(guest.get(guest.avail_event()) == count);
                } else {
                    guest.set(guest.used_event(), count);
                    fence(Ordering::SeqCst);
                    count = count.wrapping_add(1);
                    sees_used.push(guest.used_index() == count);
                }
            });
        });
    });
    for round in 0..usize::try_from(ROUNDS / 2).unwrap() {
        assert!(
            looks_again[round] || kicks[round],
            "the kick of round {round} was lost"
        );
        assert!(
            calls[round] || sees_used[round],
            "the call of round {round} was lost"
        );
    }
}
