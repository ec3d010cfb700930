//! When writes are durable: the disk's cache mode, and who may change it.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{MutexGuard, PoisonError};

use super::Disk;
use crate::daemon::device_state::DeviceState;
use crate::daemon::message::Message;
use crate::engine::Errno;
use crate::engine::disk::ImageKind;
use crate::virtio::config_space::{ConfigError, WriteCache};
use crate::virtio::features;

/// Why writes may have to be durable when they complete.
#[derive(Debug)]
pub(super) struct CacheState {
    /// The guest chose it, or the user did before. It belongs to the disk, not to a session: a guest
    /// that chose write-through still believes in it after its front end has reconnected.
    pub(super) chosen: bool,
    /// The driver that is active now can neither flush nor choose (firmware, for instance).
    pub(super) flushless: bool,
}

impl CacheState {
    fn is_write_through(&self) -> bool {
        self.chosen || self.flushless
    }
}

/// Why the cache mode did not change.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// The driver asked for something that cannot be.
    #[error(transparent)]
    Write(#[from] ConfigError),
    /// What was written before could not be made durable, which write-through would have promised.
    #[error("the guest cannot have write-through, because the image cannot be synced: {0}")]
    Sync(#[source] io::Error),
}

impl Disk {
    /// A write of the driver to the configuration space.
    ///
    /// # Errors
    ///
    /// Anything but a valid cache mode, or one that cannot be kept; the disk does not change.
    pub fn write_config(&self, offset: u32, bytes: &[u8]) -> Result<(), CacheError> {
        let mode = self.space.write(offset, bytes)?;
        self.choose(mode == WriteCache::WriteThrough)
            .map_err(CacheError::Sync)?;
        log::info!(
            "disk {}: the guest chose {}",
            self.config.serial,
            mode.name()
        );
        Ok(())
    }

    /// What a snapshot has to keep.
    pub fn device_state(&self) -> DeviceState {
        DeviceState {
            write_through: self.lock_cache().chosen,
        }
    }

    /// Goes on as a snapshot left off.
    ///
    /// # Errors
    ///
    /// The guest's cache mode cannot be kept; the disk does not change.
    pub fn restore_state(&self, state: DeviceState) -> io::Result<()> {
        self.choose(state.write_through)?;
        let serial = &self.config.serial;
        log::info!("disk {serial}: a snapshot comes back whose guest has {state}");
        Ok(())
    }

    fn choose(&self, chosen: bool) -> io::Result<()> {
        let before = self.lock_cache().chosen;
        if let Err(error) = self.change_cache(|cache| cache.chosen = chosen) {
            let mut cache = self.lock_cache();
            cache.chosen = before;
            self.write_through
                .store(cache.is_write_through(), Ordering::Relaxed);
            return Err(error);
        }
        Ok(())
    }

    /// A driver acknowledged these features. One that can neither flush nor choose the cache mode
    /// relies on write-through (virtio 1.3, section 5.2.6.2).
    pub fn driver_acknowledged(&self, acked: u64) {
        let changed =
            self.change_cache(|cache| cache.flushless = !features::allows_write_back(acked));
        if let Err(error) = changed {
            // A driver that cannot be refused learns of it from its writes.
            let errno = error.raw_os_error().unwrap_or(libc::EIO);
            self.sync_fault.set(Errno(errno));
        }
    }

    /// Changes the cache mode, and returns when it holds: for all that completes from then on, and
    /// when write-through begins for all that completed before, too.
    pub(super) fn change_cache(&self, change: impl FnOnce(&mut CacheState)) -> io::Result<()> {
        let mut cache = self.lock_cache();
        change(&mut cache);
        let now = cache.is_write_through();
        let before = self.write_through.swap(now, Ordering::Relaxed);
        if !now || before {
            return Ok(());
        }
        // What completed in write-back mode was not promised to be durable, but a guest that changes
        // the mode counts on it from here on. It also counts on what it sent before and will see
        // completed after, so that ends first.
        self.tell_workers(|done| Message::Drain(self.id, done));
        self.sync()
    }

    pub(super) fn lock_cache(&self) -> MutexGuard<'_, CacheState> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes all completed writes durable.
    fn sync(&self) -> io::Result<()> {
        let is_null = self.image.kind == ImageKind::Null;
        if is_null || self.image.read_only || self.config.cache.ignores_flush() {
            return Ok(());
        }
        if let Some(errno) = self.sync_fault.errno() {
            return Err(io::Error::from_raw_os_error(errno.0));
        }
        let synced = self.image.file.sync_data();
        if let Err(error) = &synced
            && (!self.image.direct || self.witness_fails())
        {
            let errno = error.raw_os_error().unwrap_or(libc::EIO);
            self.sync_fault.set(Errno(errno));
        }
        synced
    }

    /// Whether the image's second open file says that pages were lost.
    fn witness_fails(&self) -> bool {
        let witness = self.sync_fault.witness();
        witness.is_some_and(|witness| rustix::fs::fdatasync(witness).is_err())
    }

    /// The error of the sync after which none is believed, if there was one.
    pub fn sync_error(&self) -> Option<Errno> {
        self.sync_fault.errno()
    }

    /// Whether writes are durable when they complete, as things are now.
    pub fn is_write_through(&self) -> bool {
        self.write_through.load(Ordering::Relaxed)
    }
}
