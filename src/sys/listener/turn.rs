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

/// Far longer than a daemon needs. Other programs lock directories, too: against systemd-tmpfiles for example.
const PATIENCE: Duration = Duration::from_secs(2);

/// How often the lock is tried.
const PAUSE: Duration = Duration::from_millis(5);

/// The lock, until it is dropped.
#[derive(Debug)]
pub(super) struct Turn {
    _directory: OwnedFd,
}

impl Turn {
    /// Waits for the lock of the directory that `socket` is in. Without one, where the directory cannot be read or
    /// locked, or where another program keeps the lock, a socket is made all the same.
    pub(super) fn take(socket: &Path) -> Option<Turn> {
        let directory = match socket.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let opened = open(directory, flags, Mode::empty());
        let locked = opened.and_then(|fd| lock(&fd).map(|()| fd));
        match locked {
            Ok(fd) => Some(Turn { _directory: fd }),
            Err(errno) => {
                log::debug!(
                    "the directory {directory:?} cannot be locked ({errno}): nothing keeps another daemon that \
                     starts now from taking the same socket"
                );
                None
            }
        }
    }
}

fn lock(directory: &OwnedFd) -> Result<(), Errno> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match flock(directory, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) if Instant::now() < deadline => thread::sleep(PAUSE),
            Err(Errno::INTR) => {}
            outcome => return outcome,
        }
    }
}
