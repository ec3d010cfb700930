//! Models of what threads share without a lock: loom runs each through every order of its steps that the
//! memory model allows. The code is the daemon's own, from its files; only the atomics are loom's.

#![allow(dead_code, reason = "what a model needs of a file is not all there is")]

use std::sync::Arc;

use loom::thread;

/// In the daemon: `std::sync::atomic`.
mod atomic {
    pub use loom::sync::atomic::*;
}

#[path = "../../../src/mq/qos/bucket.rs"]
mod bucket;
#[path = "../../../src/sigbus/slot.rs"]
mod slot;
#[path = "../../../src/engine/sync_fault.rs"]
mod sync_fault;

// What these files take from the modules they stand in.

/// `mq::qos::Rate`
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

/// `mq::qos::RetryAt`
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

use bucket::{Bucket, Speed, ticks};
use slot::Slot;
use sync_fault::SyncFault;

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

fn main() {
    let models: [(&str, fn()); 5] = [
        ("one token is taken once", one_token_is_taken_once),
        ("a refund is one token", a_refund_is_one_token),
        (
            "a token is charged at one speed",
            a_token_is_charged_at_one_speed,
        ),
        ("a failed sync is remembered", a_failed_sync_is_remembered),
        ("a range is seen whole", a_range_is_seen_whole),
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
