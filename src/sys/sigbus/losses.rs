//! What one thread knows of lost memory: so much that it can tell whether a transfer used it.

use super::{TABLE, USED_SLOTS, losses};
use crate::atomic::Ordering;

/// The parts of all buffers in the process ([`super::Guarded::buffers`]) that are lost at present, as one
/// thread saw them last.
///
/// The kernel does not know of a loss once zeros are in the place of a page: it reads the zeros, and says
/// that all went well. So whoever gave it the address asks here afterwards.
#[derive(Debug, Default)]
pub struct Losses {
    seen: u64,
    /// Start and end, by start, apart from each other.
    parts: Vec<(usize, usize)>,
}

impl Losses {
    /// Whether any memory is lost at present. One load and a comparison when nothing has changed.
    ///
    /// Zeros that were read before this call were counted before it.
    #[inline]
    pub fn are_any(&mut self) -> bool {
        if losses() != self.seen {
            self.look();
        }
        !self.parts.is_empty()
    }

    #[cold]
    fn look(&mut self) {
        // First, so that what is lost meanwhile makes for another look.
        self.seen = losses();
        self.parts.clear();
        let used = USED_SLOTS.load(Ordering::Acquire);
        for slot in &TABLE[..used] {
            if slot.lost.load(Ordering::Relaxed) && slot.buffers.load(Ordering::Relaxed) {
                slot.each_lost(|base, len| self.parts.push((base, base.saturating_add(len))));
            }
        }
        self.parts.sort_unstable();
        self.parts.dedup_by(|next, part| {
            let meets = next.0 <= part.1;
            if meets {
                part.1 = part.1.max(next.1);
            }
            meets
        });
    }

    /// Whether any of the `len` bytes at `base` was lost when [`Self::are_any`] was asked last.
    pub fn have(&self, base: usize, len: usize) -> bool {
        let end = base.saturating_add(len);
        let at = self.parts.partition_point(|part| part.1 <= base);
        self.parts.get(at).is_some_and(|part| part.0 < end)
    }
}
