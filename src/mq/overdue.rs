//! Requests that do not come back.

use super::Mq;
use super::ids::{DriverTag, RequestTag, RingId};
use super::request::Request;

/// A request the engine has had for too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overdue {
    /// Where it came from.
    pub ring: RingId,
    /// Which one it is there.
    pub tag: RequestTag,
    /// Which one it is for the engine.
    pub driver_tag: DriverTag,
    /// What it asks for.
    pub request: Request,
    /// When the engine took it.
    pub issued_ns: u64,
    /// How long that is ago.
    pub age_ns: u64,
}

impl<P> Mq<P> {
    /// The requests the engine has had for `limit_ns` or longer (the kernel's timeout worker scans
    /// the tags in the same way).
    pub fn overdue(&self, limit_ns: u64) -> impl Iterator<Item = Overdue> {
        self.tags.taken().filter_map(move |(driver_tag, id)| {
            let hctx = self.hctx(id.hctx);
            let entry = hctx.table.get(id.tag);
            let age_ns = self.now_ns.saturating_sub(entry.issued_ns);
            (age_ns >= limit_ns).then_some(Overdue {
                ring: RingId {
                    disk: hctx.config.disk,
                    queue: hctx.config.queue,
                },
                tag: id.tag,
                driver_tag,
                request: entry.request,
                issued_ns: entry.issued_ns,
                age_ns,
            })
        })
    }
}
