//! From slots to submission entries.

use super::{Engine, KIND_SLOT, user_data};

impl Engine {
    /// Whether the kernel has refused to be entered again and again. Then nothing arrives here, messages neither.
    pub fn is_refused(&self) -> bool {
        self.ring.is_refused()
    }

    /// Prepares the slot's next step; false if the ring takes none now.
    #[inline]
    pub(super) fn send(&mut self, index: u16) -> bool {
        let slot = &mut self.slots[usize::from(index)];
        if slot.wants_bounce {
            let Some(bounce) = self.memory.take_bounce() else {
                return false;
            };
            slot.wants_bounce = false;
            slot.bounce = Some(bounce);
            self.counters.bounced += 1;
        }
        let disk = self
            .disks
            .get(slot.disk)
            .expect("a disk with requests in flight stays");
        let entry = slot
            .sqe(disk, self.memory.extents(index), self.memory.zeroes())
            .user_data(user_data(KIND_SLOT, u32::from(slot.generation), index));
        let polled = match &mut self.polled {
            Some(polled) if slot.goes_polled() => Some(polled),
            _ => None,
        };
        // SAFETY: the entry names the caller's buffers, which `queue_rq`'s caller keeps valid until
        // the slot is done, the slot's own memory, which goes after the ring is drained, or a static.
        // Unsafe because the kernel works on addresses.
        let sent = unsafe {
            match polled {
                Some(polled) => {
                    let sent = polled.ring.push(&entry, &mut self.counters);
                    polled.in_flight += u32::from(sent);
                    self.counters.polled += u64::from(sent);
                    sent
                }
                None => self.ring.push(&entry, &mut self.counters),
            }
        };
        if sent {
            // Queued, not submitted: the kernel has not begun.
            slot.sent(disk, self.memory.extents(index));
        }
        sent
    }

    /// Tries again what the ring had no room for.
    #[inline]
    pub(super) fn resend(&mut self) {
        // All are tried: one may wait for a bounce buffer that another one holds.
        let mut at = 0;
        while at < self.unsent.len() {
            if self.send(self.unsent[at]) {
                self.unsent.swap_remove(at);
            } else {
                at += 1;
            }
        }
        if self.unsent_fds {
            self.resend_fds();
        }
    }
}
