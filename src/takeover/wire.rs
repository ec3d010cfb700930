//! Frames: a kind, JSON, and file descriptors, over a UNIX stream socket.
//!
//! A frame is a header of twelve bytes (kind, bytes of JSON, descriptors; each a `u32` in the
//! machine's byte order: both ends are on one machine), the JSON, and one byte for each batch of
//! descriptors, which are attached to it. The kernel carries 253 descriptors with one message
//! (SCM_MAX_FD, include/net/scm.h), and a disk has many more.

use std::io::{self, IoSlice, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use super::trust::Trusted;

/// Descriptors with one byte.
const BATCH: usize = 128;

const HEADER_BYTES: usize = 12;

/// Most bytes of one system call. Within one the kernel waits for the time limit again and again, as long as the other
/// side takes anything (`unix_stream_sendmsg`, net/unix/af_unix.c).
const PIECE: usize = 32 << 10;

/// More than any frame has: each fd of 256 queues and of 509 regions in JSON is far less.
const MAX_JSON_BYTES: usize = 16 << 20;

/// 3 for each of 256 queues, one for each of 509 regions, and a few.
const MAX_FDS: usize = 4096;

/// What a frame says. The numbers are for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// New to old: which disks it wants.
    Plan = 1,
    /// Old to new: what each guest was promised.
    Facts = 2,
    /// New to old: it has prepared all it can.
    Ready = 3,
    /// Old to new: what is common to all disks, and how many follow.
    State = 4,
    /// Old to new: a disk.
    Disk = 5,
    /// New to old: the disks are the new one's.
    Taken = 6,
    /// Either way: it does not go on, and why.
    Refused = 7,
}

impl Kind {
    fn of(number: u32) -> Option<Kind> {
        [
            Kind::Plan,
            Kind::Facts,
            Kind::Ready,
            Kind::State,
            Kind::Disk,
            Kind::Taken,
            Kind::Refused,
        ]
        .into_iter()
        .find(|kind| *kind as u32 == number)
    }
}

/// One frame.
#[derive(Debug)]
pub struct Frame {
    /// What it says.
    pub kind: Kind,
    /// JSON.
    pub json: Vec<u8>,
    /// What the JSON refers to by index.
    pub fds: Vec<OwnedFd>,
}

/// One end of the connection.
#[derive(Debug)]
pub struct Frames {
    stream: UnixStream,
    /// The users whose frames are read; `None` reads those of any.
    trusted: Option<Trusted>,
}

impl Frames {
    /// Over `stream`, whose time limits are changed.
    pub fn new(stream: UnixStream) -> Frames {
        Frames {
            stream,
            trusted: None,
        }
    }

    /// The same, reading only what these users have sent. The stream passes credentials (`SO_PASSCRED`) since before
    /// the other side had a reason to send.
    pub fn of(stream: UnixStream, trusted: Trusted) -> Frames {
        Frames {
            stream,
            trusted: Some(trusted),
        }
    }

    /// Sends a frame before `deadline`.
    ///
    /// # Errors
    ///
    /// The other side is gone or takes nothing.
    pub fn send(&self, frame: &Frame, deadline: Instant) -> io::Result<()> {
        let count = |n: usize| u32::try_from(n).map_err(|_| io::ErrorKind::InvalidInput);
        let header = [
            frame.kind as u32,
            count(frame.json.len())?,
            count(frame.fds.len())?,
        ];
        let mut bytes: Vec<u8> = header.into_iter().flat_map(u32::to_ne_bytes).collect();
        bytes.extend_from_slice(&frame.json);
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            self.stream.set_write_timeout(Some(left(deadline)))?;
            // A signal for a closed pipe is ignored in every Rust program.
            match (&self.stream).write(&rest[..rest.len().min(PIECE)]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(sent) => rest = &rest[sent..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
            in_time(rest.is_empty(), deadline)?;
        }
        let mut batches = frame.fds.chunks(BATCH).peekable();
        while let Some(batch) = batches.next() {
            let batch: Vec<_> = batch.iter().map(AsFd::as_fd).collect();
            self.stream.set_write_timeout(Some(left(deadline)))?;
            self.send_batch(&batch)?;
            in_time(batches.peek().is_none(), deadline)?;
        }
        Ok(())
    }

    fn send_batch(&self, batch: &[std::os::fd::BorrowedFd<'_>]) -> io::Result<()> {
        loop {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(BATCH))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            let pushed = control.push(SendAncillaryMessage::ScmRights(batch));
            assert!(pushed, "there is space for a batch");
            match sendmsg(
                &self.stream,
                &[IoSlice::new(&[0])],
                &mut control,
                SendFlags::NOSIGNAL,
            ) {
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Receives a frame before `deadline`; `None` if the other side closed instead.
    ///
    /// # Errors
    ///
    /// It does not come in time, is no frame, or comes from a user that is not trusted; the process is out of
    /// descriptors.
    pub fn receive(&self, deadline: Instant) -> io::Result<Option<Frame>> {
        let mut header = [0; HEADER_BYTES];
        if !self.fill(&mut header, deadline)? {
            return Ok(None);
        }
        let word = |at: usize| {
            let bytes = header[at..at + 4].try_into().expect("four bytes");
            u32::from_ne_bytes(bytes)
        };
        let bad = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
        let kind = Kind::of(word(0)).ok_or_else(|| bad("a frame of an unknown kind"))?;
        let [bytes, fds] = [word(4), word(8)].map(|n| usize::try_from(n).unwrap_or(usize::MAX));
        if bytes > MAX_JSON_BYTES || fds > MAX_FDS {
            return Err(bad("a frame that is too long"));
        }
        let mut json = vec![0; bytes];
        let mut received = Vec::with_capacity(fds);
        if !self.fill(&mut json, deadline)? {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        while received.len() < fds {
            let before = received.len();
            if self.read(&mut [0], &mut received, deadline)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            if received.len() == before || received.len() > fds {
                return Err(bad(UNANNOUNCED));
            }
            in_time(received.len() == fds, deadline)?;
        }
        Ok(Some(Frame {
            kind,
            json,
            fds: received,
        }))
    }

    /// Reads exactly as much; false if there is nothing at all any more.
    fn fill(&self, bytes: &mut [u8], deadline: Instant) -> io::Result<bool> {
        let mut filled = 0;
        let mut fds = Vec::new();
        while filled < bytes.len() {
            match self.read(&mut bytes[filled..], &mut fds, deadline) {
                Ok(0) if filled == 0 => return Ok(false),
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(read) => filled += read,
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(false),
                Err(error) => return Err(error),
            }
            if !fds.is_empty() {
                return Err(io::Error::new(io::ErrorKind::InvalidData, UNANNOUNCED));
            }
            in_time(filled == bytes.len(), deadline)?;
        }
        Ok(true)
    }

    /// Reads some bytes and the descriptors that came with them; 0 at the end.
    fn read(
        &self,
        bytes: &mut [u8],
        fds: &mut Vec<OwnedFd>,
        deadline: Instant,
    ) -> io::Result<usize> {
        let mut space =
            [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(BATCH), ScmCredentials(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = loop {
            self.stream.set_read_timeout(Some(left(deadline)))?;
            match recvmsg(
                &self.stream,
                &mut [IoSliceMut::new(bytes)],
                &mut control,
                RecvFlags::CMSG_CLOEXEC,
            ) {
                Ok(received) => break received,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Err(io::ErrorKind::TimedOut.into()),
                Err(errno) => return Err(errno.into()),
            }
        };
        let mut sender = None;
        for message in control.drain() {
            match message {
                RecvAncillaryMessage::ScmRights(batch) => fds.extend(batch),
                RecvAncillaryMessage::ScmCredentials(credentials) => sender = Some(credentials.uid),
                _ => {}
            }
        }
        if received.flags.contains(ReturnFlags::CTRUNC) {
            return Err(io::Error::other(
                "file descriptors were lost: raise the limit of open files (ulimit -n)",
            ));
        }
        if let Some(trusted) = self.trusted.as_ref().filter(|_| received.bytes > 0) {
            let sender = sender.ok_or_else(|| io::Error::other("its sender is not known"))?;
            trusted.check(sender).map_err(io::Error::other)?;
        }
        Ok(received.bytes)
    }

    /// Takes no more from the other side, whose writes fail from now on. What it wrote before can still
    /// be received, and nothing is waited for.
    pub fn close_ear(&self) {
        // Gone already is gone.
        let _ = self.stream.shutdown(Shutdown::Read);
    }
}

const UNANNOUNCED: &str = "descriptors that were not announced";

/// An error if the deadline has passed and not all is `done`: a peer that sends or takes one byte after another does
/// not make the time longer.
fn in_time(done: bool, deadline: Instant) -> io::Result<()> {
    if !done && Instant::now() >= deadline {
        return Err(io::ErrorKind::TimedOut.into());
    }
    Ok(())
}

/// Never zero, which would mean "no limit".
fn left(deadline: Instant) -> Duration {
    deadline
        .saturating_duration_since(Instant::now())
        .max(Duration::from_millis(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    fn pair() -> (Frames, Frames) {
        let (one, other) = UnixStream::pair().unwrap();
        (Frames::new(one), Frames::new(other))
    }

    fn frame(kind: Kind, json: &str, fds: usize) -> Frame {
        let file = std::fs::File::open("/dev/null").unwrap();
        Frame {
            kind,
            json: json.into(),
            fds: (0..fds).map(|_| file.try_clone().unwrap().into()).collect(),
        }
    }

    #[test]
    fn frames_arrive_with_all_their_descriptors() {
        let (one, other) = pair();
        for (kind, fds) in [
            (Kind::Plan, 0),
            (Kind::Disk, 1),
            (Kind::Disk, BATCH),
            (Kind::Disk, 2 * BATCH + 1),
        ] {
            let sent = frame(kind, "{\"a\": 1}", fds);
            let got = std::thread::scope(|scope| {
                let sending = scope.spawn(|| one.send(&sent, soon()));
                let got = other.receive(soon()).unwrap().unwrap();
                sending.join().unwrap().unwrap();
                got
            });
            assert_eq!((got.kind, got.json, got.fds.len()), (kind, sent.json, fds));
        }
        drop(one);
        assert!(other.receive(soon()).unwrap().is_none());
    }

    #[test]
    fn who_stops_listening_still_hears_what_was_said_before_and_nothing_after() {
        let (one, other) = pair();
        one.send(&frame(Kind::Taken, "", 0), soon()).unwrap();
        other.close_ear();
        assert!(one.send(&frame(Kind::Taken, "", 0), soon()).is_err());
        assert_eq!(other.receive(soon()).unwrap().unwrap().kind, Kind::Taken);
        assert!(other.receive(soon()).unwrap().is_none());
    }

    #[test]
    fn what_is_no_frame_is_refused_and_what_does_not_come_is_late() {
        let (one, other) = pair();
        let late = other.receive(Instant::now()).unwrap_err();
        assert_eq!(late.kind(), io::ErrorKind::TimedOut);
        for header in [[99, 0, 0], [1, u32::MAX, 0], [1, 0, u32::MAX]] {
            let bytes: Vec<u8> = header.into_iter().flat_map(u32::to_ne_bytes).collect();
            (&one.stream).write_all(&bytes).unwrap();
            assert!(other.receive(soon()).is_err(), "{header:?}");
        }
    }

    /// Each byte comes in time, and the whole never would.
    #[test]
    fn a_peer_that_sends_or_takes_bytes_slowly_is_not_waited_for_longer() {
        let pace = Duration::from_millis(10);
        let deadline = || Instant::now() + Duration::from_millis(100);
        let (one, other) = pair();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let header = [Kind::Plan as u32, 1 << 20, 0]
                    .map(u32::to_ne_bytes)
                    .concat();
                (&one.stream).write_all(&header).unwrap();
                // Ends when the other side is gone.
                while (&one.stream).write_all(b" ").is_ok() {
                    std::thread::sleep(pace);
                }
            });
            let late = other.receive(deadline());
            other.close_ear();
            assert_eq!(late.unwrap_err().kind(), io::ErrorKind::TimedOut);
        });

        let (one, other) = pair();
        let long = frame(Kind::Plan, &" ".repeat(MAX_JSON_BYTES), 0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut some = vec![0; 100_000];
                while io::Read::read(&mut &other.stream, &mut some).is_ok_and(|read| read > 0) {
                    std::thread::sleep(pace);
                }
            });
            let late = one.send(&long, deadline()).unwrap_err();
            assert!(
                matches!(
                    late.kind(),
                    io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock
                ),
                "{late}"
            );
            one.stream.shutdown(Shutdown::Both).unwrap();
        });
    }
}
