//! When writes are durable: the disk's cache mode, and who may change it.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{MutexGuard, PoisonError, TryLockError};

use super::Disk;
use crate::disk::device_state::DeviceState;
use crate::engine::Errno;
use crate::image::ImageKind;
use crate::virtio::config_space::{ConfigError, WriteCache};
use crate::virtio::features::{self, CacheControl};
use crate::virtio::inflight::{InflightRegion, Notes};
use crate::worker::message::Message;

/// Why writes may have to be durable when they complete, and what is known of the guest's choice.
#[derive(Debug)]
pub(super) struct CacheState {
    /// The guest chose it, or the user did before. It belongs to the disk, not to a session: a guest
    /// that chose write-through still believes in it after its front end has reconnected.
    pub(super) chosen: bool,
    /// The driver that is active now can neither flush nor choose (firmware, for instance).
    flushless: bool,
    /// The guest ran before this process served it, and what it chose is not known. It does not choose
    /// again, so it has what it may rely on.
    pub(super) cautious: bool,
    /// Whatever the guest chose, this process has heard of it.
    pub(super) known: bool,
    /// The features that the driver accepted, since the session began or the device was reset.
    acked: Option<u64>,
    /// A ring runs.
    runs: bool,
    /// A ring that runs was served before it started.
    history: bool,
    /// Where notes of this are kept for the process after this one.
    region: Option<InflightRegion>,
    /// The guest of that region has started a ring, or may have.
    pub(super) started: bool,
}

impl CacheState {
    /// Of a disk that no guest has seen.
    pub(super) fn new(write_through: bool) -> CacheState {
        CacheState {
            chosen: write_through,
            flushless: false,
            cautious: false,
            known: false,
            acked: None,
            runs: false,
            history: false,
            region: None,
            started: false,
        }
    }

    fn is_write_through(&self) -> bool {
        self.chosen || self.flushless || self.cautious
    }

    /// Whether it is known what the notes have to say: what the guest chose, or that it has write-through for want
    /// of that.
    pub(super) fn can_be_noted(&self) -> bool {
        self.known || self.cautious
    }

    /// Whether this process has heard of all that the guest chose. If no ring that runs was served before, its driver
    /// began here.
    pub(super) fn has_heard_all(&self) -> bool {
        self.known || self.runs && !self.history
    }

    /// Where notes are kept.
    pub(super) fn region(&self) -> Option<&InflightRegion> {
        self.region.as_ref()
    }

    /// Whether all that speaks for write-through is that the guest may have chosen it.
    pub(super) fn is_in_doubt(&self) -> bool {
        self.cautious && !self.chosen
    }

    /// What a guest counts on that goes on elsewhere, or with another process.
    pub(super) fn is_promised(&self) -> bool {
        self.chosen || self.cautious
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
            disk = self.id.0; "disk {}: the guest chose {}",
            self.config.serial,
            mode.name()
        );
        Ok(())
    }

    /// What a snapshot has to keep.
    pub fn device_state(&self) -> DeviceState {
        DeviceState {
            write_through: self.lock_cache().is_promised(),
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
        log::info!(disk = self.id.0; "disk {serial}: a snapshot comes back whose guest has {state}");
        Ok(())
    }

    /// The notes of a guest that runs say whether it has write-through. It keeps that, and one that has
    /// write-back gets what the disk has: the front end, which can change notes, cannot take write-through
    /// away.
    pub(super) fn guest_has(&self, told: &Notes) -> io::Result<()> {
        let has = {
            let cache = self.lock_cache();
            cache.chosen || cache.cautious && told.in_doubt
        };
        if told.write_through && !has {
            self.promise(!told.in_doubt, told.in_doubt)?;
            log::info!(
                disk = self.id.0; "disk {}: its guest goes on with write-through",
                self.config.serial
            );
        }
        self.lock_cache().known |= !told.in_doubt;
        Ok(())
    }

    /// Keeps notes in `region` from now on; `started` is whether its guest has started a ring.
    pub(super) fn keep_notes_in(&self, region: InflightRegion, started: bool) {
        let mut cache = self.lock_cache();
        cache.region = Some(region);
        cache.started = started;
        self.note(&cache);
    }

    fn choose(&self, chosen: bool) -> io::Result<()> {
        self.promise(chosen, false)
    }

    /// The guest chose write-through or did not, or may have. On an error nothing changes.
    fn promise(&self, chosen: bool, cautious: bool) -> io::Result<()> {
        let (chosen_before, cautious_before, known_before) = {
            let cache = self.lock_cache();
            (cache.chosen, cache.cautious, cache.known)
        };
        let changed = self.change_cache(|cache| {
            cache.chosen = chosen;
            cache.cautious = cautious;
            cache.known |= !cautious;
        });
        if changed.is_err() {
            let mut cache = self.lock_cache();
            cache.chosen = chosen_before;
            cache.cautious = cautious_before;
            cache.known = known_before;
            self.write_through
                .store(cache.is_write_through(), Ordering::Relaxed);
        }
        changed
    }

    /// A driver acknowledged these features. One that can neither flush nor choose the cache mode
    /// relies on write-through, and one that can only choose begins with it.
    pub fn driver_acknowledged(&self, acked: u64) {
        // Both are the front end's, and change while the driver goes on.
        let acked = acked & !(features::LOG_ALL | features::VHOST_USER_PROTOCOL_FEATURES);
        let control = CacheControl::of(acked);
        let changed = self.change_cache(|cache| {
            let begins = cache.acked.replace(acked) != Some(acked);
            cache.flushless = control == CacheControl::Nothing;
            cache.chosen |= begins && control == CacheControl::OnlyChooses;
        });
        self.unable_to_refuse(changed);
    }

    /// A ring is about to start; `history` is whether it was served before.
    ///
    /// A guest whose ring has a history chose its cache mode in another process, if it did. Where no notes
    /// tell what it chose (the front end has no in-flight region, or one of another program), its writes
    /// are durable when they complete, until its driver begins anew or chooses.
    pub fn ring_starts(&self, history: bool) {
        let serial = &self.config.serial;
        let mut cache = self.lock_cache();
        cache.runs = true;
        cache.history |= history;
        let can_choose = cache
            .acked
            .is_none_or(|acked| acked & features::CONFIG_WCE != 0);
        let in_doubt = history && can_choose && !cache.is_write_through();
        let begins = cache.region.is_some() && !std::mem::replace(&mut cache.started, true);
        let arrives = in_doubt && begins && cache.known;
        if begins {
            self.note(&cache);
        }
        let unknown = in_doubt && !cache.known;
        drop(cache);
        if arrives {
            log::info!(
                disk = self.id.0; "disk {serial}: a guest arrives that ran elsewhere and has write-back here; if it chose \
                 write-through there, start this daemon with --cache directsync or writethrough"
            );
        }
        if unknown {
            log::warn!(
                disk = self.id.0; "disk {serial}: the guest ran before this daemon served it, and whether it chose \
                 write-through is not known: it has write-through until its driver starts anew"
            );
            let changed = self.change_cache(|cache| cache.cautious = true);
            self.unable_to_refuse(changed);
        }
    }

    /// No ring runs any more. If none of them had a history, their driver began with this process, and all
    /// that it chose is known.
    pub(super) fn rings_stopped(&self) {
        let mut cache = self.lock_cache();
        cache.runs = false;
        let history = std::mem::take(&mut cache.history);
        drop(cache);
        if !history {
            self.driver_begins();
        }
    }

    /// The driver of the device begins anew: it reads the cache mode again.
    pub fn driver_begins(&self) {
        let changed = self.change_cache(|cache| {
            cache.known = true;
            cache.cautious = false;
        });
        self.unable_to_refuse(changed);
    }

    /// The device was reset.
    pub fn device_reset(&self) {
        self.lock_cache().acked = None;
        self.driver_begins();
    }

    /// The front end has left, and has its in-flight region to itself again.
    pub fn session_ended(&self) {
        let mut cache = self.lock_cache();
        self.leave_notes(&cache);
        cache.acked = None;
        cache.region = None;
        cache.started = false;
    }

    /// A change that nobody could be told has failed.
    fn unable_to_refuse(&self, changed: io::Result<()>) {
        if let Err(error) = changed {
            // A driver that cannot be refused learns of it from its writes.
            let errno = error.raw_os_error().unwrap_or(libc::EIO);
            self.sync_fault.set(Errno(errno));
        }
    }

    /// Changes the cache mode, and returns when it holds: for all that completes from then on, and
    /// when write-through begins for all that completed before, too. The notes say so by then.
    pub(super) fn change_cache(&self, change: impl FnOnce(&mut CacheState)) -> io::Result<()> {
        let mut cache = self.lock_cache();
        change(&mut cache);
        let now = cache.is_write_through();
        let before = self.write_through.swap(now, Ordering::Relaxed);
        if now && !before {
            // What completed in write-back mode was not promised to be durable, but a guest that changes
            // the mode counts on it from here on. It also counts on what it sent before and will see
            // completed after, so that ends first, or is sent again as durable if it is held after an error.
            self.tell_workers(|done| Message::WriteThrough(self.id, done));
            self.sync()?;
        }
        self.note(&cache);
        Ok(())
    }

    pub(super) fn lock_cache(&self) -> MutexGuard<'_, CacheState> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The same; `None` while the cache mode is being changed, which may take as long as the image's storage takes.
    pub(super) fn try_lock_cache(&self) -> Option<MutexGuard<'_, CacheState>> {
        match self.cache.try_lock() {
            Ok(cache) => Some(cache),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
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
