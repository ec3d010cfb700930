//! Asking the processor for memory before it is needed.

/// The usual size of a cache line, in bytes.
pub(super) const CACHE_LINE_BYTES: usize = 64;

/// Asks for the cache line at an address, into the second level: a page at a time would drown the
/// first. Any address will do; one that is not mapped is left alone.
#[inline]
pub(super) fn prefetch(address: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch has no effect but on time, whatever the address. Unsafe because all
    // intrinsics of this kind are.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T1>(address.cast());
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: as above. Unsafe because it is assembler.
    unsafe {
        std::arch::asm!("prfm pldl2keep, [{0}]", in(reg) address, options(nostack, preserves_flags, readonly));
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = address;
}
