//! How bits of the dirty log are set.

use crate::atomic::{AtomicU8, Ordering};

/// Sets the bits from `first` to `last`, inclusive; `byte` gives the byte at a place.
#[inline]
pub(super) fn mark<'a>(byte: impl Fn(u64) -> &'a AtomicU8, first: u64, last: u64) {
    let mut page = first;
    while page <= last {
        let upto = last.min(page | 7);
        let mask = (0xff << (page % 8)) & (0xff >> (7 - upto % 8));
        // A plain "is it marked already?" would not do: only a full barrier keeps our look at the
        // bit behind the write of the page. Pairs with the front end's exchange, after which it
        // reads the page.
        byte(page / 8).fetch_or(mask, Ordering::SeqCst);
        page = upto + 1;
    }
}
