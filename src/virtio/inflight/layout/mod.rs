//! Where the records are in a region, and how a region of this program is told from others.
//!
//! A region that this program makes:
//!
//! ```text
//! placeholders   a record for each queue, of the size that the front end says, with version 2
//! records        at a multiple of 64 KiB: one for each queue, with MAX_RING_SIZE entries
//! mark           magic with the version   entries of a placeholder   six words that are 0
//! notes          see notes.rs
//! ```
//!
//! The last release (bb5a7f7) takes the size that the front end says for the size of the records. Started in
//! the place of this program, it finds the placeholders, knows no version 2, and starts no ring. Without them it
//! would find records where there are none: chains are answered twice, or not at all. A ring that is larger than the
//! front end says is outside of what they can do: the last release serves it without any record.
//!
//! A take-over names the records themselves, with their size, and not what stands before them. So the last
//! release finds them, and the process that takes over from it again as well: the mark stands behind the records, at
//! the same distance. Every page begins at a multiple of 64 KiB, and the file is a memfd with pages of the usual
//! size. A copy of it in larger ones could not be mapped there; then the take-over fails, and the old process serves on.
//!
//! The last release takes a placeholder for a record in one case: the device is reset, and it forgets all
//! records. So a region one of whose placeholders is gone is one of the last release, whatever stands behind them.
//!
//! A region without a mark is of another program, or of the last release: records of the size that the front end
//! says, and nothing else.

use std::sync::atomic::{AtomicU16, Ordering};

use super::mapping::Mapping;
use super::{ENTRY_BYTES, HEADER_BYTES, QUEUE_ALIGN, at};
use crate::mq::limits::MAX_RING_SIZE;

/// Where the records of a region begin that this program makes: a multiple of this, and thereby of every page.
const RECORDS_ALIGN: usize = 64 << 10;
/// Bytes of the mark.
const MARK_BYTES: usize = 64;
/// "BLKMQ", "R", and 1 for the version of the layout.
const MAGIC: u64 = u64::from_be_bytes(*b"BLKMQ\0R\x01");
/// The version of a placeholder: one that no record has.
const PLACEHOLDER: u16 = 2;

/// Bytes of the record of a queue with `size` descriptors, up to where the next one begins.
pub(super) fn queue_bytes(size: u16) -> usize {
    (HEADER_BYTES + usize::from(size) * ENTRY_BYTES).next_multiple_of(QUEUE_ALIGN)
}

/// Bytes of the records of `queues` queues of up to `queue_size` descriptors: the least that a region can
/// have.
pub fn records_bytes(queues: u16, queue_size: u16) -> usize {
    usize::from(queues) * queue_bytes(queue_size)
}

/// Where the records for `queues` queues begin in a region that this program makes.
pub fn records_at(queues: u16) -> usize {
    // As far for every size, so that the mark is found by the number of queues alone.
    records_bytes(queues, MAX_RING_SIZE).next_multiple_of(RECORDS_ALIGN)
}

/// Bytes of the notes.
pub(super) const NOTES_BYTES: usize = 128;

/// Bytes of a region for `queues` queues that this program makes.
pub fn region_bytes(queues: u16) -> usize {
    records_at(queues) + own_bytes(queues)
}

/// Bytes of what stands behind the placeholders.
fn own_bytes(queues: u16) -> usize {
    records_bytes(queues, MAX_RING_SIZE) + MARK_BYTES + NOTES_BYTES
}

/// Where notes begin in a region of this program whose records begin at `at`.
pub(super) fn notes_at(at: usize, queues: u16) -> usize {
    at + records_bytes(queues, MAX_RING_SIZE) + MARK_BYTES
}

/// Where things are in a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    /// Where the records begin.
    pub(super) at: usize,
    /// Entries of a record.
    pub(super) queue_size: u16,
    /// This program made it: there is room for notes.
    pub(super) ours: bool,
}

impl Layout {
    /// Of a region of which `used` bytes are mapped, for `queues` queues of `queue_size`, as its front end says.
    pub(super) fn find(mapping: &Mapping, used: usize, queues: u16, queue_size: u16) -> Layout {
        let ours = |at| Layout {
            at,
            queue_size: MAX_RING_SIZE,
            ours: true,
        };
        let another = Layout {
            at: 0,
            queue_size,
            ours: false,
        };
        let at = records_at(queues);
        if used >= region_bytes(queues)
            && let Some(said) = read_mark(mapping, at, queues)
        {
            let versions = (0..queues).map(|index| version(mapping, index, said));
            let placeholders =
                versions.filter(|version| version.load(Ordering::Acquire) == PLACEHOLDER);
            if placeholders.clone().count() == usize::from(queues) {
                return ours(at);
            }
            // It may have ended before it had forgotten the others.
            if said == queue_size {
                placeholders.for_each(|version| version.store(0, Ordering::Release));
            }
            return another;
        }
        if used >= own_bytes(queues) && read_mark(mapping, 0, queues).is_some() {
            return ours(0);
        }
        another
    }
}

/// Makes a region for `queues` queues of all zeros, with placeholders for queues of `queue_size`.
pub(super) fn lay_out(mapping: &Mapping, queues: u16, queue_size: u16) {
    for index in 0..queues {
        version(mapping, index, queue_size).store(PLACEHOLDER, Ordering::Relaxed);
    }
    let mark = mark_at(records_at(queues), queues);
    let said = u64::from(queue_size);
    mapping.word(mark + 8).store(said, Ordering::Relaxed);
    mapping.word(mark).store(MAGIC, Ordering::Release);
}

/// The version of the record of queue `index` among those with `queue_size` entries at the region's beginning.
fn version(mapping: &Mapping, index: u16, queue_size: u16) -> &AtomicU16 {
    mapping.half(records_bytes(index, queue_size) + at::VERSION)
}

fn mark_at(at: usize, queues: u16) -> usize {
    at + records_bytes(queues, MAX_RING_SIZE)
}

/// The entries of a placeholder, as the mark behind the records at `at` says; `None` if there is no mark.
fn read_mark(mapping: &Mapping, at: usize, queues: u16) -> Option<u16> {
    let mark = mark_at(at, queues);
    let magic = mapping.word(mark).load(Ordering::Acquire);
    let said = mapping.word(mark + 8).load(Ordering::Relaxed);
    // The front end can write here: no placeholder reaches into the records.
    u16::try_from(said)
        .ok()
        .filter(|said| magic == MAGIC && (1..=MAX_RING_SIZE).contains(said))
}

#[cfg(test)]
mod tests;
