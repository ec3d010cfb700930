//! The session guard: it stands between a front end's socket and the device's.
//!
//! # Who trusts whom
//!
//! The front end (the VMM) is not trusted: it may send anything, in any pieces, and stop reading or
//! writing at any point. The device behind is the vhost-user-backend crate and our own handlers. It
//! parses each message again, but it was written for well-meaning front ends: it takes a payload
//! that comes in two pieces for a broken one, wants memory regions in order, adds addresses that
//! may wrap, and believes that a region is as long as it is said to be. So the guard passes on
//! whole messages only, each in one piece with its file descriptors, and only those that satisfy
//! the rules in `vhost_user/guard/rules.rs`; the first that does not ends the session, and its
//! [`Refusal`] says in one line what was wrong. What the crate cannot do, the in-flight region, is
//! answered here (`vhost_user/guard/inflight.rs`).
//!
//! The guest is not heard here at all: its rings and requests never cross this socket. That ring
//! addresses lie in memory and are aligned is checked here only so that a front end's mistake has a
//! clear message; whoever maps a ring checks the whole of it. A file that is truncated *after* its
//! region passed is likewise beyond the guard: see [`crate::sys::sigbus`].
//!
//! The device's answers are trusted in what they say. They are still received whole and
//! bounded in size, because the guard learns from them which features were offered.
//!
//! # How it runs
//!
//! One thread for each session polls both sockets and the stop event. It blocks nowhere else: what
//! a receiver does not take waits in a queue of a few messages, and while that is full the
//! other side is not read. So a peer that stops reading stops its own session, whose memory stays
//! bounded and which can still be stopped.

mod barrier;
mod config_notifier;
mod dirty_log;
mod fd_share;
mod inflight;
mod memory_regions;
mod payload_checks;
mod payload_sizes;
mod received_fds;
mod refusal;
mod rules;
mod snapshot;
mod stall;
mod stream_sockets;
mod wait;
mod wire;

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

use rustix::event::PollFlags;

pub use config_notifier::ConfigNotifier;
pub use dirty_log::LogKeeper;
pub use inflight::{CarriedInflight, InflightStore};
pub use payload_checks::read_from as config_read_from;
pub use refusal::{Reason, Refusal, RequestName};
pub use snapshot::{CarriedRegion, CarriedRing, CarriedSession, Negotiated, PrimeError};

use crate::sys::fds::{Share, open_fd_table};
use crate::sys::own_sockets::remember_socket;
use barrier::Rest;
pub use barrier::Served;
use config_notifier::Channel;
use fd_share::Promised;
use inflight::Turnstile;
use rules::Rules;
use stall::Stall;
use wait::HUNG_UP;
use wire::{Flushed, MAX_FDS, Message, Progress, Receiver, SendQueue};

/// Memory regions a session may have: as many as the device answers to GET_MAX_MEM_SLOTS, which is
/// what x86 offers a guest (KVM's 512 slots less those it keeps).
pub const MAX_REGIONS: usize = 509;

/// Bytes of the device-specific configuration space a front end may ask for (vhost-user, "Virtio
/// device config space").
pub const CONFIG_SPACE_BYTES: u32 = 256;

/// Descriptors that a session has before its front end has said anything, those received and not judged yet, and some
/// to spare.
pub const FDS_TO_BEGIN: u64 = 16 + wire::UNJUDGED_FDS;

/// Messages moved for one side before the other side and the stop event get their turn.
const MESSAGES_PER_TURN: usize = 32;

/// What one session may use.
#[derive(Clone, Copy, Debug)]
pub struct SessionLimits {
    /// Virtqueues the disk has, at most 256: their index travels in eight bits.
    pub max_queues: u16,
    /// Descriptors of the largest virtqueue.
    pub max_queue_size: u16,
    /// Memory regions the front end may announce, all together.
    pub max_regions: usize,
}

impl SessionLimits {
    /// The limits for a disk with `max_queues` virtqueues of up to `max_queue_size` descriptors.
    pub fn new(max_queues: u16, max_queue_size: u16) -> SessionLimits {
        SessionLimits {
            max_queues,
            max_queue_size,
            max_regions: MAX_REGIONS,
        }
    }
}

/// Why a session is over. Its text is one line.
#[derive(Debug, thiserror::Error)]
pub enum SessionEnd {
    /// The front end closed its connection, perhaps in the middle of a message.
    #[error("the front end closed the connection")]
    FrontEndLeft,
    /// The device closed its side: a handler there failed.
    #[error("the device closed the session because it could not carry out a request")]
    BackendClosed,
    /// The front end sent what may not pass.
    #[error("the front end's message was refused: {0}")]
    Refused(#[from] Refusal),
    /// A file of the guest's memory was truncated while it was used, or a page of it failed.
    #[error(
        "the guest's memory is gone: a file the front end gave for it was truncated, or a page of it \
         failed"
    )]
    MemoryLost,
    /// The front end neither goes on nor leaves.
    #[error(
        "the front end did not go on for {} seconds, with half a message sent or answers not read",
        stall::PATIENCE.as_secs()
    )]
    Stalled,
    /// A take-over was not to be refused because of it (`--close-unready`).
    #[error(
        "its front end was not ready to be handed over, and the new daemon has --close-unready"
    )]
    MadeWay,
    /// The stop event was signalled.
    #[error("the session was stopped")]
    Stopped,
    /// A socket failed, or the device sent what is no answer.
    #[error("the session's connection failed: {0}")]
    Io(#[from] io::Error),
}

/// One session between a front end and the device.
#[derive(Debug)]
pub struct Guard {
    front_end: UnixStream,
    device: UnixStream,
    stop: OwnedFd,
    memory_lost: Option<OwnedFd>,
    from_front_end: Receiver,
    from_device: Receiver,
    to_front_end: SendQueue,
    to_device: SendQueue,
    /// The device has hung up, which is noticed once what it sent before is read.
    device_hung_up: bool,
    rules: Rules,
    turnstile: Turnstile,
    inflight: Arc<InflightStore>,
    channel: Arc<Channel>,
    rest: Rest,
    stall: Stall,
}

impl Guard {
    /// A session of the accepted connection `vmm` with the device at the other end of `backend`.
    ///
    /// The sockets may be blocking or not; their flags stay as they are. `stop` is an eventfd (or
    /// anything that can be polled): when it is readable, the session ends.
    ///
    /// # Errors
    ///
    /// `/proc/self/fd` cannot be opened; see [`open_fd_table`].
    pub fn new(
        vmm: UnixStream,
        backend: UnixStream,
        limits: SessionLimits,
        stop: OwnedFd,
    ) -> io::Result<Guard> {
        open_fd_table()?;
        remember_socket(&vmm)?;
        let channel = Arc::new(Channel::default());
        Ok(Guard {
            front_end: vmm,
            device: backend,
            stop,
            memory_lost: None,
            from_front_end: Receiver::new(),
            from_device: Receiver::new(),
            to_front_end: SendQueue::default(),
            to_device: SendQueue::default(),
            device_hung_up: false,
            rules: Rules::new(limits, Arc::clone(&channel)),
            turnstile: Turnstile::default(),
            inflight: Arc::default(),
            channel,
            rest: Rest::default(),
            stall: Stall::new(stall::PATIENCE),
        })
    }

    /// What the front end says of its dirty log goes to `keeper`. Without one a log is refused.
    pub fn with_log(mut self, keeper: Arc<dyn LogKeeper>) -> Guard {
        self.rules.log.keep(keeper);
        self
    }

    /// Has the session count its descriptors in `share`, which holds what it needs to begin.
    pub fn with_share(mut self, share: Share) -> Guard {
        self.rules.promised = Promised::new(share);
        self
    }

    /// Ends the session when `memory_lost` is readable.
    pub fn watch_memory(self, memory_lost: OwnedFd) -> Guard {
        Guard {
            memory_lost: Some(memory_lost),
            ..self
        }
    }

    /// Waits that long for a front end in the middle of something.
    #[cfg(test)]
    fn with_patience(self, patience: std::time::Duration) -> Guard {
        Guard {
            stall: Stall::new(patience),
            ..self
        }
    }

    /// The same guard, with the in-flight region the front end may give put where the device looks for it.
    pub fn with_inflight(mut self, store: Arc<InflightStore>) -> Guard {
        self.inflight = store;
        self
    }

    /// A handle with which other threads tell this session's front end that the config changed.
    pub fn notifier(&self) -> ConfigNotifier {
        ConfigNotifier::new(Arc::clone(&self.channel))
    }

    /// Carries messages until the session is over, and shuts both connections down.
    pub fn run(mut self) -> SessionEnd {
        loop {
            if let Served::Over(end) = self.serve() {
                self.close();
                return end;
            }
        }
    }

    /// Waits until something can be done, and does it.
    fn turn(&mut self) -> Result<(), SessionEnd> {
        let midway = self.from_front_end.is_midway() || !self.to_front_end.is_empty();
        let moved = self.from_front_end.total() + self.to_front_end.total();
        if self.stall.look(midway, moved, Instant::now()) {
            return Err(SessionEnd::Stalled);
        }
        let ready = self.wait()?;
        if ready.stop {
            return Err(SessionEnd::Stopped);
        }
        if ready.make_way {
            return Err(SessionEnd::MadeWay);
        }
        if ready.memory_lost {
            return Err(SessionEnd::MemoryLost);
        }
        if ready.wish {
            self.rest.begin();
        }
        self.flush()?;
        if ready.front_end.intersects(PollFlags::IN | HUNG_UP) {
            if !self.takes_requests() && ready.front_end.intersects(HUNG_UP) {
                return Err(SessionEnd::FrontEndLeft);
            }
            self.carry_requests()?;
        }
        if ready.device.intersects(PollFlags::IN | HUNG_UP) {
            self.device_hung_up |= ready.device.intersects(HUNG_UP);
            self.carry_answers()?;
        }
        let midway = self.from_front_end.is_midway()
            || self.turnstile.is_closed()
            || !self.to_device.is_empty();
        if let Some(question) = self.rest.question(midway) {
            self.to_device.push(question);
            self.flush()?;
        }
        Ok(())
    }

    /// Sends what is queued, to both sides.
    fn flush(&mut self) -> Result<(), SessionEnd> {
        if self.to_front_end.flush(&self.front_end)? == Flushed::Closed {
            return Err(SessionEnd::FrontEndLeft);
        }
        if self.to_device.flush(&self.device)? == Flushed::Closed {
            // What the device said before it closed, a refusal perhaps, is still to be read.
            self.device_hung_up = true;
            self.carry_answers()?;
            return Err(SessionEnd::BackendClosed);
        }
        Ok(())
    }

    /// Whether a request of the front end can be dealt with now.
    fn takes_requests(&self) -> bool {
        self.to_device.has_room()
            && !self.turnstile.is_closed()
            && self.rest.lets_read(self.from_front_end.is_midway())
    }

    /// Carries the front end's requests to the device, each after it was judged.
    fn carry_requests(&mut self) -> Result<(), SessionEnd> {
        for _ in 0..MESSAGES_PER_TURN {
            if !self.takes_requests() {
                break;
            }
            let request = self.from_front_end.request();
            let refused = |reason| {
                SessionEnd::Refused(Refusal {
                    request: request.map(RequestName),
                    reason,
                })
            };
            match self.from_front_end.receive(&self.front_end)? {
                Progress::Header(header) => {
                    self.rules.check_header(header).map_err(|reason| Refusal {
                        request: Some(RequestName(header.request)),
                        reason,
                    })?;
                    self.from_front_end.expect_payload(header);
                }
                Progress::Message(message) => {
                    let message = self.rules.admit(message).map_err(refused)?;
                    self.rest.passes(&message);
                    self.to_device.push(self.turnstile.pass(message));
                    self.flush()?;
                }
                Progress::TooManyFds => return Err(refused(Reason::TooManyFds(MAX_FDS))),
                Progress::FdsLost => return Err(refused(Reason::FdsLost)),
                Progress::Blocked => break,
                Progress::Closed => return Err(SessionEnd::FrontEndLeft),
            }
        }
        Ok(())
    }

    /// Answers a request in the device's stead.
    fn answer(&self, request: &Message) -> Result<Option<Message>, Refusal> {
        self.rules
            .carry_out(request, &self.inflight)
            .map_err(|reason| Refusal {
                request: Some(RequestName(request.header.request)),
                reason,
            })
    }

    /// Carries the device's answers to the front end.
    fn carry_answers(&mut self) -> Result<(), SessionEnd> {
        for _ in 0..MESSAGES_PER_TURN {
            if !self.to_front_end.has_room() {
                break;
            }
            match self.from_device.receive(&self.device)? {
                Progress::Header(header) if rules::check_answer_header(header) => {
                    self.from_device.expect_payload(header);
                }
                Progress::Message(message) if self.rest.takes(&message) => {}
                Progress::Message(message) => {
                    self.rules.observe_answer(&message);
                    let answer = match self.turnstile.answered(&message) {
                        None => message,
                        Some(ours) => match self.answer(&ours)? {
                            Some(answer) => answer,
                            None => continue,
                        },
                    };
                    self.to_front_end.push(answer);
                    if self.to_front_end.flush(&self.front_end)? == Flushed::Closed {
                        return Err(SessionEnd::FrontEndLeft);
                    }
                }
                Progress::Blocked => break,
                Progress::Closed => return Err(SessionEnd::BackendClosed),
                wrong => {
                    return Err(SessionEnd::Io(io::Error::new(
                        io::ErrorKind::InvalidData,
                        format!("the device sent what is no answer: {wrong:?}"),
                    )));
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
