//! The descriptors that the sessions of the process share. A session counts what it needs before it goes on, so that
//! two of them are never promised the same one.
//!
//! What is open when serving begins, and what the process needs beside its sessions, is left out of what is shared. So
//! a descriptor that was counted is there when it is needed, whatever other sessions do.

use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::fs::fstat;
use rustix::process::{Resource, getrlimit};

use super::open_fd_table;

/// Kept for the control socket's connections, and a few that are open for a moment.
const KEPT: u64 = 16;

/// Kept for each disk: the one that stands for a connection to be turned away, a connection that is being accepted,
/// and the image's at a dedicated worker.
const KEPT_FOR_A_DISK: u64 = 4;

/// The process's descriptors are used up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UsedUp;

/// How many there are to share, and how many are shared out.
#[derive(Debug, Default)]
struct Budget {
    /// Not to be shared.
    kept: u64,
    taken: u64,
}

impl Budget {
    /// Takes `count` of what there are, if `limit` is the process's and `open` are open now, as far as that is known.
    fn take(&mut self, count: u64, limit: u64, open: Option<u64>) -> Result<(), UsedUp> {
        let shared = limit.saturating_sub(self.kept);
        let free = open.map_or(limit, |open| limit.saturating_sub(open));
        if self.taken + count > shared || count > free {
            return Err(UsedUp);
        }
        self.taken += count;
        Ok(())
    }
}

static BUDGET: Mutex<Budget> = Mutex::new(Budget { kept: 0, taken: 0 });

fn budget() -> MutexGuard<'static, Budget> {
    BUDGET.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Counts what is open, which sessions do not share. To be called when everything is open and no session has begun.
pub fn settle(disks: usize) {
    let lowest_free = || {
        let probe = open_fd_table().ok()?.try_clone_to_owned().ok()?;
        u64::try_from(std::os::fd::AsRawFd::as_raw_fd(&probe)).ok()
    };
    // Descriptors are given out from the lowest number on, so there are about as many.
    let open = open_now().or_else(lowest_free).unwrap_or(0);
    budget().kept = open + KEPT + KEPT_FOR_A_DISK * disks as u64;
}

/// Descriptors that are open: the size of /proc/self/fd (Linux 6.2 and later).
fn open_now() -> Option<u64> {
    let found = fstat(open_fd_table().ok()?).ok()?;
    u64::try_from(found.st_size).ok().filter(|open| *open > 0)
}

/// Descriptors that one session may have, given back when it ends.
#[derive(Debug, Default)]
pub struct Share(u64);

impl Share {
    /// Takes `count`.
    ///
    /// # Errors
    ///
    /// There are no more.
    pub fn take(count: u64) -> Result<Share, UsedUp> {
        let mut share = Share::default();
        share.grow(count)?;
        Ok(share)
    }

    /// Takes `count` more.
    ///
    /// # Errors
    ///
    /// There are no more; it has what it had.
    pub fn grow(&mut self, count: u64) -> Result<(), UsedUp> {
        // None is no limit. It may change while the process runs.
        let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        budget().take(count, limit, open_now())?;
        self.0 += count;
        Ok(())
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        budget().taken -= self.0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::thread;

    #[test]
    fn what_is_kept_is_not_shared_and_what_is_open_is_not_promised() {
        let mut budget = Budget { kept: 30, taken: 0 };
        assert_eq!(budget.take(51, 80, Some(20)), Err(UsedUp));
        assert_eq!(budget.take(50, 80, Some(20)), Ok(()));
        assert_eq!(budget.take(1, 80, Some(20)), Err(UsedUp));
        budget.taken = 0;
        assert_eq!(budget.take(11, 80, Some(70)), Err(UsedUp), "10 are free");
        assert_eq!(budget.take(11, 80, None), Ok(()));
        assert_eq!(budget.take(11, 20, None), Err(UsedUp), "a lower limit");
    }

    #[test]
    fn of_sessions_that_want_the_last_ones_at_once_none_is_promised_anothers() {
        let budget = Mutex::new(Budget { kept: 0, taken: 0 });
        let got = AtomicU64::new(0);
        thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    while budget.lock().unwrap().take(3, 1000, None).is_ok() {
                        got.fetch_add(3, Ordering::Relaxed);
                    }
                });
            }
        });
        assert_eq!(got.into_inner(), 999);
    }
}
