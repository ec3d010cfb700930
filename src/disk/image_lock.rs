//! Whether the disk is in use, for the lock of its image.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::config::{ImageSource, LockWhen};
use crate::error::StartError;
use crate::image::lock::{lock_beside, lock_image, unlock};

use super::Disk;

/// How many rings run of a disk whose image is locked while one does.
#[derive(Debug, Default)]
pub(super) struct Usage {
    rings: Mutex<u16>,
    /// Another process has the image as well, and leaves it to us.
    beside: AtomicBool,
}

impl Disk {
    /// One more ring is to run: the first locks the image, if it is not locked all the time.
    ///
    /// # Errors
    ///
    /// Somebody else has the image; the ring must not run.
    pub fn use_image(&self) -> Result<(), StartError> {
        let Some(path) = self.path_to_lock() else {
            return Ok(());
        };
        // Held while the lock is waited for: the rings of one disk are started by one thread.
        let mut rings = self
            .usage
            .rings
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if *rings == 0 {
            match self.usage.beside.load(Ordering::Relaxed) {
                true => lock_beside(&self.image.file, path, &self.config)?,
                false => lock_image(&self.image.file, path, &self.config)?,
            }
        }
        *rings += 1;
        Ok(())
    }

    /// Whether another process has the image as well, and is about to leave it to us.
    pub fn set_beside(&self, beside: bool) {
        self.usage.beside.store(beside, Ordering::Relaxed);
    }

    /// A ring for which [`Self::use_image`] was called has ended: the last unlocks the image. What was
    /// written is durable or not as ever; another process on this host sees it all the same.
    pub fn leave_image(&self) {
        if self.path_to_lock().is_none() {
            return;
        }
        let mut rings = self
            .usage
            .rings
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *rings -= 1;
        if *rings == 0 {
            unlock(&self.image.file);
        }
    }

    /// The path of an image that is locked while rings run.
    fn path_to_lock(&self) -> Option<&Path> {
        match (&self.config.image, self.config.lock) {
            (ImageSource::File { path }, LockWhen::InUse) => Some(path),
            _ => None,
        }
    }
}
