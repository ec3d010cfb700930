//! The first step of a command: what it needs, and whether it can be had.

use libc::iovec;

use super::memory::Memory;
use super::slot::{Next, Slot};
use super::target::{Disk, FileTarget, IoPoll, Target};
use super::{Busy, Command, EngineCounters, Errno, Payload};
use crate::mq::limits::{MAX_RANGES, MAX_SEGMENTS};
use crate::mq::request::Op;

/// Makes `slot`, which is claimed, ready for its first SQE, or done without one. The one place that
/// chooses by what is behind the disk.
///
/// # Safety
///
/// As for [`super::Engine::queue_rq`].
#[inline]
pub(super) unsafe fn start(
    slot: &mut Slot,
    index: u16,
    disk: &Disk,
    command: Command<'_>,
    memory: &mut Memory,
    counters: &mut EngineCounters,
) -> Result<Next, Busy> {
    let file = match &disk.target {
        Target::File(file) => file,
        Target::Null { .. } => return Ok(Next::Done(Ok(command.bytes))),
    };
    let fua = command.fua && !file.ignore_flush;
    let promises = fua || (command.op == Op::Flush && !file.ignore_flush);
    if promises && disk.sync_fault.errno().is_some() {
        // An I/O error, whatever the sync failed with: a lack of space, for one, could end.
        return Ok(Next::Done(Err(Errno(libc::EIO))));
    }
    match command.op {
        // SAFETY: passed on to our caller. Unsafe because the buffers are the caller's.
        Op::Read | Op::Write => unsafe {
            start_transfer(slot, index, disk, file, command, fua, memory, counters)
        },
        Op::Flush if file.ignore_flush => Ok(Next::Done(Ok(0))),
        Op::Flush => {
            slot.start_flush();
            Ok(Next::Issue)
        }
        Op::Discard | Op::WriteZeroes => Ok(start_ranges(
            slot, index, disk, command, fua, memory, counters,
        )),
    }
}

/// # Safety
///
/// As for [`super::Engine::queue_rq`].
#[inline]
#[expect(clippy::too_many_arguments, reason = "parts of one call")]
unsafe fn start_transfer(
    slot: &mut Slot,
    index: u16,
    disk: &Disk,
    file: &FileTarget,
    command: Command<'_>,
    fua: bool,
    memory: &mut Memory,
    counters: &mut EngineCounters,
) -> Result<Next, Busy> {
    if !inside(file, command.offset, command.bytes) {
        return Ok(Next::Done(Err(Errno(libc::EIO))));
    }
    if command.bytes == 0 {
        return Ok(Next::Done(Ok(0)));
    }
    let polled = command.polled;
    let mut sum = Sum::default();
    let (segments, count, owned) = match command.payload {
        Payload::Buffers(buffers) => {
            assert!(
                buffers.len() <= usize::from(MAX_SEGMENTS),
                "too many segments"
            );
            buffers.iter().for_each(|b| sum.add(b));
            (buffers.as_ptr(), buffers.len(), false)
        }
        Payload::Merged(parts) => {
            let own = memory.segments(index);
            let mut count = 0;
            for buffer in parts.flatten() {
                assert!(
                    count < usize::from(MAX_SEGMENTS),
                    "too many segments merged"
                );
                sum.add(buffer);
                // SAFETY: the array has room for MAX_SEGMENTS, is this slot's, and the slot was
                // free, so that the kernel does not read it. Unsafe because the kernel will.
                unsafe { own.add(count).write(*buffer) };
                count += 1;
            }
            (own.as_ptr().cast_const(), count, true)
        }
        Payload::None | Payload::Extents(_) => panic!("a read or write without buffers"),
    };
    assert_eq!(
        sum.bytes, command.bytes,
        "the buffers are not what the command says"
    );

    let bounce = if file.direct && sum.misaligned(disk.align) {
        // A disk always has its part of them: without one, it holds some, and gets one back when those
        // end.
        let bounce = memory
            .take_bounce(disk.index)
            .ok_or(Busy::WakesOnCompletion)?;
        counters.bounced += 1;
        Some(bounce)
    } else {
        None
    };
    let count = u32::try_from(count).expect("MAX_SEGMENTS at most");
    // SAFETY: the segments are our caller's, valid until done, or the slot's own. Unsafe because no
    // borrow lasts that long.
    unsafe {
        slot.start_transfer(
            command.offset,
            segments,
            count,
            owned,
            fua && command.op == Op::Write,
            bounce,
        );
    }
    // A durable write may need a flush of the device, which nobody polls for.
    slot.polled = disk.can.poll
        && !fua
        && match file.io_poll {
            IoPoll::Never => false,
            IoPoll::PollQueues => polled,
            IoPoll::Always => true,
        };
    match &file.mapping {
        Some(mapping) => {
            counters.copied += 1;
            slot.start_copy(mapping);
            Ok(Next::Copy)
        }
        None => Ok(Next::Issue),
    }
}

fn start_ranges(
    slot: &mut Slot,
    index: u16,
    disk: &Disk,
    command: Command<'_>,
    fua: bool,
    memory: &mut Memory,
    counters: &mut EngineCounters,
) -> Next {
    let Payload::Extents(extents) = command.payload else {
        panic!("a discard or write-zeroes without ranges");
    };
    let Target::File(file) = &disk.target else {
        unreachable!("chosen by the caller")
    };
    let own = memory.extents_mut(index);
    let (mut count, mut bytes) = (0, 0);
    for extent in extents {
        assert!(count < MAX_RANGES, "too many ranges");
        if !inside(file, extent.offset, extent.len) {
            return Next::Done(Err(Errno(libc::EIO)));
        }
        own[usize::from(count)] = extent;
        count += 1;
        bytes += extent.len;
    }
    assert_eq!(
        bytes, command.bytes,
        "the ranges are not what the command says"
    );
    slot.start_ranges(own, count, fua, command.unmap, disk.can, counters)
}

/// Requests are checked against the disk before they come here; this is the last line, which a
/// shrinking disk can reach.
fn inside(file: &FileTarget, offset: u64, bytes: u64) -> bool {
    offset
        .checked_add(bytes)
        .is_some_and(|end| end <= file.size_bytes)
}

/// What a list of segments comes to.
#[derive(Default)]
struct Sum {
    bytes: u64,
    addresses: usize,
    lengths: usize,
}

impl Sum {
    #[inline]
    fn add(&mut self, segment: &iovec) {
        self.bytes += segment.iov_len as u64;
        self.addresses |= segment.iov_base.addr();
        self.lengths |= segment.iov_len;
    }

    /// Whether `O_DIRECT` would refuse them.
    #[inline]
    fn misaligned(&self, (addresses, lengths): (usize, usize)) -> bool {
        self.addresses & (addresses - 1) != 0 || self.lengths & (lengths - 1) != 0
    }
}
