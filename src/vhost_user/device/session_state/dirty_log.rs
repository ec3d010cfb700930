//! Marking what the disk writes to its guest's memory, while the guest migrates.
//!
//! Three messages say what is to be marked: SET_LOG_BASE gives the log, SET_VRING_ADDR says where a used ring
//! is logged, and the feature LOG_ALL in SET_FEATURES turns it on and off, while rings run. The first two
//! come from the session guard, because the crate's handlers keep them to themselves, the last
//! from the crate. Each change reaches all workers before its message is answered.

use std::collections::BTreeMap;
use std::sync::{Arc, MutexGuard, PoisonError};

use super::SessionState;
use crate::vhost_user::guard::LogKeeper;
use crate::virtio::dirty_log::{DirtyLog, DiskLog};
use crate::worker::message::Message;

/// A session's log.
#[derive(Debug, Default)]
pub struct Logging {
    /// LOG_ALL is set.
    all: bool,
    log: Option<Arc<DirtyLog>>,
    /// By queue: where its used ring is logged.
    used: BTreeMap<u32, u64>,
    /// LOG_ALL was set while there was no log, so nobody knows what has been written.
    missed: bool,
}

impl SessionState {
    /// LOG_ALL was set or cleared.
    pub fn set_logging(&self, all: bool) {
        let mut logging = self.lock_logging();
        if logging.all != all {
            logging.all = all;
            logging.missed = all && logging.log.is_none();
            self.tell_log(&logging);
        }
    }

    /// Whether the guest is being migrated.
    pub fn is_logging(&self) -> bool {
        self.lock_logging().all
    }

    /// Forgets the log: the session is over.
    pub(super) fn end_log(&self) {
        let mut logging = self.lock_logging();
        let was_on = logging.all && logging.log.is_some();
        *logging = Logging::default();
        if was_on {
            self.tell_log(&logging);
        }
    }

    /// Tells the workers what they were told before, for one that has come since.
    pub(super) fn tell_log_again(&self) {
        let logging = self.lock_logging();
        if logging.all && logging.log.is_some() {
            self.tell_log(&logging);
        }
    }

    fn tell_log(&self, logging: &Logging) {
        let log = logging
            .log
            .as_ref()
            .filter(|_| logging.all)
            .map(|log| Arc::new(DiskLog::new(Arc::clone(log), logging.used.clone())));
        let disk = self.disk();
        disk.tell_workers(|done| Message::SetLog(disk.id, log.clone(), done));
    }

    fn lock_logging(&self) -> MutexGuard<'_, Logging> {
        self.logging.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl LogKeeper for SessionState {
    fn set_log(&self, log: DirtyLog) {
        let mut logging = self.lock_logging();
        let log = Arc::new(log);
        let before = logging.log.replace(Arc::clone(&log));
        let missed = std::mem::take(&mut logging.missed);
        if !logging.all {
            return;
        }
        self.tell_log(&logging);
        // A device that is started in the midst of a migration is given its log last. What its rings
        // wrote until now is in the log of its last start, or unknown.
        match before {
            Some(before) => log.add(&before),
            None if missed => {
                for region in self.memory().iter().flat_map(|memory| memory.regions()) {
                    log.mark(region.gpa, region.len);
                }
            }
            None => {}
        }
    }

    fn log_used_at(&self, queue: u32, address: Option<u64>) {
        let mut logging = self.lock_logging();
        let before = match address {
            Some(address) => logging.used.insert(queue, address),
            None => logging.used.remove(&queue),
        };
        if before != address && logging.all && logging.log.is_some() {
            self.tell_log(&logging);
        }
    }
}
