//! What a failed sync leaves behind.
//!
//! When the host cannot write pages of its page cache back, it reports that once and takes the pages
//! for clean (fsync(2), "NOTES"): the next sync succeeds although the data is lost. So after the first
//! failure no sync of that image can be believed any more, whichever worker asks.

use crate::atomic::{AtomicI32, Ordering};

use super::Errno;

/// Whether syncs of an image can still be believed; shared by all who serve it.
#[derive(Debug, Default)]
pub struct SyncFault(AtomicI32);

impl SyncFault {
    /// The error of the first sync that failed.
    #[inline]
    pub fn errno(&self) -> Option<Errno> {
        match self.0.load(Ordering::Acquire) {
            0 => None,
            errno => Some(Errno(errno)),
        }
    }

    /// A sync failed. Nothing makes this unsaid: what is lost is not known, so it cannot be written
    /// again.
    #[cold]
    pub fn set(&self, errno: Errno) {
        let first = self
            .0
            .compare_exchange(0, errno.0, Ordering::AcqRel, Ordering::Acquire);
        if first.is_ok() {
            log::error!(
                "the image could not be synced: {errno}; data that was written may be lost, so from \
                 now on every flush and every durable write of this disk fails, until it is served \
                 anew"
            );
        }
    }
}
