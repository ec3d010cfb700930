//! How long a worker looks before it sleeps.
//!
//! Sleeping and being woken costs microseconds on both sides; looking costs a core. The bound moves
//! between 0 and the configured maximum: a sleep that ended so soon that looking on would have
//! caught the event makes it longer, a sleep that lasted makes it shorter. An idle worker looks
//! for nothing: the bound is halved at each long sleep and small ones become 0.

/// The smallest bound worth having, in nanoseconds: less than a wake-up costs.
const SMALLEST_NS: u64 = 4_000;

/// A worker's spinning.
#[derive(Debug)]
pub(super) struct Spin {
    max_ns: u64,
    bound_ns: u64,
    last_progress_ns: u64,
    slept_at_ns: u64,
}

impl Spin {
    /// With a maximum in microseconds; 0 never spins.
    pub fn new(max_us: u32) -> Self {
        Spin {
            max_ns: u64::from(max_us) * 1000,
            bound_ns: 0,
            last_progress_ns: 0,
            slept_at_ns: 0,
        }
    }

    /// The turn at `now_ns` found something to do.
    #[inline]
    pub fn progress(&mut self, now_ns: u64) {
        if self.slept_at_ns != 0 {
            let slept = now_ns.saturating_sub(self.slept_at_ns);
            self.slept_at_ns = 0;
            self.bound_ns = if slept <= self.max_ns {
                (self.bound_ns * 2).clamp(SMALLEST_NS.min(self.max_ns), self.max_ns)
            } else if self.bound_ns / 2 < SMALLEST_NS {
                0
            } else {
                self.bound_ns / 2
            };
        }
        self.last_progress_ns = now_ns;
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
    pub fn sleeps(&mut self, now_ns: u64) {
        self.slept_at_ns = now_ns.max(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sleep_for(spin: &mut Spin, now: &mut u64, ns: u64) {
        spin.sleeps(*now);
        *now += ns;
        spin.progress(*now);
    }

    #[test]
    fn short_sleeps_lengthen_the_bound_up_to_the_maximum() {
        let (mut spin, mut now) = (Spin::new(50), 1);
        assert!(!spin.is_on());
        sleep_for(&mut spin, &mut now, 10_000);
        assert!(spin.again(now + SMALLEST_NS - 1) && !spin.again(now + SMALLEST_NS));
        (0..10).for_each(|_| sleep_for(&mut spin, &mut now, 10_000));
        assert!(spin.again(now + 49_999) && !spin.again(now + 50_000));
    }

    #[test]
    fn long_sleeps_end_it() {
        let (mut spin, mut now) = (Spin::new(50), 1);
        (0..10).for_each(|_| sleep_for(&mut spin, &mut now, 10_000));
        (0..10).for_each(|_| sleep_for(&mut spin, &mut now, 1_000_000));
        assert!(!spin.is_on());
    }

    #[test]
    fn zero_never_spins() {
        let (mut spin, mut now) = (Spin::new(0), 1);
        (0..10).for_each(|_| sleep_for(&mut spin, &mut now, 0));
        assert!(!spin.is_on() && !spin.again(now));
    }
}
