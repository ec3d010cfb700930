//! From slots to submission entries.

use super::{Engine, KIND_SLOT, user_data};

impl Engine {
    /// Prepares the slot's next step; false if the ring takes none now.
    #[inline]
    pub(super) fn send(&mut self, index: u16) -> bool {
        let slot = &mut self.slots[usize::from(index)];
        let disk = self
            .disks
            .get(slot.disk)
            .expect("a disk with requests in flight stays");
        let entry = slot
            .sqe(disk, self.memory.extents(index), self.memory.zeroes())
            .user_data(user_data(KIND_SLOT, u32::from(slot.generation), index));
        // SAFETY: the entry names the caller's buffers, which `queue_rq`'s caller keeps valid until
        // the slot is done, the slot's own memory, which goes after the ring is drained, or a static.
        // Unsafe because the kernel works on addresses.
        let sent = unsafe { self.ring.push(&entry, &mut self.counters) };
        if sent {
            // Queued, not submitted: the kernel has not begun.
            slot.sent(disk, self.memory.extents(index));
        }
        sent
    }

    /// Tries again what the ring had no room for.
    #[inline]
    pub(super) fn resend(&mut self) {
        while let Some(&index) = self.unsent.last() {
            if !self.send(index) {
                return;
            }
            self.unsent.pop();
        }
        if self.unsent_fds {
            self.resend_fds();
        }
    }
}
