//! Limits on operations and bytes for each second: token buckets.
//!
//! A [`Throttle`] holds the buckets of one disk, or of a group of disks that one worker serves. A
//! request is admitted by all buckets that apply to it, its disk's and its group's, or by none.
//!
//! A bucket admits a request of any size as soon as it holds one whole token, and is charged the
//! full size: what it did not hold it owes, and admits nothing until that is paid. If it had to hold
//! the whole size first, small requests that share the bucket would keep a large one out for ever.
//! Over any time `t` a bucket admits at most rate × t + burst + one request.

use serde::{Deserialize, Serialize};

use super::request::Op;

/// A limit on one thing: how much of it for each second, and how much at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Rate {
    /// Operations, or bytes, for each second; 0 is no limit.
    pub per_second: u64,
    /// How many may come at once after a while without any. 0 is what comes in a tenth of a
    /// second, as in QEMU.
    pub burst: u64,
}

impl Rate {
    /// A rate with the burst that comes with it by default.
    pub fn per_second(per_second: u64) -> Self {
        Rate {
            per_second,
            burst: 0,
        }
    }

    fn burst(self) -> u64 {
        match self.burst {
            0 => (self.per_second / 10).max(1),
            burst => burst,
        }
    }

    fn share(self, index: u32, of: u32) -> Self {
        let part = |whole: u64| match whole {
            0 => 0,
            _ => {
                (whole / u64::from(of) + u64::from(u64::from(index) < whole % u64::from(of))).max(1)
            }
        };
        Rate {
            per_second: part(self.per_second),
            burst: part(self.burst),
        }
    }
}

/// Limits on reads, on writes, and on both together. All that are set hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Directions {
    /// For reads.
    pub read: Rate,
    /// For writes, write-zeroes, and (operations only) discards.
    pub write: Rate,
    /// For all of these together.
    pub total: Rate,
}

/// The limits of a disk or of a group of disks. The default is none.
///
/// A flush is never limited: it is what makes earlier, limited writes durable. A discard counts as
/// a write of no bytes, because it moves none; write-zeroes count the bytes they zero, because the
/// disk may have to write them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Operations (QEMU's iops_rd, iops_wr, iops).
    pub ops: Directions,
    /// Bytes (QEMU's bps_rd, bps_wr, bps).
    pub bytes: Directions,
}

impl Limits {
    /// Part `index` of `of`, for one of several workers that serve the same disk or group.
    ///
    /// The parts of each rate and burst add up to the whole, but none is less than 1.
    pub fn share(&self, index: u32, of: u32) -> Self {
        assert!(index < of, "part {index} of {of}");
        let directions = |whole: Directions| Directions {
            read: whole.read.share(index, of),
            write: whole.write.share(index, of),
            total: whole.total.share(index, of),
        };
        Limits {
            ops: directions(self.ops),
            bytes: directions(self.bytes),
        }
    }

    fn rates(&self) -> [Rate; BUCKETS] {
        let Limits { ops, bytes } = self;
        [
            ops.read,
            ops.write,
            ops.total,
            bytes.read,
            bytes.write,
            bytes.total,
        ]
    }
}

/// From when on a refused request is admitted, if nothing else is admitted before: nanoseconds on
/// the clock of the call that refused it. [`u64::MAX`] if that is beyond the clock.
///
/// Buckets do not remember whom they refused: of those that wait for the same time, who has waited
/// longest is to be asked first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct RetryAt(pub u64);

const BUCKETS: usize = 6;

/// Operations stand before bytes in this order too.
const READ: [usize; 2] = [0, 3];
const WRITE: [usize; 2] = [1, 4];
const TOTAL: [usize; 2] = [2, 5];

/// What one token is in the unit levels are kept in: tokens × nanoseconds, so that a rate for each
/// second times nanoseconds needs no division, and nothing is ever rounded.
const TOKEN: i128 = 1_000_000_000;

/// One token bucket. Without a rate it is not asked.
#[derive(Clone, Copy, Debug, Default)]
struct Bucket {
    rate: u64,
    /// Most it may hold.
    capacity: i128,
    /// What it holds, or owes when negative.
    level: i128,
    updated_ns: u64,
}

impl Bucket {
    fn full(rate: Rate) -> Self {
        let capacity = i128::from(rate.burst()) * TOKEN;
        Bucket {
            rate: rate.per_second,
            capacity,
            level: capacity,
            updated_ns: 0,
        }
    }

    #[inline]
    fn is_limit(&self) -> bool {
        self.rate != 0
    }

    #[inline]
    fn refill(&mut self, now_ns: u64) {
        let elapsed = now_ns.saturating_sub(self.updated_ns);
        if elapsed == 0 {
            return;
        }
        self.updated_ns = now_ns;
        let gain = i128::from(elapsed).saturating_mul(i128::from(self.rate));
        self.level = self.level.saturating_add(gain).min(self.capacity);
    }

    /// When it admits, after [`Self::refill`]; `None` is now.
    #[inline]
    fn admits_at(&self) -> Option<RetryAt> {
        let missing = TOKEN - self.level;
        if missing <= 0 {
            return None;
        }
        let rate = i128::from(self.rate);
        let wait = (missing + rate - 1) / rate;
        let wait = u64::try_from(wait).unwrap_or(u64::MAX);
        Some(RetryAt(self.updated_ns.saturating_add(wait)))
    }

    #[inline]
    fn charge(&mut self, tokens: u64) {
        self.level = self.level.saturating_sub(i128::from(tokens) * TOKEN);
    }

    #[inline]
    fn refund(&mut self, tokens: u64) {
        let level = self.level.saturating_add(i128::from(tokens) * TOKEN);
        self.level = level.min(self.capacity);
    }

    /// Goes on with another rate. What it holds stays as far as it fits, what it owes stays: there
    /// is nothing to win by changing limits back and forth. Where there was no limit, it begins
    /// empty.
    fn set(&mut self, now_ns: u64, rate: Rate) {
        let mut next = Bucket::full(rate);
        if self.is_limit() {
            self.refill(now_ns);
            next.level = self.level.min(next.capacity);
            next.updated_ns = self.updated_ns;
        } else {
            next.level = 0;
            next.updated_ns = now_ns;
        }
        *self = next;
    }
}

/// What a request takes: from which buckets of each kind, and how many bytes.
#[derive(Clone, Copy, Debug)]
struct Price {
    buckets: [usize; 2],
    bytes: u64,
}

impl Price {
    /// `None` if it is free.
    #[inline]
    fn of(op: Op, bytes: u64) -> Option<Self> {
        let (buckets, bytes) = match op {
            Op::Read => (READ, bytes),
            Op::Write | Op::WriteZeroes => (WRITE, bytes),
            Op::Discard => (WRITE, 0),
            Op::Flush => return None,
        };
        Some(Price { buckets, bytes })
    }

    /// The four buckets with the tokens each is charged.
    #[inline]
    fn charges(self) -> [(usize, u64); 4] {
        [
            (self.buckets[0], 1),
            (TOTAL[0], 1),
            (self.buckets[1], self.bytes),
            (TOTAL[1], self.bytes),
        ]
    }
}

/// The token buckets of one disk, or of one group of disks, on one worker.
#[derive(Clone, Debug)]
pub struct Throttle {
    limits: Limits,
    limited: bool,
    buckets: [Bucket; BUCKETS],
}

impl Default for Throttle {
    fn default() -> Self {
        Self::new(Limits::default())
    }
}

impl Throttle {
    /// With full buckets: the burst can be had at once.
    pub fn new(limits: Limits) -> Self {
        let buckets = limits.rates().map(Bucket::full);
        Throttle {
            limits,
            limited: buckets.iter().any(Bucket::is_limit),
            buckets,
        }
    }

    /// The limits that hold now.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Whether there is any limit.
    #[inline]
    pub fn is_limited(&self) -> bool {
        self.limited
    }

    /// Changes the limits from `now_ns` on.
    ///
    /// Tokens and debts carry over, so that a change never makes room for a burst. A request that
    /// was admitted before may be refunded after; it fills the new buckets at most.
    pub fn set_limits(&mut self, now_ns: u64, limits: Limits) {
        for (bucket, rate) in self.buckets.iter_mut().zip(limits.rates()) {
            bucket.set(now_ns, rate);
        }
        self.limits = limits;
        self.limited = self.buckets.iter().any(Bucket::is_limit);
    }

    /// Admits a request and charges it, or says when to ask again and charges nothing. `now_ns` is
    /// a monotonic time in nanoseconds; `bytes` is the request's length.
    #[inline]
    pub fn try_take(&mut self, now_ns: u64, op: Op, bytes: u64) -> Result<(), RetryAt> {
        if !self.limited {
            return Ok(());
        }
        let Some(price) = Price::of(op, bytes) else {
            return Ok(());
        };
        self.check(now_ns, price)?;
        self.charge(price);
        Ok(())
    }

    /// As [`Self::try_take`], from this (a disk's) and from its group's: both, or none.
    #[inline]
    pub fn try_take_with(
        &mut self,
        group: &mut Throttle,
        now_ns: u64,
        op: Op,
        bytes: u64,
    ) -> Result<(), RetryAt> {
        if !self.limited && !group.limited {
            return Ok(());
        }
        let Some(price) = Price::of(op, bytes) else {
            return Ok(());
        };
        match (self.check(now_ns, price), group.check(now_ns, price)) {
            (Ok(()), Ok(())) => {
                self.charge(price);
                group.charge(price);
                Ok(())
            }
            (Err(own), Err(shared)) => Err(own.max(shared)),
            (Err(at), Ok(())) | (Ok(()), Err(at)) => Err(at),
        }
    }

    /// Takes back what an admitted request was charged: the engine refused it, and it will ask
    /// again. The buckets are then as if it had not asked. Refund the disk and its group, each.
    #[inline]
    pub fn refund(&mut self, op: Op, bytes: u64) {
        if !self.limited {
            return;
        }
        let Some(price) = Price::of(op, bytes) else {
            return;
        };
        for (index, tokens) in price.charges() {
            let bucket = &mut self.buckets[index];
            if bucket.is_limit() {
                bucket.refund(tokens);
            }
        }
    }

    /// Whether all buckets admit it; else when the last of them does.
    fn check(&mut self, now_ns: u64, price: Price) -> Result<(), RetryAt> {
        let mut latest = None;
        for (index, tokens) in price.charges() {
            let bucket = &mut self.buckets[index];
            if bucket.is_limit() && tokens != 0 {
                bucket.refill(now_ns);
                latest = latest.max(bucket.admits_at());
            }
        }
        latest.map_or(Ok(()), Err)
    }

    fn charge(&mut self, price: Price) {
        for (index, tokens) in price.charges() {
            let bucket = &mut self.buckets[index];
            if bucket.is_limit() {
                bucket.charge(tokens);
            }
        }
    }
}

#[cfg(test)]
mod tests;
