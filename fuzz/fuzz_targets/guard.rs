//! The session guard: whatever a front end writes, in whatever pieces and with whatever file
//! descriptors, what reaches the device is whole messages within bounds, and the session ends.

#![no_main]

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::thread;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost_user_blkmq::vhost_user::guard::{Guard, SessionLimits};
use vhost_user_blkmq_fuzz::wire::{message, request, send};

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Fd {
    Event,
    Memory,
    Socket,
}

#[derive(Arbitrary, Debug)]
enum Piece<'a> {
    Bytes(&'a [u8], Vec<Fd>),
    Message {
        request: u8,
        flags: u8,
        payload: &'a [u8],
        fds: Vec<Fd>,
    },
    /// What every front end begins with.
    Greeting,
    /// The device gets to answer.
    Listen,
}

/// Longer than any message there is: SET_MEM_TABLE with all its regions.
const LONGEST: usize = 4096;

/// The device's side: reads what came so far, answers what has an answer.
struct Device {
    socket: UnixStream,
    read: Vec<u8>,
}

impl Device {
    /// False at the end of the session.
    fn listen(&mut self) -> bool {
        let mut chunk = [0; 4096];
        match self.socket.read(&mut chunk) {
            Ok(0) => return false,
            Ok(got) => self.read.extend(&chunk[..got]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(_) => return false,
        }
        while self.read.len() >= 12 {
            let word = |at: usize| {
                u32::from_ne_bytes(self.read[at..at + 4].try_into().expect("four bytes"))
            };
            let (request, flags, size) = (word(0), word(4), word(8) as usize);
            assert_eq!(flags & 0x7, 1, "version 1 and no reply");
            assert!(size <= LONGEST, "{size} bytes of payload");
            if self.read.len() < 12 + size {
                break;
            }
            self.read.drain(..12 + size);
            let answer = match request {
                request::GET_FEATURES => Some(0x1_7000_7e46u64),
                request::GET_PROTOCOL_FEATURES => Some(0xffff),
                17 | 36 => Some(64),
                _ if flags & 8 != 0 => Some(0),
                _ => None,
            };
            if let Some(value) = answer {
                let bytes = message(request, 5, &value.to_ne_bytes());
                let _ = self.socket.write_all(&bytes);
            }
        }
        true
    }
}

fuzz_target!(|pieces: Vec<Piece<'_>>| {
    let (front, vmm) = UnixStream::pair().expect("a socket pair");
    let (device, backend) = UnixStream::pair().expect("a socket pair");
    let stop = eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd");
    let guard =
        Guard::new(vmm, backend, SessionLimits::new(16, 1024), stop).expect("a guard begins");
    let thread = thread::spawn(move || guard.run());
    let memory: OwnedFd = memfd_create("guest", MemfdFlags::CLOEXEC).expect("a memfd");
    ftruncate(&memory, 1 << 20).expect("a megabyte");
    let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an eventfd");
    let socket = UnixStream::pair().expect("a socket pair").0;
    device.set_nonblocking(true).expect("a flag");
    let mut device = Device {
        socket: device,
        read: Vec::new(),
    };
    fn fd_of<'a>(
        fd: Fd,
        (event, memory, socket): (&'a OwnedFd, &'a OwnedFd, &'a UnixStream),
    ) -> BorrowedFd<'a> {
        match fd {
            Fd::Event => event.as_fd(),
            Fd::Memory => memory.as_fd(),
            Fd::Socket => socket.as_fd(),
        }
    }
    let all = (&event, &memory, &socket);
    let carry = |fds: &[Fd]| -> Vec<BorrowedFd<'_>> {
        fds.iter().take(12).map(|fd| fd_of(*fd, all)).collect()
    };
    for piece in pieces {
        match piece {
            Piece::Bytes(bytes, fds) if !bytes.is_empty() => {
                send(&front, bytes, &carry(&fds));
            }
            Piece::Bytes(..) => {}
            Piece::Message {
                request,
                flags,
                payload,
                fds,
            } => {
                let bytes = message(u32::from(request % 45), u32::from(flags), payload);
                send(&front, &bytes, &carry(&fds));
            }
            Piece::Greeting => {
                for (request, payload) in [
                    (request::GET_FEATURES, Vec::new()),
                    (request::GET_PROTOCOL_FEATURES, Vec::new()),
                ] {
                    send(&front, &message(request, 1, &payload), &[]);
                }
                // The guard learns what is offered from the answers: wait for one of each.
                let mut replies = [0; 40];
                for _ in 0..2 {
                    let mut got = 0;
                    while got < 20 {
                        if !device.listen() {
                            break;
                        }
                        front.set_nonblocking(true).expect("a flag");
                        match (&front).read(&mut replies[..20 - got]) {
                            Ok(0) => break,
                            Ok(bytes) => got += bytes,
                            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                                thread::yield_now();
                            }
                            Err(_) => break,
                        }
                    }
                }
                for (request, value) in [
                    (request::SET_PROTOCOL_FEATURES, 0xffffu64),
                    (request::SET_FEATURES, 0x1_7000_7e46),
                ] {
                    send(&front, &message(request, 1, &value.to_ne_bytes()), &[]);
                }
            }
            Piece::Listen => {
                device.listen();
            }
        }
    }
    let _ = front.shutdown(Shutdown::Write);
    device.socket.set_nonblocking(false).expect("a flag");
    while device.listen() {}
    let _ = thread.join().expect("the guard does not panic");
});
