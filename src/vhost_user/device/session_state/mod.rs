//! What all rings of one session share.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use crate::mq::ids::RingId;
use crate::virtio::memory::MemoryTable;

use self::dirty_log::Logging;
use self::session_end::EndFromWithin;
use self::vring::Vring;
use super::super::guard::InflightStore;
use crate::disk::Disk;
use crate::disk::guest_notes::NoteKeeper;
use crate::sys::listener::Stop;
use crate::worker::dedicated::DedicateError;
use crate::worker::message::{Message, Reply};

pub mod dirty_log;
mod session_end;
pub mod vring;

/// What all rings of one session share.
#[derive(Debug)]
pub struct SessionState {
    disk: Arc<Disk>,
    /// The memory the front end has shared, as the workers use it.
    memory: RwLock<Option<Arc<MemoryTable>>>,
    /// Said when some of it was taken away.
    memory_lost: Arc<Stop>,
    inflight: Arc<InflightStore>,
    rings: Mutex<Vec<Vring>>,
    end: EndFromWithin,
    /// The device's state was saved, and nothing was set up since.
    saved: AtomicBool,
    /// What is logged while the guest migrates.
    pub(crate) logging: Mutex<Logging>,
}

impl SessionState {
    /// A session of `disk` that has not begun.
    ///
    /// # Errors
    ///
    /// No descriptor to be had.
    pub fn new(disk: Arc<Disk>) -> io::Result<Arc<SessionState>> {
        let keeper = Arc::clone(&disk) as Arc<dyn NoteKeeper>;
        Ok(Arc::new(SessionState {
            disk,
            memory: RwLock::new(None),
            memory_lost: Arc::new(Stop::new()?),
            inflight: Arc::new(InflightStore::new(keeper)),
            rings: Mutex::new(Vec::new()),
            end: EndFromWithin::default(),
            saved: AtomicBool::new(false),
            logging: Mutex::new(Logging::default()),
        }))
    }

    /// A descriptor that becomes readable when some of the guest's memory was taken away.
    ///
    /// # Errors
    ///
    /// No descriptor to be had.
    pub fn watch_memory(&self) -> io::Result<OwnedFd> {
        self.memory_lost.watch()
    }

    /// The device's state was saved, for a snapshot.
    pub fn is_saved(&self) {
        self.saved.store(true, Ordering::Relaxed);
    }

    /// The front end sets something up: features, memory or rings.
    pub fn is_set_up(&self) {
        self.saved.store(false, Ordering::Relaxed);
    }

    /// Whether the device's state was saved, and nothing was set up since.
    pub(super) fn is_only_saved(&self) -> bool {
        self.saved.load(Ordering::Relaxed)
    }

    /// The disk.
    pub fn disk(&self) -> &Arc<Disk> {
        &self.disk
    }

    /// Uses `memory` for rings that start from now on, and for those that run. `may_wait`: touching it may
    /// wait for a disk's file system.
    ///
    /// # Errors
    ///
    /// It cannot be used, because no worker is left that may wait.
    pub fn set_memory(
        &self,
        memory: Arc<MemoryTable>,
        may_wait: bool,
    ) -> Result<(), DedicateError> {
        self.disk.memory_shown(&memory, may_wait)?;
        // If the image was to be looked at while the disk got a worker. What comes of it is in the log.
        let _ = self.disk.look_again();
        // A worker that is new to the disk does not know the log yet.
        self.tell_log_again();
        *self.memory.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&memory));
        let disk = &self.disk;
        disk.tell_workers(|done| Message::SetMemory(disk.id, Arc::clone(&memory), done));
        Ok(())
    }

    /// The memory in use, if there is any yet.
    pub fn memory(&self) -> Option<Arc<MemoryTable>> {
        self.memory
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Where the session's in-flight region is, if its front end gives one.
    pub fn inflight(&self) -> &Arc<InflightStore> {
        &self.inflight
    }

    /// Stops all rings, and forgets what was in flight.
    pub fn reset(&self) {
        self.stop_all(Message::Stop);
        self.inflight.clear();
        self.disk.device_reset();
    }

    /// Stops all rings with this message; each finishes what it has in flight first.
    fn stop_all(&self, message: fn(RingId, Reply<Option<u16>>) -> Message) {
        let rings = self
            .rings
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        for ring in rings {
            ring.reset(message);
        }
    }

    /// Forgets the rings, which refer to the session in turn.
    pub fn end(&self) {
        self.stop_all(Message::Leave);
        self.end_log();
        self.rings
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
        self.disk.session_ended();
    }
}
