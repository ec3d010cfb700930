//! The last line of a process that ends at once: a bug was noticed, and nothing after it can be trusted.
//!
//! A worker that panicked leaves rings that are never served again, while the rest of the process answers as
//! if all were well. So any panic ends the whole process: a supervisor starts the next one, which finds the
//! requests in the in-flight region.
//!
//! The line is written directly and cannot block. Nothing here allocates, so that it can be used in a signal
//! handler and in a process that is out of memory.

use std::fmt::{self, Write as _};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::panic::{self, PanicHookInfo};
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, IoSlice, ReadWriteFlags, pwritev2};
use rustix::net::{SendFlags, send};

use crate::logging;

/// Bytes of a line. A pipe takes as many in one piece (PIPE_BUF is at least 512).
const LINE_BYTES: usize = 512;

/// How long the log may take for the lines before the last one.
const PATIENCE: Duration = Duration::from_millis(100);

/// At the current position, as `write` does (pwritev2(2)).
const HERE: u64 = u64::MAX;

/// Makes every panic, in any thread, end the process: one line on standard error, then SIGABRT.
pub fn abort_on_panic() {
    panic::set_hook(Box::new(|panic| {
        end(&line_of(panic));
    }));
}

/// Ends the process at once: what the log has to write, `line`, then SIGABRT.
pub fn end(line: &Line) -> ! {
    // What led to it comes first, if standard error takes it.
    logging::settle(PATIENCE);
    write_line(line);
    std::process::abort()
}

fn line_of(panic: &PanicHookInfo<'_>) -> Line {
    let mut line = Line::new("this is a bug, and the process ends: ");
    let current = thread::current();
    let _ = write!(line, "thread '{}'", current.name().unwrap_or("?"));
    if let Some(place) = panic.location() {
        let _ = write!(line, " at {}:{}", place.file(), place.line());
    }
    // What `panic!` passes.
    let why = panic.payload();
    let text = why.downcast_ref::<&str>().copied();
    let text = text.or_else(|| why.downcast_ref::<String>().map(String::as_str));
    let _ = write!(line, ": {}", text.unwrap_or("no reason given"));
    line
}

/// A line of text in a fixed space; what does not fit is left out.
#[derive(Debug)]
pub struct Line {
    bytes: [u8; LINE_BYTES],
    len: usize,
}

impl Line {
    /// A line that begins with the program's name and `text`.
    pub fn new(text: &str) -> Line {
        let mut line = Line {
            bytes: [0; LINE_BYTES],
            len: 0,
        };
        let _ = write!(line, "vhost-user-blkmq: {text}");
        line
    }

    fn with_end(&self) -> ([u8; LINE_BYTES], usize) {
        let mut bytes = self.bytes;
        bytes[self.len] = b'\n';
        (bytes, self.len + 1)
    }
}

impl fmt::Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        // The last place is the line end's.
        let room = LINE_BYTES - 1 - self.len;
        for byte in text.bytes().take(room) {
            self.bytes[self.len] = match byte.is_ascii_control() {
                true => b' ',
                false => byte,
            };
            self.len += 1;
        }
        Ok(())
    }
}

/// Writes a line to standard error, if that takes it without waiting.
pub fn write_line(line: &Line) {
    let (bytes, len) = line.with_end();
    // Whether it arrives changes nothing: there is no other place to write to.
    let _ = write_at_once(io::stderr().as_fd(), &bytes[..len]);
}

/// Writes `bytes` to a socket, pipe, terminal or file that may block, without blocking where that can be known.
fn write_at_once(stream: BorrowedFd<'_>, bytes: &[u8]) -> Result<(), Errno> {
    match send(stream, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
        Err(Errno::NOTSOCK) => {}
        sent => return sent.map(drop),
    }
    match pwritev2(stream, &[IoSlice::new(bytes)], HERE, ReadWriteFlags::NOWAIT) {
        // Pipes of older kernels, terminals, and most file systems do not know the flag.
        Err(Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS) => {}
        written => return written.map(drop),
    }
    let mut streams = [PollFd::new(&stream, PollFlags::OUT)];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    poll(&mut streams, Some(&now))?;
    match streams[0].revents().contains(PollFlags::OUT) {
        true => rustix::io::write(stream, bytes).map(drop),
        false => Err(Errno::AGAIN),
    }
}

#[cfg(test)]
mod tests;
