//! One token bucket that several threads take from without a lock.
//!
//! What a bucket holds follows from one number: the time at which it is full again if nobody takes
//! anything. To take is to move that time on by what the tokens cost in time, and a bucket admits as
//! long as that time is no further away than all tokens but one cost. (The generic cell rate
//! algorithm of ITU-T I.371, its virtual scheduling form, without a separate peak rate.)
//!
//! Time is counted in ticks, an eighth of a nanosecond each. Costs are rounded up to ticks and never
//! down, so that a limit is never exceeded; a stream of requests is slower than its limit by at most
//! one tick for each request, below 1 % as long as a request costs 12.5 ns or more.

use crate::atomic::{AtomicU64, Ordering};

use super::{Rate, RetryAt};

const TICK_BITS: u32 = 3;
const TICKS_PER_SECOND: u64 = 1_000_000_000 << TICK_BITS;

/// The last time there is: 18 years. A debt that reaches further is cut off there.
const LAST: u64 = (1 << (u64::BITS - GENERATION_BITS)) - 1;

/// Costs of a token are kept in ticks × 2^28: fine enough for terabytes a second, and a token that
/// costs a whole second still fits.
const COST_BITS: u32 = 28;

const GENERATION_BITS: u32 = 2;
const GENERATION: u64 = (1 << GENERATION_BITS) - 1;

/// A time in nanoseconds as ticks.
#[inline]
pub(super) fn ticks(ns: u64) -> u64 {
    ns.min(LAST >> TICK_BITS) << TICK_BITS
}

/// How fast a bucket fills and how much it holds, in ticks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Speed {
    /// What a token costs, in ticks × 2^28; 0 is no limit.
    token: u64,
    /// What all tokens but one cost: how far away the time at which it is full may be for it to
    /// admit.
    ahead: u64,
}

impl Speed {
    const UNLIMITED: Speed = Speed { token: 0, ahead: 0 };

    /// For operations. One costs a whole number of ticks, so that a burst is as many as it says.
    pub fn of_ops(rate: Rate) -> Self {
        match rate.per_second {
            0 => Self::UNLIMITED,
            per_second => Self::new(TICKS_PER_SECOND.div_ceil(per_second) << COST_BITS, rate),
        }
    }

    /// For bytes.
    pub fn of_bytes(rate: Rate) -> Self {
        match rate.per_second {
            0 => Self::UNLIMITED,
            per_second => Self::new((TICKS_PER_SECOND << COST_BITS).div_ceil(per_second), rate),
        }
    }

    fn new(token: u64, rate: Rate) -> Self {
        let ahead = (u128::from(token) * u128::from(rate.burst() - 1)) >> COST_BITS;
        Speed {
            token,
            // A burst of nine years: there is room for a debt beyond it.
            ahead: u64::try_from(ahead).unwrap_or(LAST).min(LAST / 2),
        }
    }

    #[inline]
    pub fn is_limit(self) -> bool {
        self.token != 0
    }

    /// What tokens cost, in ticks, rounded up.
    #[inline]
    fn cost(self, tokens: u64) -> u64 {
        let cost = u128::from(self.token) * u128::from(tokens);
        let cost = (cost + ((1 << COST_BITS) - 1)) >> COST_BITS;
        u64::try_from(cost).unwrap_or(LAST).min(LAST)
    }

    /// When a bucket that was full at `full_at` with the speed `old` is full with this one, so that
    /// it holds or owes the same number of tokens as before, as far as they fit. After no limit it
    /// is empty.
    fn carry_over(self, old: Speed, now: u64, full_at: u64) -> u64 {
        let empty = now.saturating_add(self.ahead).saturating_add(self.cost(1));
        if !old.is_limit() {
            return empty.min(LAST);
        }
        // What it holds beyond one token, negative if less; below 2^124 in size.
        let spare = i128::from(old.ahead) - i128::from(full_at.saturating_sub(now));
        let spare = (spare * i128::from(self.token)).div_euclid(i128::from(old.token));
        let missing = (i128::from(self.ahead) - spare).max(0);
        let missing = u64::try_from(missing).unwrap_or(LAST);
        now.saturating_add(missing).min(LAST)
    }
}

/// The place of a [`Speed`].
///
/// Read with acquire and written with release: who reads a value of a later generation here also
/// sees that the generation has changed.
#[derive(Debug)]
struct Slot {
    token: AtomicU64,
    ahead: AtomicU64,
}

impl Slot {
    fn new(speed: Speed) -> Self {
        Slot {
            token: AtomicU64::new(speed.token),
            ahead: AtomicU64::new(speed.ahead),
        }
    }

    #[inline]
    fn load(&self) -> Speed {
        Speed {
            token: self.token.load(Ordering::Acquire),
            ahead: self.ahead.load(Ordering::Acquire),
        }
    }

    fn store(&self, speed: Speed) {
        self.token.store(speed.token, Ordering::Release);
        self.ahead.store(speed.ahead, Ordering::Release);
    }
}

/// A token bucket.
///
/// What its state means depends on its speed, so a cost reckoned with one speed must never be
/// charged at another: a cheap request would turn into hours of debt. Therefore the word that holds
/// the state also says which speed it is for, by a generation that each change increments, and the
/// exchange that charges fails if the speed has changed since it was read. The new speed is put into
/// the slot that is not in use before the generation that uses it is published. Nobody ever waits
/// for a change that has begun.
///
/// A thread that stops between reading the word and exchanging it could be deceived only if
/// meanwhile the speed changed four times, or a multiple of it, and the state came out the same to
/// the tick; then one request would be charged at a rate that has been replaced.
#[derive(Debug)]
// Takers of reads and of writes do not fight for one cache line.
#[repr(align(64))]
pub(super) struct Bucket {
    /// When it is full, in ticks, above the generation.
    word: AtomicU64,
    /// By the lowest bit of the generation.
    slots: [Slot; 2],
}

#[inline]
fn full_at(word: u64) -> u64 {
    word >> GENERATION_BITS
}

#[inline]
fn with_full_at(word: u64, full_at: u64) -> u64 {
    full_at << GENERATION_BITS | word & GENERATION
}

impl Bucket {
    /// A full one.
    pub fn new(speed: Speed) -> Self {
        Bucket {
            word: AtomicU64::new(0),
            slots: [Slot::new(speed), Slot::new(Speed::UNLIMITED)],
        }
    }

    #[inline]
    fn slot(&self, word: u64) -> &Slot {
        &self.slots[usize::from(word & 1 != 0)]
    }

    /// Whether the speed is still the one that was read for `word`. For decisions that no exchange
    /// confirms.
    #[inline]
    fn is_current(&self, word: u64) -> bool {
        self.word.load(Ordering::Acquire) & GENERATION == word & GENERATION
    }

    /// Whether it admits at `now`, in ticks, which [`Self::take`] must confirm; else from when on it
    /// does.
    #[inline]
    pub fn check(&self, now: u64) -> Result<(), RetryAt> {
        loop {
            let word = self.word.load(Ordering::Acquire);
            let speed = self.slot(word).load();
            if !speed.is_limit() {
                return Ok(());
            }
            let outcome = admits(full_at(word), speed, now);
            if outcome.is_ok() || self.is_current(word) {
                return outcome;
            }
        }
    }

    /// Takes tokens if it admits at `now`, in ticks; else says from when on it does.
    #[inline]
    pub fn take(&self, now: u64, tokens: u64) -> Result<(), RetryAt> {
        let mut word = self.word.load(Ordering::Acquire);
        loop {
            let speed = self.slot(word).load();
            if !speed.is_limit() {
                return Ok(());
            }
            if let Err(at) = admits(full_at(word), speed, now) {
                if self.is_current(word) {
                    return Err(at);
                }
                word = self.word.load(Ordering::Acquire);
                continue;
            }
            let next = full_at(word).max(now).saturating_add(speed.cost(tokens));
            match self.exchange(word, with_full_at(word, next.min(LAST))) {
                Ok(()) => return Ok(()),
                Err(other) => word = other,
            }
        }
    }

    /// Takes tokens whether it admits or not.
    pub fn owe(&self, now: u64, tokens: u64) {
        let mut word = self.word.load(Ordering::Acquire);
        loop {
            let speed = self.slot(word).load();
            if !speed.is_limit() {
                return;
            }
            let next = full_at(word).max(now).saturating_add(speed.cost(tokens));
            match self.exchange(word, with_full_at(word, next.min(LAST))) {
                Ok(()) => return,
                Err(other) => word = other,
            }
        }
    }

    /// Puts back tokens that were taken. What is more than it holds is lost.
    #[inline]
    pub fn refund(&self, tokens: u64) {
        let mut word = self.word.load(Ordering::Acquire);
        loop {
            let speed = self.slot(word).load();
            if !speed.is_limit() {
                return;
            }
            // A time that has passed is as good as now: nobody gets more than a full bucket.
            let next = full_at(word).saturating_sub(speed.cost(tokens));
            match self.exchange(word, with_full_at(word, next)) {
                Ok(()) => return,
                Err(other) => word = other,
            }
        }
    }

    /// Goes on with another speed from `now` on, in ticks. One thread at a time.
    pub fn set(&self, now: u64, next: Speed) {
        let mut word = self.word.load(Ordering::Acquire);
        let speed = self.slot(word).load();
        if speed == next {
            return;
        }
        let generation = word.wrapping_add(1) & GENERATION;
        self.slot(generation).store(next);
        loop {
            let full_at = match next.is_limit() {
                true => next.carry_over(speed, now, full_at(word)),
                false => 0,
            };
            match self.exchange(word, with_full_at(generation, full_at)) {
                Ok(()) => return,
                Err(other) => word = other,
            }
        }
    }

    #[inline]
    fn exchange(&self, from: u64, to: u64) -> Result<(), u64> {
        self.word
            .compare_exchange_weak(from, to, Ordering::AcqRel, Ordering::Acquire)
            .map(drop)
    }

    /// When it is full again, but not before `now`, in ticks.
    #[cfg(test)]
    pub fn full_at(&self, now: u64) -> u64 {
        full_at(self.word.load(Ordering::Acquire)).max(now)
    }

    #[cfg(test)]
    pub fn copy(&self) -> Self {
        let word = self.word.load(Ordering::Acquire);
        Bucket {
            word: AtomicU64::new(word),
            slots: self.slots.each_ref().map(|slot| Slot::new(slot.load())),
        }
    }
}

#[inline]
fn admits(full_at: u64, speed: Speed, now: u64) -> Result<(), RetryAt> {
    let at = full_at.saturating_sub(speed.ahead);
    if at <= now {
        Ok(())
    } else if full_at == LAST {
        Err(RetryAt(u64::MAX))
    } else {
        Err(RetryAt(at.div_ceil(1 << TICK_BITS)))
    }
}
