//! The fds of other people: eventfds that wake us, and eventfds we write to.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use io_uring::{opcode, squeue, types};
use rustix::event::{EventfdFlags, PollFlags, eventfd};
use rustix::fs::{FileType, OFlags};

use super::Errno;
use super::uring::Ring;

/// Wakes an engine from any thread: see [`super::Engine::watch_waker`].
#[derive(Clone, Debug)]
pub struct Waker {
    fd: Arc<OwnedFd>,
}

impl Waker {
    /// A waker nobody listens to yet; what it is told before is not lost.
    pub fn new() -> io::Result<Self> {
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Waker { fd: Arc::new(fd) })
    }

    /// Makes the engine report [`super::Event::Message`].
    pub fn wake(&self) {
        // Fails only when the counter is at its end, 2^64 wakes from here, and is a wake even then.
        let _ = rustix::io::write(&*self.fd, &ONE);
    }

    pub(super) fn duplicate(&self) -> io::Result<OwnedFd> {
        self.fd.try_clone()
    }
}

/// What is written to an eventfd.
static ONE: [u8; 8] = 1u64.to_ne_bytes();

/// Whom a watch stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Watched {
    Kick(u32),
    Waker,
}

/// An fd armed in the ring.
#[derive(Debug)]
pub(super) struct Watch {
    fd: OwnedFd,
    pub(super) whom: Watched,
    pub(super) generation: u32,
    /// The ring has a poll for it.
    pub(super) armed: bool,
    /// It hung up: never armed again.
    pub(super) lost: bool,
}

/// What a poll's completion means for its watch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Polled {
    /// It was written to.
    Ready,
    /// It is of no use any more.
    Lost(Errno),
    /// Nothing to report.
    Nothing,
}

impl Watch {
    pub(super) fn new(fd: OwnedFd, whom: Watched, generation: u32) -> Self {
        Watch {
            fd,
            whom,
            generation,
            armed: true,
            lost: false,
        }
    }

    /// Armed until told otherwise. The eventfd is never read: the poll reports each write, not the
    /// count, so a kick costs no system call here.
    pub(super) fn sqe(&self) -> squeue::Entry {
        let events = u32::from(PollFlags::IN.bits());
        opcode::PollAdd::new(types::Fd(self.fd.as_raw_fd()), events)
            .multi(true)
            .build()
    }

    /// Reads a completion: poll's event bits, or a negative errno.
    pub(super) fn on_cqe(&mut self, res: i32) -> Polled {
        if self.lost {
            return Polled::Nothing;
        }
        let error = match u16::try_from(res) {
            Err(_) => Errno(-res),
            Ok(bits) => {
                let events = PollFlags::from_bits_retain(bits);
                if !events.intersects(PollFlags::ERR | PollFlags::HUP | PollFlags::NVAL) {
                    return if events.contains(PollFlags::IN) {
                        Polled::Ready
                    } else {
                        Polled::Nothing
                    };
                }
                Errno(libc::EPIPE)
            }
        };
        self.lost = true;
        Polled::Lost(error)
    }

    pub(super) fn into_fd(self) -> OwnedFd {
        self.fd
    }
}

/// Refuses what has no readiness to wait for. Files and many devices are always ready: a poll on
/// them ends at once, each time it is armed.
pub(super) fn check_pollable(fd: &OwnedFd) -> io::Result<()> {
    let kind = FileType::from_raw_mode(rustix::fs::fstat(fd)?.st_mode);
    // An eventfd is an anonymous inode, which has no type.
    if matches!(kind, FileType::Unknown | FileType::Fifo | FileType::Socket) {
        return Ok(());
    }
    Err(io::Error::new(
        io::ErrorKind::InvalidInput,
        "neither an eventfd nor a pipe nor a socket",
    ))
}

/// A call fd of an engine, as [`super::Engine::add_call`] numbers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CallSlot {
    pub(super) index: u16,
    pub(super) generation: u32,
}

/// Writes to one call fd whose end nobody hears of before one is waited for.
const UNHEARD_CALLS: u8 = 63;

/// An fd we write to.
#[derive(Debug)]
pub(super) struct Call {
    fd: OwnedFd,
    pub(super) token: u32,
    pub(super) generation: u32,
    /// A write is under way.
    pub(super) in_flight: bool,
    /// Write once more when it is over: it may have been taken before what we now call for.
    pub(super) again: bool,
    pub(super) lost: bool,
    /// Writes to it may block, so that a kernel thread has to do them.
    blocking: bool,
    /// Writes since the last one whose end we asked to hear of.
    unheard: u8,
    /// Its place in the ring's registered file table, which saves the kernel looking up the number and counting
    /// the users of a file that the front end uses at the same time.
    place: Option<u32>,
}

impl Call {
    pub(super) fn new(fd: OwnedFd, token: u32, generation: u32) -> io::Result<Self> {
        let blocking = !rustix::fs::fcntl_getfl(&fd)?.contains(OFlags::NONBLOCK);
        Ok(Call {
            fd,
            token,
            generation,
            in_flight: false,
            again: false,
            lost: false,
            blocking,
            unheard: 0,
            place: None,
        })
    }

    /// Has writes go to it by a place in the ring's registered file table, if that can be had.
    pub(super) fn register(&mut self, ring: &Ring, place: u32) {
        self.place = ring
            .register_file(place, self.fd.as_raw_fd())
            .then_some(place);
    }

    pub(super) fn unregister(&self, ring: &Ring) {
        if let Some(place) = self.place {
            ring.unregister_file(place);
        }
    }

    pub(super) fn into_fd(self) -> OwnedFd {
        self.fd
    }

    /// Whether a write nobody hears of may be under way.
    pub(super) fn may_wait(&self) -> bool {
        self.unheard > 0
    }

    /// Adds one to the counter. Through the ring whatever the fd's flags say: they belong to the
    /// front end, which may change them while we look away, and a worker never blocks on its fd.
    /// A blocking fd costs a kernel thread's work; left to itself io_uring would first try 128 times.
    ///
    /// The completion of a write would end the sleep that the same system call begins, so most
    /// writes ask for none; now and then one does, and none follows until it is over. That bounds
    /// what a front end can pile up by making its fd block. The flag says whether this one reports.
    pub(super) fn sqe(&mut self, silent: bool) -> (squeue::Entry, bool) {
        let write = match self.place {
            Some(place) => opcode::Write::new(types::Fixed(place), ONE.as_ptr(), 8),
            None => opcode::Write::new(types::Fd(self.fd.as_raw_fd()), ONE.as_ptr(), 8),
        };
        let entry = write.build();
        if self.blocking {
            return (entry.flags(squeue::Flags::ASYNC), true);
        }
        if silent && self.unheard < UNHEARD_CALLS {
            self.unheard += 1;
            return (entry.flags(squeue::Flags::SKIP_SUCCESS), false);
        }
        self.unheard = 0;
        (entry, true)
    }
}

/// A table whose places keep their numbers, and are reused.
#[derive(Debug)]
pub(super) struct Table<T> {
    entries: Vec<Option<T>>,
}

impl<T> Table<T> {
    pub(super) fn new(capacity: u16) -> Self {
        Table {
            entries: (0..capacity).map(|_| None).collect(),
        }
    }

    pub(super) fn capacity(&self) -> u16 {
        u16::try_from(self.entries.len()).expect("made with a u16")
    }

    /// A free place.
    pub(super) fn vacant(&self) -> io::Result<u16> {
        let place = self.entries.iter().position(Option::is_none);
        place.and_then(|p| u16::try_from(p).ok()).ok_or_else(|| {
            io::Error::other(format!(
                "all {} places of this worker's engine are taken",
                self.entries.len()
            ))
        })
    }

    pub(super) fn put(&mut self, index: u16, entry: T) {
        let place = &mut self.entries[usize::from(index)];
        debug_assert!(place.is_none());
        *place = Some(entry);
    }

    #[inline]
    pub(super) fn get_mut(&mut self, index: u16) -> Option<&mut T> {
        self.entries.get_mut(usize::from(index))?.as_mut()
    }

    pub(super) fn get(&self, index: u16) -> Option<&T> {
        self.entries.get(usize::from(index))?.as_ref()
    }

    pub(super) fn take(&mut self, index: u16) -> Option<T> {
        self.entries.get_mut(usize::from(index))?.take()
    }

    pub(super) fn find(&self, wanted: impl Fn(&T) -> bool) -> Option<u16> {
        let place = self
            .entries
            .iter()
            .position(|e| e.as_ref().is_some_and(&wanted))?;
        u16::try_from(place).ok()
    }
}
