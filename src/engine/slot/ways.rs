//! Which ways to discard and to zero a disk has.

use super::{Method, Slot, Stage};
use crate::engine::memory::PAGE_BYTES;
use crate::engine::target::{Abilities, Disk, Target};

/// Whether an errno says "not in this way" rather than "this went wrong".
pub(super) fn is_refusal(errno: i32) -> bool {
    matches!(
        errno,
        libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY | libc::ENODEV | libc::EINVAL
    )
}

impl Abilities {
    pub(super) fn allows(self, method: Method) -> bool {
        match method {
            Method::Discard => self.discard,
            Method::Punch => self.punch,
            Method::ZeroRange => self.zero_range,
            Method::Zero => self.zero,
            Method::Write => true,
        }
    }

    pub(super) fn strike_out(&mut self, method: Method) {
        match method {
            Method::Discard => self.discard = false,
            Method::Punch => self.punch = false,
            Method::ZeroRange => self.zero_range = false,
            Method::Zero | Method::Write => {}
        }
    }
}

impl Slot {
    /// Whether the next step goes to the ring that polls.
    #[inline]
    pub(in crate::engine) fn goes_polled(&self) -> bool {
        self.polled && self.stage == Stage::Transfer
    }

    /// A transfer was refused for the way it was tried in, and there is another.
    pub(super) fn is_refused_in_this_way(&mut self, errno: i32, disk: &mut Disk) -> bool {
        let Target::File(file) = &disk.target else {
            return false;
        };
        if self.polled && matches!(errno, libc::EOPNOTSUPP | libc::EAGAIN | libc::EINVAL) {
            // Without polling it goes on the usual way, with its own retries. A file system may be
            // without it where its device has it.
            self.polled = false;
            disk.can.poll &= errno != libc::EOPNOTSUPP;
            return true;
        }
        // Nor is it the buffers: the file system has come to demand more of offsets than the guest's blocks
        // have.
        if errno == libc::EINVAL
            && file.direct
            && self.bounce.is_some()
            && !(self.offset + self.done).is_multiple_of(PAGE_BYTES as u64)
        {
            return disk.leave_direct();
        }
        // What the image wants of buffers was found out from a file system that may answer for one part
        // of the file only, or from a device that has been exchanged since.
        if errno == libc::EINVAL && file.direct && self.bounce.is_none() {
            let (addresses, lengths) = self.alignment();
            if addresses < PAGE_BYTES || lengths < PAGE_BYTES {
                self.too_fine = Some((addresses, lengths));
                self.wants_bounce = true;
                return true;
            }
        }
        false
    }

    /// If what was refused went well by way of a bounce buffer, alignment was what it lacked.
    #[inline]
    pub(super) fn learn_alignment(&mut self, disk: &mut Disk) {
        let Some((addresses, lengths)) = self.too_fine.take() else {
            return;
        };
        let finer = |known: usize, refused: usize| match refused < PAGE_BYTES {
            true => known.max(2 * refused),
            false => known,
        };
        let before = disk.align;
        disk.align = (finer(before.0, addresses), finer(before.1, lengths));
        if disk.align != before {
            log::warn!(
                "O_DIRECT wants more of buffers than it said: addresses aligned to {} bytes and lengths to \
                 {}; others are copied from now on",
                disk.align.0,
                disk.align.1
            );
        }
    }
}

#[cfg(test)]
mod tests;
