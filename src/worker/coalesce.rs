//! Interrupt coalescing: calls that wait for more to tell (`--coalesce`).
//!
//! A call is held back only while its ring has requests in flight, whose completion brings the worker
//! back to it, and then for a bounded time and a bounded number of completions. What is done is in the
//! used ring at once all the same, for a guest that looks. A ring that never has more than one request
//! is called as without.

use crate::config::Coalesce;
use crate::mq::ids::HctxId;

use super::{Worker, open_disk, open_port};

/// What one disk's calls may wait for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patience {
    delay_ns: u64,
    count: u16,
}

impl From<Coalesce> for Patience {
    fn from(coalesce: Coalesce) -> Self {
        Patience {
            delay_ns: u64::from(coalesce.delay_us) * 1000,
            count: coalesce.count,
        }
    }
}

impl Worker {
    /// Whether the call for what a ring has published is held back. Puts the ring on the list of those
    /// whose calls are.
    #[cold]
    pub(super) fn holds_back(&mut self, hctx: HctxId) -> bool {
        let port = open_port(&mut self.ports, hctx);
        let Some(patience) = open_disk(&mut self.disks, port.id.disk).patience else {
            return false;
        };
        if self.mq.in_flight(hctx) == 0 || port.ring.not_called_for() >= patience.count {
            return false;
        }
        if port.call_due_ns.is_none() {
            port.call_due_ns = Some(self.now_ns + patience.delay_ns);
            self.held_back.push(hctx);
        }
        true
    }

    /// Calls for what was held back long enough, and forgets rings that were called meanwhile.
    #[cold]
    pub(super) fn call_when_due(&mut self) {
        let Worker {
            engine,
            ports,
            held_back,
            now_ns,
            ..
        } = self;
        held_back.retain(|hctx| {
            let port = open_port(ports, *hctx);
            let waits = port.call_due_ns.is_some_and(|due| *now_ns < due);
            if port.call_due_ns.is_some() && !waits {
                port.tell(engine);
            }
            waits
        });
    }

    /// When the first of the calls that are held back is due.
    pub(super) fn next_call_ns(&self) -> Option<u64> {
        let due = |hctx: &HctxId| self.ports[hctx.index()].as_ref()?.call_due_ns;
        self.held_back.iter().filter_map(due).min()
    }
}
