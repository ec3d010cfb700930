//! What is answered as durable, and what a failure means for it.

use super::{Next, Slot, Stage};
use crate::engine::target::{Disk, Target};
use crate::engine::{Errno, Extent};

/// What an error means for data that was written before, by this command or by others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Meaning {
    /// Nothing: it is the command's own.
    Own,
    /// Pages of the page cache may be lost.
    Lost,
    /// One or the other.
    Unknown,
}

impl Slot {
    /// The transfer is done.
    #[inline]
    pub(super) fn finish(&mut self, disk: &Disk) -> Next {
        if !self.fua {
            Next::Done(Ok(self.total))
        } else if self.unsynced {
            self.stage = Stage::Sync;
            Next::Issue
        } else {
            self.durable(disk)
        }
    }

    /// The command is durable by what the kernel says, which another one may have been told otherwise:
    /// the kernel reports lost pages of an open file once, and all workers share it.
    pub(super) fn durable(&mut self, disk: &Disk) -> Next {
        let fault = &disk.sync_fault;
        if fault.errno().is_none() && fault.is_doubted() && fault.witness().is_some() {
            self.error = 0;
            self.stage = Stage::Witness;
            return Next::Issue;
        }
        // Asked again: the doubt may have ended in between. An I/O error, as in `start`.
        Next::Done(match fault.errno() {
            None => Ok(self.total),
            Some(_) => Err(Errno(libc::EIO)),
        })
    }

    /// An error ends the command, as soon as it is known what it means.
    pub(super) fn ends(&mut self, errno: i32, disk: &Disk, extents: &[Extent]) -> Next {
        let fault = &disk.sync_fault;
        if self.stage == Stage::Witness {
            // Where it cannot be asked nothing is believed.
            fault.set(Errno(errno));
            return self.witnessed(disk);
        }
        // Past a device's end there is no space, by the kernel's words.
        if errno == libc::ENOSPC && disk.is_shorter_than(self.end(extents)) {
            return Next::Done(Err(Errno(libc::EIO)));
        }
        match self.meaning(errno, disk) {
            Meaning::Own => {}
            Meaning::Lost => fault.set(Errno(errno)),
            Meaning::Unknown => {
                fault.doubt();
                self.error = errno;
                self.stage = Stage::Witness;
                return Next::Issue;
            }
        }
        Next::Done(Err(Errno(errno)))
    }

    /// The witness has answered.
    pub(super) fn witnessed(&mut self, disk: &Disk) -> Next {
        if self.error == 0 {
            return self.durable(disk);
        }
        disk.sync_fault.end_doubt();
        Next::Done(Err(Errno(self.error)))
    }

    /// Where on the disk the step ends that is under way.
    fn end(&self, extents: &[Extent]) -> u64 {
        match self.stage {
            Stage::Range(_) => {
                let extent = extents[usize::from(self.range)];
                extent.offset + extent.len
            }
            _ => self.offset + self.total,
        }
    }

    fn meaning(&self, errno: i32, disk: &Disk) -> Meaning {
        let Target::File(file) = &disk.target else {
            return Meaning::Own;
        };
        let concerns_others = match (self.stage, errno) {
            // Given up by the watchdog, not by the disk.
            (_, libc::ECANCELED) => false,
            (Stage::Sync, _) => true,
            // No memory of the guest's there; not done in this way. That comes before all syncing.
            (Stage::Transfer, libc::EFAULT | libc::EINVAL | libc::EOPNOTSUPP) => false,
            (Stage::Transfer, _) => self.fua && !self.unsynced,
            _ => false,
        };
        if !concerns_others || disk.sync_fault.errno().is_some() {
            return Meaning::Own;
        }
        let buffered = !file.direct || !disk.can.direct;
        match (buffered, self.stage) {
            (true, Stage::Sync) => Meaning::Lost,
            (true, _) if errno == libc::EIO => Meaning::Lost,
            // A write that lacks space may lack it before anything is lost. And a file that is open with
            // O_DIRECT is not written past the page cache everywhere and always: XFS takes it for a part
            // of a block that is shared with a clone, btrfs where it keeps checksums.
            _ if disk.sync_fault.witness().is_some() => Meaning::Unknown,
            (true, _) => Meaning::Lost,
            (false, _) => Meaning::Own,
        }
    }
}
