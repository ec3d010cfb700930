//! One range in the table that the signal's handler reads: a seqlock.

use crate::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence};

/// A registered range, or a free place.
#[derive(Debug, Default)]
pub struct Slot {
    /// Odd while `base` and `len` are written.
    pub turn: AtomicU32,
    /// What was there is gone, and zeros are in its place.
    pub lost: AtomicBool,
    /// Zero when free, and then `len` is too.
    pub base: AtomicUsize,
    /// In bytes.
    pub len: AtomicUsize,
}

impl Slot {
    /// Changes the range. By one thread at a time.
    pub fn set(&self, base: usize, len: usize) {
        let turn = self.turn.load(Ordering::Relaxed);
        self.turn.store(turn.wrapping_add(1), Ordering::Relaxed);
        // Pairs with the acquire fence in `get`: who sees one of the two stores below sees the odd
        // count too, and leaves the slot out.
        fence(Ordering::Release);
        self.base.store(base, Ordering::Relaxed);
        self.len.store(len, Ordering::Relaxed);
        // Pairs with the acquire load in `get`: who sees the new count sees both.
        self.turn.store(turn.wrapping_add(2), Ordering::Release);
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

    /// Says that what was there is gone, before zeros are put in its place: who finds zeros finds the
    /// reason too. Each thread that finds it gone counts, not the first alone, which may stand still
    /// between its two stores while the others go on.
    pub fn lose(&self, losses: &AtomicU64) {
        self.lost.store(true, Ordering::Relaxed);
        // Pairs with the acquire load of `losses`.
        losses.fetch_add(1, Ordering::Release);
    }
}
