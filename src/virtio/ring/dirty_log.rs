//! What a ring does while its guest is being migrated: every page it writes is marked in the dirty log.
//!
//! Without a log it costs a branch for each request and each batch. All marks are made after the
//! write they stand for, see [`crate::virtio::dirty_log`], and before anybody is told that a ring has stopped.

use std::ptr::NonNull;
use std::sync::Arc;

use super::{Ring, RingError};
use crate::mq::request::Status;
use crate::virtio::dirty_log::DirtyLog;
use crate::virtio::guest_io::GuestIo;
use crate::virtio::pool::{Segment, SegmentPool};

/// A ring's log.
#[derive(Debug)]
pub(in crate::virtio) struct RingLog {
    log: Arc<DirtyLog>,
    /// The address under which the used ring is logged.
    used: u64,
}

impl Ring {
    /// Marks what is written from now on in `log`, or nowhere. Requests in flight count as written
    /// when they end. The used ring is logged at `used` (the log address of
    /// VHOST_USER_SET_VRING_ADDR), and without one where it is.
    ///
    /// # Errors
    ///
    /// The log has no bits for the used ring; nothing is logged then.
    pub fn set_log(
        &mut self,
        log: Option<Arc<DirtyLog>>,
        used: Option<u64>,
    ) -> Result<(), RingError> {
        self.log = None;
        if let Some(log) = log {
            let address = used.unwrap_or(self.setup.used);
            let len = 4 + 8 * u64::from(self.setup.size) + 2;
            if !log.covers(address, len) {
                return Err(RingError::LogShort { address, len });
            }
            self.log = Some(Box::new(RingLog { log, used: address }));
        }
        Ok(())
    }

    /// Whether the front end has taken the log away: its guest must not be told of writes that nobody
    /// marks.
    pub fn is_log_lost(&self) -> bool {
        self.log.as_ref().is_some_and(|log| log.log.is_lost())
    }

    /// Answers a request and puts its used element; see [`GuestIo::finish`].
    #[inline]
    pub fn finish(&mut self, io: GuestIo, status: Status, bytes: u32, pool: &mut SegmentPool) {
        let used = if self.log.is_none() {
            io.finish(status, bytes, pool)
        } else {
            self.finish_logged(io, status, bytes, pool)
        };
        self.put_used(used);
    }

    #[cold]
    fn finish_logged(
        &mut self,
        io: GuestIo,
        status: Status,
        bytes: u32,
        pool: &mut SegmentPool,
    ) -> super::Used {
        // The engine has written what it had to write; a read that failed may have written any of it.
        for buffer in io.written() {
            let base = NonNull::new(buffer.iov_base.cast()).expect("made of a NonNull");
            self.mark(base, buffer.iov_len);
        }
        let byte = io.status();
        let used = io.finish(status, bytes, pool);
        self.mark(byte, 1);
        used
    }

    /// A chain was answered while it was parsed: its status was written, and the first `bytes` of its
    /// writable `pieces`.
    #[cold]
    pub(in crate::virtio) fn log_answer(
        &self,
        status: NonNull<u8>,
        pieces: &[Segment],
        bytes: u32,
    ) {
        self.mark(status, 1);
        let mut left = usize::try_from(bytes).expect("at least 32 bits");
        for piece in pieces {
            // SAFETY: pieces of a layout are buffers. Unsafe because a segment can also be an extent.
            let buffer = unsafe { piece.iovec };
            let written = buffer.iov_len.min(left);
            if written == 0 {
                return;
            }
            let base = NonNull::new(buffer.iov_base.cast()).expect("made of a NonNull");
            self.mark(base, written);
            left -= written;
        }
    }

    /// The used elements from index `old` to `new` have been written, and the index.
    #[cold]
    pub(super) fn log_published(&self, old: u16, new: u16) {
        let size = self.setup.size;
        let count = new.wrapping_sub(old).min(size);
        let first = old & self.mask;
        let to_the_end = count.min(size - first);
        self.log_used(4 + 8 * u64::from(first), 8 * u64::from(to_the_end));
        self.log_used(4, 8 * u64::from(count - to_the_end));
        self.log_used(2, 2);
    }

    /// A wish about kicks has been written, into the used ring's field `field` (16 bits wide).
    #[cold]
    pub(super) fn log_wish(&self, field: usize) {
        self.log_used(2 * field as u64, 2);
    }

    fn log_used(&self, offset: u64, len: u64) {
        if let Some(log) = &self.log {
            log.log.mark(log.used + offset, len);
        }
    }

    /// Marks the `len` bytes from `host`, which lie in one region of the guest's memory.
    fn mark(&self, host: NonNull<u8>, len: usize) {
        if let Some(log) = &self.log {
            let gpa = self.memory.gpa(host).expect("in the table it was found in");
            log.log.mark(gpa, len as u64);
        }
    }
}
