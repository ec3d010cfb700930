//! Who wakes whom: calls to the guest, kicks from it (virtio 1.3, sections 2.7.7 and 2.7.10).

use std::mem;
use std::sync::atomic::{Ordering, fence};

use super::Ring;
use crate::virtio::abi::{AVAIL_NO_INTERRUPT, USED_NO_NOTIFY};

impl Ring {
    /// Decides whether what was published since the last decision needs a call (section 2.7.7).
    /// The first decision of a ring that was served before is yes: whoever did may have died
    /// between publishing and calling.
    #[inline]
    pub fn should_call(&mut self) -> bool {
        let (old, new) = (self.decided, self.published);
        let must_call = mem::take(&mut self.must_call);
        if old == new && !must_call {
            return false;
        }
        self.decided = new;
        // Orders our used index before our look at the driver's wish. Its partner is the full
        // barrier in the driver between that wish and its second look at the used index (section
        // 2.7.14; virtqueue_enable_cb in drivers/virtio/virtio_ring.c): one of us sees the other.
        fence(Ordering::SeqCst);
        if self.setup.event_idx {
            let event = self.avail_field(2 + usize::from(self.setup.size));
            let event = u16::from_le(event.load(Ordering::Relaxed));
            must_call || need_event(event, new, old)
        } else {
            let flags = u16::from_le(self.avail_field(0).load(Ordering::Relaxed));
            flags & AVAIL_NO_INTERRUPT == 0
        }
    }

    /// How many published elements no decision was made about.
    #[inline]
    pub fn not_called_for(&self) -> u16 {
        self.published.wrapping_sub(self.decided)
    }

    /// Makes the next [`Ring::should_call`] say yes if anything was ever used: whoever waits for calls
    /// has been replaced, and the new one was told nothing yet.
    pub fn request_call(&mut self) {
        self.must_call = self.used_before;
    }

    /// Asks the driver not to kick. With EVENT_IDX there is nothing to write: the driver kicks
    /// only when it passes the index of the last [`Ring::arm_kicks`].
    #[inline]
    pub fn suppress_kicks(&mut self) {
        if !self.setup.event_idx {
            self.used_field(0)
                .store(USED_NO_NOTIFY.to_le(), Ordering::Relaxed);
            if self.log.is_some() {
                self.log_wish(0);
            }
        }
    }

    /// Asks the driver to kick at the next chain. True: one has become available since
    /// [`Ring::available`] looked last, and its kick may not come, so look again.
    #[inline]
    pub fn arm_kicks(&mut self) -> bool {
        let (field, wish) = if self.setup.event_idx {
            (2 + 4 * usize::from(self.setup.size), self.seen_avail)
        } else {
            (0, 0)
        };
        self.used_field(field)
            .store(wish.to_le(), Ordering::Relaxed);
        if self.log.is_some() {
            self.log_wish(field);
        }
        // Orders our wish before our second look. Its partner is the full barrier in the driver
        // between its available index and its look at our wish (section 2.7.13.4;
        // virtqueue_kick_prepare in drivers/virtio/virtio_ring.c): one of us sees the other.
        fence(Ordering::SeqCst);
        u16::from_le(self.avail_field(1).load(Ordering::Relaxed)) != self.seen_avail
    }
}

/// Whether an index that went from `old` to `new` has passed `event` (section 2.7.7.2).
#[inline]
pub(super) fn need_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}
