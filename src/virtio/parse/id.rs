//! The answer to VIRTIO_BLK_T_GET_ID.

use std::ptr::NonNull;

use crate::virtio::abi::{self, ID_BYTES};
use crate::virtio::pool::Segment;

/// Writes as much of the serial as the guest has room for; returns how many bytes.
pub(super) fn write(pieces: &[Segment], serial: &[u8; ID_BYTES]) -> u32 {
    let mut left = &serial[..];
    for piece in pieces {
        // SAFETY: pieces of a layout are buffers. Unsafe because a segment can also be an extent.
        let iovec = unsafe { piece.iovec };
        let (now, later) = left.split_at(iovec.iov_len.min(left.len()));
        let base = NonNull::new(iovec.iov_base.cast::<u8>()).expect("made of a NonNull");
        // SAFETY: the walk found the piece's `iov_len` bytes in guest memory. Unsafe because it is
        // the guest's too.
        unsafe { abi::write_bytes(base, now) };
        left = later;
    }
    u32::try_from(serial.len() - left.len()).expect("at most ID_BYTES")
}
