//! Requests that do not come back.
//!
//! The kernel's virtio-blk waits for ever, so a request the host has lost hangs the guest's I/O
//! without a word. The watchdog says the word: which queue, which request, for how long. If it may,
//! it also asks the kernel to give the request up. Only what the kernel gives up ends with an error:
//! a request that a device still has may still write into the guest's memory, and calling it
//! finished would let the guest use that memory for something else.

use crate::config::OnTimeout;
use crate::engine::Engine;
use crate::mq::{Mq, Overdue};

/// Looks are this far apart at least.
const SHORTEST_INTERVAL_NS: u64 = 100_000_000;

/// One worker's watchdog.
#[derive(Debug)]
pub(super) struct Watchdog {
    limit_ns: u64,
    policy: OnTimeout,
    next_ns: u64,
    /// Up to when requests were issued that have been reported.
    reported_ns: u64,
    found: Vec<Overdue>,
}

impl Watchdog {
    /// With a limit in seconds; 0 never looks.
    pub fn new(limit_s: u32, policy: OnTimeout, driver_tags: u16) -> Self {
        Watchdog {
            limit_ns: u64::from(limit_s) * 1_000_000_000,
            policy,
            next_ns: 0,
            reported_ns: 0,
            found: Vec::with_capacity(usize::from(driver_tags)),
        }
    }

    /// When to look next, if there is anything to look at.
    pub fn next_ns<P>(&self, mq: &Mq<P>) -> Option<u64> {
        (self.limit_ns != 0 && mq.tags().in_use() > 0).then_some(self.next_ns)
    }

    /// Looks, if it is time. Each request is reported once.
    #[inline]
    pub fn look<P>(&mut self, now_ns: u64, mq: &Mq<P>, engine: &mut Engine) {
        if now_ns >= self.next_ns && self.limit_ns != 0 {
            self.look_now(now_ns, mq, engine);
        }
    }

    #[cold]
    fn look_now<P>(&mut self, now_ns: u64, mq: &Mq<P>, engine: &mut Engine) {
        // A request is found at most a quarter of the limit late.
        self.next_ns = now_ns + (self.limit_ns / 4).max(SHORTEST_INTERVAL_NS);
        let reported_ns = self.reported_ns;
        self.found.clear();
        self.found.extend(
            mq.overdue(self.limit_ns)
                .filter(|late| late.issued_ns > reported_ns || reported_ns == 0),
        );
        for late in &self.found {
            log::warn!(
                disk = late.ring.disk.0; "{} tag {}: {:?} of {} bytes at sector {} has not come back for {} ms{}",
                late.ring,
                late.tag,
                late.request.op,
                late.request.bytes,
                late.request.sector.0,
                late.age_ns / 1_000_000,
                match self.policy {
                    OnTimeout::Report => "",
                    OnTimeout::Cancel => "; asking the kernel to give it up",
                }
            );
            self.reported_ns = self.reported_ns.max(late.issued_ns);
            if self.policy == OnTimeout::Cancel {
                engine.cancel_rq(late.driver_tag);
            }
        }
    }
}
