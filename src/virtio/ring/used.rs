//! The used ring: chains go back to the guest (virtio 1.3, section 2.7.8).

use std::ptr::NonNull;
use std::sync::atomic::Ordering;

use super::{NO_HEAD, Ring};
use crate::virtio::inflight::kill_point;
use crate::virtio::receipt::Used;

impl Ring {
    /// Writes a used element; [`Ring::publish`] shows it to the guest.
    #[inline]
    pub fn put_used(&mut self, used: Used) {
        self.release(used.head());
        if let Some(tracker) = &mut self.tracker {
            tracker.put(used.head());
        }
        let element = self.next_element();
        kill_point();
        // SAFETY: `next_element` gives two fields that are mapped and aligned. Unsafe because the ring is the
        // guest's memory.
        unsafe {
            element.write_volatile(u32::from(used.head()).to_le());
            element.add(1).write_volatile(used.len().to_le());
        }
        self.next_used = self.next_used.wrapping_add(1);
    }

    /// Shows the guest all that was put since the last time. False: there was nothing.
    #[inline]
    pub fn publish(&mut self) -> bool {
        let (old, new) = (self.published, self.next_used);
        if old == new {
            return false;
        }
        if let Some(tracker) = &self.tracker {
            tracker.publishes();
        }
        kill_point();
        // Release pairs with the driver's read barrier after it has read the index (section
        // 2.7.14): the elements and all data are visible before it.
        self.used_field(1).store(new.to_le(), Ordering::Release);
        if let Some(tracker) = &self.tracker {
            tracker.published(new.wrapping_sub(old), new);
        }
        if self.log.is_some() {
            self.log_published(old, new);
        }
        self.published = new;
        self.used_before = true;
        if new.wrapping_sub(self.decided) < new.wrapping_sub(old) {
            self.must_call = true;
        }
        true
    }

    /// The two 32-bit fields of the used element that is put next.
    #[inline]
    pub(super) fn next_element(&self) -> NonNull<u32> {
        let entry = usize::from(self.next_used & self.mask);
        // SAFETY: the used ring has `size` elements of two 32-bit fields, four bytes after its
        // start, `Parts::find` checked that they are mapped and aligned to four bytes, and `entry`
        // is below the size. Unsafe because the compiler knows nothing of that.
        unsafe { self.parts.used.add(2).cast::<u32>().add(2 * entry) }
    }

    /// The head is the guest's again.
    #[inline]
    pub(super) fn release(&mut self, head: u16) {
        let (word, bit) = (usize::from(head / 64), 1 << (head % 64));
        assert!(
            self.in_flight_heads[word] & bit != 0,
            "head {head} is not in flight"
        );
        self.in_flight_heads[word] &= !bit;
        self.in_flight -= 1;
        self.last_head = NO_HEAD;
    }
}
