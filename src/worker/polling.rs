//! How long a worker looks before it sleeps.
//!
//! Sleeping and being woken costs microseconds on both sides; looking costs a core. The bound moves
//! between 0 and the configured maximum by what the last pauses were. A pause (from the last
//! progress to the next, less what being woken took of it) that looking on would have caught makes
//! the bound longer, one beyond the maximum makes it shorter, and small bounds become 0: an idle
//! worker looks for nothing.
//!
//! Looking can defeat itself: on a CPU that the front end shares, it keeps away what it looks for,
//! which then comes as soon as the worker sleeps. Or what comes is mostly a little late. So a worker
//! that looks in vain more often than not, although the bound grew, stops looking for a while, and for
//! longer each time.

/// The smallest bound worth having, in nanoseconds: less than a wake-up costs.
const SMALLEST_NS: u64 = 4_000;

/// What a pause is longer because the worker slept, in nanoseconds: the front end's system call and
/// our wake-up. On a virtual machine with halted CPUs; where it is less, pauses of just above the
/// maximum look as if they could be caught, and [`LUCK`] ends that.
const WAKE_UP_NS: u64 = 20_000;

/// What comes this soon after the worker went to sleep, in nanoseconds, seems to have waited for
/// that; and pauses that exceed the maximum by less say nothing.
const SLACK_NS: u64 = 10_000;

/// As often as this the bound can double before it is at any maximum worth having, and some.
const LUCK: i32 = 8;

/// For how many sleeps a worker that looked in vain does not look: at first, and at most.
const HOLD_OFF: (u32, u32) = (32, 4096);

/// Whom a pause waits for. A device and a guest take their own times, and take turns: one bound for both
/// would grow with the one and shrink with the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Awaited {
    /// Nothing is in flight: the next request has to come.
    Guest,
    /// Something is: a completion, or more requests.
    Device,
}

/// A worker's spinning.
#[derive(Debug)]
pub(super) struct Spin {
    max_ns: u64,
    /// By whom is awaited.
    looks: [Look; 2],
    last_progress_ns: u64,
    /// Whom the worker last looked or slept for.
    awaited: Awaited,
    pause: Pause,
}

/// How the worker spends what may be a pause.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pause {
    /// It is none: the last turn found something.
    Not,
    Looking,
    Sleeping,
}

/// The bound for one kind of pause.
#[derive(Debug)]
struct Look {
    bound_ns: u64,
    /// What was found by looking, less the sleeps after looking in vain.
    luck: i32,
    /// Sleeps left before it looks again.
    held_off: u32,
    hold_off: u32,
}

impl Look {
    const OFF: Look = Look {
        bound_ns: 0,
        luck: 0,
        held_off: 0,
        hold_off: HOLD_OFF.0,
    };

    /// A pause was ended by what looking found.
    fn found(&mut self) {
        self.luck = (self.luck + 1).min(LUCK);
        if self.luck == LUCK {
            self.hold_off = HOLD_OFF.0;
        }
    }

    /// A pause was ended by a wake-up.
    fn woken(&mut self, pause_ns: u64, max_ns: u64) {
        if self.held_off > 0 {
            self.held_off -= 1;
            return;
        }
        let in_vain = pause_ns < self.bound_ns + SLACK_NS || self.bound_ns == max_ns;
        if self.bound_ns != 0 && in_vain {
            self.luck -= 1;
        }
        if self.luck <= -LUCK {
            self.luck = 0;
            self.bound_ns = 0;
            self.held_off = self.hold_off;
            self.hold_off = (self.hold_off * 2).min(HOLD_OFF.1);
            return;
        }
        let pause_ns = pause_ns.saturating_sub(WAKE_UP_NS);
        if pause_ns <= max_ns {
            let least = SMALLEST_NS.min(max_ns);
            self.bound_ns = (self.bound_ns * 2).clamp(least, max_ns);
        } else if pause_ns > max_ns + SLACK_NS {
            self.bound_ns /= 2;
            if self.bound_ns < SMALLEST_NS {
                self.bound_ns = 0;
            }
        }
    }
}

impl Spin {
    /// With a maximum in microseconds; 0 never spins.
    pub fn new(max_us: u32) -> Self {
        Spin {
            max_ns: u64::from(max_us) * 1000,
            looks: [Look::OFF; 2],
            last_progress_ns: 0,
            awaited: Awaited::Guest,
            pause: Pause::Not,
        }
    }

    /// The turn at `now_ns` found something to do.
    #[inline]
    pub fn progress(&mut self, now_ns: u64) {
        if self.pause != Pause::Not {
            self.end_pause(now_ns);
        }
        self.last_progress_ns = now_ns;
    }

    fn end_pause(&mut self, now_ns: u64) {
        let look = &mut self.looks[self.awaited as usize];
        match self.pause {
            Pause::Sleeping => {
                look.woken(now_ns.saturating_sub(self.last_progress_ns), self.max_ns);
            }
            _ => look.found(),
        }
        self.pause = Pause::Not;
    }

    fn bound_ns(&self, awaited: Awaited) -> u64 {
        self.looks[awaited as usize].bound_ns
    }

    /// Whether to look once more before sleeping, after a turn that found nothing.
    #[inline]
    pub fn again(&mut self, now_ns: u64, awaited: Awaited) -> bool {
        let bound_ns = self.bound_ns(awaited);
        let again = bound_ns != 0 && now_ns.saturating_sub(self.last_progress_ns) < bound_ns;
        if again {
            (self.awaited, self.pause) = (awaited, Pause::Looking);
        }
        again
    }

    /// Whether the worker looks at all before it sleeps, after a turn that found something.
    #[inline]
    pub fn is_on(&self, awaited: Awaited) -> bool {
        self.bound_ns(awaited) != 0
    }

    /// The worker goes to sleep.
    pub fn sleeps(&mut self, awaited: Awaited) {
        (self.awaited, self.pause) = (awaited, Pause::Sleeping);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A pause of `ns` that ends by being woken.
    fn pause(spin: &mut Spin, now: &mut u64, ns: u64) {
        spin.sleeps(Awaited::Guest);
        *now += ns;
        spin.progress(*now);
    }

    /// A pause that is caught if the bound allows; true if it was.
    fn offer(spin: &mut Spin, now: &mut u64, ns: u64) -> bool {
        offer_of(spin, now, Awaited::Guest, ns)
    }

    /// The same, whoever is awaited.
    fn offer_of(spin: &mut Spin, now: &mut u64, awaited: Awaited, ns: u64) -> bool {
        let caught = spin.again(*now + ns, awaited);
        if !caught {
            spin.sleeps(awaited);
        }
        *now += ns;
        spin.progress(*now);
        caught
    }

    #[test]
    fn short_pauses_are_soon_caught() {
        let (mut spin, mut now) = (Spin::new(50), 1);
        assert!(!spin.is_on(Awaited::Guest));
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
        assert!(spin.is_on(Awaited::Guest));
        (0..10).for_each(|_| pause(&mut spin, &mut now, 90_000));
        assert!(!spin.is_on(Awaited::Guest));
    }

    #[test]
    fn what_being_woken_takes_does_not_keep_it_from_looking() {
        // The front end needs 40 µs, and 15 more when it has to wake the worker.
        let (mut spin, mut now) = (Spin::new(50), 1);
        let caught = (0..1000)
            .filter(|_| {
                let caught = spin.again(now + 40_000, Awaited::Guest);
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
            looked_ns += spin.bound_ns(Awaited::Guest);
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
            looked_ns += spin.bound_ns(Awaited::Guest);
            pauses += 1;
            let ns = spin.bound_ns(Awaited::Guest).min(47_000) + 2_000;
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
            let ns = spin.bound_ns(Awaited::Guest).min(47_000) + 2_000;
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
        assert!(!spin.is_on(Awaited::Guest) && !spin.again(now, Awaited::Guest));
    }

    #[test]
    fn a_guest_is_looked_for_beside_a_device_that_takes_longer() {
        let (mut spin, mut now) = (Spin::new(50), 1);
        let mut caught = 0;
        for _ in 0..1000 {
            for (awaited, ns) in [(Awaited::Device, 100_000), (Awaited::Guest, 30_000)] {
                if offer_of(&mut spin, &mut now, awaited, ns) {
                    assert_eq!(awaited, Awaited::Guest);
                    caught += 1;
                }
            }
            assert!(!spin.is_on(Awaited::Device));
        }
        assert!(caught > 990, "{caught} of 1000");
    }

    #[test]
    fn what_is_late_more_often_than_not_is_given_up() {
        // One in three comes in time, and the others just after the worker went to sleep.
        let (mut spin, mut now) = (Spin::new(50), 1);
        let mut looked_ns = 0;
        for i in 0..10_000 {
            let ns = if i % 3 == 0 { 45_000 } else { 58_000 };
            looked_ns += spin.bound_ns(Awaited::Device).min(ns);
            offer_of(&mut spin, &mut now, Awaited::Device, ns);
        }
        assert!(
            looked_ns / 10_000 < 2_000,
            "{} ns a pause",
            looked_ns / 10_000
        );
    }
}
