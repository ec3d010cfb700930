//! A split-ring virtio driver for one virtqueue (virtio 1.3, 2.7), with nothing allocated for a request.

mod poke;

pub use poke::write_table;

use super::event::Event;
use super::memory::{GuestMemory, Window};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

const _: () = assert!(
    cfg!(target_endian = "little"),
    "rings are little-endian and this driver stores its words as they are"
);

/// Descriptor flag: another descriptor follows (VIRTQ_DESC_F_NEXT).
pub const NEXT: u16 = 1;
/// Descriptor flag: the device writes this buffer (VIRTQ_DESC_F_WRITE).
pub const WRITE: u16 = 2;
/// Descriptor flag: the buffer is a table of descriptors (VIRTQ_DESC_F_INDIRECT).
pub const INDIRECT: u16 = 4;
/// avail.flags: please do not call (VIRTQ_AVAIL_F_NO_INTERRUPT).
pub const NO_INTERRUPT: u16 = 1;
/// used.flags: please do not kick (VIRTQ_USED_F_NO_NOTIFY).
pub const NO_NOTIFY: u16 = 1;

/// Status byte before the device wrote one: no device answers 0xff.
pub const STATUS_UNWRITTEN: u8 = 0xff;

const DESC: usize = 16;
/// Each head has this many bytes for its header (at 0) and its status byte (at 16): one cache line.
const SLOT: usize = 64;
const SLOT_STATUS: u64 = 16;

/// One buffer of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seg {
    /// Guest physical address.
    pub gpa: u64,
    /// Length in bytes.
    pub len: u32,
    /// True if the device writes it.
    pub writable: bool,
}

impl Seg {
    /// A buffer the device reads.
    pub fn readable(gpa: u64, len: usize) -> Self {
        let len = u32::try_from(len).expect("a descriptor's length has 32 bits");
        Self {
            gpa,
            len,
            writable: false,
        }
    }

    /// A buffer the device writes.
    pub fn writable(gpa: u64, len: usize) -> Self {
        Self {
            writable: true,
            ..Self::readable(gpa, len)
        }
    }
}

/// A descriptor as it stands in a table, for tests that write bad ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawDesc {
    /// Guest physical address.
    pub addr: u64,
    /// Length in bytes.
    pub len: u32,
    /// [`NEXT`], [`WRITE`], [`INDIRECT`] or anything else.
    pub flags: u16,
    /// Index of the next descriptor.
    pub next: u16,
}

/// What came back for one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// The caller's number for the request.
    pub token: u64,
    /// Head descriptor of its chain.
    pub head: u16,
    /// Bytes the device says it wrote, the status byte included.
    pub len: u32,
    /// The status byte; [`STATUS_UNWRITTEN`] if the device left it alone.
    pub status: u8,
}

/// How a queue is made.
#[derive(Clone, Copy, Debug)]
pub struct QueueSetup {
    /// Entries, a power of two.
    pub size: u16,
    /// VIRTIO_F_EVENT_IDX was negotiated.
    pub event_idx: bool,
    /// Put chains of more than one descriptor into indirect tables.
    pub indirect: bool,
    /// Longest indirect table, in descriptors.
    pub indirect_len: u16,
    /// With a call eventfd; without one the driver polls the used ring.
    pub call: bool,
    /// First avail and used index.
    pub base: u16,
    /// Memory region of the rings.
    pub region: usize,
}

impl Default for QueueSetup {
    fn default() -> Self {
        Self {
            size: 128,
            event_idx: true,
            indirect: true,
            indirect_len: 128,
            call: true,
            base: 0,
            region: 0,
        }
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Slot {
    token: u64,
    status: u64,
    last: u16,
    descriptors: u16,
    in_flight: bool,
}

/// One virtqueue and its driver's state. Made by [`super::Front::queue`].
#[derive(Debug)]
pub struct Queue {
    /// Index of the queue in its disk.
    pub index: usize,
    /// Guest memory, for buffers.
    pub mem: Arc<GuestMemory>,
    /// Kicks sent.
    pub kicks: u64,
    /// Calls received: the sum of the call eventfd's counts.
    pub calls: u64,
    setup: QueueSetup,
    kick: Event,
    call: Option<Event>,
    rings: [u64; 3],
    desc: Window,
    avail: Window,
    used: Window,
    slots_gpa: u64,
    slots: Window,
    tables_gpa: u64,
    tables: Option<Window>,
    state: Box<[Slot]>,
    next: Box<[u16]>,
    free_head: u16,
    free: u16,
    mask: u16,
    avail_idx: u16,
    published: u16,
    used_idx: u16,
    used_seen: u16,
}

impl Queue {
    /// A queue with its rings, headers, status bytes and indirect tables in `mem`.
    pub fn new(mem: &Arc<GuestMemory>, index: usize, setup: QueueSetup) -> io::Result<Self> {
        assert!(
            setup.size.is_power_of_two(),
            "this driver masks its indices"
        );
        let size = usize::from(setup.size);
        let desc = mem.alloc_in(setup.region, size * DESC, 4096);
        let avail = mem.alloc_in(setup.region, 6 + 2 * size, 64);
        let used = mem.alloc_in(setup.region, 6 + 8 * size, 64);
        let slots = mem.alloc_in(setup.region, size * SLOT, 64);
        let table = usize::from(setup.indirect_len) * DESC;
        let tables = setup
            .indirect
            .then(|| mem.alloc_in(setup.region, size * table, 64));
        let mut queue = Self {
            index,
            mem: Arc::clone(mem),
            kicks: 0,
            calls: 0,
            setup,
            kick: Event::new()?,
            call: setup.call.then(Event::new).transpose()?,
            rings: [desc, avail, used],
            desc: mem.window(desc, size * DESC),
            avail: mem.window(avail, 6 + 2 * size),
            used: mem.window(used, 6 + 8 * size),
            slots_gpa: slots,
            slots: mem.window(slots, size * SLOT),
            tables_gpa: tables.unwrap_or(0),
            tables: tables.map(|gpa| mem.window(gpa, size * table)),
            state: vec![Slot::default(); size].into_boxed_slice(),
            next: vec![0; size].into_boxed_slice(),
            free_head: 0,
            free: 0,
            mask: setup.size - 1,
            avail_idx: 0,
            published: 0,
            used_idx: 0,
            used_seen: 0,
        };
        queue.reset(setup.base);
        Ok(queue)
    }

    /// Forgets everything in flight and starts both rings at index `base`, as a driver does after a device reset.
    pub fn reset(&mut self, base: u16) {
        for (index, next) in (1..=self.setup.size).zip(self.next.iter_mut()) {
            *next = index & self.mask;
        }
        self.state.fill(Slot::default());
        self.free_head = 0;
        self.free = self.setup.size;
        self.avail_idx = base;
        self.published = base;
        self.used_idx = base;
        self.used_seen = base;
        self.avail.store_u16(0, 0, Ordering::Relaxed);
        self.avail.store_u16(2, base, Ordering::Relaxed);
        self.avail
            .store_u16(self.used_event_at(), base, Ordering::Relaxed);
        self.used.store_u16(0, 0, Ordering::Relaxed);
        self.used
            .store_u16(self.avail_event_at(), base, Ordering::Relaxed);
        self.used.store_u16(2, base, Ordering::Release);
    }

    /// Entries of the rings.
    pub fn size(&self) -> u16 {
        self.setup.size
    }

    /// Descriptors not in use.
    pub fn free(&self) -> u16 {
        self.free
    }

    /// Requests the device has not answered yet.
    pub fn in_flight(&self) -> u16 {
        self.avail_idx.wrapping_sub(self.used_idx)
    }

    /// How the queue was made.
    pub fn setup(&self) -> QueueSetup {
        self.setup
    }

    /// From here on, uses indirect tables or not; they must have been there when the queue was made.
    pub fn set_indirect(&mut self, indirect: bool) {
        assert!(
            !indirect || self.tables.is_some(),
            "made without indirect tables"
        );
        self.setup.indirect = indirect;
    }

    /// Guest addresses of the descriptor table, the avail ring and the used ring.
    pub fn ring_addresses(&self) -> [u64; 3] {
        self.rings
    }

    /// The kick eventfd.
    pub fn kick_fd(&self) -> &Event {
        &self.kick
    }

    /// The call eventfd, if there is one.
    pub fn call_fd(&self) -> Option<&Event> {
        self.call.as_ref()
    }

    /// Replaces the call eventfd, or leaves none; [`super::Front::set_call`] tells the back end too.
    pub fn replace_call(&mut self, call: Option<Event>) {
        self.call = call;
    }

    fn used_event_at(&self) -> usize {
        4 + 2 * usize::from(self.setup.size)
    }

    fn avail_event_at(&self) -> usize {
        4 + 8 * usize::from(self.setup.size)
    }

    // ---- submission ----

    /// Queues a virtio-blk request with header and status byte of the driver's own: header, `data`, status. Returns the
    /// head, or `None` if the ring has no room. The device sees it after [`Queue::publish`].
    #[inline]
    pub fn push(
        &mut self,
        token: u64,
        kind: u32,
        ioprio: u32,
        sector: u64,
        data: &[Seg],
    ) -> Option<u16> {
        let slots_gpa = self.slots_gpa;
        let head = self.place(data.len() + 2, |index, head| {
            let slot = slots_gpa + (usize::from(head) * SLOT) as u64;
            match index {
                0 => Seg::readable(slot, 16),
                n if n <= data.len() => data[n - 1],
                _ => Seg::writable(slot + SLOT_STATUS, 1),
            }
        })?;
        let at = usize::from(head) * SLOT;
        self.slots.store_u32(at, kind, Ordering::Relaxed);
        self.slots.store_u32(at + 4, ioprio, Ordering::Relaxed);
        self.slots.store_u64(at + 8, sector, Ordering::Relaxed);
        let status = at + SLOT_STATUS as usize;
        self.slots
            .store_u8(status, STATUS_UNWRITTEN, Ordering::Relaxed);
        let slot = &mut self.state[usize::from(head)];
        slot.token = token;
        slot.status = self.slots_gpa + status as u64;
        Some(head)
    }

    /// Queues a chain of any shape; `status` is the guest address of its status byte.
    pub fn push_chain(&mut self, token: u64, chain: &[Seg], status: u64) -> Option<u16> {
        self.mem.fill(status, 1, STATUS_UNWRITTEN);
        let head = self.place(chain.len(), |index, _| chain[index])?;
        let slot = &mut self.state[usize::from(head)];
        slot.token = token;
        slot.status = status;
        Some(head)
    }

    #[inline]
    fn place(&mut self, count: usize, segment: impl Fn(usize, u16) -> Seg) -> Option<u16> {
        assert!(count > 0, "a chain has a descriptor");
        let head = self.free_head;
        let indirect = self.setup.indirect && count > 1;
        let taken = if indirect { 1 } else { count };
        if taken > usize::from(self.free) {
            return None;
        }
        let last = if indirect {
            assert!(
                count <= usize::from(self.setup.indirect_len),
                "the chain is longer than the driver's indirect tables"
            );
            let offset = usize::from(head) * usize::from(self.setup.indirect_len) * DESC;
            let table = self.tables.as_ref().expect("indirect queues have tables");
            for index in 0..count {
                let seg = segment(index, head);
                let more = if index + 1 < count { NEXT } else { 0 };
                let desc = RawDesc {
                    addr: seg.gpa,
                    len: seg.len,
                    flags: more | if seg.writable { WRITE } else { 0 },
                    next: (index + 1) as u16,
                };
                store_desc(table, offset + index * DESC, desc);
            }
            let desc = RawDesc {
                addr: self.tables_gpa + offset as u64,
                len: (count * DESC) as u32,
                flags: INDIRECT,
                next: 0,
            };
            store_desc(&self.desc, usize::from(head) * DESC, desc);
            head
        } else {
            let mut at = head;
            for index in 0..count {
                let seg = segment(index, head);
                let next = self.next[usize::from(at)];
                let more = if index + 1 < count { NEXT } else { 0 };
                let desc = RawDesc {
                    addr: seg.gpa,
                    len: seg.len,
                    flags: more | if seg.writable { WRITE } else { 0 },
                    next,
                };
                store_desc(&self.desc, usize::from(at) * DESC, desc);
                if index + 1 < count {
                    at = next;
                }
            }
            at
        };
        self.free_head = self.next[usize::from(last)];
        self.free -= taken as u16;
        self.state[usize::from(head)] = Slot {
            last,
            descriptors: taken as u16,
            in_flight: true,
            ..Slot::default()
        };
        let entry = 4 + 2 * usize::from(self.avail_idx & self.mask);
        self.avail.store_u16(entry, head, Ordering::Relaxed);
        self.avail_idx = self.avail_idx.wrapping_add(1);
        Some(head)
    }

    /// Shows the device what was pushed, without a kick.
    #[inline]
    pub fn publish_quietly(&mut self) {
        self.avail.store_u16(2, self.avail_idx, Ordering::Release);
        self.published = self.avail_idx;
    }

    /// Shows the device what was pushed, and kicks it if it asks for that (virtio 1.3, 2.7.10).
    #[inline]
    pub fn publish(&mut self) {
        let old = self.published;
        self.publish_quietly();
        if self.published == old {
            return;
        }
        fence(Ordering::SeqCst);
        let wanted = if self.setup.event_idx {
            let event = self.used.load_u16(self.avail_event_at(), Ordering::Relaxed);
            needs_event(event, self.published, old)
        } else {
            self.used.load_u16(0, Ordering::Relaxed) & NO_NOTIFY == 0
        };
        if wanted {
            self.kick();
        }
    }

    /// Kicks the device, whether it asked for it or not.
    pub fn kick(&mut self) {
        self.kicks += 1;
        self.kick.signal();
    }

    // ---- completion ----

    /// The next completion, if there is one; never waits.
    #[inline]
    pub fn reap(&mut self) -> Option<Completion> {
        if self.used_idx == self.used_seen {
            self.used_seen = self.used.load_u16(2, Ordering::Acquire);
            if self.used_idx == self.used_seen {
                return None;
            }
        }
        let entry = 4 + 8 * usize::from(self.used_idx & self.mask);
        let id = self.used.load_u32(entry, Ordering::Relaxed);
        let len = self.used.load_u32(entry + 4, Ordering::Relaxed);
        self.used_idx = self.used_idx.wrapping_add(1);
        let slot = self
            .state
            .get_mut(id as usize)
            .unwrap_or_else(|| panic!("the device returned head {id}, past the ring's end"));
        assert!(
            slot.in_flight,
            "the device returned head {id}, which is not in flight"
        );
        slot.in_flight = false;
        let slot = *slot;
        let offset = slot.status.wrapping_sub(self.slots_gpa);
        let status = if (offset as usize) < self.state.len() * SLOT {
            self.slots.load_u8(offset as usize, Ordering::Relaxed)
        } else {
            let mut byte = [0];
            self.mem.read(slot.status, &mut byte);
            byte[0]
        };
        self.next[usize::from(slot.last)] = self.free_head;
        self.free_head = id as u16;
        self.free += slot.descriptors;
        Some(Completion {
            token: slot.token,
            head: id as u16,
            len,
            status,
        })
    }

    /// Whether [`Queue::reap`] would return something.
    #[inline]
    pub fn has_completions(&self) -> bool {
        self.used_idx != self.used.load_u16(2, Ordering::Acquire)
    }

    /// Asks for a call when the completion after the next `after` ones has been published; 0: the next one.
    pub fn arm(&mut self, after: u16) {
        if self.setup.event_idx {
            let event = self.used_idx.wrapping_add(after);
            self.avail
                .store_u16(self.used_event_at(), event, Ordering::Relaxed);
        } else {
            self.avail.store_u16(0, 0, Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
    }

    /// Asks for no calls: NO_INTERRUPT, or with EVENT_IDX an index the ring has just left behind.
    pub fn disarm(&mut self) {
        if self.setup.event_idx {
            let event = self.used_idx.wrapping_sub(1);
            self.avail
                .store_u16(self.used_event_at(), event, Ordering::Relaxed);
        } else {
            self.avail.store_u16(0, NO_INTERRUPT, Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
    }

    /// Waits for a completion: asleep on the call eventfd if there is one, else spinning. `None` after `timeout`.
    pub fn wait(&mut self, timeout: Duration) -> Option<Completion> {
        if let Some(completion) = self.reap() {
            return Some(completion);
        }
        let deadline = Instant::now() + timeout;
        loop {
            if self.call.is_some() {
                self.arm(0);
                if let Some(completion) = self.reap() {
                    return Some(completion);
                }
                let left = deadline.saturating_duration_since(Instant::now());
                if self.wait_call(left) == 0 {
                    return self.reap();
                }
            } else {
                for _ in 0..200 {
                    if let Some(completion) = self.reap() {
                        return Some(completion);
                    }
                    std::hint::spin_loop();
                }
                if Instant::now() >= deadline {
                    return None;
                }
                std::thread::yield_now();
            }
            if let Some(completion) = self.reap() {
                return Some(completion);
            }
        }
    }

    /// Polls the used ring for a completion without ever sleeping. `None` after `timeout`.
    pub fn spin(&mut self, timeout: Duration) -> Option<Completion> {
        let deadline = Instant::now() + timeout;
        loop {
            for _ in 0..1000 {
                if let Some(completion) = self.reap() {
                    return Some(completion);
                }
                std::hint::spin_loop();
            }
            if Instant::now() >= deadline {
                return None;
            }
            std::thread::yield_now();
        }
    }

    /// Sleeps until the call eventfd is signalled, reads it and returns its count; 0 after `timeout`.
    pub fn wait_call(&mut self, timeout: Duration) -> u64 {
        let call = self.call.as_ref().expect("the queue has a call eventfd");
        let count = call.wait(timeout);
        self.calls += count;
        count
    }
}

/// Writes a descriptor to `table` at byte `offset`.
fn store_desc(table: &Window, offset: usize, desc: RawDesc) {
    let tail = u64::from(desc.len) | u64::from(desc.flags) << 32 | u64::from(desc.next) << 48;
    table.store_u64(offset, desc.addr, Ordering::Relaxed);
    table.store_u64(offset + 8, tail, Ordering::Relaxed);
}

/// Whether moving an index from `old` to `new` passed `event` (virtio 1.3, 2.7.7.2).
fn needs_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}
