//! Whose turn it is to make a socket in a directory.
//!
//! Between `bind` and `listen` a socket refuses connections, as one does that a killed process left. Another daemon
//! that starts on the same path would remove it. So daemons look, bind and listen one after another: each holds a
//! lock of the directory (flock(2)) meanwhile.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, Mode, OFlags, flock, open};
use rustix::io::Errno;

/// Far longer than a daemon needs, for all of its sockets together. Other programs lock directories, too: against
/// systemd-tmpfiles for example. Each user who can read a directory can lock it for as long as he likes.
const PATIENCE: Duration = Duration::from_secs(2);

/// How often the lock is tried.
const PAUSE: Duration = Duration::from_millis(5);

/// The turns of one start.
#[derive(Debug)]
pub struct Turns {
    /// How long they may wait from here on.
    left: Duration,
    /// The log says that another program keeps a lock.
    said: bool,
}

impl Default for Turns {
    fn default() -> Self {
        Turns {
            left: PATIENCE,
            said: false,
        }
    }
}

/// The lock, until it is dropped.
#[derive(Debug)]
pub(super) struct Turn {
    _directory: OwnedFd,
}

impl Turns {
    /// Waits for the lock of the directory that `socket` is in. Without one, where the directory cannot be read or
    /// locked, or where another program keeps the lock, a socket is made all the same.
    pub(super) fn take(&mut self, socket: &Path) -> Option<Turn> {
        let directory = match socket.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let opened = open(directory, flags, Mode::empty());
        let errno = match opened.and_then(|fd| self.lock(&fd).map(|()| fd)) {
            Ok(fd) => return Some(Turn { _directory: fd }),
            Err(errno) => errno,
        };
        const RISK: &str =
            "nothing keeps another daemon that starts now from taking the same socket";
        if errno != Errno::WOULDBLOCK {
            log::debug!("the directory {directory:?} cannot be locked ({errno}): {RISK}");
        } else if !self.said {
            self.said = true;
            log::warn!(
                "another program keeps the directory {directory:?} locked (flock); it is not waited for any longer: \
                 {RISK}; make sockets in a directory that only the daemon's user can read"
            );
        }
        None
    }

    fn lock(&mut self, directory: &OwnedFd) -> Result<(), Errno> {
        let begun = Instant::now();
        let outcome = loop {
            match flock(directory, FlockOperation::NonBlockingLockExclusive) {
                Err(Errno::WOULDBLOCK) if begun.elapsed() < self.left => thread::sleep(PAUSE),
                Err(Errno::INTR) => {}
                outcome => break outcome,
            }
        };
        self.left = self.left.saturating_sub(begun.elapsed());
        outcome
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_sockets_of_a_start_wait_together_for_a_directory_that_stays_locked() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("s");
        let mut other = Turns::default();
        let held = other.take(&socket).expect("it is free");
        let mut turns = Turns::default();
        let begun = Instant::now();
        for _ in 0..8 {
            assert!(turns.take(&socket).is_none());
        }
        let waited = begun.elapsed();
        assert!(waited < 4 * PATIENCE, "{waited:?}");
        assert_eq!(turns.left, Duration::ZERO);
        assert!(turns.said, "the log names the directory");
        drop(held);
        assert!(turns.take(&socket).is_some());
    }
}
