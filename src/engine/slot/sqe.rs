//! The submission entries of a slot's steps.

use std::os::fd::AsRawFd;

use io_uring::types::{self, FsyncFlags, Timespec};
use io_uring::{opcode, squeue};

use super::{Method, Slot, Stage};
use crate::engine::target::{Disk, FileTarget, Target};
use crate::engine::uring::NOWHERE;
use crate::engine::{Extent, RETRIES, ZERO_BYTES};
use crate::mq::limits::IOV_MAX;
use crate::mq::request::Op;

/// Builds an entry with the disk's fd, be it an index of the registered table or a plain one.
macro_rules! on_file {
    ($disk:expr, |$fd:ident| $build:expr) => {
        if $disk.registered {
            let $fd = types::Fixed(u32::from($disk.index));
            $build
        } else {
            let $fd = types::Fd($disk.fd);
            $build
        }
    };
}

/// `_IO(0x12, 0)` of uapi/linux/blkdev.h: discard as an io_uring command, since Linux 6.12.
const BLOCK_URING_CMD_DISCARD: u32 = 0x1200;

/// How long to leave an operation alone before its next try.
static DELAYS: [Timespec; RETRIES as usize] = {
    let mut delays = [Timespec::new(); RETRIES as usize];
    let mut i = 0;
    let mut nanos = 500_000;
    while i < delays.len() {
        delays[i] = Timespec::new().nsec(nanos);
        nanos = if nanos < 128_000_000 {
            nanos * 2
        } else {
            nanos
        };
        i += 1;
    }
    delays
};

impl Slot {
    /// The submission entry for what [`Next::Issue`] asked for, without user data.
    ///
    /// For a bounced write this fills the bounce buffer.
    pub(in crate::engine) fn sqe(
        &mut self,
        disk: &Disk,
        extents: &[Extent],
        zeroes: *const u8,
    ) -> squeue::Entry {
        if self.delayed {
            let delay = &DELAYS[usize::from(self.attempts - 1)];
            return opcode::Timeout::new(delay).build();
        }
        let Target::File(file) = &disk.target else {
            unreachable!("a null disk has no SQEs")
        };
        let entry = match self.stage {
            Stage::Idle | Stage::Inline | Stage::Copy => unreachable!("nothing to submit"),
            Stage::Transfer => self.transfer_sqe(file, disk),
            Stage::Range(method) => self.range_sqe(method, disk, extents, zeroes),
            Stage::Sync => on_file!(disk, |fd| opcode::Fsync::new(fd)
                .flags(FsyncFlags::DATASYNC)
                .build()),
            Stage::Witness => {
                let witness = disk
                    .sync_fault
                    .witness()
                    .expect("asked only if there is one");
                opcode::Fsync::new(types::Fd(witness.as_raw_fd()))
                    .flags(FsyncFlags::DATASYNC)
                    .build()
            }
        };
        // On a file that cannot promise not to wait, whoever submits must not even try.
        if self.punt || !disk.can.nowait {
            entry.flags(squeue::Flags::ASYNC)
        } else {
            entry
        }
    }

    /// A submission entry that does nothing and completes with `EFAULT`.
    #[cold]
    pub(in crate::engine) fn refused_sqe(disk: &Disk) -> squeue::Entry {
        let nowhere = std::ptr::without_provenance_mut(NOWHERE);
        on_file!(disk, |fd| opcode::Read::new(fd, nowhere, 1).build())
    }

    #[inline]
    fn transfer_sqe(&mut self, file: &FileTarget, disk: &Disk) -> squeue::Entry {
        debug_assert!(self.offset + self.total <= file.size_bytes);
        let offset = self.offset + self.done;
        // A read through the page cache waits for its pages in the ring, and no one else waits for it.
        self.nowait = disk.can.nowait
            && !self.punt
            && !self.polled
            && (self.op == Op::Write || disk.is_direct());
        let mut rw_flags = if self.nowait { libc::RWF_NOWAIT } else { 0 };
        if self.fua {
            if disk.can.dsync {
                rw_flags |= libc::RWF_DSYNC;
            } else {
                self.unsynced = true;
            }
        }
        let left = self.total - self.done;
        self.step = left;
        let mut vectors = self.segment_count.min(u32::from(IOV_MAX));
        let single = if let Some(bounce) = self.bounce {
            let piece = self.piece();
            if self.op == Op::Write {
                self.copy_bounced(piece as usize, false);
            }
            self.step = piece.into();
            Some((bounce.base.as_ptr(), piece))
        } else {
            if left > u64::from(disk.piece_bytes) {
                (vectors, self.step) = self.cut(vectors, disk.piece_bytes.into());
            }
            // SAFETY: one segment is there (`start_transfer`'s contract). Unsafe as in `advance`.
            let first = unsafe { *self.segments };
            (vectors == 1).then(|| {
                let len = first.iov_len.min(disk.piece_bytes as usize);
                (
                    first.iov_base.cast::<u8>(),
                    u32::try_from(len).expect("a piece"),
                )
            })
        };
        on_file!(disk, |fd| match (self.op, single) {
            (Op::Read, Some((buf, len))) => opcode::Read::new(fd, buf, len)
                .offset(offset)
                .rw_flags(rw_flags)
                .build(),
            (Op::Read, None) => opcode::Readv::new(fd, self.segments, vectors)
                .offset(offset)
                .rw_flags(rw_flags)
                .build(),
            (_, Some((buf, len))) => opcode::Write::new(fd, buf, len)
                .offset(offset)
                .rw_flags(rw_flags)
                .build(),
            (_, None) => opcode::Writev::new(fd, self.segments, vectors)
                .offset(offset)
                .rw_flags(rw_flags)
                .build(),
        })
    }

    fn range_sqe(
        &mut self,
        method: Method,
        disk: &Disk,
        extents: &[Extent],
        zeroes: *const u8,
    ) -> squeue::Entry {
        let extent = extents[usize::from(self.range)];
        let (offset, left) = (extent.offset + self.done, extent.len - self.done);
        let len = disk.pace.piece(offset, left);
        self.step = len;
        let fallocate = |mode| {
            let mode = mode | libc::FALLOC_FL_KEEP_SIZE;
            on_file!(disk, |fd| opcode::Fallocate::new(fd, len)
                .offset(offset)
                .mode(mode)
                .build())
        };
        match method {
            Method::Zero => unreachable!("nothing to submit"),
            Method::Punch => fallocate(libc::FALLOC_FL_PUNCH_HOLE),
            Method::ZeroRange => fallocate(libc::FALLOC_FL_ZERO_RANGE),
            Method::Write => {
                let len = u32::try_from(left).unwrap_or(u32::MAX).min(ZERO_BYTES);
                on_file!(disk, |fd| opcode::Write::new(fd, zeroes, len)
                    .offset(offset)
                    .build())
            }
            Method::Discard => {
                // The kernel takes the start from the SQE's `addr` and the length from `addr3`,
                // which is where a command's own bytes begin (block/ioctl.c, blkdev_uring_cmd).
                let mut command = [0; 16];
                command[..8].copy_from_slice(&len.to_ne_bytes());
                on_file!(disk, |fd| opcode::UringCmd16::new(
                    fd,
                    BLOCK_URING_CMD_DISCARD
                )
                .addr(Some(offset))
                .cmd(command)
                .build())
            }
        }
    }
}
