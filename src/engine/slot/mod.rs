//! One command on its way: a state machine fed with results, which says what to do next.
//!
//! It makes no system call and owns no fd, so that every fault can be fed to it by hand. (Two rare questions
//! about the image are its disk's to answer.)

mod belief;
mod copying;
mod lost;
mod ranges;
mod segments;
mod sqe;
mod ways;

use std::ptr::{self, NonNull};

use libc::iovec;

use self::ways::is_refusal;
use super::lane::Kind;
use super::mapping::Since;
use super::memory::Bounce;
use super::target::{Disk, Target};
use super::{EngineCounters, Errno, Extent, RETRIES};
use crate::mq::request::Op;

/// What the slot waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// Nothing: the slot is free.
    Idle,
    /// To be reaped: the command was over at once.
    Inline,
    /// A read or write.
    Transfer,
    /// A read or write of an image in memory, which the engine does itself.
    Copy,
    /// A range, worked on in this way.
    Range(Method),
    /// `fdatasync`: the last step of a flush or of a durable write.
    Sync,
    /// `fdatasync` of the image's second open file, which tells whether pages were lost.
    Witness,
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
    /// Zero the mapped memory.
    Zero,
    /// Write zeroes.
    Write,
}

/// What to do with the slot now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Submit [`Slot::sqe`].
    Issue,
    /// Go on with `Slot::copy`.
    Copy,
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
    /// A discard was announced to the mapping.
    discarding: bool,
    /// What the kernel was asked for then.
    since: Since,
    /// The device is polled for the transfer.
    pub(super) polled: bool,
    /// The buffers need a bounce buffer before the next step.
    pub(super) wants_bounce: bool,
    /// The alignment that a refused transfer had: of addresses, and of lengths.
    too_fine: Option<(usize, usize)>,
    /// Let a kernel thread do it, because trying without blocking did not work.
    punt: bool,
    /// The transfer under way is refused rather than waited for (`RWF_NOWAIT`).
    nowait: bool,
    /// The watchdog asked the kernel to give it up.
    pub(super) cancelled: bool,
    /// The step under way counts as one of these of its disk.
    pub(super) lane: Option<Kind>,
    /// When the step under way was given to the kernel.
    pub(super) sent_ns: u64,
    /// The bytes of the range that the step under way works on.
    pub(super) step: u64,
    attempts: u8,
    /// The error whose meaning the witness is asked for; 0: a success is in doubt.
    error: i32,
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
            discarding: false,
            since: Since::default(),
            polled: false,
            wants_bounce: false,
            too_fine: None,
            punt: false,
            nowait: false,
            cancelled: false,
            lane: None,
            sent_ns: 0,
            step: 0,
            attempts: 0,
            error: 0,
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
        self.polled = false;
        self.wants_bounce = false;
        self.too_fine = None;
        self.punt = false;
        self.cancelled = false;
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

    /// Makes it a flush.
    pub(super) fn start_flush(&mut self) {
        self.stage = Stage::Sync;
    }

    /// Whether a completion for this slot is to come.
    #[inline]
    pub(super) fn in_kernel(&self) -> bool {
        !matches!(
            self.stage,
            Stage::Idle | Stage::Inline | Stage::Copy | Stage::Range(Method::Zero)
        )
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
            return match self.cancelled {
                true => Next::Done(Err(Errno(libc::ECANCELED))),
                false => Next::Issue,
            };
        }
        self.announced_is_over(disk);
        let Ok(moved) = u32::try_from(res) else {
            return self.failed(-res, disk, extents, counters);
        };
        match self.stage {
            Stage::Idle | Stage::Inline | Stage::Copy => {
                unreachable!("only a slot in the kernel gets here")
            }
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
                self.done += self.step;
                if self.done < extents[usize::from(self.range)].len {
                    return Next::Issue;
                }
                self.range += 1;
                self.next_range(None, extents, disk.can, counters)
            }
            Stage::Sync => self.durable(disk),
            Stage::Witness => self.witnessed(disk),
        }
    }

    #[inline]
    fn progressed(&mut self) {
        self.attempts = 0;
        self.punt = false;
    }

    fn transferred(&mut self, moved: u32, disk: &mut Disk, counters: &mut EngineCounters) -> Next {
        self.learn_alignment(disk);
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
        self.learn(file, moved);
        if self.bounce.is_some() && self.op == Op::Read && !self.scatter(moved) {
            return Next::Done(Err(Errno(libc::EFAULT)));
        }
        self.done += moved;
        if self.done == self.total {
            return self.finish(disk);
        }
        // What goes in pieces was no partial transfer.
        counters.continued += u64::from(moved < self.step.min(left));
        self.advance(moved);
        Next::Issue
    }

    fn failed(
        &mut self,
        errno: i32,
        disk: &mut Disk,
        extents: &[Extent],
        counters: &mut EngineCounters,
    ) -> Next {
        if self.stage == Stage::Transfer && self.is_refused_in_this_way(errno, disk) {
            return Next::Issue;
        }
        if let Some(next) = self.is_to_wait(errno, disk, counters) {
            return next;
        }
        if errno == libc::EAGAIN || errno == libc::EINTR {
            if self.attempts == RETRIES {
                return match self.stage {
                    Stage::Witness => self.ends(errno, disk, extents),
                    _ => Next::Done(Err(Errno(errno))),
                };
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
            _ => self.ends(errno, disk, extents),
        }
    }
}

#[cfg(test)]
mod tests;
