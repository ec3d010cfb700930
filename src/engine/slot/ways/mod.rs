//! Which ways to discard and to zero a disk has.

use super::{Method, Next, Slot, Stage};
use crate::engine::lane::Kind;
use crate::engine::memory::PAGE_BYTES;
use crate::engine::target::{Abilities, Disk, Target};
use crate::engine::{EngineCounters, RETRIES};

/// Whether an errno says "not in this way" rather than "this went wrong".
pub(super) fn is_refusal(errno: i32) -> bool {
    matches!(
        errno,
        libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY | libc::ENODEV | libc::EINVAL
    )
}

#[cold]
fn log_threadless() {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nproc).current;
    let limit = limit.map_or("no limit".to_owned(), |limit| limit.to_string());
    log::error!(
        "the kernel can start no thread for a flush, discard or write; it is tried again until it can: raise the \
         limit of threads, which is {limit} for the user (ulimit -u), or that of the cgroup (pids.max, TasksMax=)"
    );
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

    /// Whether the next step counts among those that its disk may have in kernel threads.
    #[inline]
    pub(in crate::engine) fn needs_lane(&self, disk: &Disk) -> bool {
        self.stage != Stage::Transfer || self.punt || !disk.can.nowait
    }

    /// As which.
    pub(in crate::engine) fn kind(&self) -> Kind {
        match self.stage {
            Stage::Range(_) => Kind::Range,
            _ => Kind::Call,
        }
    }

    /// Whether nothing is to be done but to wait.
    pub(in crate::engine) fn is_delayed(&self) -> bool {
        self.delayed
    }

    /// What to do if the kernel refused a step because it would have to wait, or because it has no thread that
    /// could. Neither says anything about the disk.
    pub(super) fn is_to_wait(
        &mut self,
        errno: i32,
        disk: &mut Disk,
        counters: &mut EngineCounters,
    ) -> Option<Next> {
        let nowait = std::mem::take(&mut self.nowait) && self.stage == Stage::Transfer;
        match errno {
            // The file cannot promise not to wait.
            libc::EOPNOTSUPP if nowait => disk.can.nowait = false,
            libc::EAGAIN if nowait => {
                counters.punted += 1;
                self.punt = true;
            }
            // The kernel starts no more threads for this user or group, and gives up what waited for one. A
            // flush that fails would have the guest believe that data is lost.
            libc::ECANCELED if !self.cancelled => {
                counters.threadless += 1;
                if !std::mem::replace(&mut disk.threadless, true) {
                    log_threadless();
                }
                self.attempts = (self.attempts + 1).min(RETRIES);
                self.delayed = true;
            }
            _ => return None,
        }
        Some(Next::Issue)
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
