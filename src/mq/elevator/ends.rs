//! Queued requests by the sector they end at, for what could be merged behind them (the kernel's
//! `elv_rqhash`).

use super::super::ids::HctxId;
use super::super::limits::MERGE_LOOKBACK;
use super::store::NONE;

#[derive(Clone, Copy, Debug)]
struct Link {
    prev: u32,
    next: u32,
    hash: u64,
}

/// A hash table with one chain for each bucket, newest first.
#[derive(Debug)]
pub(super) struct Ends {
    buckets: Vec<u32>,
    links: Vec<Link>,
    /// The upper bits of a hash are its bucket.
    shift: u32,
}

/// Fibonacci hashing: the upper bits of the product are the well-mixed ones. The hctx takes bits a
/// sector number does not reach on any disk there is.
#[inline]
fn hash(hctx: HctxId, end: u64) -> u64 {
    (end ^ (u64::from(hctx.0) << 48)).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

impl Ends {
    pub fn new(capacity: usize) -> Self {
        let mut ends = Ends {
            buckets: Vec::new(),
            links: Vec::new(),
            shift: 0,
        };
        ends.reserve(capacity);
        ends
    }

    /// Makes room for slots below `capacity`.
    pub fn reserve(&mut self, capacity: usize) {
        let count = capacity.max(2).next_power_of_two();
        if count <= self.buckets.len() {
            return;
        }
        let blank = Link {
            prev: NONE,
            next: NONE,
            hash: 0,
        };
        self.links.resize(count, blank);
        self.shift = 64 - count.trailing_zeros();
        for mut at in std::mem::replace(&mut self.buckets, vec![NONE; count]) {
            // From the oldest, so that each chain is newest first again.
            let mut oldest = NONE;
            while at != NONE {
                oldest = at;
                at = self.links[at as usize].next;
            }
            while oldest != NONE {
                let link = self.links[oldest as usize];
                self.push(oldest, link.hash);
                oldest = link.prev;
            }
        }
    }

    #[inline]
    #[expect(
        clippy::cast_possible_truncation,
        reason = "below the number of buckets, a usize"
    )]
    fn bucket(&self, hash: u64) -> usize {
        (hash >> self.shift) as usize
    }

    #[inline]
    fn push(&mut self, slot: u32, hash: u64) {
        let bucket = self.bucket(hash);
        let next = std::mem::replace(&mut self.buckets[bucket], slot);
        self.links[slot as usize] = Link {
            prev: NONE,
            next,
            hash,
        };
        if next != NONE {
            self.links[next as usize].prev = slot;
        }
    }

    /// Adds `slot`, which ends at `end`.
    #[inline]
    pub fn insert(&mut self, slot: u32, hctx: HctxId, end: u64) {
        self.push(slot, hash(hctx, end));
    }

    /// Removes `slot`, which is in the table.
    #[inline]
    pub fn remove(&mut self, slot: u32) {
        let link = self.links[slot as usize];
        match link.prev {
            NONE => {
                let bucket = self.bucket(link.hash);
                self.buckets[bucket] = link.next;
            }
            prev => self.links[prev as usize].next = link.next,
        }
        if link.next != NONE {
            self.links[link.next as usize].prev = link.prev;
        }
    }

    /// Slots that may end at `end`, newest first. A few at most: a guest may put as many as it
    /// likes into one chain.
    #[inline]
    pub fn near(&self, hctx: HctxId, end: u64) -> impl Iterator<Item = u32> {
        let mut at = self.buckets[self.bucket(hash(hctx, end))];
        std::iter::from_fn(move || {
            let slot = (at != NONE).then_some(at)?;
            at = self.links[slot as usize].next;
            Some(slot)
        })
        .take(MERGE_LOOKBACK)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ends_there_is_found_newest_first_also_after_growing() {
        let mut ends = Ends::new(2);
        let hctx = HctxId(3);
        ends.insert(0, hctx, 100);
        ends.insert(1, hctx, 100);
        let near = |ends: &Ends, end| ends.near(hctx, end).collect::<Vec<_>>();
        assert_eq!(near(&ends, 100), [1, 0]);
        ends.reserve(64);
        for slot in 2..40 {
            ends.insert(slot, hctx, 1000 + u64::from(slot));
        }
        let found: Vec<_> = near(&ends, 100).into_iter().filter(|s| *s < 2).collect();
        assert_eq!(found, [1, 0]);
        ends.remove(1);
        assert!(near(&ends, 100).contains(&0) && !near(&ends, 100).contains(&1));
        for slot in (2..40).rev() {
            assert!(near(&ends, 1000 + u64::from(slot)).contains(&slot));
            ends.remove(slot);
        }
        ends.remove(0);
        assert!(ends.buckets.iter().all(|b| *b == NONE));
    }

    #[test]
    fn a_crowded_chain_is_not_walked_to_its_end() {
        let mut ends = Ends::new(64);
        (0..64).for_each(|slot| ends.insert(slot, HctxId(0), 8));
        assert_eq!(ends.near(HctxId(0), 8).count(), MERGE_LOOKBACK);
    }
}
