//! Limits on operations and bytes for each second: token buckets.
//!
//! A [`Throttle`] holds the buckets of one disk, or of a group of disks. It is shared by all workers
//! that serve them: a limit is one limit, whether one vCPU issues everything or all do. A request is
//! admitted by all buckets that apply to it, its disk's and its group's, or by none.
//!
//! A bucket admits a request of any size as soon as it holds one whole token, and is charged the
//! full size: what it did not hold it owes, and admits nothing until that is paid. If it had to hold
//! the whole size first, small requests that share the bucket would keep a large one out for ever.
//! Over any time `t` a bucket admits at most rate × t + burst + one request, whoever asks.

mod bucket;

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use self::bucket::{Bucket, Speed, ticks};
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

    /// The burst that holds: the one given, or the one that comes with the rate.
    pub fn burst(self) -> u64 {
        match self.burst {
            0 => (self.per_second / 10).max(1),
            burst => burst,
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
    /// In the order of the buckets.
    fn speeds(&self) -> [Speed; BUCKETS] {
        let Limits { ops, bytes } = self;
        [
            Speed::of_ops(ops.read),
            Speed::of_ops(ops.write),
            Speed::of_ops(ops.total),
            Speed::of_bytes(bytes.read),
            Speed::of_bytes(bytes.write),
            Speed::of_bytes(bytes.total),
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

/// The token buckets of one disk, or of one group of disks.
///
/// All methods may be called by any thread at any time, with times of one and the same clock; a
/// caller whose time is a little behind the others' gets a little less, never more. No call on the
/// way of a request locks or waits: it costs an atomic exchange for each limit that applies.
#[derive(Debug)]
pub struct Throttle {
    /// Bit by bit, which buckets are limits.
    limited: AtomicU8,
    buckets: [Bucket; BUCKETS],
    /// Not for requests: what was set last.
    limits: Mutex<Limits>,
}

impl Default for Throttle {
    fn default() -> Self {
        Self::new(Limits::default())
    }
}

/// Bit by bit, which are limits.
fn mask(speeds: &[Speed; BUCKETS]) -> u8 {
    let bits = speeds.iter().enumerate();
    bits.fold(0, |mask, (bit, speed)| {
        mask | u8::from(speed.is_limit()) << bit
    })
}

impl Throttle {
    /// With full buckets: the burst can be had at once.
    pub fn new(limits: Limits) -> Self {
        let speeds = limits.speeds();
        Throttle {
            limited: AtomicU8::new(mask(&speeds)),
            buckets: speeds.map(Bucket::new),
            limits: Mutex::new(limits),
        }
    }

    /// The limits that were set last.
    pub fn limits(&self) -> Limits {
        *self.lock()
    }

    fn lock(&self) -> MutexGuard<'_, Limits> {
        self.limits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether there is any limit.
    #[inline]
    pub fn is_limited(&self) -> bool {
        self.limited() != 0
    }

    /// Relaxed: a request that comes while limits change may be treated as if before or after.
    #[inline]
    fn limited(&self) -> u8 {
        self.limited.load(Ordering::Relaxed)
    }

    /// Changes the limits from `now_ns` on, while others may take.
    ///
    /// Tokens and debts carry over as far as they fit, and where there was no limit it begins
    /// empty: a change, or many back and forth, never makes room for a burst. Each bucket changes
    /// at once, but not all of them at the same time: a request that comes meanwhile may meet an old
    /// limit and a new one. One that was admitted before may be refunded after; it fills the new
    /// buckets at most.
    ///
    /// Who was refused before waits for a time that may no longer be right, and should ask again.
    pub fn set_limits(&self, now_ns: u64, limits: Limits) {
        let mut current = self.lock();
        let speeds = limits.speeds();
        for (bucket, speed) in self.buckets.iter().zip(speeds) {
            bucket.set(ticks(now_ns), speed);
        }
        self.limited.store(mask(&speeds), Ordering::Relaxed);
        *current = limits;
    }

    /// Admits a request and charges it, or says when to ask again and charges nothing. `now_ns` is
    /// a monotonic time in nanoseconds; `bytes` is the request's length.
    ///
    /// # Errors
    ///
    /// Some bucket holds less than one token at `now_ns`: when all hold one.
    #[inline]
    pub fn try_take(&self, now_ns: u64, op: Op, bytes: u64) -> Result<(), RetryAt> {
        let limited = self.limited();
        if limited == 0 {
            return Ok(());
        }
        let Some(price) = Price::of(op, bytes) else {
            return Ok(());
        };
        let now = ticks(now_ns);
        self.check(limited, now, price)?;
        self.charge(limited, now, price)
    }

    /// As [`Self::try_take`], from this (a disk's) and from its group's: both, or none.
    ///
    /// # Errors
    ///
    /// Some bucket of either holds less than one token at `now_ns`: when all hold one.
    #[inline]
    pub fn try_take_with(
        &self,
        group: &Throttle,
        now_ns: u64,
        op: Op,
        bytes: u64,
    ) -> Result<(), RetryAt> {
        let (own, shared) = (self.limited(), group.limited());
        if own | shared == 0 {
            return Ok(());
        }
        let Some(price) = Price::of(op, bytes) else {
            return Ok(());
        };
        let now = ticks(now_ns);
        match (self.check(own, now, price), group.check(shared, now, price)) {
            (Ok(()), Ok(())) => {}
            (Err(own), Err(shared)) => return Err(own.max(shared)),
            (Err(at), Ok(())) | (Ok(()), Err(at)) => return Err(at),
        }
        self.charge(own, now, price)?;
        group.charge(shared, now, price).inspect_err(|_| {
            for (bucket, tokens) in self.asked(own, price) {
                bucket.refund(tokens);
            }
        })
    }

    /// Charges a request that is issued whatever the buckets hold. What they lack they owe.
    pub fn owe(&self, now_ns: u64, op: Op, bytes: u64) {
        if let Some(price) = Price::of(op, bytes) {
            for (bucket, tokens) in self.asked(self.limited(), price) {
                bucket.owe(ticks(now_ns), tokens);
            }
        }
    }

    /// When all buckets admit something, if one does not at `now_ns`.
    pub fn owes_until(&self, now_ns: u64) -> Option<RetryAt> {
        let buckets = self.buckets.iter();
        buckets
            .filter_map(|bucket| bucket.check(ticks(now_ns)).err())
            .max()
    }

    /// Takes back what an admitted request was charged: the engine refused it, and it will ask
    /// again. The buckets are then as if it had not asked. Refund the disk and its group, each.
    #[inline]
    pub fn refund(&self, op: Op, bytes: u64) {
        let limited = self.limited();
        if limited == 0 {
            return;
        }
        let Some(price) = Price::of(op, bytes) else {
            return;
        };
        for (bucket, tokens) in self.asked(limited, price) {
            bucket.refund(tokens);
        }
    }

    /// The buckets of those in `limited` that a request takes from, and how much from each.
    #[inline]
    fn asked(&self, limited: u8, price: Price) -> impl Iterator<Item = (&Bucket, u64)> {
        price
            .charges()
            .into_iter()
            .filter(move |&(index, tokens)| limited & 1 << index != 0 && tokens != 0)
            .map(|(index, tokens)| (&self.buckets[index], tokens))
    }

    /// Whether all buckets admit it; else when the last of them does. Refused requests change
    /// nothing others could see, and no cache line moves for them.
    #[inline]
    fn check(&self, limited: u8, now: u64, price: Price) -> Result<(), RetryAt> {
        let refused = self
            .asked(limited, price)
            .filter_map(|(bucket, _)| bucket.check(now).err())
            .max();
        refused.map_or(Ok(()), Err)
    }

    /// Takes from all buckets, or, if somebody was faster since [`Self::check`], from none.
    #[inline]
    fn charge(&self, limited: u8, now: u64, price: Price) -> Result<(), RetryAt> {
        for (taken, (bucket, tokens)) in self.asked(limited, price).enumerate() {
            if let Err(at) = bucket.take(now, tokens) {
                for (bucket, tokens) in self.asked(limited, price).take(taken) {
                    bucket.refund(tokens);
                }
                return Err(at);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
