//! A whole hostile session against the whole daemon, in this process: a front end and its guest do
//! what they like with one disk, and another disk goes on serving.

#![no_main]
#![allow(dead_code, unused_imports, unused_qualifications)]

#[path = "../../tests/support/mod.rs"]
mod support;

use std::cell::RefCell;
use std::ffi::OsString;
use std::io::{ErrorKind, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::thread;
use std::time::Duration;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::write;
use vhost_user_blkmq::cli::{self, Invocation};
use vhost_user_blkmq::config::Config;
use vhost_user_blkmq::server;
use vhost_user_blkmq_fuzz::wire::{halves, message, request, send, words};

use support::Disk;

/// Bytes of each of the two regions of the hostile guest's memory.
const REGION: u64 = 0x1_0000;
/// Queues it uses.
const QUEUES: u32 = 2;
/// Where the rings of a queue are, below the region's end.
fn ring_at(queue: u32) -> u64 {
    0x4000 * u64::from(queue % QUEUES)
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum FdKind {
    Event,
    Memory,
    Socket,
    None,
}

#[derive(Arbitrary, Debug)]
enum Step<'a> {
    /// The beginning of any session, done right.
    Begin,
    /// A session begun, a queue set up and requests made, all right.
    Serve { queue: u8, size: u8, kind: u8, sector: u8, count: u8, indirect: bool },
    /// A queue set up right, with `1 << size` entries.
    Queue { queue: u8, size: u8, base: u8 },
    Features(u64),
    Protocol(u64),
    AddMemory { at: u64, size: u64, user: u64, offset: u64 },
    Table(Vec<(u64, u64, u64, u64)>),
    RemoveMemory(bool),
    Num { queue: u8, size: u32 },
    Base { queue: u8, base: u32 },
    Addr { queue: u8, flags: u32, desc: u64, used: u64, avail: u64 },
    Fd { what: u8, queue: u8, fd: FdKind },
    Enable { queue: u8, on: u32 },
    Stop { queue: u8 },
    Config { offset: u32, size: u32 },
    SetConfig { offset: u32, flags: u32, bytes: &'a [u8] },
    Reset,
    Inflight { size: u64, offset: u64, queues: u16, entries: u16, get: bool },
    Log { size: u64, offset: u64 },
    Raw { request: u8, flags: u8, payload: &'a [u8], fd: FdKind },
    Bytes(&'a [u8]),
    /// The guest writes to its memory.
    Poke { at: u16, bytes: &'a [u8] },
    /// A request laid out right.
    Request { queue: u8, head: u8, kind: u8, sector: u8, bytes: u16, indirect: bool },
    /// More is available, or less.
    Avail { queue: u8, index: u16 },
    Kick,
    Truncate(u32),
    /// The daemon gets to do its part.
    Pause,
}

struct Daemon {
    victim: PathBuf,
}

/// Starts the daemon, once for the process.
fn daemon() -> &'static Daemon {
    static DAEMON: OnceLock<Daemon> = OnceLock::new();
    DAEMON.get_or_init(|| {
        let dir = tempfile::tempdir().expect("a directory").keep();
        // The daemon is in this process, which has more to do than to serve.
        let mut argv: Vec<OsString> = ["fuzz", "--workers", "2", "--log", "error", "--sandbox", "off"]
            .map(OsString::from)
            .into();
        argv.extend(
            std::env::var("BLKMQ_FUZZ_ARGS")
                .unwrap_or_default()
                .split_whitespace()
                .map(OsString::from),
        );
        for name in ["victim", "witness"] {
            let image = dir.join(name);
            std::fs::write(&image, vec![0; 1 << 20]).expect("an image");
            argv.push("--disk".into());
            argv.push(
                format!(
                    "socket-path={}.sock,blk-file={},num-queues=4",
                    image.display(),
                    image.display()
                )
                .into(),
            );
        }
        let Ok(Invocation::Serve(arguments)) = cli::parse(argv) else {
            panic!("the arguments are right");
        };
        let config = arguments.resolve().expect("the configuration is right");
        thread::spawn(move || {
            server::run(config).expect("the daemon starts");
            panic!("the daemon ended");
        });
        let victim = dir.join("victim.sock");
        while UnixStream::connect(&victim).is_err() {
            thread::sleep(Duration::from_millis(5));
        }
        Daemon { victim }
    })
}

thread_local! {
    static WITNESS: RefCell<Option<(Disk, u64)>> = const { RefCell::new(None) };
}

/// The other disk still holds what was written to it.
fn ask_witness(socket: PathBuf) {
    WITNESS.with_borrow_mut(|witness| {
        // The memory that each of its requests takes is never given back, so it starts anew at times;
        // one front end at a time.
        if witness.as_ref().is_some_and(|(_, round)| *round == 1000) {
            *witness = None;
        }
        let (disk, round) = witness.get_or_insert_with(|| (Disk::attach(&socket, 1), 0));
        *round += 1;
        let sector = *round;
        let block = [u8::try_from(*round % 251).expect("below 251"); 512];
        disk.write(0, sector, &block);
        assert_eq!(disk.read(0, sector, 512), block, "the other disk noticed");
    });
}

struct Session {
    socket: UnixStream,
    memory: OwnedFd,
    event: OwnedFd,
    other: UnixStream,
}

impl Session {
    fn say(&self, number: u32, payload: &[u8]) {
        self.say_with(number, payload, FdKind::None);
    }

    fn say_with(&self, number: u32, payload: &[u8], fd: FdKind) {
        let bytes = message(number, 1, payload);
        match fd {
            FdKind::Event => send(&self.socket, &bytes, &[self.event.as_fd()]),
            FdKind::Memory => send(&self.socket, &bytes, &[self.memory.as_fd()]),
            FdKind::Socket => send(&self.socket, &bytes, &[self.other.as_fd()]),
            FdKind::None => send(&self.socket, &bytes, &[]),
        };
    }

    fn ask(&self, number: u32, payload: &[u8]) -> bool {
        self.say(number, payload);
        self.answer()
    }

    /// Waits for one answer; false if the session was closed.
    fn answer(&self) -> bool {
        let mut header = [0; 12];
        if (&self.socket).read_exact(&mut header).is_err() {
            return false;
        }
        let size = u32::from_ne_bytes(header[8..].try_into().expect("four bytes"));
        let mut payload = vec![0; size as usize];
        (&self.socket).read_exact(&mut payload).is_ok()
    }

    /// Throws away what came meanwhile.
    fn listen(&self) {
        self.socket.set_nonblocking(true).expect("a flag");
        let mut bytes = [0; 4096];
        while matches!((&self.socket).read(&mut bytes), Ok(got) if got > 0) {}
        self.socket.set_nonblocking(false).expect("a flag");
    }

    fn add_memory(&self, at: u64, size: u64, user: u64, offset: u64) {
        let payload = words(&[0, at, size, user, offset]);
        self.say_with(request::ADD_MEM_REG, &payload, FdKind::Memory);
    }

    fn poke(&self, at: u64, bytes: &[u8]) {
        let file = std::fs::File::from(self.memory.try_clone().expect("a duplicate"));
        let room = usize::try_from((2 * REGION).saturating_sub(at)).expect("small");
        let _ = file.write_all_at(&bytes[..bytes.len().min(room)], at);
    }

    fn begin(&self) {
        self.listen();
        self.say(request::GET_FEATURES, &[]);
        if !self.answer() {
            return;
        }
        if !self.ask(request::GET_PROTOCOL_FEATURES, &[]) {
            return;
        }
        self.say(request::SET_PROTOCOL_FEATURES, &words(&[0x8a05]));
        self.say(request::SET_OWNER, &[]);
        self.say(request::SET_FEATURES, &words(&[0x1_7000_7e44]));
        self.add_memory(0, REGION, 0x10_0000, 0);
        self.add_memory(REGION, REGION, 0x10_0000 + REGION, REGION);
    }

    fn queue(&self, queue: u8, size: u8, base: u8) {
        let queue = u32::from(queue) % QUEUES;
        let (size, at) = (1 << (size % 9), ring_at(queue));
        self.say(request::SET_VRING_NUM, &halves(&[queue, size]));
        self.say(request::SET_VRING_BASE, &halves(&[queue, u32::from(base)]));
        let mut payload = halves(&[queue, 0]);
        let user = 0x10_0000 + at;
        payload.extend(words(&[user, user + 0x2000, user + 0x1000, 0]));
        self.say(request::SET_VRING_ADDR, &payload);
        for what in [request::SET_VRING_CALL, request::SET_VRING_KICK] {
            self.say_with(what, &words(&[u64::from(queue)]), FdKind::Event);
        }
        self.say(request::SET_VRING_ENABLE, &halves(&[queue, 1]));
    }

    fn run(&self, step: Step<'_>) {
        let number = |queue: u8| u32::from(queue) % (QUEUES + 1);
        match step {
            Step::Begin => self.begin(),
            Step::Serve { queue, size, kind, sector, count, indirect } => {
                self.begin();
                self.queue(queue, size, 0);
                let (size, count) = (1 << (size % 9), count % 65);
                for head in 0..count {
                    self.request(queue, head, (kind.wrapping_add(head), sector), 512, indirect);
                    let entry = u64::from(head) % size;
                    let at = ring_at(u32::from(queue)) + 0x1004 + 2 * entry;
                    self.poke(at, &u16::from(head).to_le_bytes());
                }
                self.run(Step::Avail { queue, index: u16::from(count) });
                self.run(Step::Kick);
                self.run(Step::Pause);
            }
            Step::Queue { queue, size, base } => self.queue(queue, size, base),
            Step::Features(bits) => self.say(request::SET_FEATURES, &words(&[bits])),
            Step::Protocol(bits) => self.say(request::SET_PROTOCOL_FEATURES, &words(&[bits])),
            Step::AddMemory { at, size, user, offset } => {
                self.add_memory(at % (1 << 40), size % (1 << 20), user, offset);
            }
            Step::Table(regions) => {
                let mut payload = halves(&[u32::try_from(regions.len()).unwrap_or(0), 0]);
                for (at, size, user, offset) in regions.iter().take(8) {
                    payload.extend(words(&[*at, *size, *user, *offset]));
                }
                let fds = vec![self.memory.as_fd(); regions.len().min(8)];
                send(&self.socket, &message(request::SET_MEM_TABLE, 1, &payload), &fds);
            }
            Step::RemoveMemory(second) => {
                let at = if second { REGION } else { 0 };
                let payload = words(&[0, at, REGION, 0x10_0000 + at, at]);
                self.say(request::REM_MEM_REG, &payload);
            }
            Step::Num { queue, size } => {
                self.say(request::SET_VRING_NUM, &halves(&[number(queue), size]));
            }
            Step::Base { queue, base } => {
                self.say(request::SET_VRING_BASE, &halves(&[number(queue), base]));
            }
            Step::Addr { queue, flags, desc, used, avail } => {
                let mut payload = halves(&[number(queue), flags]);
                payload.extend(words(&[desc, used, avail, 0]));
                self.say(request::SET_VRING_ADDR, &payload);
            }
            Step::Fd { what, queue, fd } => {
                let none = if matches!(fd, FdKind::None) { 0x100 } else { 0 };
                let payload = words(&[u64::from(number(queue)) | none]);
                self.say_with(request::SET_VRING_KICK + u32::from(what % 3), &payload, fd);
            }
            Step::Enable { queue, on } => {
                self.say(request::SET_VRING_ENABLE, &halves(&[number(queue), on]));
            }
            Step::Stop { queue } => {
                self.say(request::GET_VRING_BASE, &halves(&[number(queue), 0]));
            }
            Step::Config { offset, size } => {
                let size = size % 300;
                let mut payload = halves(&[offset, size, 0]);
                payload.resize(12 + size as usize, 0);
                self.say(request::GET_CONFIG, &payload);
            }
            Step::SetConfig { offset, flags, bytes } => {
                let size = u32::try_from(bytes.len()).unwrap_or(0);
                let mut payload = halves(&[offset, size, flags]);
                payload.extend(bytes);
                self.say(request::SET_CONFIG, &payload);
            }
            Step::Reset => self.say(request::RESET_DEVICE, &[]),
            Step::Inflight { size, offset, queues, entries, get } => {
                let mut payload = words(&[size, offset]);
                payload.extend(queues.to_ne_bytes());
                payload.extend(entries.to_ne_bytes());
                payload.extend([0; 4]);
                if get {
                    self.say(request::GET_INFLIGHT_FD, &payload);
                } else {
                    self.say_with(request::SET_INFLIGHT_FD, &payload, FdKind::Memory);
                }
            }
            Step::Log { size, offset } => {
                self.say_with(request::SET_LOG_BASE, &words(&[size, offset]), FdKind::Memory);
            }
            Step::Raw { request, flags, payload, fd } => {
                let _ = flags;
                self.say_with(u32::from(request % 45), payload, fd);
            }
            Step::Bytes(bytes) => {
                if !bytes.is_empty() {
                    send(&self.socket, bytes, &[]);
                }
            }
            Step::Poke { at, bytes } => self.poke(u64::from(at), bytes),
            Step::Request { queue, head, kind, sector, bytes, indirect } => {
                self.request(queue, head, (kind, sector), bytes, indirect);
            }
            Step::Avail { queue, index } => {
                self.poke(ring_at(u32::from(queue)) + 0x1002, &index.to_le_bytes());
            }
            Step::Kick => {
                let _ = write(&self.event, &1u64.to_ne_bytes());
            }
            Step::Truncate(size) => {
                let _ = ftruncate(&self.memory, u64::from(size) % (3 * REGION));
            }
            Step::Pause => {
                self.listen();
                thread::sleep(Duration::from_micros(200));
            }
        }
    }

    /// Header and status at fixed places for each head, data in the second region.
    fn request(&self, queue: u8, head: u8, (kind, sector): (u8, u8), bytes: u16, indirect: bool) {
        let ring = ring_at(u32::from(queue));
        let head = u64::from(head) % 64;
        let kind = [0u32, 1, 4, 8, 11, 13, 14, 99][usize::from(kind % 8)];
        let header = REGION - 0x2000 + 32 * head;
        let mut block = Vec::new();
        block.extend(kind.to_le_bytes());
        block.extend(0u32.to_le_bytes());
        block.extend(u64::from(sector).to_le_bytes());
        self.poke(header, &block);
        let device_writes = if matches!(kind, 0 | 8) { 2u16 } else { 0 };
        let chain = [
            (header, 16, 1u16),
            (REGION, u32::from(bytes), 1 | device_writes),
            (header + 16, 1, 2),
        ];
        let mut table = Vec::new();
        for (index, (at, len, flags)) in (1u16..).zip(chain) {
            table.extend(at.to_le_bytes());
            table.extend(len.to_le_bytes());
            table.extend(flags.to_le_bytes());
            table.extend(index.to_le_bytes());
        }
        if indirect {
            let at = REGION - 0x1000 + 48 * head;
            self.poke(at, &table);
            table.clear();
            table.extend(at.to_le_bytes());
            table.extend(48u32.to_le_bytes());
            table.extend(4u16.to_le_bytes());
            table.extend(0u16.to_le_bytes());
        }
        self.poke(ring + 16 * head, &table);
    }
}

fuzz_target!(|steps: Vec<Step<'_>>| {
    let daemon = daemon();
    let socket = UnixStream::connect(&daemon.victim).expect("the daemon takes another session");
    socket
        .set_read_timeout(Some(Duration::from_secs(20)))
        .expect("a time-out");
    let memory = memfd_create("guest", MemfdFlags::CLOEXEC).expect("a memfd");
    ftruncate(&memory, 2 * REGION).expect("room");
    let session = Session {
        socket,
        memory,
        event: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an eventfd"),
        other: UnixStream::pair().expect("a socket pair").0,
    };
    for step in steps {
        session.run(step);
    }
    ask_witness(daemon.victim.with_file_name("witness.sock"));
});
