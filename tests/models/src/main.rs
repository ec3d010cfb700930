//! Models of what threads share without a lock: loom runs each through every order of its steps that the
//! memory model allows. The code is the daemon's own, from its files; only the atomics are loom's.

#![allow(dead_code, reason = "what a model needs of a file is not all there is")]

use std::sync::Arc;

use loom::thread;

/// In the daemon: `std::sync::atomic`.
mod atomic {
    pub use loom::sync::atomic::{
        AtomicBool, AtomicI32, AtomicU8, AtomicU32, AtomicUsize, Ordering, fence,
    };

    /// Of all loads and exchanges loom makes acquire-release at most, but its fences are sequentially
    /// consistent. With one before and after, an access is as well.
    #[derive(Debug)]
    pub struct AtomicU64(loom::sync::atomic::AtomicU64);

    fn ordered<T>(order: Ordering, access: impl FnOnce() -> T) -> T {
        if order != Ordering::SeqCst {
            return access();
        }
        fence(Ordering::SeqCst);
        let value = access();
        fence(Ordering::SeqCst);
        value
    }

    impl AtomicU64 {
        pub fn new(value: u64) -> Self {
            AtomicU64(loom::sync::atomic::AtomicU64::new(value))
        }

        pub fn load(&self, order: Ordering) -> u64 {
            ordered(order, || self.0.load(order))
        }

        pub fn store(&self, value: u64, order: Ordering) {
            ordered(order, || self.0.store(value, order));
        }

        pub fn fetch_add(&self, value: u64, order: Ordering) -> u64 {
            ordered(order, || self.0.fetch_add(value, order))
        }

        pub fn fetch_or(&self, value: u64, order: Ordering) -> u64 {
            ordered(order, || self.0.fetch_or(value, order))
        }

        pub fn fetch_and(&self, value: u64, order: Ordering) -> u64 {
            ordered(order, || self.0.fetch_and(value, order))
        }

        pub fn compare_exchange_weak(
            &self,
            current: u64,
            new: u64,
            success: Ordering,
            failure: Ordering,
        ) -> Result<u64, u64> {
            self.0.compare_exchange_weak(current, new, success, failure)
        }
    }
}

#[path = "../../../src/virtio/dirty_log/bits.rs"]
mod bits;
#[path = "../../../src/mq/throttle/bucket.rs"]
mod bucket;
#[path = "../../../src/engine/mapping/known.rs"]
mod known;
#[path = "../../../src/sys/sigbus/slot.rs"]
mod slot;
#[path = "../../../src/engine/sync_fault.rs"]
mod sync_fault;
#[path = "../../../src/worker/io_errors/times.rs"]
mod times;

// What these files take from the modules they stand in.

/// `mq::throttle::Rate`
#[derive(Clone, Copy, Debug)]
struct Rate {
    per_second: u64,
    burst: u64,
}

impl Rate {
    fn burst(self) -> u64 {
        self.burst
    }
}

/// `mq::throttle::RetryAt`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct RetryAt(u64);

/// `engine::Errno`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Errno(pub i32);

impl std::fmt::Display for Errno {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// `sigbus::MOST_PAGES`, of which one is enough to run out of them.
const MOST_PAGES: usize = 1;

/// `engine::mapping::PAGE_BYTES`
const PAGE_BYTES: u64 = 4096;

/// `engine::mapping::in_memory`
fn in_memory(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap()
}

/// `engine::mapping::zeroes`
fn zeroes(count: usize) -> Box<[atomic::AtomicU64]> {
    (0..count).map(|_| atomic::AtomicU64::new(0)).collect()
}

use atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use bucket::{Bucket, Speed, ticks};
use known::Known;
use slot::{Recorded, Slot};
use sync_fault::SyncFault;
use times::{Followed, Times};

fn speed(per_second: u64, burst: u64) -> Speed {
    Speed::of_ops(Rate { per_second, burst })
}

fn take(bucket: &Bucket, now_ns: u64) -> bool {
    bucket.take(ticks(now_ns), 1).is_ok()
}

/// Two that want the last token: one gets it.
fn one_token_is_taken_once() {
    let limit = Arc::new(Bucket::new(speed(1, 1)));
    let other = {
        let limit = Arc::clone(&limit);
        thread::spawn(move || take(&limit, 0))
    };
    let first = take(&limit, 0);
    assert_eq!(u8::from(first) + u8::from(other.join().unwrap()), 1);
}

/// A token that is given back while two ask is there for one of them, or for who comes later, and no more.
fn a_refund_is_one_token() {
    let limit = Arc::new(Bucket::new(speed(1, 1)));
    assert!(take(&limit, 0));
    let others = [(); 2].map(|()| {
        let limit = Arc::clone(&limit);
        thread::spawn(move || take(&limit, 0))
    });
    limit.refund(1);
    let taken = others.map(|other| u8::from(other.join().unwrap()));
    let late = u8::from(take(&limit, 0)) + u8::from(take(&limit, 0));
    assert_eq!(taken[0] + taken[1] + late, 1);
}

/// The speed changes while somebody takes: what is taken costs what a token costs at one speed or the
/// other, never a mixture. At a token a second both ways, a third one in the same second would be one.
fn a_token_is_charged_at_one_speed() {
    let limit = Arc::new(Bucket::new(speed(1, 2)));
    let other = {
        let limit = Arc::clone(&limit);
        thread::spawn(move || limit.set(0, speed(1_000_000_000, 2)))
    };
    let mut taken = u8::from(take(&limit, 0));
    other.join().unwrap();
    // The new speed: a token a nanosecond, two at once. What was left is carried over.
    while take(&limit, 0) {
        taken += 1;
        assert!(taken <= 2, "more than a full bucket");
    }
    // A debt at the old speed would be a second; at the new one it is over in two nanoseconds.
    assert!(take(&limit, 2), "charged at the old price");
}

/// Once a sync has failed nobody who comes after that believes one, and the reason stays the first.
fn a_failed_sync_is_remembered() {
    let fault = Arc::new(SyncFault::default());
    let other = {
        let fault = Arc::clone(&fault);
        thread::spawn(move || {
            fault.set(Errno(5));
            fault.errno()
        })
    };
    fault.set(Errno(28));
    let mine = fault.errno();
    let theirs = other.join().unwrap();
    assert!(mine.is_some() && mine == theirs && mine == fault.errno());
}

/// Who asks after a doubt has ended knows what came of it.
fn a_doubt_ends_with_its_answer() {
    let fault = Arc::new(SyncFault::default());
    fault.doubt();
    let other = {
        let fault = Arc::clone(&fault);
        thread::spawn(move || {
            fault.set(Errno(5));
            fault.end_doubt();
        })
    };
    if !fault.is_doubted() {
        assert_eq!(fault.errno(), Some(Errno(5)));
    }
    other.join().unwrap();
}

/// The handler sees a range as it was registered, or leaves it out; never one's start and another's length.
fn a_range_is_seen_whole() {
    let slot = Arc::new(Slot::default());
    let other = {
        let slot = Arc::clone(&slot);
        thread::spawn(move || {
            slot.set(0x1000, 1);
            slot.set(0x2000, 2);
        })
    };
    let seen = slot.get();
    assert!(matches!(
        seen,
        None | Some((0, 0) | (0x1000, 1) | (0x2000, 2))
    ));
    other.join().unwrap();
    assert_eq!(slot.get(), Some((0x2000, 2)));
}

/// Two threads find pages gone at the same time, of which the slot has a place for one. When either goes on, with
/// zeros, it learns that memory was lost and that its page is among it: the daemon looks when the count differs from
/// what it was.
fn zeros_are_recorded_before_they_are_read() {
    let slot = Slot::default();
    slot.describe(0x1000, true);
    slot.set(0x1000, 0x2000);
    let shared = Arc::new((slot, AtomicU64::new(0)));
    let has = |slot: &Slot, page: usize| {
        let mut found = false;
        slot.each_lost(|base, len| found |= (base..base + len).contains(&page));
        found
    };
    let touch = move |shared: &(Slot, AtomicU64), page| {
        let (slot, losses) = shared;
        if slot.lose(page, losses) == Recorded::NoPlace {
            slot.lose_all(losses);
        }
        assert!(losses.load(Ordering::Acquire) != 0 && slot.lost.load(Ordering::Relaxed));
        assert!(has(slot, page));
    };
    let other = {
        let shared = Arc::clone(&shared);
        thread::spawn(move || touch(&shared, 0x1000))
    };
    touch(&shared, 0x2000);
    other.join().unwrap();
    assert!(shared.0.pages_lost() == 1 && has(&shared.0, 0x1000) && has(&shared.0, 0x2000));
}

/// A thread looks at a page, finds it there and learns that, while another takes it away, and once more. In
/// the end nobody takes a page for known that is gone.
fn a_page_that_is_gone_is_not_known() {
    let shared = Arc::new((Known::new(1, true), AtomicBool::new(true)));
    let other = {
        let shared = Arc::clone(&shared);
        thread::spawn(move || learn(&shared))
    };
    discard(&shared);
    discard(&shared);
    other.join().unwrap();
    assert_eq!(shared.0.run(0, PAGE_BYTES), (PAGE_BYTES, false));
}

/// The kernel's answers are ordered by its locks, as these exchanges are.
fn learn((known, there): &(Known, AtomicBool)) {
    let since = known.now();
    if there.fetch_or(false, Ordering::AcqRel) {
        known.learn(since, 0, PAGE_BYTES);
    }
}

fn discard((known, there): &(Known, AtomicBool)) {
    known.discards(0, PAGE_BYTES);
    there.fetch_and(false, Ordering::AcqRel);
    known.discarded();
}

/// A page is written and marked twice while the front end takes marks and copies: its last copy is the page.
/// Page 8 has a neighbour in the same byte that another worker marks.
fn a_marked_page_is_copied_as_it_is() {
    let log = Arc::new([AtomicU8::new(0), AtomicU8::new(0)]);
    let page = Arc::new(AtomicUsize::new(0));
    let writer = {
        let (log, page) = (Arc::clone(&log), Arc::clone(&page));
        thread::spawn(move || {
            for content in 1..=2 {
                page.store(content, Ordering::Relaxed);
                bits::mark(|at| &log[in_memory(at)], 8, 8);
            }
        })
    };
    let neighbour = {
        let log = Arc::clone(&log);
        thread::spawn(move || bits::mark(|at| &log[in_memory(at)], 7, 9))
    };
    let mut copy = 0;
    let mut seen = [0; 2];
    let mut pass = |copy: &mut usize| {
        let bits = [0, 1].map(|byte: usize| log[byte].swap(0, Ordering::SeqCst));
        seen = [seen[0] | bits[0], seen[1] | bits[1]];
        if bits[1] & 1 != 0 {
            *copy = page.load(Ordering::Relaxed);
        }
    };
    pass(&mut copy);
    writer.join().unwrap();
    neighbour.join().unwrap();
    pass(&mut copy);
    assert_eq!((copy, seen), (2, [0x80, 0x03]));
}

/// A worker goes on with a disk, fails again and holds it anew, while another has yet to hear that it is to
/// go on: both hold it in the end.
fn a_disk_that_fails_again_is_held_by_all() {
    let times = Arc::new(Times::default());
    let (mut first, mut second) = (Followed::new(&times), Followed::new(&times));
    first.begin(&times);
    assert!(second.follow(&times));
    let until = times.get();
    let other = {
        let times = Arc::clone(&times);
        thread::spawn(move || {
            first.resume(until);
            first.begin(&times);
            first
        })
    };
    second.resume(until);
    let held = second.follow(&times);
    let mut first = other.join().unwrap();
    // The first has woken the second.
    assert!(held || second.follow(&times));
    assert!(!first.follow(&times));
}

fn main() {
    let models: [(&str, fn()); 10] = [
        ("one token is taken once", one_token_is_taken_once),
        ("a refund is one token", a_refund_is_one_token),
        (
            "a token is charged at one speed",
            a_token_is_charged_at_one_speed,
        ),
        ("a failed sync is remembered", a_failed_sync_is_remembered),
        ("a doubt ends with its answer", a_doubt_ends_with_its_answer),
        ("a range is seen whole", a_range_is_seen_whole),
        (
            "zeros are recorded before they are read",
            zeros_are_recorded_before_they_are_read,
        ),
        (
            "a page that is gone is not known",
            a_page_that_is_gone_is_not_known,
        ),
        (
            "a marked page is copied as it is",
            a_marked_page_is_copied_as_it_is,
        ),
        (
            "a disk that fails again is held by all",
            a_disk_that_fails_again_is_held_by_all,
        ),
    ];
    for (name, model) in models {
        let runs = std::sync::Arc::new(std::sync::atomic::AtomicU64::new(0));
        let count = std::sync::Arc::clone(&runs);
        loom::model(move || {
            count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            model();
        });
        let runs = runs.load(std::sync::atomic::Ordering::Relaxed);
        println!("{name}: {runs} orders");
    }
}
