//! An image's size as time goes on.

use std::io::{self, Seek, SeekFrom};

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

use super::{Image, ImageKind};

impl Image {
    /// How many bytes it has by now; [`Image::size_bytes`] is how many it had when it was opened.
    ///
    /// # Errors
    ///
    /// The file or device does not say.
    pub fn current_size_bytes(&self) -> io::Result<u64> {
        match self.kind {
            ImageKind::Null => Ok(self.size_bytes),
            ImageKind::File => Ok(self.file.metadata()?.len()),
            // The position is nobody's: all I/O says where it goes.
            ImageKind::BlockDevice => (&self.file).seek(SeekFrom::End(0)),
        }
    }

    /// Makes a regular file `size_bytes` long if it is shorter. It stays sparse, but for its last block.
    ///
    /// ftruncate(2) sets a length, and so cuts off what another process has written behind it meanwhile. The call may
    /// wait in the kernel for a long time. fallocate(2) in its default mode only extends, looks at the length when the
    /// file is its own, and leaves what is written as it is; its price is the room of one block. A file system that
    /// cannot do that, or is full, gets ftruncate: there the image's lock alone keeps other processes away.
    ///
    /// # Errors
    ///
    /// The file system refuses, or the limit of a file's size does (RLIMIT_FSIZE).
    pub fn extend_to(&self, size_bytes: u64) -> io::Result<()> {
        let Some(last) = size_bytes.checked_sub(1) else {
            return Ok(());
        };
        loop {
            match fallocate(&self.file, FallocateFlags::empty(), last, 1) {
                Ok(()) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NOSPC | Errno::DQUOT) => break,
                Err(errno) => return Err(errno.into()),
            }
        }
        if self.current_size_bytes()? < size_bytes {
            self.file.set_len(size_bytes)?;
        }
        Ok(())
    }
}
