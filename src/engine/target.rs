//! What is behind a disk, as far as doing I/O on it goes.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use rustix::fs::{OFlags, SeekFrom, fcntl_setfl, seek};

use super::lane::{CALLS, Kind, Lane, Pace, RANGES, REMOTE_CALLS};
use super::mapping::{Mapping, Medium};
use super::{
    BOUNCE_BYTES, CACHED_PIECE_BYTES, COPY_SMALL_BYTES, DIRECT_PER_CACHED, DIRECT_PIECE_BYTES,
    SyncFault, memory,
};
use crate::sys::filesystem::FileSystem;

/// A regular file or a block device.
#[derive(Debug)]
pub struct FileTarget {
    /// Open for reading, and for writing unless the disk is read-only.
    pub file: OwnedFd,
    /// What answers for its bytes.
    pub file_system: FileSystem,
    /// The disk's size in bytes. Nothing beyond it is ever touched.
    pub size_bytes: u64,
    /// Opened with `O_DIRECT`.
    pub direct: bool,
    /// What `O_DIRECT` demands of a buffer's address, in bytes; a power of two, 4096 at most.
    pub memory_align: u32,
    /// What `O_DIRECT` demands of positions and lengths, in bytes; a power of two.
    pub offset_align: u32,
    /// Nothing smaller than this is freed by a discard, in bytes; 0: not known.
    pub granularity: u32,
    /// A block device, which can be discarded in another way than a file can.
    pub block_device: bool,
    /// Flush and FUA do nothing (cache mode "unsafe", or a medium that forgets everything anyway).
    pub ignore_flush: bool,
    /// Which transfers the device is polled for. Only if it has queues for that
    /// (`queue/io_poll` of sysfs): on others such a transfer may never come back.
    pub io_poll: IoPoll,
    /// The file, mapped, if it lies in memory. Not with `direct`.
    pub mapping: Option<Arc<Mapping>>,
}

/// Which transfers of a disk are completed by polling the device (IORING_SETUP_IOPOLL) rather than by
/// its interrupt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IoPoll {
    /// None.
    #[default]
    Never,
    /// Those whose guest polls too.
    PollQueues,
    /// All.
    Always,
}

/// What is behind a disk.
#[derive(Debug)]
pub enum Target {
    /// I/O through io_uring.
    File(FileTarget),
    /// Everything completes at once and nothing happens: reads leave the guest's buffers as they are,
    /// as Linux' null_blk and QEMU's null-co do. For measurements.
    Null {
        /// The size the disk pretends to have, in bytes.
        size_bytes: u64,
    },
}

impl Target {
    /// The size of the disk in bytes.
    pub fn size_bytes(&self) -> u64 {
        match self {
            Target::File(file) => file.size_bytes,
            Target::Null { size_bytes } => *size_bytes,
        }
    }
}

/// A target in an engine's table, with what was learned about it.
#[derive(Debug)]
pub(super) struct Disk {
    pub(super) target: Target,
    /// Its place in the table, which is its place in the registered file table too.
    pub(super) index: u16,
    /// The file's number; −1 for a null disk.
    pub(super) fd: RawFd,
    /// Commands of this disk that are not done.
    pub(super) in_flight: u32,
    /// What remains of the ways to do things: each is struck out when the disk refuses it.
    pub(super) can: Abilities,
    /// What `O_DIRECT` turned out to demand of buffers: of their addresses and of their lengths, in bytes.
    pub(super) align: (usize, usize),
    /// The SQE's fd is an index of the registered file table.
    pub(super) registered: bool,
    /// Whether its syncs can be believed.
    pub(super) sync_fault: Arc<SyncFault>,
    /// Its steps in kernel threads.
    pub(super) calls: Lane,
    /// Its discards and zeroes.
    pub(super) ranges: Lane,
    pub(super) pace: Pace,
    /// The kernel could start no thread for one of its steps, and the log said so.
    pub(super) threadless: bool,
    /// The most that is moved at a time.
    pub(super) piece_bytes: u32,
    /// The most that is moved without regard to how much the turn has moved already.
    pub(super) small_bytes: u64,
}

/// What a file system or device may refuse to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Abilities {
    /// `RWF_DSYNC`: accepted so far, and known to be kept ([`FileSystem::keeps_dsync`]).
    pub(super) dsync: bool,
    /// `FALLOC_FL_PUNCH_HOLE`
    pub(super) punch: bool,
    /// `FALLOC_FL_ZERO_RANGE`
    pub(super) zero_range: bool,
    /// `BLOCK_URING_CMD_DISCARD` (block devices, Linux 6.12)
    pub(super) discard: bool,
    /// Zeroing memory.
    pub(super) zero: bool,
    /// Polling the device.
    pub(super) poll: bool,
    /// `O_DIRECT`, if the image was opened with it.
    pub(super) direct: bool,
    /// `RWF_NOWAIT`: what cannot go on without waiting is refused, rather than waited for by whoever
    /// submits it.
    pub(super) nowait: bool,
}

impl Disk {
    /// Whether it is read and written past the page cache.
    pub(super) fn is_direct(&self) -> bool {
        self.can.direct && matches!(&self.target, Target::File(file) if file.direct)
    }

    /// The steps that count together with those of this kind.
    pub(super) fn lane(&mut self, kind: Kind) -> &mut Lane {
        match kind {
            Kind::Call => &mut self.calls,
            Kind::Range => &mut self.ranges,
        }
    }

    pub(super) fn new(index: u16, target: Target) -> io::Result<Self> {
        let (mut is_mapped, mut allocates) = (false, true);
        let (fd, block_device) = match &target {
            Target::File(file) => {
                if let Some(mapping) = &file.mapping {
                    is_mapped = true;
                    // Huge pages are set aside once; those given back may not be had again.
                    allocates = !matches!(mapping.medium(), Medium::Hugetlbfs(_));
                }
                if file.direct {
                    check_alignment(file)?;
                }
                (file.file.as_raw_fd(), file.block_device)
            }
            Target::Null { .. } => (-1, false),
        };
        let (align, dsync, remote, direct, granularity) = match &target {
            Target::File(file) => (
                (file.memory_align as usize, file.offset_align as usize),
                file.file_system.keeps_dsync(),
                file.file_system.is_remote(),
                file.direct,
                file.granularity,
            ),
            Target::Null { .. } => ((1, 1), true, false, false, 0),
        };
        let (piece_bytes, small_bytes) = pieces(direct);
        Ok(Disk {
            target,
            index,
            fd,
            in_flight: 0,
            can: Abilities {
                dsync,
                punch: allocates,
                zero_range: allocates,
                discard: block_device,
                zero: is_mapped,
                poll: true,
                direct: true,
                nowait: !remote,
            },
            align,
            registered: false,
            sync_fault: Arc::default(),
            calls: Lane::new(if remote { REMOTE_CALLS } else { CALLS }),
            ranges: Lane::new(RANGES),
            pace: Pace::new(granularity.into()),
            threadless: false,
            piece_bytes,
            small_bytes,
        })
    }
}

impl Disk {
    /// Has the image go through the page cache from now on: its file system demands more of offsets with
    /// `O_DIRECT` than the guest's blocks have, which it did not when it was opened. False if that has been
    /// done before.
    #[cold]
    pub(super) fn leave_direct(&mut self) -> bool {
        let Target::File(file) = &self.target else {
            return false;
        };
        if !std::mem::take(&mut self.can.direct) {
            return false;
        }
        // The open file is all workers', and so is the flag.
        let left = fcntl_setfl(&file.file, OFlags::empty());
        (self.piece_bytes, self.small_bytes) = pieces(false);
        log::warn!(
            "O_DIRECT wants more of offsets than it did: the image is served through the host's page cache \
             from now on"
        );
        left.is_ok()
    }

    /// Whether the disk is a device that ends before `end` by now, whatever it was when it was opened.
    #[cold]
    pub(super) fn is_shorter_than(&self, end: u64) -> bool {
        match &self.target {
            // The position is nobody's: all I/O says where it goes.
            Target::File(file) if file.block_device => {
                seek(&file.file, SeekFrom::End(0)).is_ok_and(|size| size < end)
            }
            _ => false,
        }
    }
}

/// The most that is moved at a time, and the most that no turn is awaited for, in bytes.
fn pieces(direct: bool) -> (u32, u64) {
    match direct {
        true => (
            DIRECT_PIECE_BYTES,
            COPY_SMALL_BYTES * u64::from(DIRECT_PER_CACHED),
        ),
        false => (CACHED_PIECE_BYTES, COPY_SMALL_BYTES),
    }
}

fn check_alignment(file: &FileTarget) -> io::Result<()> {
    let memory_ok =
        file.memory_align.is_power_of_two() && file.memory_align as usize <= memory::PAGE_BYTES;
    if !memory_ok || !file.offset_align.is_power_of_two() || file.offset_align > BOUNCE_BYTES {
        return Err(io::Error::new(
            io::ErrorKind::Unsupported,
            format!(
                "O_DIRECT here wants buffers aligned to {} bytes and positions aligned to {} bytes, \
                 more than can be offered; use a cache mode without O_DIRECT",
                file.memory_align, file.offset_align
            ),
        ));
    }
    Ok(())
}
