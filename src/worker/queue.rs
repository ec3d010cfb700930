//! One ring of a worker with everything that hangs on it: where the virtqueue and the hctx meet.

use std::sync::Arc;

use crate::engine::{CallSlot, Engine};
use crate::virtio::ring::Ring;

use crate::mq::ids::{HctxId, RingId};
use crate::sys::listener::Stop;
use crate::worker::counts::RingStats;

/// What keeps a ring from being drained, beside being empty.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Gates {
    /// The front end has not enabled it (SET_VRING_ENABLE).
    pub disabled: bool,
    /// The disk is frozen: its memory is about to change.
    pub frozen: bool,
    /// It is being stopped (GET_VRING_BASE, a reset).
    pub stopping: bool,
    /// Its session ends, and what is held after an error stays in the in-flight record.
    pub leaving: bool,
    /// The guest broke it.
    pub broken: bool,
    /// The disk is held after an error.
    pub held: bool,
}

impl Gates {
    /// Whether somebody waits for the ring's requests to end.
    pub fn is_draining(self) -> bool {
        self.disabled || self.frozen || self.stopping || self.leaving
    }

    /// Whether what the ring has is to end as it ends, also if its disk is held.
    pub fn must_end(self) -> bool {
        self.disabled || self.stopping
    }
}

/// A started ring.
#[derive(Debug)]
pub(super) struct Port {
    pub id: RingId,
    pub ring: Ring,
    /// Ends the session: its memory was taken away.
    pub memory_lost: Arc<Stop>,
    /// The engine watches its kick eventfd.
    pub has_kick: bool,
    /// How the guest is told that requests are done; a guest that polls gives none. Written by the
    /// engine and never by a plain write: whether that blocks is up to the front end, at any time,
    /// because the flag belongs to the open file description.
    pub call: Option<CallSlot>,
    /// How the front end is told that the ring is broken.
    pub err: Option<CallSlot>,
    pub gates: Gates,
    /// Looked at each turn, kicks suppressed.
    pub hot: bool,
    /// Used elements were put since the last decision about a call.
    pub touched: bool,
    /// When the guest is to be told at the latest of what it was not told at once (`--coalesce`).
    pub call_due_ns: Option<u64>,
    /// The segment pool was empty; a completion gives it something back.
    pub no_room: bool,
    /// The engine answered what was last taken from it without the kernel.
    pub inline: bool,
    /// The front end has enabled it, at the latest now.
    pub was_enabled: bool,
    /// The last turn in which something was taken from it.
    pub turn: u32,
    pub stats: RingStats,
}

impl Port {
    /// Whether requests may be taken from it.
    #[inline]
    pub fn is_open(&self) -> bool {
        self.gates == Gates::default()
    }

    /// Calls for what was published, if the guest wants that.
    #[inline]
    pub fn tell(&mut self, engine: &mut Engine) {
        self.call_due_ns = None;
        if let Some(call) = self.call
            && self.ring.should_call()
        {
            engine.call(call);
            self.stats.calls += 1;
        }
    }

    /// Whether it has requests that were in flight when the daemon before ended, and are to be finished before
    /// the ring is stopped or disabled like any that are in flight.
    pub fn owes(&self) -> bool {
        self.ring.to_resume() > 0 && self.was_enabled && !self.gates.broken
    }

    /// Whether what it [`Port::owes`] is to be taken although the ring is closed for anything new. A disk that is held
    /// takes nothing of a ring that need not be empty.
    #[cold]
    pub fn must_resume(&self) -> bool {
        let waits = self.gates.held && !self.gates.must_end();
        self.owes() && !self.gates.frozen && !waits
    }
}

/// The guest is to be told of what was put.
#[inline]
pub(super) fn touch(touched: &mut Vec<HctxId>, port: &mut Port, hctx: HctxId) {
    if !port.touched {
        port.touched = true;
        touched.push(hctx);
    }
}

/// The ring is looked at each turn.
#[inline]
pub(super) fn heat(hot: &mut Vec<HctxId>, port: &mut Port, hctx: HctxId) {
    if !port.hot {
        port.hot = true;
        hot.push(hctx);
    }
}
