//! The clock of the process: one for all workers, because they share limits, and with them times.

use std::time::{Duration, Instant};

/// Counts nanoseconds from when it was made.
#[derive(Clone, Copy, Debug)]
pub struct Clock(Instant);

impl Clock {
    /// Begins to count.
    pub fn start() -> Clock {
        Clock(Instant::now())
    }

    /// How long it has counted.
    pub fn elapsed(self) -> Duration {
        self.0.elapsed()
    }

    /// The same in nanoseconds.
    #[inline]
    pub fn now_ns(self) -> u64 {
        u64::try_from(self.elapsed().as_nanos()).expect("uptime below five centuries")
    }
}
