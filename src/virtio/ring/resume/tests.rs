//! Processes that are killed at every store, and what the next one makes of it.

use std::collections::VecDeque;
use std::sync::Arc;

use proptest::prelude::*;

use crate::virtio::guest_io::Used;
use crate::virtio::inflight::InflightRegion;
use crate::virtio::inflight::tests::{live, old_region, region, stores_of};
use crate::virtio::ring::{Ring, RingError};
use crate::virtio::testing::{AVAIL, Guest, USED};

/// A guest with a ring, its front end with a region, and what the guest knows of its own requests.
struct World {
    guest: Guest,
    region: InflightRegion,
    /// Heads the guest may use, in the order it will.
    free: VecDeque<u16>,
    /// Heads it waits for, in the order in which they were made available.
    awaited: Vec<u16>,
    /// The used index it has seen.
    seen: u16,
    /// How the front end tells the next process where to begin: by the used index as QEMU, or by the available
    /// index as Cloud Hypervisor.
    base_is_used: bool,
}

/// What a process does. Numbers are taken modulo what there is.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// The guest makes a chain available.
    Offer,
    /// All that is available is taken.
    Take,
    /// The chain with this place among those taken is put.
    Put(usize),
    /// What was put is published.
    Publish,
}

impl World {
    fn new(size: u16, start: u16) -> World {
        let mut guest = Guest::new(size);
        guest.set(AVAIL + 2, start);
        guest.set(USED + 2, start);
        guest.setup.next_avail = start;
        World {
            guest,
            // Were the record larger than the ring, nearly every kill would be while it begins.
            region: old_region(1, size).0,
            free: (0..size).collect(),
            awaited: Vec::new(),
            seen: start,
            base_is_used: true,
        }
    }

    /// As it was when it was new, but for the index.
    fn begin_anew(&mut self) {
        let start = self.guest.avail_index();
        self.region.clear();
        self.guest.set(USED + 2, start);
        self.free = (0..self.guest.setup.size).collect();
        self.awaited.clear();
        self.seen = start;
        self.guest.setup.next_avail = start;
    }

    fn offer(&mut self) {
        if let Some(head) = self.free.pop_front() {
            self.guest.offer(head);
            self.awaited.push(head);
        }
    }

    /// The guest looks at its used ring. Each element is of a chain it waits for.
    fn look(&mut self) {
        while self.seen != self.guest.used_index() {
            let (head, len) = self.guest.used(self.seen);
            let head = u16::try_from(head).unwrap();
            assert_eq!(len, u32::from(head) + 1);
            let place = self.awaited.iter().position(|&other| other == head);
            let place = place.unwrap_or_else(|| panic!("head {head} is used twice"));
            self.awaited.remove(place);
            self.free.push_back(head);
            self.seen = self.seen.wrapping_add(1);
        }
    }

    /// A process takes the ring over.
    fn ring(&mut self) -> Ring {
        self.guest.setup.next_avail = if self.base_is_used {
            self.guest.used_index()
        } else {
            self.guest.avail_index()
        };
        let mut ring = Ring::new(&self.guest.setup, Arc::clone(&self.guest.table)).unwrap();
        let record = self.region.queue(0, self.guest.setup.size).unwrap();
        ring.track(record).unwrap();
        ring
    }

    /// A process takes the ring over and does `steps`. Returns what it has in flight.
    fn process(
        &mut self,
        steps: &[Step],
        at_end: impl FnOnce(&mut World, &mut Ring, &mut Vec<u16>),
    ) {
        // The requests of a process that is killed are not leaked: nothing points to them here.
        struct Ending(Option<Ring>);
        impl Drop for Ending {
            fn drop(&mut self) {
                if let Some(ring) = &mut self.0 {
                    ring.in_flight = 0;
                }
            }
        }
        let mut ending = Ending(None);
        let ring = ending.0.insert(self.ring());
        let mut taken = Vec::new();
        for step in steps {
            match *step {
                Step::Offer => self.offer(),
                Step::Take => take_all(ring, &mut taken),
                Step::Put(place) if !taken.is_empty() => {
                    put(ring, taken.remove(place % taken.len()));
                }
                Step::Put(_) => {}
                Step::Publish => {
                    ring.publish();
                    self.look();
                }
            }
        }
        at_end(self, ring, &mut taken);
    }

    /// A process finds what the guest waits for, in the order in which it was made available, and ends it
    /// all, beginning with the last.
    fn finish(&mut self) {
        self.look();
        let awaited = self.awaited.clone();
        self.process(&[], |world, ring, taken| {
            take_all(ring, taken);
            assert_eq!(*taken, awaited, "taken in another order than offered");
            while let Some(head) = taken.pop() {
                put(ring, head);
            }
            ring.publish();
            world.look();
        });
        assert!(self.awaited.is_empty(), "lost: {:?}", self.awaited);
    }
}

fn take_all(ring: &mut Ring, taken: &mut Vec<u16>) {
    // The second look is for what comes after the chains of the process before.
    for _ in 0..2 {
        ring.available().unwrap();
        while let Some(head) = ring.pop_head().unwrap() {
            taken.push(ring.commit(head));
        }
    }
}

fn put(ring: &mut Ring, head: u16) {
    ring.put_used(Used::new(head, u32::from(head) + 1));
}

/// Every sequence of four steps on a ring of two and of five on one of four, killed at every store; and the
/// process after it killed at every store, too.
#[test]
fn a_process_killed_at_any_store_loses_nothing_and_does_nothing_twice() {
    const STEPS: [Step; 5] = [
        Step::Offer,
        Step::Take,
        Step::Put(0),
        Step::Put(1),
        Step::Publish,
    ];
    for (size, length) in [(2, 4), (4, 5)] {
        // Near the end of the index.
        let mut world = World::new(size, 0xfffe);
        for number in 0..STEPS.len().pow(length) {
            let mut steps = vec![Step::Offer, Step::Take, Step::Offer];
            steps.extend((0..length).map(|at| STEPS[number / STEPS.len().pow(at) % STEPS.len()]));
            world.base_is_used = number % 2 == 0;
            world.begin_anew();
            let stores = stores_of(|| world.process(&steps, |_, _, _| {}));
            for kill in 0..=stores {
                world.begin_anew();
                live(kill, || world.process(&steps, |_, _, _| {}));
                let mut again = 0;
                // The process that takes over is killed at its first store, then at its second...
                while live(again, || world.finish()).is_none() {
                    again += 1;
                }
                world.look();
                assert!(world.awaited.is_empty(), "lost after {steps:?}, {kill}");
            }
        }
    }
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => Just(Step::Offer),
        2 => Just(Step::Take),
        4 => (0_usize..16).prop_map(Step::Put),
        2 => Just(Step::Publish),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    /// Several processes, each killed after some stores, on rings of different sizes.
    #[test]
    fn a_row_of_killed_processes_loses_nothing(
        exponent in 0_u32..6,
        start in prop_oneof![Just(0_u16), 0xfff0_u16..=0xffff, any::<u16>()],
        lives in prop::collection::vec(
            (prop::collection::vec(step(), 0..60), 0_u64..250, any::<bool>()),
            1..6,
        ),
    ) {
        let mut world = World::new(1 << exponent, start);
        for (steps, stores, base_is_used) in lives {
            world.base_is_used = base_is_used;
            live(stores, || world.process(&steps, |_, _, _| {}));
            world.look();
        }
        world.finish();
    }
}

#[test]
fn a_full_ring_of_1024_comes_again_in_order() {
    let mut guest = Guest::with_regions(1024, &[(0, 0x8000)]);
    (guest.setup.avail, guest.setup.used) = (0x4000, 0x5000);
    let offer = |index: u16, head: u16| {
        guest.set(0x4004 + 2 * u64::from(index), head);
        guest.set(0x4002, index + 1);
    };
    for index in 0..1024 {
        offer(index, 1023 - index);
    }
    let (region, _) = region(1, 1024);
    let start = || {
        let mut ring = Ring::new(&guest.setup, Arc::clone(&guest.table)).unwrap();
        ring.track(region.queue(0, 1024).unwrap()).unwrap();
        ring
    };
    let heads: Vec<u16> = (0..1024).rev().collect();
    for _ in 0..3 {
        let mut ring = start();
        let mut taken = Vec::new();
        take_all(&mut ring, &mut taken);
        assert_eq!(taken, heads);
        assert_eq!(ring.next_avail(), 1024);
        ring.in_flight = 0;
    }
    let mut ring = start();
    assert_eq!(ring.to_resume(), 1024);
    let mut taken = Vec::new();
    take_all(&mut ring, &mut taken);
    for head in taken {
        put(&mut ring, head);
    }
    assert!(ring.publish());
    assert_eq!(start().to_resume(), 0);
}

#[test]
fn a_chain_of_before_that_finds_no_room_comes_again() {
    let mut world = World::new(4, 0);
    world.offer();
    world.offer();
    world.process(&[Step::Take], |_, _, _| {});
    let mut ring = world.ring();
    assert_eq!(ring.available(), Ok(2));
    let head = ring.pop_head().unwrap().unwrap();
    assert_eq!(head.index(), 0);
    ring.unpop(head);
    assert_eq!((ring.in_flight(), ring.to_resume()), (0, 2));
    // New ones wait until those of before are taken, also when one of those was given back.
    world.offer();
    for expected in [0, 1] {
        let head = ring.pop_head().unwrap().unwrap();
        assert_eq!(ring.commit(head), expected);
    }
    assert_eq!(ring.pop_head(), Ok(None));
    assert_eq!(ring.available(), Ok(1));
    let head = ring.pop_head().unwrap().unwrap();
    assert_eq!(head.index(), 2);
    ring.unpop(head);
    assert_eq!(ring.next_avail(), 2);
    let head = ring.pop_head().unwrap().unwrap();
    ring.commit(head);
    for head in [2, 0, 1] {
        put(&mut ring, head);
    }
    assert!(ring.publish());
}

#[test]
fn more_in_flight_than_was_offered_is_refused() {
    let mut world = World::new(4, 10);
    world.offer();
    world.offer();
    world.process(&[Step::Take], |_, _, _| {});
    // The guest takes one back.
    world.guest.set(AVAIL + 2, 11);
    let mut ring = Ring::new(&world.guest.setup, Arc::clone(&world.guest.table)).unwrap();
    let record = world.region.queue(0, 4).unwrap();
    assert!(matches!(
        ring.track(record),
        Err(RingError::AvailJump {
            index: 11,
            next: 12,
            size: 4
        })
    ));
}

/// Cloud Hypervisor names the available index, and a daemon may die before it ever saw the ring.
#[test]
fn a_new_record_does_not_let_the_front_end_skip_requests() {
    for base_is_used in [true, false] {
        let mut world = World::new(4, 10);
        world.offer();
        world.base_is_used = base_is_used;
        assert_eq!(world.ring().next_avail(), 10);
        world.finish();
    }
}
