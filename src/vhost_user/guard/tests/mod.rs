//! A scripted front end on one side of the guard and a scripted device on the other.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc;
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use vhost::vhost_user::message::FrontendReq as R;

use super::*;

mod inflight;
mod log;
mod order;
mod random;
mod requests;
mod transport;
mod whole;

/// A deadline for what must happen at once; only a broken build waits for it.
const DEADLINE: Duration = Duration::from_secs(30);

const PROTOCOL_FEATURES: u64 = 1 << 30;
/// MQ, LOG_SHMFD, REPLY_ACK, BACKEND_REQ, CONFIG, RESET_DEVICE, CONFIGURE_MEM_SLOTS.
const ALL_PROTOCOL: u64 = 0x1 | 0x2 | 0x8 | 0x20 | 0x200 | 0x2000 | 0x8000 | 0x8_0000;

fn limits() -> SessionLimits {
    SessionLimits::new(4, 256)
}

/// A message as a front end composes it.
#[derive(Debug)]
struct Sent {
    bytes: Vec<u8>,
    fds: Vec<OwnedFd>,
}

/// A message as the device finds it.
#[derive(Debug)]
struct Found {
    request: u32,
    flags: u32,
    payload: Vec<u8>,
    fds: Vec<OwnedFd>,
}

fn raw(request: u32, flags: u32, payload: &[u8]) -> Sent {
    let size = u32::try_from(payload.len()).unwrap();
    let mut bytes = Vec::new();
    for word in [request, flags, size] {
        bytes.extend_from_slice(&word.to_ne_bytes());
    }
    bytes.extend_from_slice(payload);
    Sent {
        bytes,
        fds: Vec::new(),
    }
}

fn plain(request: R) -> Sent {
    raw(request.into(), 1, &[])
}

fn u64s(request: R, values: &[u64]) -> Sent {
    let payload: Vec<u8> = values.iter().flat_map(|v| v.to_ne_bytes()).collect();
    raw(request.into(), 1, &payload)
}

fn u32s(request: R, values: &[u32]) -> Sent {
    let payload: Vec<u8> = values.iter().flat_map(|v| v.to_ne_bytes()).collect();
    raw(request.into(), 1, &payload)
}

impl Sent {
    fn with(mut self, fd: impl Into<OwnedFd>) -> Sent {
        self.fds.push(fd.into());
        self
    }
}

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::empty()).unwrap()
}

fn file_of(bytes: u64) -> File {
    let file = tempfile::tempfile_in("/dev/shm").unwrap();
    file.set_len(bytes).unwrap();
    file
}

/// guest address, size, front-end address, offset.
type RegionWords = [u64; 4];

fn mem_table(regions: &[RegionWords]) -> Sent {
    let mut words = vec![regions.len() as u64];
    words.extend(regions.iter().flatten());
    u64s(R::SET_MEM_TABLE, &words)
}

fn one_region(request: R, region: RegionWords) -> Sent {
    let mut words = vec![0];
    words.extend(region);
    u64s(request, &words)
}

fn config_message(request: R, offset: u32, size: u32, flags: u32, contents: usize) -> Sent {
    let mut payload: Vec<u8> = [offset, size, flags]
        .iter()
        .flat_map(|word| word.to_ne_bytes())
        .collect();
    payload.resize(12 + contents, 0);
    raw(request.into(), 1, &payload)
}

/// What a front end says before it may say everything.
fn opening() -> Vec<Sent> {
    vec![
        u64s(R::SET_PROTOCOL_FEATURES, &[ALL_PROTOCOL]),
        u64s(R::SET_FEATURES, &[PROTOCOL_FEATURES]),
    ]
}

/// Sends `bytes` with `fds` in one segment.
fn send_segment(socket: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
    }
    Ok(sendmsg(
        socket,
        &[IoSlice::new(bytes)],
        &mut control,
        SendFlags::NOSIGNAL,
    )?)
}

/// Sends one message in one segment.
fn send(socket: &UnixStream, message: &Sent) {
    let fds: Vec<_> = message.fds.iter().map(AsFd::as_fd).collect();
    let sent = send_segment(socket, &message.bytes, &fds).unwrap();
    assert_eq!(sent, message.bytes.len());
}

/// Reads as the `vhost` crate does: a header with its descriptors, then the payload at once, which
/// must be there whole. `None` at the end of the stream.
fn find(socket: &UnixStream) -> Option<Found> {
    let mut header = [0; 12];
    let (got, fds) = recv_segment(socket, &mut header);
    if got == 0 {
        return None;
    }
    assert_eq!(got, 12, "a header in one piece");
    let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
    let mut payload = vec![0; word(8) as usize];
    if !payload.is_empty() {
        let (got, late) = recv_segment(socket, &mut payload);
        assert_eq!(got, payload.len(), "a payload in one piece");
        assert!(late.is_empty(), "descriptors come with the header");
    }
    Some(Found {
        request: word(0),
        flags: word(4),
        payload,
        fds,
    })
}

fn recv_segment(socket: &UnixStream, bytes: &mut [u8]) -> (usize, Vec<OwnedFd>) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = match recvmsg(
        socket,
        &mut [IoSliceMut::new(bytes)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    ) {
        Ok(received) => received,
        // The end as well: the guard closed with something of ours unread.
        Err(Errno::CONNRESET) => return (0, Vec::new()),
        Err(errno) => panic!("{errno}"),
    };
    let fds = control
        .drain()
        .flat_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => fds.collect::<Vec<_>>(),
            _ => Vec::new(),
        })
        .collect();
    (received.bytes, fds)
}

/// Everything the device finds until the stream ends.
fn find_all(device: &UnixStream) -> Vec<Found> {
    std::iter::from_fn(|| find(device)).collect()
}

/// The guard between two sockets, run on the thread that calls.
struct Bench {
    front_end: UnixStream,
    device: UnixStream,
    guard: Guard,
}

fn bench() -> Bench {
    bench_with(limits())
}

fn bench_with(limits: SessionLimits) -> Bench {
    let (front_end, vmm) = UnixStream::pair().unwrap();
    let (backend, device) = UnixStream::pair().unwrap();
    for socket in [&front_end, &device] {
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        socket.set_write_timeout(Some(DEADLINE)).unwrap();
    }
    Bench {
        front_end,
        device,
        guard: Guard::new(vmm, backend, limits, event()).unwrap(),
    }
}

/// Sends `messages` and closes; gives the end of the session and what came through. All of it fits
/// the socket buffers, so nothing has to run at the same time.
fn exchange_with(limits: SessionLimits, messages: &[Sent]) -> (SessionEnd, Vec<Found>) {
    let Bench {
        front_end,
        device,
        guard,
    } = bench_with(limits);
    for message in messages {
        send(&front_end, message);
    }
    drop(front_end);
    let end = guard.run();
    (end, find_all(&device))
}

fn exchange(messages: Vec<Sent>) -> (SessionEnd, Vec<Found>) {
    exchange_with(limits(), &messages)
}

/// After the opening, `messages` pass, each unchanged, with as many descriptors as it had.
#[track_caller]
fn pass(messages: Vec<Sent>) -> Vec<Found> {
    let mut all = opening();
    let skip = all.len();
    all.extend(messages);
    let (end, mut found) = exchange_with(limits(), &all);
    assert!(matches!(end, SessionEnd::FrontEndLeft), "{end}");
    assert_eq!(found.len(), all.len());
    for (sent, found) in all.iter().zip(&found) {
        assert_eq!(sent.bytes[0..4], found.request.to_ne_bytes());
        assert_eq!(sent.bytes[12..], found.payload);
        assert_eq!(sent.fds.len(), found.fds.len());
    }
    found.split_off(skip)
}

/// After the opening, all but the last of `messages` pass, and the last is refused with `text`.
#[track_caller]
fn refuse(messages: Vec<Sent>, text: &str) {
    let mut all = opening();
    all.extend(messages);
    let (end, found) = exchange_with(limits(), &all);
    assert!(matches!(end, SessionEnd::Refused(_)), "{end}");
    let line = end.to_string();
    assert!(line.contains(text), "{line}");
    assert!(!line.contains('\n'), "{line}");
    assert_eq!(found.len(), all.len() - 1, "{line}");
}

/// The end of a guard on a thread of its own. It comes, or the test fails; it is never waited for
/// without end.
struct Ending(mpsc::Receiver<SessionEnd>);

impl Ending {
    fn of(guard: Guard) -> Ending {
        let (ended, ending) = mpsc::channel();
        std::thread::spawn(move || ended.send(guard.run()));
        Ending(ending)
    }

    #[track_caller]
    fn join(self) -> SessionEnd {
        self.0.recv_timeout(DEADLINE).expect("the session ends")
    }
}

/// A guard on a thread of its own, with its way to be stopped.
struct Running {
    front_end: UnixStream,
    device: UnixStream,
    stop: OwnedFd,
    notifier: ConfigNotifier,
    thread: Ending,
}

fn running() -> Running {
    let (front_end, vmm) = UnixStream::pair().unwrap();
    let (backend, device) = UnixStream::pair().unwrap();
    for socket in [&front_end, &device] {
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        socket.set_write_timeout(Some(DEADLINE)).unwrap();
    }
    let stop = event();
    let guard = Guard::new(vmm, backend, limits(), stop.try_clone().unwrap()).unwrap();
    let notifier = guard.notifier();
    Running {
        front_end,
        device,
        stop,
        notifier,
        thread: Ending::of(guard),
    }
}

fn signal(stop: &OwnedFd) {
    rustix::io::write(stop, &1_u64.to_ne_bytes()).unwrap();
}
