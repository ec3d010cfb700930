//! How long a cache line takes from one CPU to another and back.
//!
//! Front end and back end live on two CPUs and hand each other cache lines, so this is the unit in which a ring costs
//! time. On a virtual machine it changes from minute to minute by several times, as the host puts the virtual CPUs on
//! threads of one core or on cores far from each other.

use crate::backend;
use crate::cli::Pin;
use std::sync::Barrier;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

/// Enough that an interrupt or two does not matter, few enough to take milliseconds.
const TRIPS: u32 = 10_000;

/// A line of its own, whatever the processor fetches beside it.
#[repr(align(128))]
struct Line(AtomicU32);

/// Nanoseconds of a round trip between a CPU of the front end and one of the back end, or between the first two that
/// this process may use; none where there is only one, or none of those asked for.
pub fn round_trip_ns(pin: Option<&Pin>) -> Option<f64> {
    let (here, there) = match pin {
        Some(pin) => {
            let here = *pin.front.first()?;
            (here, *pin.back.iter().find(|cpu| **cpu != here)?)
        }
        None => {
            let allowed = backend::allowed();
            (*allowed.first()?, *allowed.get(1)?)
        }
    };
    let (line, pinned, ready) = (Line(AtomicU32::new(0)), AtomicU32::new(0), Barrier::new(2));
    let seated = |cpu| {
        if backend::pin(None, &[cpu]).is_ok() {
            pinned.fetch_add(1, Ordering::Relaxed);
        }
        ready.wait();
        pinned.load(Ordering::Relaxed) == 2
    };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            if seated(there) {
                (0..TRIPS).for_each(|trip| line.pass(2 * trip + 1));
            }
        });
        let asks = scope.spawn(|| {
            seated(here).then(|| {
                let begun = Instant::now();
                (0..TRIPS).for_each(|trip| line.pass(2 * trip));
                begun.elapsed().as_nanos() as f64 / f64::from(TRIPS)
            })
        });
        asks.join().ok()?
    })
}

impl Line {
    /// Waits until it is our turn, and makes it the other's.
    fn pass(&self, turn: u32) {
        while self.0.load(Ordering::Acquire) != turn {
            std::hint::spin_loop();
        }
        self.0.store(turn + 1, Ordering::Release);
    }
}
