//! What a failed sync leaves behind.
//!
//! When the host cannot write pages of its page cache back, it reports that once and takes the pages
//! for clean (fsync(2), "NOTES"): the next sync succeeds although the data is lost. So after the first
//! failure no sync of that image can be believed any more, whichever worker asks.
//!
//! It reports that to each open file once. A durable write, or a sync of an image that is open with
//! `O_DIRECT`, may therefore fail for a reason of its own or for pages that others have written, and the
//! error alone does not tell which: `ENOSPC` is either. So the image is open a second time (the
//! *witness*), and a sync there tells: it fails if pages were lost since the image was opened.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::atomic::{AtomicI32, AtomicU32, Ordering};

use super::Errno;

/// Whether syncs of an image can still be believed; shared by all who serve it.
#[derive(Debug, Default)]
pub struct SyncFault {
    /// 0, or the error of the first sync that failed.
    errno: AtomicI32,
    /// Failures about which the witness has not answered.
    doubts: AtomicU32,
    witness: Option<OwnedFd>,
    /// Whose image it is: the number of the disk, and its name for the log.
    disk: (u16, String),
}

impl SyncFault {
    /// That of a disk's image, with its witness if it has one.
    pub fn new(disk: u16, serial: &str, witness: Option<OwnedFd>) -> SyncFault {
        SyncFault {
            witness,
            disk: (disk, serial.to_owned()),
            ..SyncFault::default()
        }
    }

    /// The image as it was opened a second time, to be synced and nothing else.
    pub fn witness(&self) -> Option<BorrowedFd<'_>> {
        self.witness.as_ref().map(AsFd::as_fd)
    }

    /// The error of the first sync that failed.
    #[inline]
    pub fn errno(&self) -> Option<Errno> {
        match self.errno.load(Ordering::Acquire) {
            0 => None,
            errno => Some(Errno(errno)),
        }
    }

    /// Something failed, and the witness is asked what that means.
    #[cold]
    pub fn doubt(&self) {
        self.doubts.fetch_add(1, Ordering::AcqRel);
    }

    /// The witness has answered. What it said is told by [`SyncFault::set`] before.
    #[cold]
    pub fn end_doubt(&self) {
        self.doubts.fetch_sub(1, Ordering::AcqRel);
    }

    /// Whether the witness is being asked. If not, [`SyncFault::errno`] says after this all that it
    /// answered before.
    #[inline]
    pub fn is_doubted(&self) -> bool {
        self.doubts.load(Ordering::Acquire) > 0
    }

    /// A sync failed. Nothing makes this unsaid: what is lost is not known, so it cannot be written
    /// again.
    #[cold]
    pub fn set(&self, errno: Errno) {
        let first = self
            .errno
            .compare_exchange(0, errno.0, Ordering::AcqRel, Ordering::Acquire);
        if first.is_ok() {
            let (disk, serial) = &self.disk;
            log::error!(
                disk = *disk; "disk {serial}: the image could not be synced: {errno}; data that was written may be lost, so from \
                 now on every flush and every durable write of this disk fails, until it is served \
                 anew"
            );
        }
    }
}
