//! Whether the image is in use, for its lock.
//!
//! What uses an image may still write to it: a ring that runs, and a call that makes the file longer. Such a call may wait
//! in the kernel for as long as the storage does not answer, longer than the process lives. No other process is to have
//! the image before it has returned.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::config::{ImageSource, LockWhen};
use crate::error::StartError;
use crate::image::lock::{lock_beside, lock_image, lock_image_now, unlock};

use super::{Disk, ResizeError};

/// What uses the image.
#[derive(Debug, Default)]
pub(super) struct Usage {
    users: Mutex<Users>,
    /// Another process has the image as well, and leaves it to us.
    beside: AtomicBool,
}

#[derive(Debug, Default)]
struct Users {
    /// Rings that run. Counted only where the image is locked while one does.
    rings: u16,
    /// The file is being made longer.
    extends: bool,
    /// The process gives the image up, and changes its size no more.
    given_up: bool,
}

impl Usage {
    fn lock(&self) -> MutexGuard<'_, Users> {
        // Each change is one store, so a poisoned lock still guards a whole value.
        self.users.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Disk {
    /// One more ring is to run: the first locks the image, if it is not locked all the time.
    ///
    /// # Errors
    ///
    /// Another process has the image; the ring must not run.
    pub fn use_image(&self) -> Result<(), StartError> {
        let Some(path) = self.path_to_lock() else {
            return Ok(());
        };
        // Held while the lock is waited for: the rings of one disk are started by one thread.
        let mut users = self.usage.lock();
        // A failure would give back the lock of an extension.
        if users.rings == 0 && !users.extends {
            match self.usage.beside.load(Ordering::Relaxed) {
                true => lock_beside(&self.image.file, path, &self.config)?,
                false => lock_image(&self.image.file, path, &self.config)?,
            }
        }
        users.rings += 1;
        Ok(())
    }

    /// Whether another process has the image as well, and is about to leave it to us.
    pub fn set_beside(&self, beside: bool) {
        self.usage.beside.store(beside, Ordering::Relaxed);
    }

    /// A ring for which [`Self::use_image`] was called has ended: the last use unlocks the image. What was
    /// written is durable or not as ever; another process on this host sees it all the same.
    pub fn leave_image(&self) {
        if self.path_to_lock().is_none() {
            return;
        }
        let mut users = self.usage.lock();
        users.rings -= 1;
        if users.rings == 0 && !users.extends {
            unlock(&self.image.file);
        }
    }

    /// The file is to be made longer, which is a use of the image until the value is dropped. There is one at a time
    /// ([`Disk::begin_resize`]).
    ///
    /// # Errors
    ///
    /// Another process has the image, or this one has given it up.
    pub(super) fn begin_extension(&self) -> Result<Extension<'_>, ResizeError> {
        let mut users = self.usage.lock();
        if users.given_up {
            return Err(ResizeError::Ending);
        }
        if let Some(path) = self.path_to_lock()
            && users.rings == 0
        {
            lock_image_now(&self.image.file, path, &self.config).map_err(ResizeError::InUse)?;
        }
        users.extends = true;
        Ok(Extension(self))
    }

    /// Gives the image up, which no ring uses any more. It stays locked if the kernel is still making it longer: until that
    /// has ended, or the process has, which is not before.
    pub(super) fn give_up_image(&self) {
        let mut users = self.usage.lock();
        users.given_up = true;
        if users.extends {
            log::warn!(
                disk = self.id.0; "disk {}: the image stays locked until its storage has answered and the change of its \
                 size has ended",
                self.config.serial
            );
        } else {
            unlock(&self.image.file);
        }
    }

    /// The path of an image that is locked while it is used.
    fn path_to_lock(&self) -> Option<&Path> {
        match (&self.config.image, self.config.lock) {
            (ImageSource::File { path }, LockWhen::InUse) => Some(path),
            _ => None,
        }
    }
}

/// The file is being made longer.
#[derive(Debug)]
pub(super) struct Extension<'a>(&'a Disk);

impl Drop for Extension<'_> {
    fn drop(&mut self) {
        let disk = self.0;
        let mut users = disk.usage.lock();
        users.extends = false;
        let unused = users.rings == 0 && disk.path_to_lock().is_some();
        if users.given_up || unused {
            unlock(&disk.image.file);
        }
    }
}
