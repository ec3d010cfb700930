//! Standard error and output, which may be anything: a pipe, a terminal, a socket, a file.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

/// Whether a line can be written without waiting.
pub(super) fn takes_more(stream: BorrowedFd<'_>) -> bool {
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let mut fds = [PollFd::new(&stream, PollFlags::OUT)];
    poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0)
}

/// Writes all of `bytes`, however long it takes. A stream that another process has made non-blocking is waited for.
pub(super) fn write_all(stream: BorrowedFd<'_>, mut bytes: &[u8]) -> Result<(), Errno> {
    while !bytes.is_empty() {
        match rustix::io::write(stream, bytes) {
            Ok(0) => return Err(Errno::IO),
            Ok(written) => bytes = &bytes[written..],
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                let _ = poll(&mut [PollFd::new(&stream, PollFlags::OUT)], None);
            }
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// Writes `text` to standard output in pieces of `piece` bytes, until a piece takes longer than `patience`. What is
/// left then is not written.
pub(super) fn write_patiently(text: String, piece: usize, patience: Duration) {
    let (progress, seen) = mpsc::channel();
    let writing = thread::Builder::new()
        .name("stdout".to_owned())
        .spawn(move || {
            for piece in text.as_bytes().chunks(piece) {
                // A reader that has closed its end is no error of ours.
                if write_all(io::stdout().as_fd(), piece).is_err() || progress.send(()).is_err() {
                    return;
                }
            }
        });
    // Ends with the thread, too.
    while writing.is_ok() && seen.recv_timeout(patience).is_ok() {}
}
