//! The socket inside the process.

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use rustix::fs::{Mode, OFlags};
use vhost::vhost_user::Listener;

/// Where the session guard meets the crate's daemon.
///
/// The crate only takes connections from a listener, so there is one that nobody else can reach:
/// its file is gone from the file system before anybody is served, and it is connected to through
/// a descriptor of the file.
pub struct Junction {
    listener: Mutex<Waiting>,
    file: OwnedFd,
}

/// The listener, and whether a connection may wait there that is not for the next one who accepts.
struct Waiting {
    listener: Listener,
    stale: bool,
}

impl Waiting {
    /// Closes what waits, if anything may: two sessions must never be joined crosswise.
    fn clear(&mut self) -> io::Result<()> {
        if !self.stale {
            return Ok(());
        }
        let socket = io::Error::other::<vhost::vhost_user::Error>;
        self.listener.set_nonblocking(true).map_err(socket)?;
        while self.listener.accept().map_err(socket)?.is_some() {}
        self.listener.set_nonblocking(false).map_err(socket)?;
        self.stale = false;
        Ok(())
    }
}

impl fmt::Debug for Junction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Junction")
            .field("file", &self.file)
            .finish_non_exhaustive()
    }
}

impl Junction {
    /// Creates it, for a process that is to become `owner` (user and group), or stays what it is. Its file is for a
    /// moment in a directory of its own: in the one for temporary files, or else in one of `others`.
    ///
    /// # Errors
    ///
    /// None of the directories can be written to. The error is that of the first.
    pub fn new(owner: Option<(u32, u32)>, others: &[&Path]) -> io::Result<Junction> {
        let temporary = std::env::temp_dir();
        let mut junction = Junction::within(&temporary, owner);
        for place in others {
            if let Err(error) = &junction {
                log::debug!("no internal socket in {temporary:?}: {error}; trying {place:?}");
                junction = Junction::within(place, owner).or(junction);
            }
        }
        junction
    }

    fn within(place: &Path, owner: Option<(u32, u32)>) -> io::Result<Junction> {
        // Readable by this user only, and removed when it goes out of scope.
        let directory = tempfile::Builder::new()
            .prefix("vhost-user-blkmq-")
            .tempdir_in(place)?;
        // A socket's path has 107 bytes at most, and the directory's may be longer.
        let short = rustix::fs::open(
            directory.path(),
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        let path = PathBuf::from(format!("/proc/self/fd/{}/junction", short.as_raw_fd()));
        let listener = UnixListener::bind(&path)?;
        if let Some((uid, gid)) = owner {
            // Who connects needs the right to write.
            std::os::unix::fs::chown(&path, Some(uid), Some(gid))?;
        }
        let file = rustix::fs::open(&path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
        Ok(Junction {
            listener: Mutex::new(Waiting {
                listener: Listener::from(listener),
                stale: false,
            }),
            file,
        })
    }

    /// Connects, and hands the listener with that one connection waiting to `accept`.
    ///
    /// # Errors
    ///
    /// The process is out of descriptors, or `accept` fails.
    pub fn join<E: From<io::Error>>(
        &self,
        accept: impl FnOnce(&mut Listener) -> Result<(), E>,
    ) -> Result<UnixStream, E> {
        let mut waiting = self.listener.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.clear()?;
        let ours = UnixStream::connect(format!("/proc/self/fd/{}", self.file.as_raw_fd()))?;
        if let Err(error) = accept(&mut waiting.listener) {
            // It may wait there still, and would be taken for the next one.
            waiting.stale = true;
            drop(ours);
            // What cannot be done now is done before the next one connects.
            let _ = waiting.clear();
            return Err(error);
        }
        Ok(ours)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::io::{Read, Write};

    use vmm_sys_util::tempdir::TempDir;

    /// A byte written to one end of what is joined is read from the other.
    #[track_caller]
    fn assert_joins(junction: &Junction) {
        let mut theirs = None;
        let mut ours = junction
            .join(|listener| -> io::Result<()> {
                theirs = listener.accept().unwrap();
                Ok(())
            })
            .unwrap();
        ours.write_all(b"x").unwrap();
        let mut got = [0];
        theirs.unwrap().read_exact(&mut got).unwrap();
        assert_eq!(&got, b"x");
    }

    #[test]
    fn a_junction_joins_what_connects_to_what_accepts() {
        let junction = Junction::new(None, &[]).unwrap();
        for _ in 0..3 {
            assert_joins(&junction);
        }
    }

    #[test]
    fn a_connection_that_was_not_accepted_is_not_taken_for_the_next_one() {
        let junction = Junction::new(None, &[]).unwrap();
        let refused = junction.join(|_| Err::<(), _>(io::Error::from_raw_os_error(libc::EMFILE)));
        assert!(refused.is_err());
        assert_joins(&junction);
    }

    #[test]
    fn a_junction_needs_one_directory_of_several() {
        let directory = TempDir::new().unwrap();
        let missing = Path::new("/nowhere");
        let long = directory.as_path().join("long".repeat(40));
        fs::create_dir(&long).unwrap();
        Junction::within(missing, None).unwrap_err();
        for place in [directory.as_path(), &long] {
            let junction = Junction::within(place, None).unwrap();
            junction
                .join(|listener| -> io::Result<()> {
                    listener.accept().unwrap();
                    Ok(())
                })
                .unwrap();
        }
        assert_eq!(fs::read_dir(&long).unwrap().count(), 0);
    }
}
