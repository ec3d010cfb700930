//! Entries that wait to be submitted, seen a second time: the crate lets no one change what was pushed.
//!
//! Between the push of a transfer and the call that submits it, a page of its buffers may be lost. The
//! kernel would read the zeros that are there then ([`crate::sys::sigbus`]), so such an entry gets an address
//! that the kernel refuses, and completes with `EFAULT`.

use std::io;
use std::os::fd::AsRawFd;
use std::ptr::{self, NonNull};

use io_uring::{IoUring, opcode};
use libc::iovec;

use super::Ring;
use crate::sys::sigbus::Losses;

/// Bytes of an entry, and where in it fields are (`struct io_uring_sqe`, uapi/linux/io_uring.h).
const ENTRY_BYTES: usize = 64;
const OPCODE: usize = 0;
const ADDRESS: usize = 16;
const LENGTH: usize = 24;

/// IORING_OFF_SQES (the same file).
const OFFSET: libc::off_t = 0x1000_0000;

/// An address of no process: the kernel's half, where addresses have two.
pub(in crate::engine) const NOWHERE: usize = 1 << (usize::BITS - 1);

/// The array of entries that the ring's queue is made of.
pub(super) struct Entries {
    base: NonNull<u8>,
    /// A power of two.
    count: u32,
    /// Entries pushed so far, modulo 2^32, as the queue counts: the place of the next one.
    pushed: u32,
}

impl Entries {
    /// Maps the entries of a new ring.
    pub(super) fn map(ring: &IoUring) -> io::Result<Entries> {
        let count = ring.params().sq_entries();
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists. Unsafe
        // because the kernel reads the entries, which it does only while this thread submits them.
        let base = unsafe {
            libc::mmap(
                ptr::null_mut(),
                count as usize * ENTRY_BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                ring.as_raw_fd(),
                OFFSET,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).expect("mmap gives no null without MAP_FIXED");
        Ok(Entries {
            base,
            count,
            pushed: 0,
        })
    }

    #[inline]
    pub(super) fn pushed(&mut self, pushed: bool) {
        self.pushed = self.pushed.wrapping_add(u32::from(pushed));
    }

    /// Spoils those of the last `queued` entries that transfer from or to lost memory.
    fn spoil(&mut self, queued: u32, losses: &Losses) {
        for back in 1..=queued {
            let at = self.pushed.wrapping_sub(back) & (self.count - 1);
            // SAFETY: below `count`. Unsafe because only the mask tells.
            let entry = unsafe { self.base.add(at as usize * ENTRY_BYTES) };
            // SAFETY: the entry is one of ours, not submitted yet, so that what it names is valid
            // (`Ring::push`'s contract) and no other thread uses it; its fields are aligned as in the C
            // structure. Unsafe because it is read from shared memory.
            unsafe {
                let address = entry.add(ADDRESS).cast::<u64>();
                if names_lost(
                    entry.add(OPCODE).read(),
                    address.read(),
                    entry.add(LENGTH).cast::<u32>().read(),
                    losses,
                ) {
                    address.write(NOWHERE as u64);
                }
            }
        }
    }
}

/// Whether an entry with these fields transfers from or to lost memory.
///
/// # Safety
///
/// A vector's array is valid.
unsafe fn names_lost(code: u8, address: u64, len: u32, losses: &Losses) -> bool {
    let address = usize::try_from(address).expect("addresses are as wide as pointers");
    let len = len as usize;
    match code {
        opcode::Read::CODE | opcode::Write::CODE => losses.have(address, len),
        opcode::Readv::CODE | opcode::Writev::CODE => (0..len).any(|at| {
            let vectors = ptr::with_exposed_provenance::<iovec>(address);
            // SAFETY: our caller's. Unsafe because the kernel's interface works on addresses.
            let vector = unsafe { *vectors.add(at) };
            losses.have(vector.iov_base.addr(), vector.iov_len)
        }),
        _ => false,
    }
}

impl Drop for Entries {
    fn drop(&mut self) {
        // SAFETY: mapped in `map`, and no other has the address. Unsafe because unmapping is.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.count as usize * ENTRY_BYTES) };
    }
}

impl Ring {
    /// Before entries go to the kernel: none may name memory that was lost.
    #[inline]
    pub(super) fn spoil_lost(&mut self) {
        if self.losses.are_any() {
            self.spoil_unsent();
        }
    }

    #[cold]
    fn spoil_unsent(&mut self) {
        let queued = u32::try_from(self.ring.submission().len()).expect("at most the queue's size");
        self.entries.spoil(queued, &self.losses);
    }
}
