//! Which pages of a mapped image are there: one bit for each.
//!
//! A bit that is set says that the page was there when somebody looked, and that no discard has begun
//! since. A copy that tested the bit before a discard of the same page began, and touches the page after
//! the discard has ended, only allocates it again: both came from the guest at the same time, so
//! either order is right.
//!
//! Bits are set after a system call, and the call may have come before a discard that another worker
//! has begun meanwhile. So who learns says since when ([`Since`]): if a discard was under way then, or
//! has begun by the time the bits are set, they are taken back.

use crate::atomic::{AtomicU64, Ordering};

use super::{PAGE_BYTES, in_memory, zeroes};

const WORD_BITS: u64 = u64::BITS as u64;

/// A moment in the history of discards: how many had begun, and whether all of them had ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Since {
    begun: u64,
    quiet: bool,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Known {
    words: Box<[AtomicU64]>,
    /// A page is there as a whole as soon as any of its bytes is.
    wholly: bool,
    begun: AtomicU64,
    ended: AtomicU64,
}

impl Known {
    /// Knows nothing of `pages` pages.
    pub(super) fn new(pages: u64, wholly: bool) -> Self {
        let words = usize::try_from(pages.div_ceil(WORD_BITS)).expect("a mapping's pages");
        Known {
            words: zeroes(words),
            wholly,
            begun: AtomicU64::new(0),
            ended: AtomicU64::new(0),
        }
    }

    /// See [`super::Mapping::run`].
    #[inline]
    pub(super) fn run(&self, offset: u64, most: u64) -> (u64, bool) {
        let first = offset / PAGE_BYTES;
        let last = (offset + most - 1) / PAGE_BYTES;
        let known = self.get(first);
        let mut page = first + 1;
        while page <= last && self.get(page) == known {
            page += 1;
        }
        let end = (page * PAGE_BYTES).min(offset + most);
        (end - offset, known)
    }

    #[inline]
    fn get(&self, page: u64) -> bool {
        let word = self.words[in_memory(page / WORD_BITS)].load(Ordering::Relaxed);
        word >> (page % WORD_BITS) & 1 != 0
    }

    pub(super) fn now(&self) -> Since {
        // In this order: what has ended had begun.
        let ended = self.ended.load(Ordering::SeqCst);
        let begun = self.begun.load(Ordering::SeqCst);
        Since {
            begun,
            quiet: begun == ended,
        }
    }

    /// These bytes are there, as a call said that was made after `since`.
    pub(super) fn learn(&self, since: Since, offset: u64, bytes: u64) {
        if !since.quiet || bytes == 0 {
            return;
        }
        let (first, end) = if self.wholly {
            (offset / PAGE_BYTES, (offset + bytes).div_ceil(PAGE_BYTES))
        } else {
            (offset.div_ceil(PAGE_BYTES), (offset + bytes) / PAGE_BYTES)
        };
        self.set_pages(first, end);
        self.take_back(since, first, end);
    }

    fn set_pages(&self, first: u64, end: u64) {
        self.change(first, end, true);
    }

    /// If a discard has begun meanwhile, it may have cleared the bits before they were set.
    fn take_back(&self, since: Since, first: u64, end: u64) {
        if self.begun.load(Ordering::SeqCst) != since.begun {
            self.change(first, end, false);
        }
    }

    /// See [`super::Mapping::discards`].
    pub(super) fn discards(&self, offset: u64, bytes: u64) {
        self.begun.fetch_add(1, Ordering::SeqCst);
        // Pages that are discarded in part are zeroed there, and stay.
        self.change(
            offset.div_ceil(PAGE_BYTES),
            (offset + bytes) / PAGE_BYTES,
            false,
        );
    }

    /// See [`super::Mapping::discarded`].
    pub(super) fn discarded(&self) {
        self.ended.fetch_add(1, Ordering::SeqCst);
    }

    /// Sets or clears the bits of the pages from `first` to `end`, exclusive.
    fn change(&self, first: u64, end: u64, set: bool) {
        let mut page = first;
        while page < end {
            let bit = page % WORD_BITS;
            let count = (WORD_BITS - bit).min(end - page);
            let mask = (u64::MAX >> (WORD_BITS - count)) << bit;
            let word = &self.words[in_memory(page / WORD_BITS)];
            // Words that say it already are not written, so that other workers keep their copy.
            let before = word.load(Ordering::SeqCst);
            if set && before & mask != mask {
                word.fetch_or(mask, Ordering::SeqCst);
            } else if !set && before & mask != 0 {
                word.fetch_and(!mask, Ordering::SeqCst);
            }
            page += count;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const P: u64 = PAGE_BYTES;

    #[test]
    fn runs_end_where_knowledge_does() {
        let known = Known::new(200, true);
        known.learn(known.now(), 60 * P, 10 * P);
        assert_eq!(known.run(0, 200 * P), (60 * P, false));
        assert_eq!(known.run(60 * P, 200 * P - 60 * P), (10 * P, true));
        assert_eq!(known.run(61 * P + 512, 1024), (1024, true));
        assert_eq!(known.run(69 * P + 512, 2 * P), (P - 512, true));
        assert_eq!(known.run(70 * P, P), (P, false));
    }

    #[test]
    fn a_byte_is_a_page_or_none() {
        for (wholly, expected) in [(true, 3 * P), (false, P)] {
            let known = Known::new(8, wholly);
            known.learn(known.now(), P - 1, P + 2);
            let first = if wholly { 0 } else { P };
            assert_eq!(known.run(first, 8 * P - first), (expected, true));
        }
    }

    #[test]
    fn a_discard_takes_whole_pages_only() {
        let known = Known::new(300, true);
        known.learn(known.now(), 0, 300 * P);
        known.discards(P - 512, 200 * P);
        assert_eq!(known.run(0, 300 * P), (P, true));
        assert_eq!(known.run(P, 299 * P), (199 * P, false));
        assert_eq!(known.run(200 * P, 100 * P), (100 * P, true));
    }

    #[test]
    fn what_was_seen_before_a_discard_is_not_learned_after_it() {
        let known = Known::new(8, true);
        let before = known.now();
        known.discards(0, P);
        let during = known.now();
        known.learn(during, 0, P);
        known.discarded();
        known.learn(before, 0, P);
        known.learn(during, 0, P);
        assert_eq!(known.run(0, P), (P, false));
        known.learn(known.now(), 0, P);
        assert_eq!(known.run(0, P), (P, true));
    }

    /// Every interleaving of one learner's steps and one discard's, as they stand in the code: after both,
    /// a page that the discard took away is not known.
    #[test]
    fn no_order_of_steps_leaves_a_discarded_page_known() {
        // The learner: now, look (is the page there?), set, check. The discard: begin, clear, punch, end.
        fn go(at: (u32, u32), there: bool, known: &Known, seen: (Option<Since>, bool)) -> u32 {
            let copy = |known: &Known| {
                let copy = Known::new(1, true);
                copy.words[0].store(known.words[0].load(Ordering::Relaxed), Ordering::Relaxed);
                copy.begun
                    .store(known.begun.load(Ordering::Relaxed), Ordering::Relaxed);
                copy.ended
                    .store(known.ended.load(Ordering::Relaxed), Ordering::Relaxed);
                copy
            };
            if at == (4, 4) {
                assert!(there || known.run(0, P) == (P, false));
                return 1;
            }
            let mut orders = 0;
            if at.0 < 4 {
                let known = copy(known);
                let mut seen = seen;
                let since = seen.0;
                let learns = seen.1 && since.is_some_and(|since| since.quiet);
                match at.0 {
                    0 => seen.0 = Some(known.now()),
                    1 => seen.1 = there,
                    2 if learns => known.set_pages(0, 1),
                    3 if learns => known.take_back(since.expect("learns"), 0, 1),
                    _ => {}
                }
                orders += go((at.0 + 1, at.1), there, &known, seen);
            }
            if at.1 < 4 {
                let known = copy(known);
                let mut there = there;
                match at.1 {
                    0 => drop(known.begun.fetch_add(1, Ordering::SeqCst)),
                    1 => known.change(0, 1, false),
                    2 => there = false,
                    _ => known.discarded(),
                }
                orders += go((at.0, at.1 + 1), there, &known, seen);
            }
            orders
        }
        let orders = go((0, 0), true, &Known::new(1, true), (None, false));
        assert_eq!(orders, 70);
    }
}
