//! Looking ahead: what the next chains consist of was written by another CPU, and each line of it
//! takes as long to come as the rest of a request takes to be served. A descriptor names a table, a
//! table names a header, so a chain's lines are asked for in three steps, while the chains before it
//! are at work.
//!
//! Nothing that is seen here is used: whoever parses the chain reads all of it again and checks it.

use std::ptr::NonNull;
use std::sync::atomic::Ordering;

use super::Ring;
use crate::virtio::abi::{self, DESC_INDIRECT, DESCRIPTOR_BYTES, Descriptor, HEADER_BYTES};

/// So many chains' places are remembered: one that is further ahead would take another's.
pub const AHEAD: usize = 16;

/// Where the next chains' first descriptors lie, as far as it was looked up, by the low bits of
/// the available index. All of the places are mapped, sixteen bytes each, in the ring's memory table;
/// those of chains that no step was made for are of other chains.
#[derive(Debug)]
pub(super) struct Ahead {
    firsts: [NonNull<u8>; AHEAD],
}

impl Ahead {
    /// Nothing was looked up; `table` is the ring's descriptor table.
    pub(super) fn new(table: NonNull<u8>) -> Self {
        Ahead {
            firsts: [table; AHEAD],
        }
    }

    /// The place of the chain with this available index.
    #[inline]
    fn first(&mut self, index: u16) -> &mut NonNull<u8> {
        &mut self.firsts[usize::from(index) % AHEAD]
    }
}

impl Ring {
    /// Asks for the line of the available index, which [`Ring::available`] is going to look at.
    #[inline]
    pub fn fetch_available(&self) {
        abi::fetch(self.parts.avail.cast());
    }

    /// The available index of the chain that comes `after` so many others, if it was seen already.
    #[inline]
    fn seen(&self, after: u16) -> Option<u16> {
        let is_seen = after < self.seen_avail.wrapping_sub(self.next_avail);
        is_seen.then(|| self.next_avail.wrapping_add(after))
    }

    /// First step: asks for the descriptor.
    #[inline]
    pub fn fetch_descriptor(&mut self, after: u16) {
        let Some(index) = self.seen(after) else {
            return;
        };
        let entry = usize::from(index & self.mask);
        let head = u16::from_le(self.avail_field(2 + entry).load(Ordering::Relaxed));
        if head < self.setup.size {
            // SAFETY: the table's `size` descriptors are mapped. Unsafe because they are in the
            // guest's memory.
            let descriptor = unsafe { self.parts.desc.add(usize::from(head) * 16) };
            abi::fetch(descriptor);
            *self.ahead.first(index) = descriptor;
        }
    }

    /// Second step: asks for the table that the descriptor names, if it names one.
    #[inline]
    pub fn fetch_table(&mut self, after: u16) {
        let Some(index) = self.seen(after) else {
            return;
        };
        let descriptor = *self.ahead.first(index);
        // SAFETY: [`Ahead`] has places of sixteen mapped bytes. Unsafe because they are in the
        // guest's memory.
        let first = Descriptor::from_words(unsafe { abi::read_words(descriptor) });
        if first.flags & DESC_INDIRECT == 0 {
            return;
        }
        let bytes = u64::from(DESCRIPTOR_BYTES);
        let table = self
            .memory
            .host_near(&mut self.meta_region, first.addr, bytes);
        if let Some(table) = table {
            abi::fetch(table);
            *self.ahead.first(index) = table;
        }
    }

    /// Third step: asks for the header that the chain's first descriptor names, in its table or
    /// in the ring's.
    #[inline]
    pub fn fetch_header(&mut self, after: u16) {
        let Some(index) = self.seen(after) else {
            return;
        };
        let descriptor = *self.ahead.first(index);
        // SAFETY: as in `fetch_table`. Unsafe for the same reason.
        let first = Descriptor::from_words(unsafe { abi::read_words(descriptor) });
        let bytes = u64::from(HEADER_BYTES);
        let header = self
            .memory
            .host_near(&mut self.meta_region, first.addr, bytes);
        // Its line most often holds the status byte as well.
        if let Some(header) = header {
            abi::fetch_to_write(header);
        }
    }
}
