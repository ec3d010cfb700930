//! The split virtqueue (virtio 1.3, section 2.7), from the device's side.
//!
//! The ring's three parts are translated and checked once, when it is set up and whenever the
//! memory table changes; from then on they are raw pointers. Everything in them may change under
//! our hands at any time, so each value is read once, by a volatile or an atomic read, and checked
//! before it is used.

use std::fmt;
use std::mem;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use super::abi::{self, Descriptor};
use super::guest_io::{GuestIo, Slot, Used};
use super::inflight::{Tracker, kill_point};
use super::memory::{MemoryTable, Region};
use super::pool::{RawTable, SegmentPool};
use crate::mq::limits::MAX_RING_SIZE;

mod dirty_log;
mod error;
mod history;
mod memory;
mod notify;
mod prefetch;
mod resume;
mod walk;

pub use error::{RingError, RingPart};
pub use prefetch::AHEAD;
use resume::Resume;

/// What the front end says about a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingSetup {
    /// Entries: a power of two, at most [`MAX_RING_SIZE`].
    pub size: u16,
    /// Guest-physical address of the descriptor table.
    pub desc: u64,
    /// Guest-physical address of the available ring.
    pub avail: u64,
    /// Guest-physical address of the used ring.
    pub used: u64,
    /// The available index to go on from (VHOST_USER_SET_VRING_BASE).
    pub next_avail: u16,
    /// `VIRTIO_RING_F_EVENT_IDX` was negotiated.
    pub event_idx: bool,
    /// The longest indirect table to accept, in descriptors; the ring's size if that is more.
    pub chain_limit: u16,
}

/// A chain taken from the available ring: to be parsed, or to be given back with [`Ring::unpop`].
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub struct Head(u16);

impl Head {
    /// Its index in the descriptor table: the request tag.
    #[inline]
    pub fn index(&self) -> u16 {
        self.0
    }
}

/// Where the parts are mapped. Valid as long as the memory table they were found in.
#[derive(Clone, Copy, Debug)]
struct Parts {
    desc: NonNull<u8>,
    /// flags, idx, ring[size], used_event: all 16 bits wide.
    avail: NonNull<u16>,
    /// flags, idx: 16 bits wide; ring[size]: two times 32 bits each; avail_event: 16 bits.
    used: NonNull<u16>,
}

impl Parts {
    fn find(setup: &RingSetup, memory: &MemoryTable) -> Result<Parts, RingError> {
        let size = u64::from(setup.size);
        let event = if setup.event_idx { 2 } else { 0 };
        let find = |part, address: u64, len: u64, align: u64| {
            let host =
                memory
                    .host(address, len)
                    .ok_or(RingError::PartOutside { part, address, len })?;
            // Both: the first is the specification's, the second is what our pointers need.
            if !address.is_multiple_of(align) || !(host.addr().get() as u64).is_multiple_of(align) {
                return Err(RingError::Unaligned {
                    part,
                    address,
                    align,
                });
            }
            Ok(host)
        };
        Ok(Parts {
            desc: find(RingPart::Descriptors, setup.desc, 16 * size, 16)?,
            avail: find(RingPart::Available, setup.avail, 4 + 2 * size + event, 2)?.cast(),
            used: find(RingPart::Used, setup.used, 4 + 8 * size + event, 4)?.cast(),
        })
    }
}

/// Stands for no head: a ring has at most [`MAX_RING_SIZE`] of them.
const NO_HEAD: u16 = u16::MAX;

/// A split ring of one virtqueue, owned by one thread.
pub struct Ring {
    parts: Parts,
    setup: RingSetup,
    mask: u16,
    /// The available index of the next chain to pop.
    next_avail: u16,
    /// The available index the guest has published, as far as we have looked.
    seen_avail: u16,
    /// The used index of the next element to put.
    next_used: u16,
    /// The used index the guest can see.
    published: u16,
    /// `published` at the last decision whether to call.
    decided: u16,
    /// The next decision is yes: the ring was served before and there has been none yet, or the index
    /// has gone all the way round since the last one.
    must_call: bool,
    /// There are used elements somebody may not have been called for.
    used_before: bool,
    /// What the last `pop_head` gave, if it can still be given back.
    last_head: u16,
    in_flight: u16,
    /// Descriptors of chains that were not of the common shape, since somebody asked for the first time in a
    /// turn.
    walked: u32,
    /// One bit for each head, set from pop to put.
    in_flight_heads: Box<[u64]>,
    /// One for each head; in use while it is in flight.
    slots: RawTable<Slot>,
    ahead: prefetch::Ahead,
    /// Keeps account for the process after this one, if the front end wants that.
    tracker: Option<Tracker>,
    /// What the process before had in flight; `None` as soon as all of it has been taken again.
    resume: Option<Box<Resume>>,
    pub(super) memory: Arc<MemoryTable>,
    /// Where what is written to the guest's memory is marked while it migrates.
    pub(super) log: Option<Box<dirty_log::RingLog>>,
    /// The region headers, status bytes and indirect tables were last found in.
    pub(super) meta_region: Region,
    /// The region data was last found in.
    pub(super) data_region: Region,
}

// SAFETY: the pointers lead into guest memory, which any thread may access, and into allocations
// that the ring owns. Unsafe because raw pointers carry no such promise.
unsafe impl Send for Ring {}

impl fmt::Debug for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ring")
            .field("setup", &self.setup)
            .field("next_avail", &self.next_avail)
            .field("seen_avail", &self.seen_avail)
            .field("next_used", &self.next_used)
            .field("published", &self.published)
            .field("in_flight", &self.in_flight)
            .finish_non_exhaustive()
    }
}

impl Ring {
    /// Checks and adopts a ring. The used index goes on from what the ring itself says.
    pub fn new(setup: &RingSetup, memory: Arc<MemoryTable>) -> Result<Ring, RingError> {
        let size = setup.size;
        if !size.is_power_of_two() || size > MAX_RING_SIZE {
            return Err(RingError::Size(size));
        }
        let parts = Parts::find(setup, &memory)?;
        let mut ring = Ring {
            parts,
            setup: RingSetup {
                chain_limit: setup.chain_limit.max(size),
                ..*setup
            },
            mask: size - 1,
            next_avail: setup.next_avail,
            seen_avail: setup.next_avail,
            next_used: 0,
            published: 0,
            decided: 0,
            walked: 0,
            must_call: false,
            used_before: false,
            last_head: NO_HEAD,
            in_flight: 0,
            in_flight_heads: vec![0; usize::from(size).div_ceil(64)].into_boxed_slice(),
            slots: RawTable::new(usize::from(size)),
            ahead: prefetch::Ahead::new(parts.desc),
            tracker: None,
            resume: None,
            memory,
            log: None,
            meta_region: Region::NONE,
            data_region: Region::NONE,
        };
        let used = u16::from_le(ring.used_field(1).load(Ordering::Acquire));
        (ring.next_used, ring.published, ring.decided) = (used, used, used);
        ring.used_before = used != 0 || setup.next_avail != 0;
        ring.must_call = ring.used_before;
        Ok(ring)
    }

    /// Looks how many chains are available: the one load of the guest's index for a batch.
    #[inline]
    pub fn available(&mut self) -> Result<u16, RingError> {
        if let Some(left) = self.resumable() {
            return Ok(left);
        }
        // Acquire pairs with the write barrier the driver puts between its descriptors and its
        // index (section 2.7.13.3): what the index covers can be read.
        let index = u16::from_le(self.avail_field(1).load(Ordering::Acquire));
        let count = index.wrapping_sub(self.next_avail);
        if count > self.setup.size {
            let (next, size) = (self.next_avail, self.setup.size);
            return Err(RingError::AvailJump { index, next, size });
        }
        self.seen_avail = index;
        Ok(count)
    }

    /// Takes the next chain that [`Ring::available`] saw; `None` when those are used up. After an
    /// error the ring stands where it stood.
    #[inline]
    pub fn pop_head(&mut self) -> Result<Option<Head>, RingError> {
        if self.next_avail == self.seen_avail {
            return Ok(self.pop_resumed());
        }
        let entry = usize::from(self.next_avail & self.mask);
        let head = u16::from_le(self.avail_field(2 + entry).load(Ordering::Relaxed));
        if head >= self.setup.size {
            return Err(RingError::HeadOutOfRange {
                head,
                size: self.setup.size,
            });
        }
        let (word, bit) = (usize::from(head / 64), 1 << (head % 64));
        if self.in_flight_heads[word] & bit != 0 {
            return Err(RingError::HeadInFlight { head });
        }
        self.in_flight_heads[word] |= bit;
        self.in_flight += 1;
        self.next_avail = self.next_avail.wrapping_add(1);
        self.last_head = head;
        Ok(Some(Head(head)))
    }

    /// Whether there are chains that were seen and not popped yet.
    #[inline]
    pub fn has_more(&self) -> bool {
        self.next_avail != self.seen_avail || self.to_resume() > 0
    }

    /// Writes a used element; [`Ring::publish`] shows it to the guest.
    #[inline]
    pub fn put_used(&mut self, used: Used) {
        self.release(used.head());
        if let Some(tracker) = &mut self.tracker {
            tracker.put(used.head());
        }
        let entry = usize::from(self.next_used & self.mask);
        // SAFETY: the used ring has `size` elements of two 32-bit fields, four bytes after its
        // start, `Parts::find` checked that they are mapped and aligned to four bytes, and `entry`
        // is below the size. Unsafe because the ring is the guest's memory.
        unsafe {
            let element = self.parts.used.add(2).cast::<u32>().add(2 * entry);
            kill_point();
            element.write_volatile(u32::from(used.head()).to_le());
            element.add(1).write_volatile(used.len().to_le());
        }
        self.next_used = self.next_used.wrapping_add(1);
    }

    /// Whether account is kept of what is in flight.
    pub fn is_tracked(&self) -> bool {
        self.tracker.is_some()
    }

    /// Forgets a chain, which stays in flight in the record that is kept: the ring that goes on from the record
    /// takes it again.
    pub fn abandon(&mut self, io: GuestIo, pool: &mut SegmentPool) {
        self.release(io.abandon(pool));
    }

    /// Shows the guest all that was put since the last time. False: there was nothing.
    #[inline]
    pub fn publish(&mut self) -> bool {
        let (old, new) = (self.published, self.next_used);
        if old == new {
            return false;
        }
        if let Some(tracker) = &self.tracker {
            tracker.publishes();
        }
        kill_point();
        // Release pairs with the driver's read barrier after it has read the index (section
        // 2.7.14): the elements and all data are visible before it.
        self.used_field(1).store(new.to_le(), Ordering::Release);
        if let Some(tracker) = &self.tracker {
            tracker.published(new.wrapping_sub(old), new);
        }
        if self.log.is_some() {
            self.log_published(old, new);
        }
        self.published = new;
        self.used_before = true;
        if new.wrapping_sub(self.decided) < new.wrapping_sub(old) {
            self.must_call = true;
        }
        true
    }

    /// The available index of the next chain to pop: the answer to VHOST_USER_GET_VRING_BASE.
    pub fn next_avail(&self) -> u16 {
        self.next_avail
    }

    /// How many chains were popped and have no used element yet.
    #[inline]
    pub fn in_flight(&self) -> u16 {
        self.in_flight
    }

    /// Entries of the ring.
    #[inline]
    pub fn size(&self) -> u16 {
        self.setup.size
    }

    /// The longest indirect table accepted.
    #[inline]
    pub(super) fn chain_limit(&self) -> u16 {
        self.setup.chain_limit
    }

    /// The descriptor table, of [`Ring::size`] descriptors.
    #[inline]
    pub(super) fn table(&self) -> NonNull<u8> {
        self.parts.desc
    }

    /// Copies a descriptor of the ring out of guest memory.
    #[inline]
    pub(super) fn descriptor(&self, index: u16) -> Descriptor {
        assert!(index < self.setup.size);
        // SAFETY: `Parts::find` checked that the table's `size` descriptors are mapped. Unsafe
        // because they are in the guest's memory.
        Descriptor::from_words(unsafe {
            abi::read_words(self.parts.desc.add(usize::from(index) * 16))
        })
    }

    /// The slot of the chain at `head`.
    #[inline]
    pub(super) fn slot(&self, head: &Head) -> NonNull<Slot> {
        self.slots.at(usize::from(head.0))
    }

    /// From now on the chain popped last can only be answered.
    #[inline]
    pub(super) fn commit(&mut self, head: Head) -> u16 {
        self.last_head = NO_HEAD;
        self.track_taken(head.0);
        head.0
    }

    /// The head is the guest's again.
    #[inline]
    fn release(&mut self, head: u16) {
        let (word, bit) = (usize::from(head / 64), 1 << (head % 64));
        assert!(
            self.in_flight_heads[word] & bit != 0,
            "head {head} is not in flight"
        );
        self.in_flight_heads[word] &= !bit;
        self.in_flight -= 1;
        self.last_head = NO_HEAD;
    }

    /// A 16-bit field of the available ring: 0 flags, 1 idx, 2.. ring, 2 + size used_event.
    #[inline]
    fn avail_field(&self, field: usize) -> &AtomicU16 {
        debug_assert!(field < 2 + usize::from(self.setup.size) + usize::from(self.setup.event_idx));
        // SAFETY: callers name fields up to `ring[size - 1]`, and used_event only with EVENT_IDX;
        // `Parts::find` checked that those are mapped and aligned, and the memory table keeps them
        // so as long as `self`. Unsafe because the field is the guest's too, which accesses it by
        // single loads and stores of its own.
        unsafe { AtomicU16::from_ptr(self.parts.avail.add(field).as_ptr()) }
    }

    /// A 16-bit field of the used ring: 0 flags, 1 idx, 2 + 4 * size avail_event.
    #[inline]
    fn used_field(&self, field: usize) -> &AtomicU16 {
        // SAFETY: as in `avail_field`; avail_event is named only with EVENT_IDX. Unsafe for the
        // same reason.
        unsafe { AtomicU16::from_ptr(self.parts.used.add(field).as_ptr()) }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // Requests still point into their slots and the guest's memory, and the kernel may
        // still use both.
        if self.in_flight > 0 {
            self.slots.leak();
            mem::forget(Arc::clone(&self.memory));
        }
    }
}

#[cfg(test)]
mod tests;
