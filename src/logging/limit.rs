//! How many log lines a disk may have.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Lines that may come at once.
pub(super) const BURST: u32 = 1000;

/// Lines that may come in each second after that.
pub(super) const RATE: u32 = 10;

/// How often it is said that lines were left out.
pub(super) const INTERVAL: Duration = Duration::from_secs(1);

/// What a line is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Source {
    /// All disks, or none.
    Process,
    /// A disk, by number.
    Disk(u16),
}

/// Whether a line is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Write,
    LeaveOut {
        /// None was left out since it was last said.
        first: bool,
    },
}

/// A token bucket for each source.
#[derive(Debug, Default)]
pub(super) struct Limits(Mutex<BTreeMap<Source, Bucket>>);

#[derive(Debug)]
struct Bucket {
    /// Lines that may come, times `UNIT`.
    left: u64,
    filled: Instant,
    left_out: u64,
    told: Instant,
}

/// Parts of a line, as many as nanoseconds in a second.
const UNIT: u64 = 1_000_000_000;

impl Limits {
    /// Takes a line of `source` into account.
    pub(super) fn admit(&self, source: Source, now: Instant) -> Verdict {
        let mut buckets = self.buckets();
        let bucket = buckets.entry(source).or_insert(Bucket {
            left: u64::from(BURST) * UNIT,
            filled: now,
            left_out: 0,
            told: now,
        });
        let passed = now.saturating_duration_since(bucket.filled).as_nanos();
        let more = u64::try_from(passed)
            .unwrap_or(u64::MAX)
            .saturating_mul(u64::from(RATE));
        bucket.left = bucket
            .left
            .saturating_add(more)
            .min(u64::from(BURST) * UNIT);
        bucket.filled = now;
        if bucket.left >= UNIT {
            bucket.left -= UNIT;
            return Verdict::Write;
        }
        bucket.left_out += 1;
        let first = bucket.left_out == 1;
        if first {
            bucket.told = now;
        }
        Verdict::LeaveOut { first }
    }

    /// The sources that had lines left out, with their numbers, each at most once in an [`INTERVAL`].
    pub(super) fn left_out(&self, now: Instant) -> Vec<(Source, u64)> {
        let mut buckets = self.buckets();
        let due = buckets.iter_mut().filter(|(_, bucket)| {
            bucket.left_out > 0 && now.saturating_duration_since(bucket.told) >= INTERVAL
        });
        due.map(|(source, bucket)| {
            bucket.told = now;
            (*source, std::mem::take(&mut bucket.left_out))
        })
        .collect()
    }

    /// Whether there are some that have not been told.
    pub(super) fn is_owing(&self) -> bool {
        self.buckets().values().any(|bucket| bucket.left_out > 0)
    }

    fn buckets(&self) -> MutexGuard<'_, BTreeMap<Source, Bucket>> {
        // A bucket is right after each step.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_has_its_burst_and_its_rate_whatever_others_do() {
        let limits = Limits::default();
        let start = Instant::now();
        let flood = |at: Instant| {
            let lines = (0..5000).filter(|_| limits.admit(Source::Disk(0), at) == Verdict::Write);
            lines.count()
        };
        assert_eq!(flood(start), 1000);
        assert_eq!(limits.admit(Source::Disk(1), start), Verdict::Write);
        assert_eq!(limits.admit(Source::Process, start), Verdict::Write);
        assert_eq!(flood(start + Duration::from_secs(3)), 30);
        assert_eq!(
            flood(start + Duration::from_secs(10_000)),
            1000,
            "no more than at once"
        );
    }

    #[test]
    fn what_is_left_out_is_told_once() {
        let limits = Limits::default();
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        for _ in 0..BURST {
            assert_eq!(limits.admit(Source::Disk(3), start), Verdict::Write);
        }
        assert!(!limits.is_owing());
        let first = |first| Verdict::LeaveOut { first };
        assert_eq!(limits.admit(Source::Disk(3), start), first(true));
        assert_eq!(limits.admit(Source::Disk(3), at(50)), first(false));
        assert!(limits.is_owing());
        assert_eq!(limits.left_out(at(999)), []);
        assert_eq!(limits.left_out(at(1000)), [(Source::Disk(3), 2)]);
        assert_eq!(limits.left_out(at(9000)), []);
        assert!(!limits.is_owing());
    }
}
