//! A disk that grew, on one worker.

use std::io;

use crate::mq::ids::{DiskId, Sector};

use super::Worker;

impl Worker {
    /// Takes requests up to `size_bytes` of the disk from now on. Nothing has to be at rest for that:
    /// a request is checked against the size once, when it comes.
    pub(super) fn resize(&mut self, disk: DiskId, size_bytes: u64) -> io::Result<()> {
        let slot = self.slots[disk.index()].expect("a disk that was added");
        // The engine first: what passes the parser is inside the engine's disk.
        self.engine.resize_disk(slot, size_bytes)?;
        let known = self.disks[disk.index()].as_mut();
        known.expect("a disk that was added").shape.capacity = Sector::of_bytes(size_bytes);
        Ok(())
    }
}
