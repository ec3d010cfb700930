//! Joining requests that are neighbours on the disk.
//!
//! Only requests that are already there are looked at: the newest of the same plug, the newest few of
//! the same ctx. No request waits in order to be merged.

use super::{Fifo, Table};
use crate::mq::ids::RequestTag;
use crate::mq::merge_fit::{Fit, Merged, fit};

/// Makes the request at `tag` a part of `early`, if it fits; `None` if the two are no neighbours.
#[inline]
pub(in crate::mq) fn into_one<P>(
    table: &mut Table<P>,
    early: RequestTag,
    tag: RequestTag,
) -> Option<Merged> {
    let (entry, late) = (table.get(early), &table.get(tag).request);
    match fit(&entry.request, late, entry.started) {
        Fit::Apart => None,
        Fit::Back if late.bytes > 0 => {
            table.merge_back(early, tag);
            Some(Merged::Back)
        }
        Fit::Front if late.bytes > 0 => {
            table.merge_front(early, tag);
            Some(Merged::Front)
        }
        Fit::Back | Fit::Front | Fit::Refused => Some(Merged::No),
    }
}

/// Tries the newest requests of `list`, at most `lookback` of them, newest first. A neighbour that
/// may not be merged with ends the search (blk_mq_attempt_bio_merge does the same).
pub(in crate::mq) fn into_newest<P>(
    table: &mut Table<P>,
    list: &Fifo,
    tag: RequestTag,
    lookback: usize,
) -> Merged {
    let Some(mut early) = list.back() else {
        return Merged::No;
    };
    for _ in 0..lookback.min(usize::from(list.len())) {
        if let Some(merged) = into_one(table, early, tag) {
            return merged;
        }
        early = table.older(early);
    }
    Merged::No
}
