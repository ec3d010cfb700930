//! The request table of one hctx, and the FIFOs that run through it.
//!
//! Every list of those that wait (ctx, leftovers) holds requests of one hctx, and a request is on one
//! list at a time. So a list is two indices, the links live in the entries, and nothing is
//! allocated when a request moves.

use super::ids::{CtxId, RequestTag, Sector};
use super::request::{IoPrio, Op, Request};
use super::stats::key::StatKey;

pub(super) mod merge;

/// No entry. Larger than any tag ([`super::limits::MAX_RING_SIZE`]).
const NONE: u16 = u16::MAX;

/// One request, from the drain that brought it to its completion.
#[derive(Debug)]
pub(super) struct Entry<P> {
    /// Its metadata; for the leader of a merged request, those of the whole.
    pub request: Request,
    /// The ctx it was assigned to, with its operation.
    pub key: StatKey,
    /// It was handed to the engine once: what it consists of is settled.
    pub started: bool,
    /// The elevator gave it out, and is told when it ends.
    pub elevated: bool,
    /// When it was taken from the ring.
    pub queued_ns: u64,
    /// When it left its ctx, the elevator or the leftovers for the first time.
    pub dispatch_ns: Option<u64>,
    /// When the engine took it.
    pub issued_ns: u64,
    /// `None`: there is no request under this tag, and nothing else here means anything.
    payload: Option<P>,
    own_sector: Sector,
    own_bytes: u64,
    own_segments: u16,
    /// Its neighbours on the list it is on; what the list's ends have here means nothing.
    next: u16,
    prev: u16,
    part_next: u16,
    first_part: u16,
    last_part: u16,
}

impl<P> Entry<P> {
    fn vacant() -> Self {
        Entry {
            request: Request {
                op: Op::Flush,
                sector: Sector(0),
                bytes: 0,
                segments: 0,
                ioprio: IoPrio(0),
                fua: false,
                unmap: false,
            },
            key: StatKey::new(Op::Flush, CtxId(0)),
            started: false,
            elevated: false,
            queued_ns: 0,
            dispatch_ns: None,
            issued_ns: 0,
            payload: None,
            own_sector: Sector(0),
            own_bytes: 0,
            own_segments: 0,
            next: NONE,
            prev: NONE,
            part_next: NONE,
            first_part: NONE,
            last_part: NONE,
        }
    }

    /// Whether it consists of more than itself.
    #[inline]
    pub fn is_merged(&self) -> bool {
        self.first_part != self.last_part
    }
}

/// Entries indexed by request tag.
#[derive(Debug)]
pub(super) struct Table<P> {
    entries: Box<[Entry<P>]>,
    live: u16,
}

impl<P> Table<P> {
    pub fn new(size: u16) -> Self {
        Table {
            entries: (0..size).map(|_| Entry::vacant()).collect(),
            live: 0,
        }
    }

    /// How many requests it holds.
    pub fn live(&self) -> u16 {
        self.live
    }

    /// Takes a new request in.
    ///
    /// The ring refuses a head that is already in flight, so a second entry under one tag is a bug.
    #[inline]
    pub fn insert(
        &mut self,
        tag: RequestTag,
        request: Request,
        key: StatKey,
        now_ns: u64,
        payload: P,
    ) {
        let slot = &mut self.entries[tag.index()];
        assert!(
            slot.payload.is_none(),
            "request tag {tag} is already in flight"
        );
        *slot = Entry {
            request,
            key,
            started: false,
            elevated: false,
            queued_ns: now_ns,
            dispatch_ns: None,
            issued_ns: now_ns,
            payload: Some(payload),
            own_sector: request.sector,
            own_bytes: request.bytes,
            own_segments: request.segments,
            next: NONE,
            prev: NONE,
            part_next: NONE,
            first_part: tag.0,
            last_part: tag.0,
        };
        self.live += 1;
    }

    /// The request under a tag that is in flight: on a list, with the engine, or in the elevator.
    #[inline]
    pub fn get(&self, tag: RequestTag) -> &Entry<P> {
        let entry = &self.entries[tag.index()];
        debug_assert!(entry.payload.is_some(), "request tag {tag} is not in use");
        entry
    }

    #[inline]
    pub fn get_mut(&mut self, tag: RequestTag) -> &mut Entry<P> {
        let entry = &mut self.entries[tag.index()];
        debug_assert!(entry.payload.is_some(), "request tag {tag} is not in use");
        entry
    }

    /// The request before this one on the list it is on; of the first, any.
    #[inline]
    pub fn older(&self, tag: RequestTag) -> RequestTag {
        RequestTag(self.get(tag).prev)
    }

    /// Joins `late`, and whatever was merged into it, to the end of `leader`, which it follows on
    /// the disk.
    pub fn merge_back(&mut self, leader: RequestTag, late: RequestTag) {
        let joined = self.get(late);
        let (first, last, request) = (joined.first_part, joined.last_part, joined.request);
        let tail = RequestTag(self.get(leader).last_part);
        self.get_mut(tail).part_next = first;
        let entry = self.get_mut(leader);
        entry.last_part = last;
        entry.request.bytes += request.bytes;
        entry.request.segments += request.segments;
    }

    /// Joins `early`, and whatever was merged into it, to the front of `leader`, which follows it on
    /// the disk.
    pub fn merge_front(&mut self, leader: RequestTag, early: RequestTag) {
        let joined = self.get(early);
        let (first, last, request) = (joined.first_part, joined.last_part, joined.request);
        let head = self.get(leader).first_part;
        self.get_mut(RequestTag(last)).part_next = head;
        let entry = self.get_mut(leader);
        entry.first_part = first;
        entry.request.sector = request.sector;
        entry.request.bytes += request.bytes;
        entry.request.segments += request.segments;
    }

    /// Assigns every request to a ctx anew.
    pub fn reassign(&mut self, of: impl Fn(&Request) -> CtxId) {
        let taken = self.entries.iter_mut().filter(|e| e.payload.is_some());
        for entry in taken {
            entry.key = StatKey::new(entry.request.op, of(&entry.request));
        }
    }

    /// Changes the requests that are there, parts of others included.
    pub fn each_request(&mut self, each: impl FnMut(&mut Request)) {
        let taken = self.entries.iter_mut().filter(|e| e.payload.is_some());
        taken.map(|entry| &mut entry.request).for_each(each);
    }

    /// Takes a merged request apart: each part stands for itself again. They come back in the order
    /// of their sectors.
    pub fn split(&mut self, leader: RequestTag) -> Fifo {
        let mut parts = Fifo::default();
        let mut at = self.get(leader).first_part;
        while at != NONE {
            let tag = RequestTag(at);
            let entry = self.get_mut(tag);
            at = entry.part_next;
            entry.part_next = NONE;
            entry.first_part = tag.0;
            entry.last_part = tag.0;
            entry.started = true;
            entry.elevated = false;
            entry.request.sector = entry.own_sector;
            entry.request.bytes = entry.own_bytes;
            entry.request.segments = entry.own_segments;
            parts.push_back(self, tag);
        }
        parts
    }

    /// Takes a request out that nothing was merged into.
    #[inline]
    pub fn remove(&mut self, tag: RequestTag) -> P {
        self.live -= 1;
        let payload = self.entries[tag.index()].payload.take();
        payload.expect("a request that ends was there")
    }

    /// Takes `leader` and what was merged into it out, in the order of their sectors; `each` gets a
    /// part's ctx, its own length in bytes, and its payload.
    pub fn remove_parts(&mut self, leader: RequestTag, mut each: impl FnMut(CtxId, u64, P)) {
        let mut at = self.get(leader).first_part;
        while at != NONE {
            let tag = RequestTag(at);
            let entry = self.get(tag);
            let (ctx, bytes) = (entry.key.ctx(), entry.own_bytes);
            at = entry.part_next;
            each(ctx, bytes, self.remove(tag));
        }
    }

    /// The payloads of `leader` and what was merged into it, in the order of their sectors.
    #[inline]
    pub fn parts(&self, leader: RequestTag) -> Parts<'_, P> {
        Parts {
            table: self,
            at: self.get(leader).first_part,
        }
    }
}

/// The payloads a request consists of, in the order of their sectors.
#[derive(Debug)]
pub struct Parts<'a, P> {
    table: &'a Table<P>,
    at: u16,
}

impl<P> Clone for Parts<'_, P> {
    fn clone(&self) -> Self {
        Parts {
            table: self.table,
            at: self.at,
        }
    }
}

impl<'a, P> Iterator for Parts<'a, P> {
    type Item = &'a P;

    #[inline]
    fn next(&mut self) -> Option<&'a P> {
        if self.at == NONE {
            return None;
        }
        let entry = self.table.get(RequestTag(self.at));
        self.at = entry.part_next;
        entry.payload.as_ref()
    }
}

/// A first-in first-out list of requests of one table.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fifo {
    head: u16,
    tail: u16,
    len: u16,
}

impl Default for Fifo {
    fn default() -> Self {
        Fifo {
            head: NONE,
            tail: NONE,
            len: 0,
        }
    }
}

impl Fifo {
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    #[inline]
    pub fn len(&self) -> u16 {
        self.len
    }

    /// The oldest.
    pub fn front(&self) -> Option<RequestTag> {
        (self.len > 0).then_some(RequestTag(self.head))
    }

    /// The newest.
    pub fn back(&self) -> Option<RequestTag> {
        (self.len > 0).then_some(RequestTag(self.tail))
    }

    #[inline]
    pub fn push_back<P>(&mut self, table: &mut Table<P>, tag: RequestTag) {
        table.get_mut(tag).prev = self.tail;
        if self.len == 0 {
            self.head = tag.0;
        } else {
            table.get_mut(RequestTag(self.tail)).next = tag.0;
        }
        self.tail = tag.0;
        self.len += 1;
    }

    #[inline]
    pub fn push_front<P>(&mut self, table: &mut Table<P>, tag: RequestTag) {
        table.get_mut(tag).next = self.head;
        if self.len == 0 {
            self.tail = tag.0;
        } else {
            table.get_mut(RequestTag(self.head)).prev = tag.0;
        }
        self.head = tag.0;
        self.len += 1;
    }

    #[inline]
    pub fn pop_front<P>(&mut self, table: &mut Table<P>) -> Option<RequestTag> {
        if self.len == 0 {
            return None;
        }
        let tag = RequestTag(self.head);
        self.head = table.get(tag).next;
        self.len -= 1;
        Some(tag)
    }

    /// Moves all of `other` to the end of this list.
    pub fn append<P>(&mut self, table: &mut Table<P>, other: &mut Fifo) {
        if other.len == 0 {
            return;
        }
        if self.len == 0 {
            self.head = other.head;
        } else {
            table.get_mut(RequestTag(self.tail)).next = other.head;
            table.get_mut(RequestTag(other.head)).prev = self.tail;
        }
        self.tail = other.tail;
        self.len += other.len;
        *other = Fifo::default();
    }
}
