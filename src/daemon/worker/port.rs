//! One ring of a worker with everything that hangs on it: where the virtqueue and the hctx meet.

use std::os::fd::{AsFd, OwnedFd};

use crate::engine::CallSlot;
use crate::virtio::ring::Ring;

use super::super::message::RingId;
use super::super::report::RingStats;

/// How the guest is told that requests are done.
#[derive(Debug)]
pub(super) enum Call {
    /// Not at all: the guest polls (a Linux guest's `poll_queues`).
    None,
    /// By a write that cannot block.
    Direct(OwnedFd),
    /// By a write of the engine, because one of ours might block: the flag belongs to the open file
    /// description, which is the front end's, so it is not ours to change.
    Engine(CallSlot),
}

/// What keeps a ring from being drained, beside being empty.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Gates {
    /// The front end has not enabled it (SET_VRING_ENABLE).
    pub disabled: bool,
    /// The disk is frozen: its memory is about to change.
    pub frozen: bool,
    /// It is being stopped (GET_VRING_BASE, disconnect).
    pub stopping: bool,
    /// The guest broke it.
    pub broken: bool,
}

/// A started ring.
#[derive(Debug)]
pub(super) struct Port {
    pub id: RingId,
    pub ring: Ring,
    /// The engine watches its kick eventfd.
    pub has_kick: bool,
    pub call: Call,
    pub err: Option<OwnedFd>,
    pub gates: Gates,
    /// Looked at each turn, kicks suppressed.
    pub hot: bool,
    /// Used elements were put since the last decision about a call.
    pub touched: bool,
    /// The segment pool was empty; a completion gives it something back.
    pub no_room: bool,
    pub stats: RingStats,
}

impl Port {
    /// Whether requests may be taken from it.
    #[inline]
    pub fn is_open(&self) -> bool {
        self.gates == Gates::default()
    }

    /// Tells whoever watches the err fd that the ring is broken. The front end may not listen, and
    /// there is nobody else to tell.
    pub fn signal_error(&self) {
        if let Some(err) = &self.err
            && is_nonblocking(err)
        {
            let _ = write_one(err);
        }
    }
}

/// Whether a write to the descriptor returns instead of waiting.
pub(super) fn is_nonblocking(fd: &impl AsFd) -> bool {
    rustix::fs::fcntl_getfl(fd).is_ok_and(|flags| flags.contains(rustix::fs::OFlags::NONBLOCK))
}

/// Adds one to an eventfd, or puts eight bytes into a pipe. A full counter or pipe wakes its reader
/// just as well, so "would block" is success.
#[inline]
pub(super) fn write_one(fd: &OwnedFd) -> Result<(), rustix::io::Errno> {
    match rustix::io::write(fd, &1u64.to_ne_bytes()) {
        Ok(_) | Err(rustix::io::Errno::AGAIN) => Ok(()),
        Err(error) => Err(error),
    }
}
