//! Looking ahead: what the next chains consist of was written by another CPU, and each line of it
//! takes as long to come as the rest of a request takes to be served. A descriptor names a table, a
//! table names a header, so a chain's lines are asked for in three steps, while the chains before it
//! are at work.
//!
//! Nothing that is seen here is used: whoever parses the chain reads all of it again and checks it.

use std::sync::atomic::Ordering;

use super::Ring;
use crate::virtio::abi::{self, DESC_INDIRECT, DESCRIPTOR_BYTES, Descriptor, HEADER_BYTES};

impl Ring {
    /// Asks for the line of the available index, which [`Ring::available`] is going to look at.
    #[inline]
    pub fn fetch_available(&self) {
        abi::fetch(self.parts.avail.cast());
    }

    /// The head of the chain that comes `after` so many others, if it was seen already.
    #[inline]
    fn head_after(&self, after: u16) -> Option<u16> {
        if after >= self.seen_avail.wrapping_sub(self.next_avail) {
            return None;
        }
        let entry = usize::from(self.next_avail.wrapping_add(after) & self.mask);
        let head = u16::from_le(self.avail_field(2 + entry).load(Ordering::Relaxed));
        (head < self.setup.size).then_some(head)
    }

    /// First step: asks for the descriptor.
    #[inline]
    pub fn fetch_descriptor(&self, after: u16) {
        if let Some(head) = self.head_after(after) {
            // SAFETY: `head_after` gives heads of the table, whose `size` descriptors are mapped.
            // Unsafe because they are in the guest's memory.
            abi::fetch(unsafe { self.parts.desc.add(usize::from(head) * 16) });
        }
    }

    /// Second step: asks for what the descriptor names, a table or a header.
    #[inline]
    pub fn fetch_table(&mut self, after: u16) {
        let Some(head) = self.head_after(after) else {
            return;
        };
        let first = self.descriptor(head);
        let bytes = u64::from(DESCRIPTOR_BYTES);
        let found = self
            .memory
            .host_near(&mut self.meta_region, first.addr, bytes);
        match found {
            Some(table) if first.flags & DESC_INDIRECT != 0 => abi::fetch(table),
            Some(header) => abi::fetch_to_write(header),
            None => {}
        }
    }

    /// Third step: asks for the header that the table names.
    #[inline]
    pub fn fetch_header(&mut self, after: u16) {
        let Some(head) = self.head_after(after) else {
            return;
        };
        let first = self.descriptor(head);
        if first.flags & DESC_INDIRECT == 0 {
            return;
        }
        let bytes = u64::from(DESCRIPTOR_BYTES);
        let table = self
            .memory
            .host_near(&mut self.meta_region, first.addr, bytes);
        let Some(table) = table else { return };
        // SAFETY: sixteen bytes there are mapped. Unsafe because they are in the guest's memory.
        let first = Descriptor::from_words(unsafe { abi::read_words(table) });
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
