//! An image's size as time goes on.

use std::io::{self, Seek, SeekFrom};

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
}
