//! An engine that is simulated from the ring downwards: blk-mq's requests become commands, slots and
//! submission entries by the code that runs in production, and a model of the kernel works the
//! entries off on disks that are arrays of bytes. When, in which order, how much of it, and with
//! which errors is up to a seed.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fs::File;

use io_uring::{opcode, squeue};
use libc::iovec;

use self::media::{Effect, Media};
pub(super) use self::random::Random;
pub(super) use self::sqe::Sqe;
use super::memory::Memory;
use super::slot::{Next, Slot, Stage};
use super::start::start;
use super::target::{Disk, FileTarget, IoPoll, Target};
use super::{Busy, Command, EngineCounters, Errno, Extent, Payload};
use crate::mq::ids::{DiskId, DriverTag, HctxId};
use crate::mq::limits::SECTOR_SIZE;
use crate::mq::request::{Op, Request};
use crate::mq::{self, Parts};
use crate::sys::filesystem::FileSystem;

mod media;
mod random;
mod sqe;

/// How often things go wrong, in a thousand.
#[derive(Clone, Copy, Debug)]
pub(super) struct Faults {
    pub refused: u64,
    pub again: u64,
    pub short: u64,
    /// A way to do something that the file system does not know.
    pub unknown: u64,
    pub flush_fails: u64,
}

/// A disk of bytes.
pub(super) struct SimDisk {
    disk: Disk,
    pub bytes: Vec<u8>,
    /// Sectors that can be neither read nor written.
    pub bad: Vec<bool>,
    direct: bool,
    /// What is really on it, for tests that cut the power.
    pub media: Option<Media>,
}

/// What a request brings along: who it is, and its buffers or ranges.
#[derive(Debug)]
pub(super) struct Io {
    pub id: u32,
    pub iovecs: Vec<iovec>,
    pub extents: Vec<Extent>,
}

/// A command on its way.
struct Flight {
    ids: Vec<u32>,
    sqe: Option<squeue::Entry>,
    /// What it does to the disk's media.
    effect: Effect,
}

/// See the module.
pub(super) struct SimEngine {
    slots: Vec<Slot>,
    flights: Vec<Flight>,
    memory: Memory,
    pub disks: Vec<SimDisk>,
    pub counters: EngineCounters,
    pub random: Random,
    faults: Faults,
    /// Earliest first: (when, slot).
    due: BinaryHeap<Reverse<(u64, u16)>>,
    /// Over without the kernel.
    ready: Vec<(DriverTag, Result<u64, Errno>)>,
    pub in_flight: usize,
    pub now_ns: u64,
}

impl SimEngine {
    pub fn new(depth: u16, seed: u64, faults: Faults) -> Self {
        let memory = Memory::new(depth).expect("anonymous memory");
        SimEngine {
            slots: (0..depth)
                .map(|at| Slot::new(memory.segments(at)))
                .collect(),
            flights: (0..depth)
                .map(|_| Flight {
                    ids: Vec::new(),
                    sqe: None,
                    effect: Effect::None,
                })
                .collect(),
            memory,
            disks: Vec::new(),
            counters: EngineCounters::default(),
            random: Random(seed),
            faults,
            due: BinaryHeap::new(),
            ready: Vec::new(),
            in_flight: 0,
            now_ns: 0,
        }
    }

    /// Adds a disk of so many sectors, of which some are bad.
    pub fn add_disk(&mut self, sectors: u64, direct: bool, block_device: bool, bad: u64) {
        let size_bytes = sectors * SECTOR_SIZE;
        let target = Target::File(FileTarget {
            file: File::open("/dev/null").expect("/dev/null").into(),
            file_system: FileSystem::Local("ext4"),
            size_bytes,
            direct,
            memory_align: 512,
            offset_align: 512,
            granularity: 0,
            block_device,
            ignore_flush: false,
            io_poll: IoPoll::Never,
            mapping: None,
        });
        let index = u16::try_from(self.disks.len()).expect("few disks");
        self.memory.add_disk(index).expect("anonymous memory");
        let bad = (0..sectors).map(|_| self.random.permille(bad)).collect();
        self.disks.push(SimDisk {
            disk: Disk::new(index, target).expect("an alignment that can be offered"),
            bytes: vec![0; usize::try_from(size_bytes).expect("a small disk")],
            bad,
            direct,
            media: None,
        });
    }

    /// When something is over next.
    pub fn next_due_ns(&self) -> Option<u64> {
        if self.ready.is_empty() {
            self.due.peek().map(|Reverse((at, _))| *at)
        } else {
            Some(self.now_ns)
        }
    }

    /// Everything that is over by now: the tag, whose requests they are, and how it ended.
    pub fn reap(&mut self, mut on: impl FnMut(DriverTag, &[u32], Result<u64, Errno>)) {
        for (tag, result) in std::mem::take(&mut self.ready) {
            self.done(tag.index, result, &mut on);
        }
        while let Some(Reverse((at, index))) = self.due.peek().copied() {
            if at > self.now_ns {
                break;
            }
            self.due.pop();
            self.end(index, &mut on);
        }
    }

    /// Ends the `nth` of what is with the kernel, by slot, whenever it is due.
    pub fn reap_nth(
        &mut self,
        nth: usize,
        mut on: impl FnMut(DriverTag, &[u32], Result<u64, Errno>),
    ) {
        let mut due: Vec<_> = std::mem::take(&mut self.due).into_vec();
        due.sort_unstable_by_key(|Reverse((_, index))| *index);
        let Reverse((_, index)) = due.remove(nth);
        self.due = due.into();
        self.end(index, &mut on);
    }

    /// Which commands are with the kernel, by slot: for each whether it is a sync.
    pub fn in_kernel(&self) -> Vec<bool> {
        let sent = self.flights.iter().filter_map(|flight| flight.sqe.as_ref());
        sent.map(|sqe| Sqe::of(sqe).opcode == opcode::Fsync::CODE)
            .collect()
    }

    /// The kernel has done what the slot asked for.
    fn end(&mut self, index: u16, on: &mut impl FnMut(DriverTag, &[u32], Result<u64, Errno>)) {
        let flight = &mut self.flights[usize::from(index)];
        let sqe = flight.sqe.take().expect("what is due was sent");
        let effect = std::mem::take(&mut flight.effect);
        let slot = &self.slots[usize::from(index)];
        assert!(slot.in_kernel());
        let on_disk = usize::from(slot.disk);
        let res = self.work(&sqe, on_disk);
        let disk = &mut self.disks[on_disk];
        if let Some(media) = &mut disk.media {
            media.ended(effect, res, disk.direct);
        }
        let next = self.slots[usize::from(index)].on_cqe(
            res,
            &mut disk.disk,
            self.memory.extents(index),
            &mut self.counters,
        );
        match next {
            Next::Done(result) => self.done(index, result, on),
            Next::Issue => self.send(index),
            Next::Copy => unreachable!("no disk of this engine is mapped"),
        }
    }

    fn done(
        &mut self,
        index: u16,
        result: Result<u64, Errno>,
        on: &mut impl FnMut(DriverTag, &[u32], Result<u64, Errno>),
    ) {
        let slot = &mut self.slots[usize::from(index)];
        let tag = DriverTag {
            index,
            generation: slot.generation,
        };
        if let Some(bounce) = slot.release() {
            self.memory.put_bounce(bounce);
        }
        self.in_flight -= 1;
        on(tag, &self.flights[usize::from(index)].ids, result);
    }

    /// Sends the slot's next step to the kernel, which takes its time.
    fn send(&mut self, index: u16) {
        let slot = &mut self.slots[usize::from(index)];
        let disk = &mut self.disks[usize::from(slot.disk)];
        let sqe = slot.sqe(&disk.disk, self.memory.extents(index), self.memory.zeroes());
        if let Some(media) = &mut disk.media {
            self.flights[usize::from(index)].effect = media.sent(&Sqe::of(&sqe));
        }
        let takes_ns = match self.random.below(20) {
            0 => 2_000_000,
            1..=4 => 200_000,
            _ => 20_000,
        };
        let takes_ns = takes_ns / 2 + self.random.below(takes_ns);
        self.due.push(Reverse((self.now_ns + takes_ns, index)));
        self.flights[usize::from(index)].sqe = Some(sqe);
    }

    /// The kernel's part: does what the entry says and returns `cqe.res`.
    fn work(&mut self, sqe: &squeue::Entry, disk: usize) -> i32 {
        let sqe = Sqe::of(sqe);
        if sqe.opcode == opcode::Timeout::CODE {
            return -libc::ETIME;
        }
        if self.random.permille(self.faults.again) {
            return match self.random.below(2) {
                0 => -libc::EAGAIN,
                _ => -libc::EINTR,
            };
        }
        let unknown = self.random.permille(self.faults.unknown);
        match sqe.opcode {
            opcode::Read::CODE
            | opcode::Write::CODE
            | opcode::Readv::CODE
            | opcode::Writev::CODE => {
                if unknown && sqe.rw_flags != 0 {
                    return -libc::EOPNOTSUPP;
                }
                self.transfer(disk, sqe.writes(), sqe.off, &sqe.segments())
            }
            opcode::Fsync::CODE if self.random.permille(self.faults.flush_fails) => -libc::EIO,
            opcode::Fsync::CODE => 0,
            opcode::Fallocate::CODE | opcode::UringCmd16::CODE if unknown => -libc::EOPNOTSUPP,
            opcode::Fallocate::CODE | opcode::UringCmd16::CODE => {
                let (offset, len) = sqe.range();
                self.zero(disk, offset, len)
            }
            other => panic!("the kernel knows no operation {other}"),
        }
    }

    fn transfer(&mut self, disk: usize, write: bool, offset: u64, list: &[iovec]) -> i32 {
        let disk = &mut self.disks[disk];
        let total: u64 = list.iter().map(|segment| segment.iov_len as u64).sum();
        let mut len = total;
        if total > 1 && self.random.permille(self.faults.short) {
            len = 1 + self.random.below(total);
            if disk.direct || disk.media.is_some() {
                len = len.next_multiple_of(SECTOR_SIZE).min(total);
            }
        }
        if let Some(good) = disk.good(offset, len) {
            if good == 0 || self.random.below(2) == 0 {
                return -libc::EIO;
            }
            len = good;
        }
        let mut at = usize::try_from(offset).expect("a small disk");
        let mut left = usize::try_from(len).expect("a small disk");
        for segment in list {
            let part = segment.iov_len.min(left);
            let here = &mut disk.bytes[at..at + part];
            let there = segment.iov_base.cast::<u8>();
            // SAFETY: the segment is a buffer of a request in flight, or of the engine's own
            // memory, and `part` is no more than its length. Unsafe because segments are raw.
            unsafe {
                if write {
                    std::ptr::copy_nonoverlapping(there, here.as_mut_ptr(), part);
                } else {
                    std::ptr::copy_nonoverlapping(here.as_ptr(), there, part);
                }
            }
            at += part;
            left -= part;
        }
        i32::try_from(len).expect("less than the kernel's limit")
    }

    fn zero(&mut self, disk: usize, offset: u64, len: u64) -> i32 {
        let disk = &mut self.disks[disk];
        if disk.good(offset, len).is_some() {
            return -libc::EIO;
        }
        let range = |n: u64| usize::try_from(n).expect("a small disk");
        disk.bytes[range(offset)..range(offset + len)].fill(0);
        0
    }
}

impl SimDisk {
    /// How many bytes from `offset` on can be had, if a bad sector is among them.
    fn good(&self, offset: u64, len: u64) -> Option<u64> {
        let sectors = offset / SECTOR_SIZE..(offset + len).div_ceil(SECTOR_SIZE);
        let bad = |sector: &u64| self.bad[usize::try_from(*sector).expect("a small disk")];
        let first = sectors.into_iter().find(bad)?;
        Some((first * SECTOR_SIZE).saturating_sub(offset))
    }
}

impl mq::Driver<Io> for SimEngine {
    fn queue_rq(
        &mut self,
        disk: DiskId,
        _hctx: HctxId,
        tag: DriverTag,
        request: &Request,
        parts: Parts<'_, Io>,
    ) -> Result<(), mq::Busy> {
        if self.random.permille(self.faults.refused) {
            return Err(match self.random.below(2) {
                0 => mq::Busy::UntilCompletion,
                _ => mq::Busy::RetryLater,
            });
        }
        let slot = &mut self.slots[usize::from(tag.index)];
        assert_eq!(slot.stage, Stage::Idle, "a driver tag is used twice");
        slot.claim(tag.generation, disk.0, request.op, request.bytes);
        let first = parts.clone().next().expect("at least one part");
        let mut merged;
        let mut extents;
        let payload = match request.op {
            Op::Flush => Payload::None,
            Op::Discard | Op::WriteZeroes => {
                extents = parts.clone().flat_map(|io| io.extents.iter().copied());
                Payload::Extents(&mut extents)
            }
            _ if parts.clone().count() == 1 => Payload::Buffers(&first.iovecs),
            _ => {
                merged = parts.clone().map(|io| &io.iovecs[..]);
                Payload::Merged(&mut merged)
            }
        };
        let command = Command {
            op: request.op,
            offset: request.sector.bytes(),
            bytes: request.bytes,
            fua: request.fua,
            unmap: request.unmap,
            polled: false,
            payload,
        };
        // SAFETY: the buffers and their arrays are a request's, and whoever makes requests keeps
        // them until they end. Unsafe because the model of the kernel copies by address.
        let started = unsafe {
            start(
                slot,
                tag.index,
                &self.disks[disk.index()].disk,
                command,
                &mut self.memory,
                &mut self.counters,
            )
        };
        let next = started.map_err(|busy| match busy {
            Busy::WakesOnCompletion => mq::Busy::UntilCompletion,
            Busy::RetryLater => mq::Busy::RetryLater,
        })?;
        let ids = &mut self.flights[usize::from(tag.index)].ids;
        ids.clear();
        ids.extend(parts.map(|io| io.id));
        self.in_flight += 1;
        match next {
            Next::Issue => self.send(tag.index),
            Next::Copy => unreachable!("no disk of this engine is mapped"),
            Next::Done(result) => {
                self.slots[usize::from(tag.index)].stage = Stage::Inline;
                self.ready.push((tag, result));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
