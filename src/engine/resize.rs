//! A disk that has become larger.

use std::io;

use super::Engine;
use super::{DiskSlot, Target};

impl Engine {
    /// Takes commands up to `size_bytes` of a disk from now on. Commands in flight are not touched,
    /// so the disk need not be at rest; it must not become smaller under them.
    ///
    /// # Errors
    ///
    /// What the disk stands on cannot be reached as far as that. The disk keeps its size.
    pub fn resize_disk(&mut self, slot: DiskSlot, size_bytes: u64) -> io::Result<()> {
        let disk = self.disks.get_mut(slot.0).expect("a disk of this engine");
        assert!(
            size_bytes >= disk.target.size_bytes(),
            "a disk only grows while it is served"
        );
        match &mut disk.target {
            Target::File(file) => {
                if let Some(mapping) = &file.mapping
                    && size_bytes > mapping.reach_bytes()
                {
                    return Err(io::Error::other(format!(
                        "it is mapped up to {} bytes; end the daemon and start it again to serve more",
                        mapping.reach_bytes()
                    )));
                }
                file.size_bytes = size_bytes;
            }
            Target::Null { size_bytes: size } => *size = size_bytes,
        }
        Ok(())
    }
}
