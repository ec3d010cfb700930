//! Calls that the kernel refuses for the moment, and how soon the next one is worth making.
//!
//! A worker has nothing to sleep in but the call that is refused, so it would go on making it as fast as it
//! can. One refusal is nothing: after a signal, or with completions to be taken first, the next call is right at once.
//! What is refused again waits longer each time, and goes on being tried: entries that the kernel has not taken
//! are as safe as requests that are still in their ring, and blk-mq waits for resources without end, too.

use std::io;
use std::time::Duration;

/// The first pause, after the second refusal.
const SHORTEST: Duration = Duration::from_micros(100);

/// The longest: a hundred calls a second cost next to nothing, and a hundredth of a second is soon enough
/// for a machine that had no memory.
const LONGEST: Duration = Duration::from_millis(10);

/// Pauses of this much altogether are worth a line in the log.
const LOUD: Duration = Duration::from_secs(1);

/// Refusals since the last call that was not refused.
#[derive(Debug, Default)]
pub(super) struct Refusals {
    in_a_row: u32,
    error: Option<io::Error>,
    paused: Duration,
}

impl Refusals {
    /// The kernel did what it was asked to.
    #[inline]
    pub(super) fn end(&mut self) {
        if self.in_a_row > 0 {
            self.end_now();
        }
    }

    #[cold]
    fn end_now(&mut self) {
        if self.paused >= LOUD {
            log::warn!("io_uring takes requests again");
        }
        *self = Refusals::default();
    }

    /// It did not.
    #[cold]
    pub(super) fn add(&mut self, error: io::Error) {
        self.in_a_row = self.in_a_row.saturating_add(1);
        self.error = Some(error);
    }

    /// Whether the next call had better wait.
    #[inline]
    pub(super) fn is_repeated(&self) -> bool {
        self.in_a_row > 1
    }

    /// How long, for a caller that is going to wait that long.
    #[cold]
    pub(super) fn pause(&mut self) -> Duration {
        let Some(doublings) = self.in_a_row.checked_sub(2) else {
            return Duration::ZERO;
        };
        let factor = 1_u32.checked_shl(doublings).unwrap_or(u32::MAX);
        let pause = SHORTEST.saturating_mul(factor).min(LONGEST);
        let before = self.paused;
        self.paused = before.saturating_add(pause);
        if before < LOUD
            && self.paused >= LOUD
            && let Some(error) = &self.error
        {
            log::error!(
                "io_uring has taken no requests for a second: {error}; they are kept and tried again (is the host \
                 short of memory?)"
            );
        }
        pause
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(refusals: &mut Refusals) -> Duration {
        refusals.add(io::Error::from_raw_os_error(libc::EAGAIN));
        refusals.pause()
    }

    #[test]
    fn pauses_begin_after_the_second_and_grow_to_their_bound() {
        let mut refusals = Refusals::default();
        let pauses: Vec<u128> = (0..10)
            .map(|_| refused(&mut refusals).as_micros())
            .collect();
        assert_eq!(
            pauses,
            [0, 100, 200, 400, 800, 1600, 3200, 6400, 10_000, 10_000]
        );
        assert!(
            (0..100).all(|_| refused(&mut refusals) == LONGEST),
            "however many"
        );
        refusals.end();
        assert_eq!(
            refused(&mut refusals),
            Duration::ZERO,
            "one that worked ends it"
        );
    }

    #[test]
    fn the_log_is_told_of_a_long_time_once() {
        let mut refusals = Refusals::default();
        let mut told = 0;
        for _ in 0..1000 {
            let before = refusals.paused;
            refused(&mut refusals);
            told += u32::from(before < LOUD && refusals.paused >= LOUD);
        }
        assert_eq!(told, 1);
    }
}
