//! A submission entry, read as the kernel reads it.

use io_uring::{opcode, squeue};
use libc::iovec;

/// The fields of a submission entry that we use (struct io_uring_sqe, uapi/linux/io_uring.h).
pub(in crate::engine) struct Sqe {
    pub opcode: u8,
    pub off: u64,
    addr: usize,
    len: u32,
    pub rw_flags: u32,
    addr3: u64,
}

impl Sqe {
    pub fn of(entry: &squeue::Entry) -> Sqe {
        const { assert!(size_of::<squeue::Entry>() == 64) };
        // SAFETY: an entry is the kernel's 64 bytes and nothing else (it is what the ring's memory
        // consists of), all of them initialized. Unsafe because the crate lets nobody read them.
        let raw: &[u8; 64] = unsafe { &*std::ptr::from_ref(entry).cast() };
        let long = |at: usize| u64::from_ne_bytes(raw[at..at + 8].try_into().expect("8 bytes"));
        let word = |at: usize| u32::from_ne_bytes(raw[at..at + 4].try_into().expect("4 bytes"));
        Sqe {
            opcode: raw[0],
            off: long(8),
            addr: usize::try_from(long(16)).expect("an address"),
            len: word(24),
            rw_flags: word(28),
            addr3: long(48),
        }
    }

    /// Whether a kernel thread does it from the first (IOSQE_ASYNC).
    pub fn is_async(entry: &squeue::Entry) -> bool {
        // SAFETY: as in `of`. Unsafe as there.
        let raw: &[u8; 64] = unsafe { &*std::ptr::from_ref(entry).cast() };
        raw[1] & squeue::Flags::ASYNC.bits() != 0
    }

    /// A write, as opposed to a read.
    pub fn writes(&self) -> bool {
        matches!(self.opcode, opcode::Write::CODE | opcode::Writev::CODE)
    }

    /// The buffers of a read or write.
    pub fn segments(&self) -> Vec<iovec> {
        if matches!(self.opcode, opcode::Read::CODE | opcode::Write::CODE) {
            return vec![iovec {
                iov_base: std::ptr::with_exposed_provenance_mut(self.addr),
                iov_len: self.len as usize,
            }];
        }
        let list = std::ptr::with_exposed_provenance::<iovec>(self.addr);
        // SAFETY: the entry names the slot's or the request's array, which stays until the command
        // is done, and `len` is its length. Unsafe because an entry holds numbers.
        unsafe { std::slice::from_raw_parts(list, self.len as usize) }.to_vec()
    }

    /// What a write takes from its buffers.
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for segment in self.segments() {
            // SAFETY: the segment is a buffer of a request in flight, or of the engine's own memory.
            // Unsafe because segments are raw.
            bytes.extend_from_slice(unsafe {
                std::slice::from_raw_parts(segment.iov_base.cast::<u8>(), segment.iov_len)
            });
        }
        bytes
    }

    /// Offset and length of a fallocate or a discard.
    pub fn range(&self) -> (u64, u64) {
        match self.opcode {
            opcode::UringCmd16::CODE => (self.addr as u64, self.addr3),
            _ => (self.off, self.addr as u64),
        }
    }
}
