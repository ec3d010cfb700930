//! The in-flight region: which chains were taken and not yet given back, in memory that the front end
//! keeps when this process dies (vhost-user, "Inflight I/O tracking").
//!
//! A split ring alone does not tell: chains are given back in any order, and the driver writes new
//! entries over those of chains that are still being worked on. So each queue has a record in memory
//! shared with the front end, which hands it to the next process:
//!
//! ```text
//! u64 features (0)   u16 version (1; 0: never used)   u16 desc_num
//! u16 last_batch_head   u16 used_idx
//! desc_num times:   u8 inflight   5 bytes   u16 next   u64 counter
//! ```
//!
//! in the host's byte order. The document leaves the distance of the queues' records to the back end;
//! here each begins at a multiple of [`QUEUE_ALIGN`] bytes, as in libvhost-user and DPDK.
//!
//! A record has room for [`MAX_RING_SIZE`](crate::mq::limits::MAX_RING_SIZE) entries, whatever size the front end says its rings have: QEMU
//! 10.0.13 asks for a region for its `queue-size` and starts rings of 1024. What stands before and behind the
//! records is in `virtio/inflight/layout/mod.rs`. A region of another back end, or of the last release, has records of the size
//! that the front end says, and nothing else.
//!
//! # What is written when
//!
//! The process may be killed between any two stores, and the next one sees those before. A store is
//! never moved before an earlier one: those whose order counts are release stores.
//!
//! - A chain is taken for good: `counter`, then `inflight`.
//! - An element is put: its entry's `next` leads to the one put before.
//! - A batch is published: `last_batch_head`; the ring's used index; each `inflight` of the batch is
//!   cleared; `used_idx`.
//!
//! So `used_idx` differs from the ring's used index exactly while flags of the last batch may be set that
//! should not be, and the difference is how many: recovery clears them. All flags that are left are chains the
//! driver waits for. They and the used index give the next available index, whatever the front end
//! believes it is: QEMU names the used index, Cloud Hypervisor the available index.
//!
//! The front end can write to the region at any time and is not trusted. Recovery reads each word once and
//! checks it; on the data path only `next` is read, and checked. What it lies about are chains of its
//! own guest.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

use rustix::fs::{
    MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, ftruncate, memfd_create,
};
use rustix::io::Errno;

mod layout;
mod mapping;
mod notes;
mod recover;

use layout::{Layout, lay_out, queue_bytes};
pub use layout::{records_at, records_bytes, region_bytes};
use mapping::Mapping;
pub use notes::Notes;
pub use recover::InflightError;

/// Bytes in front of a queue's entries.
const HEADER_BYTES: usize = 16;
/// Bytes of an entry.
const ENTRY_BYTES: usize = 16;
/// Where each queue's record begins: at a multiple of this many bytes.
pub const QUEUE_ALIGN: usize = 64;
/// The version of the layout.
const VERSION: u16 = 1;

/// Where the fields of a record are, in bytes.
mod at {
    pub(super) const FEATURES: usize = 0;
    pub(super) const VERSION: usize = 8;
    pub(super) const DESC_NUM: usize = 10;
    pub(super) const LAST_BATCH_HEAD: usize = 12;
    pub(super) const USED_IDX: usize = 14;
    /// In an entry.
    pub(super) const INFLIGHT: usize = 0;
    /// In an entry.
    pub(super) const NEXT: usize = 6;
    /// In an entry.
    pub(super) const COUNTER: usize = 8;
}

/// A new region for `queues` queues of [`region_bytes`], in a file that cannot be made shorter. The front end says
/// that its queues have `queue_size` descriptors.
///
/// # Errors
///
/// The kernel has no memory or no descriptor left.
pub fn create(queues: u16, queue_size: u16) -> io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let name = "vhost-user-blkmq in flight";
    // Not to be run as a program: hosts may insist. Linux before 6.3 does not know the flag.
    let file = match memfd_create(name, flags | MemfdFlags::NOEXEC_SEAL) {
        Err(Errno::INVAL) => memfd_create(name, flags),
        made => made,
    }?;
    ftruncate(&file, region_bytes(queues) as u64)?;
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    let mapping = Mapping::new(&file, 0, region_bytes(queues))?;
    lay_out(&mapping, queues, queue_size);
    Ok(file)
}

/// Whether `file` is memory: a memfd, or a file on tmpfs or hugetlbfs. Anything else may take its time over
/// an access. Where its owner allows it, it is sealed, and will never be shorter than now.
pub fn is_memory(file: &OwnedFd) -> bool {
    // Files in memory have seals, and only they.
    let Ok(seals) = fcntl_get_seals(file) else {
        return false;
    };
    if !seals.contains(SealFlags::SHRINK) {
        // One that cannot be sealed is guarded like guest memory, which is never sealed.
        let _ = fcntl_add_seals(file, SealFlags::SHRINK);
    }
    true
}

/// A region, mapped.
#[derive(Clone, Debug)]
pub struct InflightRegion {
    mapping: Arc<Mapping>,
    queues: u16,
    layout: Layout,
}

impl InflightRegion {
    /// Maps the region of `size` bytes for `queues` queues of up to `queue_size` descriptors that begins at
    /// byte `offset` of `file`. The file is that long and in memory ([`is_memory`]), and `size` is at least
    /// [`records_bytes`].
    ///
    /// # Errors
    ///
    /// The kernel's: the file cannot be written, or the offset is not a page's.
    pub fn map(
        file: &impl AsFd,
        offset: u64,
        size: u64,
        queues: u16,
        queue_size: u16,
    ) -> io::Result<InflightRegion> {
        let (least, most) = (records_bytes(queues, queue_size), region_bytes(queues));
        debug_assert!(size >= least as u64);
        let used = usize::try_from(size).unwrap_or(most).min(most).max(least);
        let mapping = Mapping::new(file, offset, used)?;
        let layout = Layout::find(&mapping, used, queues, queue_size);
        Ok(InflightRegion {
            mapping: Arc::new(mapping),
            queues,
            layout,
        })
    }

    /// The record of queue `index`, whose ring has `ring_size` entries. `None` if the region has none,
    /// or no room for so many.
    pub fn queue(&self, index: u16, ring_size: u16) -> Option<InflightQueue> {
        let size = self.layout.queue_size;
        if index >= self.queues || ring_size > size {
            return None;
        }
        let offset = self.layout.at + records_bytes(index, size);
        Some(InflightQueue {
            base: self.mapping.at(offset, queue_bytes(size)),
            size,
            _mapping: Arc::clone(&self.mapping),
        })
    }

    /// Queues it has records for.
    pub fn queues(&self) -> u16 {
        self.queues
    }

    /// Descriptors it has room for in each, which may be more than the front end said.
    pub fn queue_size(&self) -> u16 {
        self.layout.queue_size
    }

    /// Where its records begin, in bytes.
    pub fn records_at(&self) -> usize {
        self.layout.at
    }

    /// Forgets everything: the device was reset. No ring that uses the region is running.
    pub fn clear(&self) {
        for index in 0..self.queues {
            let queue = self.queue(index, self.layout.queue_size);
            queue
                .expect("an index below the number")
                .u16(at::VERSION)
                .store(0, Ordering::Release);
        }
    }
}

/// One queue's record in a region.
#[derive(Debug)]
pub struct InflightQueue {
    base: NonNull<u8>,
    /// Entries: `desc_num`.
    size: u16,
    _mapping: Arc<Mapping>,
}

// SAFETY: it keeps the mapping it points into, which may be accessed from any thread. Unsafe because a raw
// pointer carries no such promise.
unsafe impl Send for InflightQueue {}

impl InflightQueue {
    /// A 16-bit field of the record's header.
    #[inline]
    fn u16(&self, offset: usize) -> &AtomicU16 {
        debug_assert!(offset + 2 <= HEADER_BYTES);
        // SAFETY: callers name fields of the header, which is mapped, and records begin at multiples of
        // QUEUE_ALIGN of a page. Unsafe because the memory is shared with another process.
        unsafe { AtomicU16::from_ptr(self.base.add(offset).cast().as_ptr()) }
    }

    /// The 64-bit field of the record's header.
    fn features(&self) -> &AtomicU64 {
        // SAFETY: as in `u16`. Unsafe for the same reason.
        unsafe { AtomicU64::from_ptr(self.base.add(at::FEATURES).cast().as_ptr()) }
    }

    /// Where the entry of `head` is, which is below the record's size.
    #[inline]
    fn entry(&self, head: u16) -> NonNull<u8> {
        debug_assert!(head < self.size);
        // SAFETY: the record has `size` entries after its header. Unsafe because the memory is shared with
        // another process.
        unsafe {
            self.base
                .add(HEADER_BYTES + usize::from(head) * ENTRY_BYTES)
        }
    }

    #[inline]
    fn inflight(&self, head: u16) -> &AtomicU8 {
        // SAFETY: a field of an entry. Unsafe because the memory is shared with another process.
        unsafe { AtomicU8::from_ptr(self.entry(head).add(at::INFLIGHT).as_ptr()) }
    }

    #[inline]
    fn next(&self, head: u16) -> &AtomicU16 {
        // SAFETY: a field of an entry, aligned as entries are. Unsafe because the memory is shared with
        // another process.
        unsafe { AtomicU16::from_ptr(self.entry(head).add(at::NEXT).cast().as_ptr()) }
    }

    #[inline]
    fn counter(&self, head: u16) -> &AtomicU64 {
        // SAFETY: a field of an entry, aligned as entries are. Unsafe because the memory is shared with
        // another process.
        unsafe { AtomicU64::from_ptr(self.entry(head).add(at::COUNTER).cast().as_ptr()) }
    }
}

/// Keeps a queue's record while its ring is served.
#[derive(Debug)]
pub(super) struct Tracker {
    queue: InflightQueue,
    /// What the next chain taken gets.
    counter: u64,
    /// The head put last: where the list of the batch begins.
    last: u16,
}

impl Tracker {
    /// The chain at `head` was taken and can only be answered now.
    #[inline]
    pub(super) fn take(&mut self, head: u16) {
        kill_point();
        self.queue
            .counter(head)
            .store(self.counter, Ordering::Relaxed);
        self.counter = self.counter.wrapping_add(1);
        kill_point();
        self.queue.inflight(head).store(1, Ordering::Release);
    }

    /// The used element of `head` is put.
    #[inline]
    pub(super) fn put(&mut self, head: u16) {
        kill_point();
        self.queue.next(head).store(self.last, Ordering::Relaxed);
        self.last = head;
    }

    /// What was put is about to be published.
    #[inline]
    pub(super) fn publishes(&self) {
        kill_point();
        self.queue
            .u16(at::LAST_BATCH_HEAD)
            .store(self.last, Ordering::Relaxed);
    }

    /// The `count` elements put last were published with the used index `used`.
    #[inline]
    pub(super) fn published(&self, count: u16, used: u16) {
        let mut head = self.last;
        for _ in 0..count {
            // The links are read back from memory that the front end can write.
            if head >= self.queue.size {
                break;
            }
            kill_point();
            self.queue.inflight(head).store(0, Ordering::Release);
            head = self.queue.next(head).load(Ordering::Relaxed);
        }
        kill_point();
        self.queue.u16(at::USED_IDX).store(used, Ordering::Release);
    }
}

/// Stands before each store that the driver or the next process can see. Tests end a process there.
#[inline]
pub(super) fn kill_point() {
    #[cfg(test)]
    tests::kill_point();
}

#[cfg(test)]
pub(super) mod tests;
