//! The end of a turn: telling the guests, submitting, sleeping.

use std::fmt::Write as _;
use std::io;
use std::time::Duration;

use super::debt::owes;
use super::polling::Awaited;
use super::{Worker, open_port};
use crate::logging::fatal::{self, Line};

/// How often a ring without a kick eventfd is looked at.
const KICKLESS_POLL: Duration = Duration::from_micros(100);

impl Worker {
    /// Tells the guests, at most once for each ring.
    pub(super) fn notify(&mut self) {
        while let Some(hctx) = self.touched.pop() {
            let port = open_port(&mut self.ports, hctx);
            port.touched = false;
            port.ring.publish();
            if !self.coalesces || !self.holds_back(hctx) {
                open_port(&mut self.ports, hctx).tell(&mut self.engine);
            }
        }
        if !self.held_back.is_empty() {
            self.call_when_due();
        }
    }

    /// Ends the turn: submits what was queued, tells the guests, and, when there is nothing left to
    /// do and looking on is not worth it, sleeps. All that is waited for arrives in the engine.
    pub(super) fn wait(&mut self, progress: bool) {
        let busy = self.engine.has_events() || self.mq.must_run() || self.has_mail || self.room;
        let awaited = match self.engine.in_flight() {
            0 => Awaited::Guest,
            _ => Awaited::Device,
        };
        let look = match progress {
            true => self.spin.is_on(awaited),
            false => self.spin.again(self.now_ns, awaited),
        };
        if busy || look {
            self.notify();
            self.commit();
            if !progress {
                std::hint::spin_loop();
            }
            return;
        }
        // What was queued, calls among it, is submitted by the same system call that sleeps.
        self.notify();
        if self.arm() {
            self.commit();
            return;
        }
        let timeout = self.timeout();
        self.spin.sleeps(awaited);
        self.empty_turns = 0;
        if let Err(error) = self.engine.wait(timeout) {
            self.engine_broken(&error);
        }
        // What does not come through the ring is fetched, so that somebody who asks what is the matter is
        // answered.
        self.has_mail |= self.engine.is_refused();
    }

    pub(super) fn commit(&mut self) {
        if let Err(error) = self.engine.commit_rqs() {
            self.engine_broken(&error);
        }
    }

    /// io_uring_enter fails like this only when we misuse it or somebody forbids it, and then no request ends any
    /// more: the process stops loudly, so that whoever supervises it starts another. Answering what is in flight
    /// would be no way out, since the kernel may still have it, and be reading or writing the guest's memory.
    #[cold]
    pub(super) fn engine_broken(&self, error: &io::Error) -> ! {
        let mut line = Line::new("");
        let _ = write!(
            line,
            "worker {}: the io_uring is unusable: {error}",
            self.id
        );
        fatal::end(&line)
    }

    /// Asks for kicks on every hot ring; true if requests came in meanwhile. Rings that cannot kick
    /// stay hot, and so do those that wait for room.
    fn arm(&mut self) -> bool {
        let mut more = false;
        let (owing, disks) = (self.indebted, &self.disks);
        let ports = &mut self.ports;
        self.hot.retain(|hctx| {
            let port = open_port(ports, *hctx);
            if !port.is_open() && !port.must_resume() {
                port.hot = false;
                return false;
            }
            let gated = owing && !port.gates.is_draining() && owes(disks, port.id.disk);
            if port.no_room || gated {
                return true;
            }
            // What was seen and is left for the next turn brings no kick.
            if port.ring.has_more() || port.has_kick && port.ring.arm_kicks() {
                more = true;
                return true;
            }
            if !port.has_kick {
                return true;
            }
            port.hot = false;
            false
        });
        more
    }

    fn timeout(&mut self) -> Option<Duration> {
        let deadlines = [
            self.mq.next_deadline_ns(),
            self.watchdog.next_ns(&self.mq),
            self.next_call_ns(),
            self.next_paid_ns(),
        ];
        let deadline = deadlines
            .into_iter()
            .flatten()
            .min()
            .map(|at| Duration::from_nanos(at.saturating_sub(self.now_ns)));
        // Only rings without a kick fd are still hot, or such that a completion will wake.
        let kickless = self.hot.iter().any(|hctx| {
            self.ports[hctx.index()]
                .as_ref()
                .is_some_and(|port| !port.has_kick)
        });
        match (deadline, kickless) {
            (Some(deadline), true) => Some(deadline.min(KICKLESS_POLL)),
            (None, true) => Some(KICKLESS_POLL),
            (deadline, false) => deadline,
        }
    }
}
