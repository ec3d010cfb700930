//! Whether a driver begins with a ring, or goes on with it.

use super::RingSetup;
use crate::virtio::memory::MemoryTable;

impl RingSetup {
    /// Whether a device has served the ring since its driver made it, as far as the ring tells.
    ///
    /// A driver begins at index 0, with a used ring that holds zeroes. Indices come back to 0 after 65536
    /// requests. By then the last used element has been written, with a length that counts the status byte
    /// and so is not 0.
    pub fn has_history(&self, memory: &MemoryTable) -> bool {
        // A ring that is not in memory does not start, so nothing depends on the answer then.
        let is_set = |offset: u64, bytes: usize| {
            let mut field = [0; 4];
            self.used
                .checked_add(offset)
                .is_some_and(|gpa| memory.read(gpa, &mut field[..bytes]))
                && field != [0; 4]
        };
        let last_element = 4 + 8 * u64::from(self.size.saturating_sub(1));
        self.next_avail != 0 || is_set(2, 2) || is_set(last_element + 4, 4)
    }
}

#[cfg(test)]
mod tests {
    use crate::virtio::testing::{Guest, USED};

    #[test]
    fn a_ring_tells_whether_it_was_served() {
        for size in [1, 4, 256] {
            let mut guest = Guest::new(size);
            assert!(!guest.setup.has_history(&guest.table));
            guest.set(USED + 2, 1);
            assert!(guest.setup.has_history(&guest.table), "by its used index");
            guest.set(USED + 2, 0);
            guest.setup.next_avail = 1;
            assert!(guest.setup.has_history(&guest.table), "by its base");
            guest.setup.next_avail = 0;
            // 65536 requests were served, the last one with a status byte alone.
            guest.set(USED + 4 + 8 * u64::from(size - 1) + 4, 1);
            assert!(guest.setup.has_history(&guest.table), "by its last element");
        }
    }

    #[test]
    fn a_ring_outside_memory_has_no_history() {
        let mut guest = Guest::new(4);
        for used in [0x1_0000, u64::MAX - 8] {
            guest.setup.used = used;
            assert!(!guest.setup.has_history(&guest.table));
        }
    }
}
