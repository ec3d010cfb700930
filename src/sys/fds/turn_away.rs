//! Connections that there is no descriptor for.

use std::fmt::Display;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use super::open_fd_table;

/// Lines that may come at once.
const BURST: u32 = 100;

/// After so long there may be one more.
const INTERVAL: Duration = Duration::from_secs(10);

/// Closes connections that cannot be served, so that those who connect do not wait for an answer, and bounds what is
/// said of it: most of them come again at once.
#[derive(Debug)]
pub struct TurnAway {
    /// Keeps a place for the connection to be closed; it stands for nothing itself.
    spare: Option<OwnedFd>,
    lines: u32,
    since: Instant,
    unsaid: u64,
}

impl TurnAway {
    /// Keeps a descriptor for it.
    ///
    /// # Errors
    ///
    /// There is none.
    pub fn new() -> io::Result<TurnAway> {
        Ok(TurnAway {
            spare: Some(spare()?),
            lines: BURST,
            since: Instant::now(),
            unsaid: 0,
        })
    }

    /// After `accept` failed: whether the connection that waits was taken all the same, in the place of the descriptor
    /// that is kept, and closed.
    pub fn close_one(&mut self, error: &io::Error, listener: &UnixListener) -> bool {
        if !matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) {
            return false;
        }
        drop(self.spare.take());
        let closed = listener.accept().is_ok();
        self.spare = spare().ok();
        closed
    }

    /// The line for the log, if there may be one: `what`, and how many were left out before it.
    pub fn line(&mut self, what: impl Display) -> Option<String> {
        self.line_at(what, Instant::now())
    }

    fn line_at(&mut self, what: impl Display, now: Instant) -> Option<String> {
        while self.lines < BURST && now.saturating_duration_since(self.since) >= INTERVAL {
            self.lines += 1;
            self.since += INTERVAL;
        }
        if self.lines == BURST {
            self.since = now;
        }
        if self.lines == 0 {
            self.unsaid += 1;
            return None;
        }
        self.lines -= 1;
        match std::mem::take(&mut self.unsaid) {
            0 => Some(what.to_string()),
            more => Some(format!(
                "{what} ({more} more times since the last such line)"
            )),
        }
    }
}

fn spare() -> io::Result<OwnedFd> {
    open_fd_table()?.try_clone_to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    #[test]
    fn one_that_connects_when_there_are_no_descriptors_sees_the_end() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let mut away = TurnAway::new().unwrap();
        let mut stream = UnixStream::connect(&path).unwrap();
        assert!(!away.close_one(&io::Error::from_raw_os_error(libc::ENOMEM), &listener));
        assert!(away.close_one(&io::Error::from_raw_os_error(libc::EMFILE), &listener));
        assert_eq!(stream.read(&mut [0]).unwrap(), 0);
        assert!(away.spare.is_some());
    }

    #[test]
    fn what_repeats_without_end_is_said_now_and_then_with_its_count() {
        let mut away = TurnAway::new().unwrap();
        let now = Instant::now();
        let said = (0..1000).filter_map(|_| away.line_at("x", now)).count();
        assert_eq!(said, BURST as usize);
        assert_eq!(away.line_at("x", now + INTERVAL / 2), None);
        let line = away.line_at("x", now + INTERVAL).unwrap();
        assert_eq!(line, "x (901 more times since the last such line)");
        assert_eq!(away.line_at("x", now + INTERVAL), None);
    }
}
