//! Trace points with blktrace's letters, kept in a ring of fixed size.
//!
//! A worker records what its requests go through; whoever asks gets the last of it. What is
//! overwritten before somebody asked is counted.

mod event;

pub use self::event::{Action, Event, Rwbs, Subject};
use super::ids::{HctxId, RequestTag, Sector};
use super::limits::SECTOR_SIZE;
use super::request::{Request, Status};

/// What fills the ring before anything was recorded; never shown.
const BLANK: Event = Event {
    time_ns: 0,
    sector: Sector(0),
    hctx: HctxId(0),
    action: Action::Plugged,
    subject: Subject::Plug { count: 0 },
};

/// The trace of one worker.
#[derive(Debug, Default)]
pub struct Trace {
    /// Actions that are recorded, by bit; none when the trace is off.
    wanted: u16,
    /// A power of two of events, or none before the trace was first started.
    ring: Box<[Event]>,
    /// Events recorded since the start; the next one's place is this modulo the size.
    written: u64,
    /// Events handed out or given up, of those.
    read: u64,
    lost: u64,
}

impl Trace {
    /// Off, and without memory.
    pub fn new() -> Self {
        Self::default()
    }

    /// Begins to record the given actions, and forgets what was recorded before. `events` is how
    /// many to keep at most, rounded up to a power of two. Only this allocates.
    pub fn start(&mut self, events: usize, actions: &[Action]) {
        let events = events.max(1).next_power_of_two();
        if self.ring.len() != events {
            self.ring = vec![BLANK; events].into_boxed_slice();
        }
        self.written = 0;
        self.read = 0;
        self.lost = 0;
        self.wanted = actions.iter().fold(0, |bits, action| bits | action.bit());
    }

    /// Stops to record. What is there can still be taken.
    pub fn stop(&mut self) {
        self.wanted = 0;
    }

    /// Whether anything is recorded.
    #[inline]
    pub fn is_on(&self) -> bool {
        self.wanted != 0
    }

    /// Records that something happened to a request.
    #[inline]
    pub fn request(
        &mut self,
        now_ns: u64,
        action: Action,
        hctx: HctxId,
        tag: RequestTag,
        request: &Request,
    ) {
        if self.wanted & action.bit() != 0 {
            let subject = Self::subject(tag, request, None);
            self.push(now_ns, action, hctx, request.sector, subject);
        }
    }

    /// Records that a request ended.
    #[inline]
    pub fn completed(
        &mut self,
        now_ns: u64,
        hctx: HctxId,
        tag: RequestTag,
        request: &Request,
        status: Status,
    ) {
        let action = Action::Completed;
        if self.wanted & action.bit() != 0 {
            let subject = Self::subject(tag, request, Some(status));
            self.push(now_ns, action, hctx, request.sector, subject);
        }
    }

    /// Records that a drain began to collect.
    #[inline]
    pub fn plugged(&mut self, now_ns: u64, hctx: HctxId) {
        let action = Action::Plugged;
        if self.wanted & action.bit() != 0 {
            self.push(now_ns, action, hctx, Sector(0), Subject::Plug { count: 0 });
        }
    }

    /// Records that a drain's `count` requests went on.
    #[inline]
    pub fn unplugged(&mut self, now_ns: u64, hctx: HctxId, count: u32) {
        let action = Action::Unplugged;
        if self.wanted & action.bit() != 0 {
            self.push(now_ns, action, hctx, Sector(0), Subject::Plug { count });
        }
    }

    #[inline]
    fn subject(tag: RequestTag, request: &Request, status: Option<Status>) -> Subject {
        Subject::Request {
            tag,
            op: request.op,
            fua: request.fua,
            ioprio: request.ioprio,
            sectors: u32::try_from(request.bytes / SECTOR_SIZE).unwrap_or(u32::MAX),
            status,
        }
    }

    #[inline]
    fn place(&self, number: u64) -> usize {
        let mask = self.ring.len() as u64 - 1;
        usize::try_from(number & mask).expect("a place in the ring is a usize")
    }

    fn push(
        &mut self,
        time_ns: u64,
        action: Action,
        hctx: HctxId,
        sector: Sector,
        subject: Subject,
    ) {
        let place = self.place(self.written);
        self.ring[place] = Event {
            time_ns,
            sector,
            hctx,
            action,
            subject,
        };
        self.written += 1;
    }

    /// The first event that is still there and was not taken.
    fn first(&self) -> u64 {
        self.read
            .max(self.written.saturating_sub(self.ring.len() as u64))
    }

    /// How many events are there to be taken.
    pub fn len(&self) -> usize {
        usize::try_from(self.written - self.first()).expect("no more than the ring holds")
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many events were overwritten since the start before they were taken.
    pub fn lost(&self) -> u64 {
        self.lost + (self.first() - self.read)
    }

    /// The events that were not taken yet, oldest first.
    pub fn iter(&self) -> impl Iterator<Item = &Event> {
        (self.first()..self.written).map(|number| &self.ring[self.place(number)])
    }

    /// Moves the events that were not taken yet to the end of `events`, oldest first; nothing is
    /// allocated if it has room for [`Self::len`] more.
    pub fn take(&mut self, events: &mut Vec<Event>) {
        self.lost = self.lost();
        events.extend(self.iter());
        self.read = self.written;
    }
}

#[cfg(test)]
mod tests;
