//! One range in the table that the signal's handler reads: a seqlock.

use super::MOST_PAGES;
use crate::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence};

/// What came of recording a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recorded {
    /// It was not known to be gone.
    New,
    /// It was known.
    Again,
    /// There is no place left for it.
    NoPlace,
}

/// A registered range, or a free place.
#[derive(Debug, Default)]
pub struct Slot {
    /// Odd while the range is written.
    pub turn: AtomicU32,
    /// Some of it is gone, and zeros are in its place.
    pub lost: AtomicBool,
    /// I/O goes from it and to it.
    pub buffers: AtomicBool,
    /// Zero when free, and then `len` is too.
    pub base: AtomicUsize,
    /// In bytes.
    pub len: AtomicUsize,
    /// The least of it that can be replaced, in bytes.
    pub page: AtomicUsize,
    /// All of it is.
    pub whole: AtomicBool,
    /// How many of `pages` are in use, at the least.
    pub count: AtomicUsize,
    /// Where the pages begin that are gone.
    pub pages: [AtomicUsize; MOST_PAGES],
}

impl Slot {
    /// Changes the range. By one thread at a time.
    pub fn set(&self, base: usize, len: usize) {
        let turn = self.turn.load(Ordering::Relaxed);
        self.turn.store(turn.wrapping_add(1), Ordering::Relaxed);
        // Pairs with the acquire fence in `get`: a reader that sees one of the two stores below sees the
        // odd count too, and leaves the slot out.
        fence(Ordering::Release);
        self.base.store(base, Ordering::Relaxed);
        self.len.store(len, Ordering::Relaxed);
        // Pairs with the acquire load in `get`: a reader that sees the new count sees both.
        self.turn.store(turn.wrapping_add(2), Ordering::Release);
    }

    /// Says what the range will be made of, while the slot is free.
    pub fn describe(&self, page: usize, buffers: bool) {
        self.page.store(page, Ordering::Relaxed);
        self.buffers.store(buffers, Ordering::Relaxed);
    }

    /// Forgets what was lost of a range that is no more. True: something was, and readers have to learn that
    /// it is not any more.
    pub fn forget(&self) -> bool {
        let lost = self.lost.swap(false, Ordering::Relaxed);
        if lost {
            self.whole.store(false, Ordering::Relaxed);
            self.count.store(0, Ordering::Relaxed);
            for page in &self.pages {
                page.store(0, Ordering::Relaxed);
            }
        }
        lost
    }

    /// The range's start and length, as they stood together; `None` while they are being changed.
    pub fn get(&self) -> Option<(usize, usize)> {
        let turn = self.turn.load(Ordering::Acquire);
        let range = (
            self.base.load(Ordering::Relaxed),
            self.len.load(Ordering::Relaxed),
        );
        fence(Ordering::Acquire);
        let same = turn == self.turn.load(Ordering::Relaxed);
        (same && turn.is_multiple_of(2)).then_some(range)
    }

    /// Records that the page at `page` is gone, before zeros are put in its place: a thread that finds
    /// zeros finds the reason too.
    pub fn lose(&self, page: usize, losses: &AtomicU64) -> Recorded {
        let known = self.pages.iter().any(|p| p.load(Ordering::Relaxed) == page);
        let recorded = if known {
            Recorded::Again
        } else {
            let at = self.count.fetch_add(1, Ordering::Relaxed);
            match self.pages.get(at) {
                Some(place) => {
                    place.store(page, Ordering::Relaxed);
                    Recorded::New
                }
                None => Recorded::NoPlace,
            }
        };
        self.tell(losses);
        recorded
    }

    /// Records that all of it is gone, before zeros are put in its place.
    pub fn lose_all(&self, losses: &AtomicU64) {
        self.whole.store(true, Ordering::Relaxed);
        self.tell(losses);
    }

    /// Each thread that finds it gone counts, not the first alone, which may stand still between its two
    /// stores while the others go on.
    fn tell(&self, losses: &AtomicU64) {
        self.lost.store(true, Ordering::Relaxed);
        // Pairs with the acquire load of `losses`.
        losses.fetch_add(1, Ordering::Release);
    }

    /// How many pages were recorded one by one.
    pub fn pages_lost(&self) -> usize {
        self.count.load(Ordering::Relaxed).min(MOST_PAGES)
    }

    /// Calls `each` with the start and the length of each part that is gone.
    pub fn each_lost(&self, mut each: impl FnMut(usize, usize)) {
        let Some((base, len)) = self.get() else {
            return;
        };
        if self.whole.load(Ordering::Relaxed) {
            return each(base, len);
        }
        let size = self.page.load(Ordering::Relaxed);
        let pages = self.pages.iter().map(|page| page.load(Ordering::Relaxed));
        pages
            .filter(|page| *page != 0)
            .for_each(|page| each(page, size));
    }
}
