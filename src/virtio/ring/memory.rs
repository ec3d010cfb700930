//! A ring and the memory table it lies in: front ends change the one under the other, and files that
//! guests' memory is made of can become shorter.

use std::sync::Arc;

use super::{Parts, Ring, RingError, prefetch};
use crate::virtio::memory::{MemoryTable, Region};

impl Ring {
    /// Goes over to another memory table. On an error the ring stays as it was, on the old one.
    ///
    /// # Panics
    ///
    /// If a chain is in flight: its buffers were translated with the old table.
    pub fn set_memory(&mut self, memory: Arc<MemoryTable>) -> Result<(), RingError> {
        assert_eq!(
            self.in_flight, 0,
            "the memory changed under requests in flight"
        );
        self.parts = Parts::find(&self.setup, &memory)?;
        self.ahead = prefetch::Ahead::new(self.parts.desc);
        self.memory = memory;
        self.meta_region = Region::NONE;
        self.data_region = Region::NONE;
        Ok(())
    }

    /// Whether any of its memory was taken away; see [`crate::sys::sigbus`].
    pub fn is_memory_lost(&self) -> bool {
        self.memory.is_lost()
    }
}
