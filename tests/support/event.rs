//! Eventfds, for kicks and calls.

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::{Errno, read, write};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

/// A non-blocking eventfd, as QEMU makes them.
#[derive(Debug)]
pub struct Event(OwnedFd);

impl Event {
    /// An eventfd with count 0.
    pub fn new() -> io::Result<Self> {
        Ok(Self(eventfd(
            0,
            EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC,
        )?))
    }

    /// Another descriptor of the same eventfd: two queues with one count.
    pub fn duplicate(&self) -> io::Result<Self> {
        self.0.try_clone().map(Self)
    }

    /// Adds one to the count.
    pub fn signal(&self) {
        let written =
            write(&self.0, &1_u64.to_ne_bytes()).expect("an eventfd takes a count of one");
        assert_eq!(written, 8, "an eventfd takes eight bytes");
    }

    /// The count, which becomes 0; never waits.
    pub fn take(&self) -> u64 {
        self.wait(Duration::ZERO)
    }

    /// Waits until the count is not 0 and takes it; 0 after `timeout`.
    pub fn wait(&self, timeout: Duration) -> u64 {
        let deadline = Instant::now() + timeout;
        loop {
            // Polled before it is read: a back end may have changed the flags of the shared file description.
            let left = deadline.saturating_duration_since(Instant::now());
            let left = Timespec::try_from(left).expect("timeouts are short");
            match poll(&mut [PollFd::new(&self.0, PollFlags::IN)], Some(&left)) {
                Ok(0) => return 0,
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(error) => panic!("poll on an eventfd: {error}"),
            }
            let mut count = [0; 8];
            match read(&self.0, &mut count) {
                Ok(8) => return u64::from_ne_bytes(count),
                Err(Errno::AGAIN | Errno::INTR) => {}
                other => panic!("read from an eventfd: {other:?}"),
            }
        }
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
