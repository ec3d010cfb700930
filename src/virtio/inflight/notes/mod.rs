//! What a guest was told by the process that it started with, and what it chose: kept behind the queues'
//! records, in a region that this program made, for the process after this one.
//!
//! The front end keeps the region for as long as the driver goes on, and drops it when the driver begins
//! anew. So what stands here is of the driver that runs, which reads and chooses nothing again when its
//! front end reconnects.
//!
//! ```text
//! two slots, each of eight words of 64 bits in the host's byte order:
//! magic with the version   generation   disk size in bytes
//! logical block size (32 bits), flags (32 bits)   three words that are 0   checksum of the seven before
//! ```
//!
//! The process may be killed between any two stores, so a change is written to the slot that does not hold
//! the newest notes, its checksum last. The valid slot of the higher generation counts. A slot that is not
//! understood (another version, another checksum) counts as empty.
//!
//! A process that does not know of notes, and takes the disk over, does not keep them up to date: they are made void
//! before ([`InflightRegion::void_notes`]). A region with room for notes and none there says that nothing is known.
//!
//! The front end can write here at any time. What it makes up is what *its* guest was told: it ends its
//! own session with it, or gives its own guest write-through.

use std::sync::atomic::{AtomicU64, Ordering};

use super::layout::{NOTES_BYTES, notes_at};
use super::{InflightRegion, kill_point};

/// Bytes of a slot.
const SLOT_BYTES: usize = WORDS * size_of::<u64>();
/// Words of a slot.
const WORDS: usize = 8;
/// There are two slots.
const _: () = assert!(2 * SLOT_BYTES == NOTES_BYTES);
/// "BLKMQ", and 1 for the version of the layout.
const MAGIC: u64 = u64::from_be_bytes(*b"BLKMQ\0\0\x01");

/// In the flags: the guest has write-through.
const WRITE_THROUGH: u32 = 1 << 0;
/// In the flags: the disk is read-only.
const READ_ONLY: u32 = 1 << 1;
/// In the flags: a ring was started.
const STARTED: u32 = 1 << 2;
/// In the flags: whether the guest chose write-through is not known.
const IN_DOUBT: u32 = 1 << 3;

/// What a guest was told of its disk, and chose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Notes {
    /// The size that the configuration space said last.
    pub size_bytes: u64,
    /// The logical block size.
    pub logical_block_size: u32,
    /// Writes are refused.
    pub read_only: bool,
    /// The guest chose write-through, or was told that the disk has it.
    pub write_through: bool,
    /// It has write-through because it is not known what it chose, until its driver begins anew.
    pub in_doubt: bool,
    /// A ring was started since the region was made.
    pub started: bool,
}

impl Notes {
    fn words(&self, generation: u64) -> [u64; WORDS] {
        let mut flags = 0;
        for (flag, bit) in [
            (self.write_through, WRITE_THROUGH),
            (self.read_only, READ_ONLY),
            (self.started, STARTED),
            (self.in_doubt, IN_DOUBT),
        ] {
            flags |= if flag { bit } else { 0 };
        }
        let mut words = [
            MAGIC,
            generation,
            self.size_bytes,
            u64::from(self.logical_block_size) | u64::from(flags) << 32,
            0,
            0,
            0,
            0,
        ];
        words[WORDS - 1] = checksum(&words);
        words
    }

    /// The notes of a slot, and their generation; `None` if it has none that are understood.
    fn of(words: &[u64; WORDS]) -> Option<(u64, Notes)> {
        if words[0] != MAGIC || words[WORDS - 1] != checksum(words) {
            return None;
        }
        let [low, high] = [words[3], words[3] >> 32]
            .map(|half| u32::try_from(half & u64::from(u32::MAX)).expect("32 bits"));
        let notes = Notes {
            size_bytes: words[2],
            logical_block_size: low,
            read_only: high & READ_ONLY != 0,
            write_through: high & WRITE_THROUGH != 0,
            in_doubt: high & IN_DOUBT != 0,
            started: high & STARTED != 0,
        };
        Some((words[1], notes))
    }
}

/// FNV-1a, word by word, over all words but the last: it tells a slot that is half written, and need not
/// withstand a front end, which can write what it likes.
fn checksum(words: &[u64; WORDS]) -> u64 {
    words[..WORDS - 1]
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |sum: u64, word| {
            (sum ^ word).wrapping_mul(0x0000_0100_0000_01b3)
        })
}

impl InflightRegion {
    /// The notes of the process before; `None` if the region has no room for them, or none that are
    /// understood.
    pub fn notes(&self) -> Option<Notes> {
        self.newest().map(|(_, _, notes)| notes)
    }

    /// Writes the notes down, if there is room for them. They count from when this returns.
    ///
    /// One thread writes at a time.
    pub fn write_notes(&self, notes: &Notes) {
        if !self.layout.ours {
            return;
        }
        let (slot, generation) = match self.newest() {
            Some((slot, generation, _)) => (1 - slot, generation.wrapping_add(1)),
            None => (0, 1),
        };
        for (index, word) in notes.words(generation).into_iter().enumerate() {
            kill_point();
            // The checksum is the last one.
            self.word(slot, index).store(word, Ordering::Release);
        }
    }

    /// Makes what was noted void: [`InflightRegion::notes`] finds none from when this returns, and never older ones
    /// than were there.
    ///
    /// Nothing else writes at the same time.
    pub fn void_notes(&self) {
        if !self.layout.ours {
            return;
        }
        // Those that do not count go first: they are never found in the place of the others.
        let newest = self.newest().map_or(1, |(slot, ..)| slot);
        for slot in [1 - newest, newest] {
            kill_point();
            self.word(slot, 0).store(0, Ordering::Release);
        }
    }

    /// The slot with the newest notes, their generation and the notes.
    fn newest(&self) -> Option<(usize, u64, Notes)> {
        if !self.layout.ours {
            return None;
        }
        let read = |slot: usize| {
            // From the checksum on, so that words which were stored before it are seen.
            let mut words = [0; WORDS];
            for index in (0..WORDS).rev() {
                words[index] = self.word(slot, index).load(Ordering::Acquire);
            }
            Notes::of(&words).map(|(generation, notes)| (slot, generation, notes))
        };
        match (read(0), read(1)) {
            // Generations that differ by more than one are made up.
            (Some(first), Some(second)) if second.1 == first.1.wrapping_add(1) => Some(second),
            (Some(first), _) => Some(first),
            (None, second) => second,
        }
    }

    fn word(&self, slot: usize, index: usize) -> &AtomicU64 {
        let notes = notes_at(self.layout.at, self.queues);
        self.mapping
            .word(notes + slot * SLOT_BYTES + index * size_of::<u64>())
    }
}

#[cfg(test)]
mod tests;
