//! For tests that look at a ring behind its driver's back, or break it.

use super::super::memory::GuestMemory;
use super::{DESC, Queue, RawDesc, STATUS_UNWRITTEN, Slot, store_desc};
use std::sync::atomic::Ordering;

impl Queue {
    /// The used index as the device last published it.
    pub fn device_used_idx(&self) -> u16 {
        self.used.load_u16(2, Ordering::Acquire)
    }

    /// The avail index the driver will publish next.
    pub fn avail_idx(&self) -> u16 {
        self.avail_idx
    }

    /// Entry `index` of the used ring: head and length.
    pub fn used_entry(&self, index: u16) -> (u32, u32) {
        let entry = 4 + 8 * usize::from(index & self.mask);
        let id = self.used.load_u32(entry, Ordering::Relaxed);
        (id, self.used.load_u32(entry + 4, Ordering::Relaxed))
    }

    /// Writes descriptor `index` of the ring's own table, whatever the driver uses it for.
    pub fn poke_desc(&mut self, index: u16, desc: RawDesc) {
        store_desc(&self.desc, usize::from(index) * DESC, desc);
    }

    /// Puts `head` into the next entry of the avail ring; the driver does not expect it back unless `expect` says so.
    pub fn poke_head(&mut self, head: u16, expect: Option<(u64, u64)>) {
        if let Some((token, status)) = expect {
            self.mem.fill(status, 1, STATUS_UNWRITTEN);
            self.state[usize::from(head)] = Slot {
                token,
                status,
                last: head,
                descriptors: 0,
                in_flight: true,
            };
        }
        let entry = 4 + 2 * usize::from(self.avail_idx & self.mask);
        self.avail.store_u16(entry, head, Ordering::Relaxed);
        self.avail_idx = self.avail_idx.wrapping_add(1);
    }

    /// Publishes any avail index.
    pub fn poke_avail_idx(&mut self, index: u16) {
        self.avail.store_u16(2, index, Ordering::Release);
    }

    /// Sets avail.flags.
    pub fn poke_avail_flags(&mut self, flags: u16) {
        self.avail.store_u16(0, flags, Ordering::SeqCst);
    }

    /// Sets used_event.
    pub fn poke_used_event(&mut self, event: u16) {
        self.avail
            .store_u16(self.used_event_at(), event, Ordering::SeqCst);
    }
}

/// Writes an indirect table of any content at `gpa`, for tests that write bad ones.
pub fn write_table(mem: &GuestMemory, gpa: u64, table: &[RawDesc]) {
    for (index, desc) in table.iter().enumerate() {
        let mut bytes = [0; DESC];
        bytes[..8].copy_from_slice(&desc.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&desc.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&desc.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&desc.next.to_le_bytes());
        mem.write(gpa + (index * DESC) as u64, &bytes);
    }
}
