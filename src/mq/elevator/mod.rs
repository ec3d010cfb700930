//! Elevators: who goes first when more waits than the engine should get.
//!
//! An elevator belongs to one disk on one worker and sees the requests of all its hctxs there, as a
//! kernel scheduler belongs to a request queue. It holds no buffers and issues nothing: requests go
//! in with [`Elevator::insert`], come out of [`Elevator::dispatch`] as ids, and are reported back
//! once, with [`Elevator::completed`] or [`Elevator::requeued`].
//!
//! Only reads, writes, discards and write-zeroes are scheduled. A flush covers what was completed
//! before it came and so waits for nobody; it never comes here.
//!
//! `none` is not an elevator but the absence of one: [`Elevator::new`] returns nothing for it.
//!
//! Memory is allocated by [`Elevator::new`] and [`Elevator::reserve`] and nowhere else. Every search
//! is logarithmic or bounded by [`MERGE_LOOKBACK`](super::limits::MERGE_LOOKBACK), so that no guest
//! can make its requests expensive by choosing their sectors.

mod deadline;
mod ends;
mod kyber;
mod params;
mod sorted;
mod store;

pub use self::deadline::{Class, Deadline};
pub use self::kyber::{Domain, Kyber};
pub use self::params::{DeadlineParams, Kind, KyberParams, Param, ParamError, Params, UnknownKind};

use super::ids::{HctxId, RequestId};
use super::request::Request;

/// A request on its way into an elevator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Queued {
    /// Which one.
    pub id: RequestId,
    /// Its metadata; for the leader of a merged request, those of the whole.
    pub request: Request,
    /// When it came to this process, in nanoseconds of the worker's clock. Deadlines and ages count
    /// from here, so a request keeps its age when the scheduler is switched.
    pub queued_ns: u64,
}

/// When a request that ended was where, in nanoseconds of the worker's clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Times {
    /// It came to this process.
    pub queued_ns: u64,
    /// The engine took it.
    pub started_ns: u64,
    /// The engine was done with it.
    pub completed_ns: u64,
}

/// On which side of a queued request another one fits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MergeSide {
    /// The new request begins where the queued one ends.
    Back,
    /// The new request ends where the queued one begins.
    Front,
}

/// A queued request another one can be merged into. Holds until the elevator is next changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Merge {
    /// The queued request.
    pub leader: RequestId,
    /// Where the other one goes.
    pub side: MergeSide,
    slot: u32,
}

/// Two queued requests that touch since a merge filled the gap between them. Holds until the
/// elevator is next changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Join {
    /// The one with the lower sectors: it stays.
    pub front: RequestId,
    /// The one that continues it: it becomes a part of `front`.
    pub back: RequestId,
    front_slot: u32,
    back_slot: u32,
}

/// A scheduler with its queues.
#[derive(Debug)]
pub enum Elevator {
    /// Deadlines, sectors and priorities: `mq-deadline`.
    Deadline(Box<Deadline>),
    /// Latency targets: `kyber`.
    Kyber(Box<Kyber>),
}

/// Calls the same method of whichever scheduler it is.
macro_rules! each {
    ($self:ident, $elevator:ident => $call:expr) => {
        match $self {
            Elevator::Deadline($elevator) => $call,
            Elevator::Kyber($elevator) => $call,
        }
    };
}

impl Elevator {
    /// The scheduler `params` are for, with room for `capacity` requests: the sum of the sizes of
    /// all rings it serves. Nothing for [`Kind::None`].
    pub fn new(params: Params, capacity: usize) -> Option<Elevator> {
        match params {
            Params::None => None,
            Params::MqDeadline(params) => Some(Elevator::Deadline(Box::new(Deadline::new(
                params, capacity,
            )))),
            Params::Kyber(params) => Some(Elevator::Kyber(Box::new(Kyber::new(params, capacity)))),
        }
    }

    /// Which one it is.
    pub fn kind(&self) -> Kind {
        match self {
            Elevator::Deadline(_) => Kind::MqDeadline,
            Elevator::Kyber(_) => Kind::Kyber,
        }
    }

    /// Makes room for `capacity` requests in all. Room is never given back.
    pub fn reserve(&mut self, capacity: usize) {
        each!(self, e => e.reserve(capacity));
    }

    /// How many requests wait here.
    pub fn len(&self) -> usize {
        each!(self, e => e.len())
    }

    /// Whether nothing waits here.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Takes a request in. `at_head` puts it before all others of its class (mq-deadline) or domain
    /// (kyber), and keeps it from being merged with.
    pub fn insert(&mut self, queued: Queued, at_head: bool) {
        each!(self, e => e.insert(queued, at_head));
    }

    /// A queued request of the same hctx that `request` can be merged into: same op and ioprio, no
    /// FUA, adjacent, and together within the limits of size. The caller joins the two in its table
    /// and then calls [`Self::merged`].
    pub fn find_merge(&self, hctx: HctxId, request: &Request) -> Option<Merge> {
        each!(self, e => e.find_merge(hctx, request))
    }

    /// A request was merged into a queued one, whose metadata are `now` from here on.
    ///
    /// Returns another queued request of the same hctx that this one touches since, if they may be
    /// merged as well (the kernel's attempt_back_merge and attempt_front_merge). The caller then
    /// joins those two in its table and calls [`Self::joined`], or leaves it.
    pub fn merged(&mut self, merge: Merge, now: &Request) -> Option<Join> {
        match self {
            Elevator::Deadline(e) => e.merged(merge, now),
            Elevator::Kyber(e) => {
                e.merged(merge, now);
                None
            }
        }
    }

    /// `join.back` has become a part of `join.front`, whose metadata are `now` from here on. What
    /// remains has the earlier deadline of the two and its place.
    pub fn joined(&mut self, join: Join, now: &Request) {
        match self {
            Elevator::Deadline(e) => e.joined(join, now),
            Elevator::Kyber(_) => unreachable!("kyber offers no joins"),
        }
    }

    /// The request to issue next, if one may go now. It has left the queues, but counts as
    /// unfinished until [`Self::completed`] or [`Self::requeued`] is called for it.
    #[inline]
    pub fn dispatch(&mut self, now_ns: u64) -> Option<RequestId> {
        match self {
            Elevator::Deadline(e) => e.dispatch(now_ns),
            Elevator::Kyber(e) => e.dispatch(),
        }
    }

    /// Whether [`Self::dispatch`] would return a request now.
    pub fn has_work(&self, now_ns: u64) -> bool {
        match self {
            Elevator::Deadline(e) => e.has_work(now_ns),
            Elevator::Kyber(e) => e.has_work(),
        }
    }

    /// When, after `now_ns`, something may become dispatchable though nothing is inserted or
    /// completed until then; nothing if only an event can change what [`Self::dispatch`] says.
    pub fn next_deadline_ns(&self, now_ns: u64) -> Option<u64> {
        match self {
            Elevator::Deadline(e) => e.next_deadline_ns(now_ns),
            // What is blocked waits for a token, and a token comes back with a completion.
            Elevator::Kyber(_) => None,
        }
    }

    /// A dispatched request that the engine did not take comes back. It goes before all others of
    /// its class or domain, and is not merged with.
    pub fn requeued(&mut self, queued: Queued) {
        each!(self, e => e.requeued(queued));
    }

    /// A dispatched request has ended; `request` are the metadata it was dispatched with. Must be
    /// called exactly once for each, also when the engine reported an error or the parts of a
    /// merged request are sent again one by one.
    #[inline]
    pub fn completed(&mut self, request: &Request, times: Times) {
        match self {
            Elevator::Deadline(e) => e.completed(request),
            Elevator::Kyber(e) => e.completed(request, times),
        }
    }

    /// Whether `request` is one of those that [`Self::async_limit`] is for: whoever issued it does
    /// probably not wait for it. mq-deadline takes everything but reads for that, kyber everything
    /// but reads and FUA writes.
    pub fn is_async(&self, request: &Request) -> bool {
        each!(self, e => e.is_async(request))
    }

    /// How many of `depth` tags asynchronous requests may hold; at least one.
    pub fn async_limit(&self, depth: u32) -> u32 {
        each!(self, e => e.async_limit(depth))
    }

    /// Empties the queues: each request in the order in which it would have been dispatched if
    /// nothing had held it back. They do not count as unfinished any more.
    pub fn drain(&mut self, now_ns: u64, each: impl FnMut(RequestId)) {
        match self {
            Elevator::Deadline(e) => e.drain(now_ns, each),
            Elevator::Kyber(e) => e.drain(each),
        }
    }

    /// Takes out what one hctx has queued, for a ring that stops while others go on. They do not
    /// count as unfinished any more.
    pub fn take_hctx(&mut self, hctx: HctxId, each: impl FnMut(RequestId)) {
        each!(self, e => e.take_hctx(hctx, each));
    }

    /// The parameters as they are now.
    pub fn params(&self) -> Params {
        match self {
            Elevator::Deadline(e) => Params::MqDeadline(*e.params()),
            Elevator::Kyber(e) => Params::Kyber(*e.params()),
        }
    }

    /// Changes one parameter by its name in sysfs. Deadlines already given are kept.
    pub fn set_param(&mut self, name: &str, value: u64) -> Result<(), ParamError> {
        let mut params = self.params();
        params.set(name, value)?;
        match (self, params) {
            (Elevator::Deadline(e), Params::MqDeadline(params)) => e.set_params(params),
            (Elevator::Kyber(e), Params::Kyber(params)) => e.set_params(params),
            _ => unreachable!("setting a parameter keeps the kind"),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
