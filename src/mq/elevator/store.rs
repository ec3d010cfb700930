//! Where queued requests are kept: slots of one array, and lists that run through it.

use super::Queued;

/// No slot.
pub(super) const NONE: u32 = u32::MAX;

/// One queued request.
#[derive(Debug)]
pub(super) struct Node {
    pub queued: Queued,
    /// When it expires (mq-deadline).
    pub deadline_ns: u64,
    /// It went in at the head, or came back from the engine: not merged with.
    pub at_head: bool,
    live: bool,
    next: u32,
    prev: u32,
}

/// Slots for as many requests as may be queued. Allocates only in [`Store::reserve`].
#[derive(Debug)]
pub(super) struct Store {
    nodes: Vec<Node>,
    capacity: usize,
    free: u32,
    len: usize,
}

impl Store {
    pub fn new(capacity: usize) -> Self {
        let mut store = Store {
            nodes: Vec::new(),
            capacity: 0,
            free: NONE,
            len: 0,
        };
        store.reserve(capacity);
        store
    }

    /// Makes room for `capacity` requests in all, if there is less.
    pub fn reserve(&mut self, capacity: usize) {
        assert!(
            u32::try_from(capacity).is_ok_and(|n| n != NONE),
            "more requests than slots have numbers"
        );
        self.capacity = self.capacity.max(capacity);
        self.nodes.reserve_exact(self.capacity - self.nodes.len());
    }

    pub fn capacity(&self) -> usize {
        self.capacity
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn insert(&mut self, queued: Queued, deadline_ns: u64, at_head: bool) -> u32 {
        let node = Node {
            queued,
            deadline_ns,
            at_head,
            live: true,
            next: NONE,
            prev: NONE,
        };
        self.len += 1;
        if self.free != NONE {
            let slot = self.free;
            self.free = self.nodes[slot as usize].next;
            self.nodes[slot as usize] = node;
            return slot;
        }
        assert!(
            self.nodes.len() < self.capacity,
            "more requests queued than the elevator has room for"
        );
        let slot = u32::try_from(self.nodes.len()).expect("the capacity is a u32");
        self.nodes.push(node);
        slot
    }

    /// Gives a slot back that is on no list any more.
    pub fn remove(&mut self, slot: u32) -> Queued {
        let node = &mut self.nodes[slot as usize];
        debug_assert!(node.live);
        node.live = false;
        node.next = self.free;
        self.free = slot;
        self.len -= 1;
        node.queued
    }

    #[inline]
    pub fn get(&self, slot: u32) -> &Node {
        let node = &self.nodes[slot as usize];
        debug_assert!(node.live);
        node
    }

    #[inline]
    pub fn get_mut(&mut self, slot: u32) -> &mut Node {
        let node = &mut self.nodes[slot as usize];
        debug_assert!(node.live);
        node
    }

    /// The request a merge was found for, which must still be the one in its slot.
    pub fn leader(&mut self, slot: u32, id: super::RequestId) -> &mut Node {
        let node = self.get_mut(slot);
        assert!(
            node.live && node.queued.id == id,
            "merged into a request that is not queued any more"
        );
        node
    }
}

/// A list of slots. A slot is on one list at a time.
#[derive(Clone, Copy, Debug)]
pub(super) struct List {
    head: u32,
    tail: u32,
}

impl Default for List {
    fn default() -> Self {
        List {
            head: NONE,
            tail: NONE,
        }
    }
}

impl List {
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.head == NONE
    }

    /// The oldest.
    #[inline]
    pub fn front(&self) -> Option<u32> {
        (self.head != NONE).then_some(self.head)
    }

    /// From the newest to the oldest.
    pub fn newest_first<'a>(&self, store: &'a Store) -> impl Iterator<Item = u32> + use<'a> {
        let mut at = self.tail;
        std::iter::from_fn(move || {
            let slot = (at != NONE).then_some(at)?;
            at = store.get(slot).prev;
            Some(slot)
        })
    }

    /// The one after `slot`.
    pub fn after(store: &Store, slot: u32) -> Option<u32> {
        let next = store.get(slot).next;
        (next != NONE).then_some(next)
    }

    #[inline]
    pub fn push_back(&mut self, store: &mut Store, slot: u32) {
        self.insert_before(store, NONE, slot);
    }

    pub fn push_front(&mut self, store: &mut Store, slot: u32) {
        self.insert_before(store, self.head, slot);
    }

    /// Puts `slot` before `next`, which is on this list; at the end if there is no `next`.
    #[inline]
    pub fn insert_before(&mut self, store: &mut Store, next: u32, slot: u32) {
        let prev = if next == NONE {
            self.tail
        } else {
            store.get(next).prev
        };
        let node = store.get_mut(slot);
        node.prev = prev;
        node.next = next;
        match prev {
            NONE => self.head = slot,
            prev => store.get_mut(prev).next = slot,
        }
        match next {
            NONE => self.tail = slot,
            next => store.get_mut(next).prev = slot,
        }
    }

    #[inline]
    pub fn remove(&mut self, store: &mut Store, slot: u32) {
        let node = store.get(slot);
        let (prev, next) = (node.prev, node.next);
        match prev {
            NONE => self.head = next,
            prev => store.get_mut(prev).next = next,
        }
        match next {
            NONE => self.tail = prev,
            next => store.get_mut(next).prev = prev,
        }
    }

    /// Takes every slot for which `take` says so, from the oldest to the newest.
    pub fn take(
        &mut self,
        store: &mut Store,
        take: impl Fn(&Node) -> bool,
        mut each: impl FnMut(&mut Store, u32),
    ) {
        let mut at = self.front();
        while let Some(slot) = at {
            at = List::after(store, slot);
            if take(store.get(slot)) {
                self.remove(store, slot);
                each(store, slot);
            }
        }
    }
}
