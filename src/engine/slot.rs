//! One command on its way: a state machine fed with results, which says what to do next.
//!
//! It makes no system call and owns no fd, so that every fault can be fed to it by hand.

use std::ptr::{self, NonNull};

use io_uring::types::{self, FsyncFlags, Timespec};
use io_uring::{opcode, squeue};
use libc::iovec;

use super::memory::Bounce;
use super::target::{Abilities, Disk, FileTarget, Target};
use super::{BOUNCE_BYTES, EngineCounters, Errno, Extent, RETRIES, ZERO_BYTES};
use crate::mq::limits::IOV_MAX;
use crate::mq::request::Op;

/// The most one `read` or `write` moves, in bytes (the kernel's `MAX_RW_COUNT`).
const MAX_RW_BYTES: u32 = 0x7fff_f000;

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

/// What the slot waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// Nothing: the slot is free.
    Idle,
    /// To be reaped: the command was over at once.
    Inline,
    /// A read or write.
    Transfer,
    /// A range, worked on in this way.
    Range(Method),
    /// `fdatasync`: the last step of a flush or of a durable write.
    Sync,
}

/// The ways to discard or zero a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Method {
    /// Discard as the device understands it.
    Discard,
    /// Deallocate; reads zero afterwards.
    Punch,
    /// Zero, keeping the space allocated.
    ZeroRange,
    /// Write zeroes.
    Write,
}

/// What to do with the slot now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Submit [`Slot::sqe`].
    Issue,
    /// Over.
    Done(Result<u64, Errno>),
}

/// The slot of one driver tag.
#[derive(Debug)]
pub(super) struct Slot {
    /// Who uses it: the tag's generation.
    pub(super) generation: u16,
    pub(super) stage: Stage,
    pub(super) disk: u16,
    op: Op,
    fua: bool,
    unmap: bool,
    /// Part of the data was written without `RWF_DSYNC`.
    unsynced: bool,
    /// The segments are in the slot's own array, and may be changed.
    owned: bool,
    /// The SQE under way is a delay, not the operation.
    delayed: bool,
    /// Let a kernel thread do it, because trying without blocking did not work.
    punt: bool,
    attempts: u8,
    /// Ranges finished, and how many there are.
    range: u16,
    ranges: u16,
    /// Segments not wholly transferred yet.
    segment_count: u32,
    segments: *const iovec,
    own: NonNull<iovec>,
    pub(super) bounce: Option<Bounce>,
    /// Where the transfer starts on the disk; bytes.
    offset: u64,
    total: u64,
    /// Bytes transferred; within the range for ranges.
    done: u64,
}

impl Slot {
    /// A free slot with its own segment array of [`super::memory::Memory`].
    pub(super) fn new(own: NonNull<iovec>) -> Self {
        Slot {
            generation: 0,
            stage: Stage::Idle,
            disk: 0,
            op: Op::Flush,
            fua: false,
            unmap: false,
            unsynced: false,
            owned: false,
            delayed: false,
            punt: false,
            attempts: 0,
            range: 0,
            ranges: 0,
            segment_count: 0,
            segments: ptr::null(),
            own,
            bounce: None,
            offset: 0,
            total: 0,
            done: 0,
        }
    }

    /// Takes the slot for a command that is neither a transfer nor has ranges yet: see the
    /// `start_` functions.
    pub(super) fn claim(&mut self, generation: u16, disk: u16, op: Op, bytes: u64) {
        assert!(self.stage == Stage::Idle, "a driver tag is used twice");
        self.generation = generation;
        self.disk = disk;
        self.op = op;
        self.fua = false;
        self.unsynced = false;
        self.delayed = false;
        self.punt = false;
        self.attempts = 0;
        self.total = bytes;
        self.done = 0;
    }

    /// Makes it a read or write of `count` segments at `segments`.
    ///
    /// # Safety
    ///
    /// Until [`Next::Done`], the segments stay where they are and their buffers valid for the
    /// transfer. `owned` segments are the slot's own array, and nobody else's.
    pub(super) unsafe fn start_transfer(
        &mut self,
        offset: u64,
        segments: *const iovec,
        count: u32,
        owned: bool,
        fua: bool,
        bounce: Option<Bounce>,
    ) {
        self.offset = offset;
        self.segments = segments;
        self.segment_count = count;
        self.owned = owned;
        self.fua = fua;
        self.bounce = bounce;
        self.stage = Stage::Transfer;
    }

    /// Makes it a discard or write-zeroes of `count` ranges.
    pub(super) fn start_ranges(
        &mut self,
        extents: &[Extent],
        count: u16,
        fua: bool,
        unmap: bool,
        can: Abilities,
        counters: &mut EngineCounters,
    ) -> Next {
        self.ranges = count;
        self.range = 0;
        self.fua = fua;
        self.unmap = unmap;
        self.unsynced = fua;
        self.next_range(None, extents, can, counters)
    }

    /// Makes it a flush.
    pub(super) fn start_flush(&mut self) {
        self.stage = Stage::Sync;
    }

    /// Whether a completion for this slot is to come.
    #[inline]
    pub(super) fn in_kernel(&self) -> bool {
        !matches!(self.stage, Stage::Idle | Stage::Inline)
    }

    /// Frees the slot, giving back its bounce buffer.
    pub(super) fn release(&mut self) -> Option<Bounce> {
        self.stage = Stage::Idle;
        self.bounce.take()
    }

    /// What the kernel answered (`cqe.res`): bytes, zero, or a negative errno.
    pub(super) fn on_cqe(
        &mut self,
        res: i32,
        disk: &mut Disk,
        extents: &[Extent],
        counters: &mut EngineCounters,
    ) -> Next {
        if self.delayed {
            self.delayed = false;
            return Next::Issue;
        }
        let Ok(moved) = u32::try_from(res) else {
            return self.failed(-res, disk, extents, counters);
        };
        match self.stage {
            Stage::Idle | Stage::Inline => unreachable!("only a slot in the kernel gets here"),
            Stage::Transfer => self.transferred(moved, disk, counters),
            Stage::Range(Method::Write) => {
                if moved == 0 {
                    return Next::Done(Err(Errno(libc::EIO)));
                }
                self.progressed();
                self.done += u64::from(moved);
                if self.done < extents[usize::from(self.range)].len {
                    return Next::Issue;
                }
                self.range += 1;
                self.next_range(None, extents, disk.can, counters)
            }
            Stage::Range(_) => {
                self.progressed();
                self.range += 1;
                self.next_range(None, extents, disk.can, counters)
            }
            Stage::Sync => Next::Done(Ok(self.total)),
        }
    }

    #[inline]
    fn progressed(&mut self) {
        self.attempts = 0;
        self.punt = false;
    }

    fn transferred(&mut self, moved: u32, disk: &Disk, counters: &mut EngineCounters) -> Next {
        let Target::File(file) = &disk.target else {
            unreachable!("a null disk has no transfers")
        };
        let left = self.total - self.done;
        let mut moved = u64::from(moved).min(left);
        if moved < left {
            // O_DIRECT goes on at an aligned place only. What a file that ends in between gave is
            // read again, and then gives nothing.
            if file.direct {
                moved &= !u64::from(file.offset_align - 1);
            }
            // The image ends early: somebody truncated it. Never a success.
            if moved == 0 {
                return Next::Done(Err(Errno(libc::EIO)));
            }
        }
        self.progressed();
        if self.bounce.is_some() && self.op == Op::Read {
            self.scatter(moved);
        }
        self.done += moved;
        if self.done == self.total {
            return self.finish();
        }
        if self.bounce.is_none() || moved < u64::from(BOUNCE_BYTES) {
            counters.continued += 1;
        }
        self.advance(moved);
        Next::Issue
    }

    /// Everything but the syncing is done.
    fn finish(&mut self) -> Next {
        if self.fua && self.unsynced {
            self.stage = Stage::Sync;
            Next::Issue
        } else {
            Next::Done(Ok(self.total))
        }
    }

    fn failed(
        &mut self,
        errno: i32,
        disk: &mut Disk,
        extents: &[Extent],
        counters: &mut EngineCounters,
    ) -> Next {
        if errno == libc::EAGAIN || errno == libc::EINTR {
            if self.attempts == RETRIES {
                return Next::Done(Err(Errno(errno)));
            }
            counters.retried += 1;
            // EAGAIN: first let a kernel thread have a go, then give the host time.
            self.delayed = errno == libc::EAGAIN && self.punt;
            self.punt = true;
            self.attempts += 1;
            return Next::Issue;
        }
        match self.stage {
            // Asked for with RWF_DSYNC, maybe together with others: see `transfer_sqe`.
            Stage::Transfer if errno == libc::EOPNOTSUPP && self.fua && !self.unsynced => {
                disk.can.dsync = false;
                Next::Issue
            }
            Stage::Range(method) if method != Method::Write && is_refusal(errno) => {
                // EINVAL may be about this range alone.
                if errno != libc::EINVAL {
                    disk.can.strike_out(method);
                }
                self.next_range(Some(method), extents, disk.can, counters)
            }
            _ => Next::Done(Err(Errno(errno))),
        }
    }

    /// Goes on with the range `self.range`, in the first way that comes after `tried`; finishes when
    /// there is no range left.
    fn next_range(
        &mut self,
        tried: Option<Method>,
        extents: &[Extent],
        can: Abilities,
        counters: &mut EngineCounters,
    ) -> Next {
        let methods: &[Method] = match (self.op, self.unmap) {
            (Op::Discard, _) => &[Method::Discard, Method::Punch],
            (_, true) => &[Method::Punch, Method::ZeroRange, Method::Write],
            // The guest wants to keep the space: no punching.
            (_, false) => &[Method::ZeroRange, Method::Write],
        };
        let after = |tried| {
            methods
                .iter()
                .position(|m| *m == tried)
                .map_or(0, |i| i + 1)
        };
        let mut first = tried.map_or(0, after);
        self.done = 0;
        while self.range < self.ranges {
            if extents[usize::from(self.range)].len > 0 {
                if let Some(method) = methods[first..].iter().find(|m| can.allows(**m)) {
                    self.stage = Stage::Range(*method);
                    counters.zeroes_written += u64::from(*method == Method::Write);
                    return Next::Issue;
                }
                // A discard is a hint: without a way to do it, it is done.
                counters.discards_ignored += 1;
            }
            self.range += 1;
            first = 0;
        }
        self.finish()
    }

    /// Drops `moved` transferred bytes from the front of the segments.
    fn advance(&mut self, moved: u64) {
        let mut moved = usize::try_from(moved).expect("no more than the segments hold");
        // SAFETY: `segments` and `segment_count` describe an array that stays valid until the
        // command is done (`start_transfer`'s contract), and the walk ends inside it because no more
        // is moved than it holds. Own arrays are written by their slot only, while no SQE names
        // them: the completion at hand was the last one's. A caller's array is copied, not changed.
        // Unsafe because the segments belong to the caller for longer than any borrow can say.
        unsafe {
            while self.segment_count > 0 && (*self.segments).iov_len <= moved {
                moved -= (*self.segments).iov_len;
                self.segments = self.segments.add(1);
                self.segment_count -= 1;
            }
            if moved == 0 {
                return;
            }
            if !self.owned {
                ptr::copy_nonoverlapping(
                    self.segments,
                    self.own.as_ptr(),
                    self.segment_count as usize,
                );
                self.segments = self.own.as_ptr();
                self.owned = true;
            }
            let first = self.segments.cast_mut();
            (*first).iov_base = (*first).iov_base.byte_add(moved);
            (*first).iov_len -= moved;
        }
    }

    /// The bytes of the next bounced piece.
    fn piece(&self) -> u32 {
        u32::try_from(self.total - self.done).map_or(BOUNCE_BYTES, |left| left.min(BOUNCE_BYTES))
    }

    /// Copies `bytes` between the bounce buffer and the front of the segments.
    fn copy_bounced(&self, bytes: usize, into_guest: bool) {
        let Some(bounce) = self.bounce else { return };
        let (mut at, mut left) = (0, bytes);
        let mut segment = self.segments;
        while left > 0 {
            // SAFETY: as in `advance`, the walk stays inside the segments, whose sum is at least
            // what is left of the command; the buffers are valid (`start_transfer`'s contract) and
            // the bounce buffer is this slot's and large enough (`piece`). The guest may write to its
            // buffers meanwhile, from outside this program: then it gets what it made of it. Unsafe
            // because guest memory has no Rust owner.
            unsafe {
                let len = (*segment).iov_len.min(left);
                let guest = (*segment).iov_base.cast::<u8>();
                let ours = bounce.base.as_ptr().add(at);
                if into_guest {
                    ptr::copy_nonoverlapping(ours, guest, len);
                } else {
                    ptr::copy_nonoverlapping(guest, ours, len);
                }
                at += len;
                left -= len;
                segment = segment.add(1);
            }
        }
    }

    fn scatter(&self, bytes: u64) {
        let bytes = usize::try_from(bytes).expect("no more than a bounce buffer holds");
        self.copy_bounced(bytes, true);
    }

    /// The submission entry for what [`Next::Issue`] asked for, without user data.
    ///
    /// For a bounced write this fills the bounce buffer.
    pub(super) fn sqe(
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
            Stage::Idle | Stage::Inline => unreachable!("nothing to submit"),
            Stage::Transfer => self.transfer_sqe(file, disk),
            Stage::Range(method) => self.range_sqe(method, disk, extents, zeroes),
            Stage::Sync => on_file!(disk, |fd| opcode::Fsync::new(fd)
                .flags(FsyncFlags::DATASYNC)
                .build()),
        };
        if self.punt {
            entry.flags(squeue::Flags::ASYNC)
        } else {
            entry
        }
    }

    #[inline]
    fn transfer_sqe(&mut self, file: &FileTarget, disk: &Disk) -> squeue::Entry {
        debug_assert!(self.offset + self.total <= file.size_bytes);
        let offset = self.offset + self.done;
        let mut rw_flags = 0;
        if self.fua {
            if disk.can.dsync {
                rw_flags = libc::RWF_DSYNC;
            } else {
                self.unsynced = true;
            }
        }
        let single = if let Some(bounce) = self.bounce {
            let piece = self.piece();
            if self.op == Op::Write {
                self.copy_bounced(piece as usize, false);
            }
            Some((bounce.base.as_ptr(), piece))
        } else if self.segment_count == 1 {
            // SAFETY: one segment is there (`start_transfer`'s contract). Unsafe as in `advance`.
            let segment = unsafe { *self.segments };
            let len = u32::try_from(segment.iov_len)
                .unwrap_or(u32::MAX)
                .min(MAX_RW_BYTES);
            Some((segment.iov_base.cast::<u8>(), len))
        } else {
            None
        };
        let vectors = self.segment_count.min(u32::from(IOV_MAX));
        on_file!(disk, |fd| match (self.op, single) {
            (Op::Read, Some((buf, len))) => opcode::Read::new(fd, buf, len).offset(offset).build(),
            (Op::Read, None) => opcode::Readv::new(fd, self.segments, vectors)
                .offset(offset)
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
        &self,
        method: Method,
        disk: &Disk,
        extents: &[Extent],
        zeroes: *const u8,
    ) -> squeue::Entry {
        let extent = extents[usize::from(self.range)];
        let (offset, len) = (extent.offset + self.done, extent.len - self.done);
        let fallocate = |mode| {
            let mode = mode | libc::FALLOC_FL_KEEP_SIZE;
            on_file!(disk, |fd| opcode::Fallocate::new(fd, len)
                .offset(offset)
                .mode(mode)
                .build())
        };
        match method {
            Method::Punch => fallocate(libc::FALLOC_FL_PUNCH_HOLE),
            Method::ZeroRange => fallocate(libc::FALLOC_FL_ZERO_RANGE),
            Method::Write => {
                let len = u32::try_from(len).unwrap_or(u32::MAX).min(ZERO_BYTES);
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

/// Whether an errno says "not in this way" rather than "this went wrong".
fn is_refusal(errno: i32) -> bool {
    matches!(
        errno,
        libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY | libc::ENODEV | libc::EINVAL
    )
}

impl Abilities {
    fn allows(self, method: Method) -> bool {
        match method {
            Method::Discard => self.discard,
            Method::Punch => self.punch,
            Method::ZeroRange => self.zero_range,
            Method::Write => true,
        }
    }

    fn strike_out(&mut self, method: Method) {
        match method {
            Method::Discard => self.discard = false,
            Method::Punch => self.punch = false,
            Method::ZeroRange => self.zero_range = false,
            Method::Write => {}
        }
    }
}

#[cfg(test)]
mod tests;
