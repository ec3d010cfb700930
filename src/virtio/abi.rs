//! Layouts and constants the guest shares with us, in host byte order once read.

use std::ptr::NonNull;

use virtio_bindings::{virtio_blk, virtio_ring};

/// Bytes of one descriptor (virtio 1.3, section 2.7.5).
pub const DESCRIPTOR_BYTES: u32 = 16;
/// Bytes of a request's header: type, ioprio (reserved in the specification), sector (section
/// 5.2.6).
pub const HEADER_BYTES: u32 = 16;
/// Bytes of one discard or write-zeroes range: sector, number of sectors, flags (section 5.2.6).
pub const RANGE_BYTES: usize = 16;
/// Bytes of the answer to `VIRTIO_BLK_T_GET_ID` (section 5.2.6).
pub const ID_BYTES: usize = virtio_blk::VIRTIO_BLK_ID_BYTES as usize;

/// The chain goes on at `next` (section 2.7.5).
pub const DESC_NEXT: u16 = narrow(virtio_ring::VRING_DESC_F_NEXT);
/// The device writes the buffer.
pub const DESC_WRITE: u16 = narrow(virtio_ring::VRING_DESC_F_WRITE);
/// The buffer is a table of descriptors.
pub const DESC_INDIRECT: u16 = narrow(virtio_ring::VRING_DESC_F_INDIRECT);
/// avail.flags: the driver asks for no interrupts (section 2.7.6).
pub const AVAIL_NO_INTERRUPT: u16 = narrow(virtio_ring::VRING_AVAIL_F_NO_INTERRUPT);
/// used.flags: the device asks for no notifications (section 2.7.8).
pub const USED_NO_NOTIFY: u16 = narrow(virtio_ring::VRING_USED_F_NO_NOTIFY);

/// Request types (section 5.2.6).
pub mod request_type {
    use virtio_bindings::virtio_blk as v;

    /// Read.
    pub const IN: u32 = v::VIRTIO_BLK_T_IN;
    /// Write.
    pub const OUT: u32 = v::VIRTIO_BLK_T_OUT;
    /// Make completed writes durable.
    pub const FLUSH: u32 = v::VIRTIO_BLK_T_FLUSH;
    /// Read the disk's serial.
    pub const GET_ID: u32 = v::VIRTIO_BLK_T_GET_ID;
    /// Drop the content of ranges.
    pub const DISCARD: u32 = v::VIRTIO_BLK_T_DISCARD;
    /// Zero ranges.
    pub const WRITE_ZEROES: u32 = v::VIRTIO_BLK_T_WRITE_ZEROES;
    /// A bit beside the type, which legacy devices could offer (VIRTIO_BLK_T_BARRIER in Linux). It is not offered
    /// and means nothing. SLOF, the firmware of pseries, sets it in each request all the same.
    pub const BARRIER: u32 = v::VIRTIO_BLK_T_BARRIER;
}

/// A write-zeroes range may be deallocated (section 5.2.6).
pub const RANGE_UNMAP: u32 = virtio_blk::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;

/// One of the ring's 16-bit flags, which the bindings give as `u32`.
const fn narrow(flag: u32) -> u16 {
    assert!(flag <= 0xffff);
    #[expect(
        clippy::cast_possible_truncation,
        reason = "checked above, at compile time"
    )]
    let flag = flag as u16;
    flag
}

/// A descriptor (section 2.7.5), copied out of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Guest-physical address of the buffer.
    pub addr: u64,
    /// Its bytes.
    pub len: u32,
    /// `DESC_*`
    pub flags: u16,
    /// Where the chain goes on, if [`DESC_NEXT`] is set.
    pub next: u16,
}

impl Descriptor {
    /// From the sixteen bytes in guest memory, given as two little-endian words.
    #[inline]
    pub fn from_words(words: [u64; 2]) -> Self {
        #[expect(clippy::cast_possible_truncation, reason = "takes the word apart")]
        Descriptor {
            addr: u64::from_le(words[0]),
            len: u64::from_le(words[1]) as u32,
            flags: (u64::from_le(words[1]) >> 32) as u16,
            next: (u64::from_le(words[1]) >> 48) as u16,
        }
    }
}

/// A request's header (section 5.2.6), copied out of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// One of [`request_type`].
    pub kind: u32,
    /// Linux' driver puts the I/O priority here; reserved in the specification.
    pub ioprio: u32,
    /// First sector, of 512 bytes.
    pub sector: u64,
}

impl Header {
    /// From the sixteen bytes in guest memory, given as two little-endian words.
    #[inline]
    pub fn from_words(words: [u64; 2]) -> Self {
        #[expect(clippy::cast_possible_truncation, reason = "takes the word apart")]
        Header {
            kind: u64::from_le(words[0]) as u32,
            ioprio: (u64::from_le(words[0]) >> 32) as u32,
            sector: u64::from_le(words[1]),
        }
    }
}

/// Sixteen bytes of guest memory, each read exactly once, as two words in the guest's byte order.
///
/// # Safety
///
/// Sixteen bytes from `at` are mapped and readable.
#[inline]
pub(super) unsafe fn read_words(at: NonNull<u8>) -> [u64; 2] {
    let wide = at.cast::<u64>();
    if wide.is_aligned() {
        // SAFETY: the caller vouches for sixteen bytes, and the alignment was just checked. Unsafe
        // because the guest may write them meanwhile, which only a volatile read through a raw
        // pointer allows for.
        unsafe { [wide.read_volatile(), wide.add(1).read_volatile()] }
    } else {
        let mut bytes = [0; 16];
        // SAFETY: as above, without the alignment, which bytes do not need.
        unsafe { read_bytes(at, &mut bytes) };
        let (low, high) = bytes.split_at(8);
        [low, high].map(|half| u64::from_ne_bytes(half.try_into().expect("half of sixteen")))
    }
}

/// Asks for the cache line at `at`, to read it soon. The address may be any: nothing is accessed.
#[inline]
pub(super) fn fetch(at: NonNull<u8>) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch changes nothing and never faults. Unsafe because it is an instruction.
    unsafe {
        std::arch::asm!("prefetcht0 [{}]", in(reg) at.as_ptr(), options(nostack, preserves_flags, readonly));
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: as above. Unsafe for the same reason.
    unsafe {
        std::arch::asm!("prfm pldl1keep, [{}]", in(reg) at.as_ptr(), options(nostack, preserves_flags, readonly));
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = at;
}

/// As [`fetch`], to read and to write it soon: the line is taken away from other CPUs at once.
#[inline]
pub(super) fn fetch_to_write(at: NonNull<u8>) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: as in `fetch`; processors without the instruction do nothing. Unsafe for the same
    // reason.
    unsafe {
        std::arch::asm!("prefetchw [{}]", in(reg) at.as_ptr(), options(nostack, preserves_flags, readonly));
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: as in `fetch`. Unsafe for the same reason.
    unsafe {
        std::arch::asm!("prfm pstl1keep, [{}]", in(reg) at.as_ptr(), options(nostack, preserves_flags, readonly));
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = at;
}

/// Fills `into` from guest memory, reading each byte exactly once.
///
/// # Safety
///
/// `into.len()` bytes from `at` are mapped and readable.
pub(super) unsafe fn read_bytes(at: NonNull<u8>, into: &mut [u8]) {
    for (i, byte) in into.iter_mut().enumerate() {
        // SAFETY: within the bytes the caller vouches for. Unsafe because the guest may write them
        // meanwhile, which only a volatile read through a raw pointer allows for.
        *byte = unsafe { at.add(i).read_volatile() };
    }
}

/// Copies `from` into guest memory.
///
/// # Safety
///
/// `from.len()` bytes from `at` are mapped and writable.
pub(super) unsafe fn write_bytes(at: NonNull<u8>, from: &[u8]) {
    for (i, byte) in from.iter().enumerate() {
        // SAFETY: within the bytes the caller vouches for. Unsafe because the guest may read them
        // meanwhile, which only a volatile write through a raw pointer allows for.
        unsafe { at.add(i).write_volatile(*byte) };
    }
}
