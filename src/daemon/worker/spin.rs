//! How long a worker looks before it sleeps.
//!
//! Sleeping and being woken costs microseconds on both sides; looking costs a core. The bound moves
//! between 0 and the configured maximum by what the last pauses were. A pause (from the last
//! progress to the next, less what being woken took of it) that looking on would have caught makes
//! the bound longer, one beyond the maximum makes it shorter, and small bounds become 0: an idle
//! worker looks for nothing.
//!
//! Looking can defeat itself: on a CPU that the front end shares, it keeps away what it looks for,
//! which then comes as soon as the worker sleeps. Or what comes is always a little late. So a worker
//! to which that happened several times in a row, although the bound grew, stops looking for a
//! while, and for longer each time.

/// The smallest bound worth having, in nanoseconds: less than a wake-up costs.
const SMALLEST_NS: u64 = 4_000;

/// What a pause is longer because the worker slept, in nanoseconds: the front end's system call and
/// our wake-up. On a virtual machine with halted CPUs; where it is less, pauses of just above the
/// maximum look as if they could be caught, and [`MISSES`] ends that.
const WAKE_UP_NS: u64 = 20_000;

/// What comes this soon after the worker went to sleep, in nanoseconds, seems to have waited for
/// that; and pauses that exceed the maximum by less say nothing.
const SLACK_NS: u64 = 10_000;

/// As often as this the bound can double before it is at any maximum worth having, and some.
const MISSES: u32 = 8;

/// For how many sleeps a worker that looked in vain does not look: at first, and at most.
const HOLD_OFF: (u32, u32) = (32, 4096);

/// A worker's spinning.
#[derive(Debug)]
pub(super) struct Spin {
    max_ns: u64,
    bound_ns: u64,
    last_progress_ns: u64,
    asleep: bool,
    /// Sleeps that ended as soon as they began, after looking, in a row.
    misses: u32,
    /// Sleeps left before it looks again.
    held_off: u32,
    hold_off: u32,
}

impl Spin {
    /// With a maximum in microseconds; 0 never spins.
    pub fn new(max_us: u32) -> Self {
        Spin {
            max_ns: u64::from(max_us) * 1000,
            bound_ns: 0,
            last_progress_ns: 0,
            asleep: false,
            misses: 0,
            held_off: 0,
            hold_off: HOLD_OFF.0,
        }
    }

    /// The turn at `now_ns` found something to do.
    #[inline]
    pub fn progress(&mut self, now_ns: u64) {
        if self.asleep {
            self.woken(now_ns.saturating_sub(self.last_progress_ns));
        } else if self.misses != 0 {
            // Found by looking.
            self.misses = 0;
            self.hold_off = HOLD_OFF.0;
        }
        self.last_progress_ns = now_ns;
    }

    fn woken(&mut self, pause_ns: u64) {
        self.asleep = false;
        if self.held_off > 0 {
            self.held_off -= 1;
            return;
        }
        let in_vain = pause_ns < self.bound_ns + SLACK_NS || self.bound_ns == self.max_ns;
        if self.bound_ns != 0 && in_vain {
            self.misses += 1;
        }
        if self.misses >= MISSES {
            self.misses = 0;
            self.bound_ns = 0;
            self.held_off = self.hold_off;
            self.hold_off = (self.hold_off * 2).min(HOLD_OFF.1);
            return;
        }
        let pause_ns = pause_ns.saturating_sub(WAKE_UP_NS);
        if pause_ns <= self.max_ns {
            let least = SMALLEST_NS.min(self.max_ns);
            self.bound_ns = (self.bound_ns * 2).clamp(least, self.max_ns);
        } else if pause_ns > self.max_ns + SLACK_NS {
            self.bound_ns /= 2;
            if self.bound_ns < SMALLEST_NS {
                self.bound_ns = 0;
            }
        }
    }

    /// Whether to look once more before sleeping.
    #[inline]
    pub fn again(&self, now_ns: u64) -> bool {
        self.bound_ns != 0 && now_ns.saturating_sub(self.last_progress_ns) < self.bound_ns
    }

    /// Whether the worker looks at all before it sleeps, after a turn that found something.
    #[inline]
    pub fn is_on(&self) -> bool {
        self.bound_ns != 0
    }

    /// The worker goes to sleep.
    pub fn sleeps(&mut self) {
        self.asleep = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A pause of `ns` that ends by being woken.
    fn pause(spin: &mut Spin, now: &mut u64, ns: u64) {
        spin.sleeps();
        *now += ns;
        spin.progress(*now);
    }

    /// A pause that is caught if the bound allows; true if it was.
    fn offer(spin: &mut Spin, now: &mut u64, ns: u64) -> bool {
        let caught = spin.again(*now + ns);
        if !caught {
            spin.sleeps();
        }
        *now += ns;
        spin.progress(*now);
        caught
    }

    #[test]
    fn short_pauses_are_soon_caught() {
        let (mut spin, mut now) = (Spin::new(50), 1);
        assert!(!spin.is_on());
        let caught: Vec<bool> = (0..100)
            .map(|_| offer(&mut spin, &mut now, 30_000))
            .collect();
        assert!(caught[6..].iter().all(|caught| *caught), "{caught:?}");
    }

    #[test]
    fn pauses_beyond_the_maximum_end_it() {
        let (mut spin, mut now) = (Spin::new(50), 1);
        (0..10).for_each(|_| {
            offer(&mut spin, &mut now, 30_000);
        });
        assert!(spin.is_on());
        (0..10).for_each(|_| pause(&mut spin, &mut now, 90_000));
        assert!(!spin.is_on());
    }

    #[test]
    fn what_being_woken_takes_does_not_keep_it_from_looking() {
        // The front end needs 40 µs, and 15 more when it has to wake the worker.
        let (mut spin, mut now) = (Spin::new(50), 1);
        let caught = (0..1000)
            .filter(|_| {
                let caught = spin.again(now + 40_000);
                if caught {
                    now += 40_000;
                    spin.progress(now);
                } else {
                    pause(&mut spin, &mut now, 55_000);
                }
                caught
            })
            .count();
        assert!(caught > 980, "{caught} of 1000");
    }

    #[test]
    fn pauses_just_beyond_the_maximum_are_not_looked_for_for_ever() {
        let (mut spin, mut now) = (Spin::new(50), 1);
        let mut looked_ns = 0;
        for _ in 0..10_000 {
            looked_ns += spin.bound_ns;
            pause(&mut spin, &mut now, 65_000);
        }
        assert!(
            looked_ns / 10_000 < 1000,
            "{} ns a pause",
            looked_ns / 10_000
        );
    }

    #[test]
    fn pauses_around_the_maximum_are_caught_when_they_can_be() {
        let (mut spin, mut now) = (Spin::new(50), 1);
        let caught = (0..1000)
            .filter(|i| offer(&mut spin, &mut now, [35_000, 55_000][i % 2]))
            .count();
        assert!(caught > 480, "{caught} of 500");
    }

    #[test]
    fn looking_that_keeps_away_what_it_looks_for_is_given_up() {
        // Whatever the bound, the event comes 2 µs after the worker has gone to sleep.
        let (mut spin, mut now) = (Spin::new(50), 1);
        let mut looked_ns = 0;
        let mut pauses = 0;
        for _ in 0..10_000 {
            looked_ns += spin.bound_ns;
            pauses += 1;
            let ns = spin.bound_ns.min(47_000) + 2_000;
            pause(&mut spin, &mut now, ns);
        }
        assert!(
            looked_ns / pauses < 1000,
            "{} ns a pause",
            looked_ns / pauses
        );
    }

    #[test]
    fn it_looks_again_when_looking_pays_again() {
        let (mut spin, mut now) = (Spin::new(50), 1);
        (0..200).for_each(|_| {
            let ns = spin.bound_ns.min(47_000) + 2_000;
            pause(&mut spin, &mut now, ns);
        });
        let caught = (0..2000)
            .filter(|_| offer(&mut spin, &mut now, 30_000))
            .count();
        assert!(caught > 1500, "{caught} of 2000");
    }

    #[test]
    fn zero_never_spins() {
        let (mut spin, mut now) = (Spin::new(0), 1);
        (0..10).for_each(|_| pause(&mut spin, &mut now, 0));
        assert!(!spin.is_on() && !spin.again(now));
    }
}
