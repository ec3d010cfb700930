//! Errors of a disk's image: how they are counted, and who has to know that the disk is held.

mod times;

use serde::Serialize;

use crate::engine::{Errno, Waker};

pub use self::times::{Followed, Times};

/// Operations that failed, by the reason; parts of a merged request that are tried again one by one
/// count again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct IoErrors {
    /// No space, or a quota is used up (`ENOSPC`, `EDQUOT`).
    pub no_space: u64,
    /// The medium failed, or the image has become shorter (`EIO`, `EREMOTEIO`, `ENODATA` and the like).
    pub io: u64,
    /// The image may not be written to any more (`EROFS`, `EPERM`, `EACCES`).
    pub denied: u64,
    /// The host had no resources, again and again (`EAGAIN`, `EINTR`, `ENOMEM`, `EBUSY`).
    pub busy: u64,
    /// Given up because of `--on-timeout cancel` (`ECANCELED`).
    pub cancelled: u64,
    /// Not known to the device (`EOPNOTSUPP`).
    pub unsupported: u64,
    /// Anything else.
    pub other: u64,
}

impl IoErrors {
    /// One more.
    pub fn count(&mut self, errno: Errno) {
        *match errno.0 {
            libc::ENOSPC | libc::EDQUOT => &mut self.no_space,
            libc::EIO | libc::EREMOTEIO | libc::ENODATA | libc::EILSEQ | libc::EBADE => {
                &mut self.io
            }
            libc::EROFS | libc::EPERM | libc::EACCES => &mut self.denied,
            libc::EAGAIN | libc::EINTR | libc::ENOMEM | libc::EBUSY => &mut self.busy,
            libc::ECANCELED => &mut self.cancelled,
            libc::EOPNOTSUPP => &mut self.unsupported,
            _ => &mut self.other,
        } += 1;
    }

    /// Adds what another worker counted.
    pub fn add(&mut self, other: &IoErrors) {
        for ((_, sum), (_, more)) in self.list_mut().into_iter().zip(other.list()) {
            *sum += more;
        }
    }

    /// The counts by name.
    pub fn list(mut self) -> [(&'static str, u64); 7] {
        self.list_mut().map(|(name, count)| (name, *count))
    }

    fn list_mut(&mut self) -> [(&'static str, &mut u64); 7] {
        [
            ("no_space", &mut self.no_space),
            ("io", &mut self.io),
            ("denied", &mut self.denied),
            ("busy", &mut self.busy),
            ("cancelled", &mut self.cancelled),
            ("unsupported", &mut self.unsupported),
            ("other", &mut self.other),
        ]
    }
}

/// What one worker knows of a disk's errors.
#[derive(Clone, Copy, Debug, Default)]
pub struct DiskFaults {
    /// The disk's queues wait here until somebody resumes the disk.
    pub held: bool,
    /// What failed.
    pub errors: IoErrors,
}

/// How a worker that holds a disk tells the others.
#[derive(Debug)]
pub struct Hold {
    times: Times,
    workers: Vec<Waker>,
}

impl Hold {
    /// Of a disk that the workers serve which these wake.
    pub fn new(workers: Vec<Waker>) -> Hold {
        Hold {
            times: Times::default(),
            workers,
        }
    }

    /// How often it was held.
    pub fn times(&self) -> &Times {
        &self.times
    }

    /// Has all workers hold the disk, soon; the caller does so now.
    pub fn begin(&self, own: &mut Followed) {
        own.begin(&self.times);
        // Ordered by the waker's write before whatever the others read after it.
        self.workers.iter().for_each(Waker::wake);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_counted_by_their_reason_and_added_up() {
        let mut errors = IoErrors::default();
        for errno in [
            libc::ENOSPC,
            libc::EDQUOT,
            libc::EIO,
            libc::EROFS,
            libc::EAGAIN,
            libc::ECANCELED,
            libc::EOPNOTSUPP,
            libc::EBADF,
        ] {
            errors.count(Errno(errno));
        }
        assert_eq!(errors.list().map(|(_, count)| count), [2, 1, 1, 1, 1, 1, 1]);
        let mut sum = errors;
        sum.add(&errors);
        assert_eq!(sum.list().map(|(_, count)| count), [4, 2, 2, 2, 2, 2, 2]);
    }
}
