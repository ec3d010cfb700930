//! The image behind a disk: opened, checked, and asked for its limits.
//!
//! | what | regular file | block device |
//! |---|---|---|
//! | size | statx | where a seek to its end arrives |
//! | alignment of direct I/O | statx (STATX_DIOALIGN), or reads that are tried | the same |
//! | physical block | statx's block size, 4096 at most | sysfs `queue/physical_block_size` |
//! | minimum and optimal I/O | the physical block; none | sysfs `queue/{minimum,optimal}_io_size` |
//! | discard | a hole: the block size, any length; the first one shows whether there are holes | sysfs `queue/discard_*` |
//! | zeroes | fallocate: any length | sysfs `queue/write_zeroes_max_bytes` |
//! | rotational | sysfs, of the device below the file system | sysfs `queue/rotational` |

use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{AtFlags, OFlags, StatxFlags, fcntl_setfl, statx};
use rustix::io::Errno;

use self::backing::{io_poll, map, medium, not_in_memory};
use self::direct_io::{Alignment, open_direct, warn_of_page_cache};
use self::limits::{QueueLimits, is_set_read_only};
use self::witness::open_witness;
use crate::config::{DiskConfig, EngineKind, ImageSource, LockWhen};
use crate::engine::IoPoll;
use crate::engine::mapping::{Mapping, Medium};
use crate::error::StartError;
use crate::sys::filesystem::FileSystem;

mod backing;
mod direct_io;
mod limits;
pub mod lock;
mod size;
mod witness;

/// Longest range, in bytes, that one discard or write-zeroes of a regular file may have: as much as
/// virtio's 32-bit number of sectors can say, in whole mebibytes.
const FILE_RANGE_MAX_BYTES: u64 = ((u32::MAX as u64) << 9) & !((1 << 20) - 1);

/// What kind of thing an image is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImageKind {
    /// A regular file.
    File,
    /// A block device.
    BlockDevice,
    /// No image at all: the null engine's.
    Null,
}

/// What an image does with a discard (VIRTIO_BLK_T_DISCARD).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DiscardLimits {
    /// Longest range in bytes; 0 where the image cannot or must not be discarded, so that the feature
    /// must not be offered.
    pub max_bytes: u64,
    /// Ranges are worth most when they begin and end at multiples of this, in bytes; 0 with
    /// `max_bytes` 0, else a multiple of the logical block size.
    pub granularity_bytes: u32,
}

/// What an image does with a write of zeroes (VIRTIO_BLK_T_WRITE_ZEROES).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WriteZeroesLimits {
    /// Longest range in bytes that the image can be told to zero; 0 where zeroes must be written like
    /// any other data.
    pub max_bytes: u64,
    /// Whether zeroing may free the space, if the guest allows it: the same images that take discards.
    pub may_unmap: bool,
}

/// An open image, with all that the engine and the guest have to know about it.
#[derive(Debug)]
pub struct Image {
    /// The file or device; for [`ImageKind::Null`] it is /dev/null, which nobody reads or writes.
    /// It is never in non-blocking mode: io_uring would take that for "fail rather than wait".
    pub file: File,
    /// What it is.
    pub kind: ImageKind,
    /// What answers for its bytes.
    pub file_system: FileSystem,
    /// Its size in bytes: a multiple of the logical block size, never 0.
    pub size_bytes: u64,
    /// Whether it is open with O_DIRECT.
    pub direct: bool,
    /// Alignment in bytes that buffers in memory need; 1 where `direct` is false.
    pub dio_mem_align: u32,
    /// Alignment in bytes that offsets and lengths need; 1 where `direct` is false. It divides the
    /// logical block size.
    pub dio_offset_align: u32,
    /// The unit in bytes that the medium writes without reading first: a power of two, at least the
    /// logical block size.
    pub physical_block_bytes: u32,
    /// The smallest I/O in bytes without a penalty: a multiple of the physical block.
    pub min_io_bytes: u32,
    /// The I/O size in bytes the medium likes best (a stripe); 0 if it has no preference.
    pub opt_io_bytes: u32,
    /// Discards.
    pub discard: DiscardLimits,
    /// Zeroes.
    pub write_zeroes: WriteZeroesLimits,
    /// Whether it is on a medium that turns, so that order matters.
    pub rotational: bool,
    /// Whether it is open for reading only.
    pub read_only: bool,
    /// Which transfers the device is polled for.
    pub io_poll: IoPoll,
    /// The image, mapped, if it lies in memory and was not to be used otherwise.
    pub mapping: Option<Arc<Mapping>>,
    /// The file, opened a second time, to ask whether pages of its page cache were lost
    /// ([`crate::engine::SyncFault`]); taken by whoever serves the image.
    pub witness: Option<OwnedFd>,
}

/// How an image is locked.
type LockImage = fn(&File, &Path, &DiskConfig) -> Result<(), StartError>;

impl Image {
    /// Opens the image of `config` the way `config` says.
    ///
    /// A cache mode with O_DIRECT falls back to the page cache, with a warning in the log, where the
    /// image has no direct I/O, or none for the guest's blocks.
    ///
    /// # Errors
    ///
    /// Anything but a regular file or a block device; no such file, no permission, a file system that
    /// or device that is read-only; a size of 0 or within a logical block.
    pub fn open(config: &DiskConfig) -> Result<Image, StartError> {
        Image::open_with(config, lock::lock_image)
    }

    /// The same for an image that another process has locked, which will let go of it and not be missed:
    /// nobody comes between.
    ///
    /// # Errors
    ///
    /// As [`Image::open`].
    pub fn open_beside(config: &DiskConfig) -> Result<Image, StartError> {
        Image::open_with(config, lock::lock_beside)
    }

    fn open_with(config: &DiskConfig, lock: LockImage) -> Result<Image, StartError> {
        match &config.image {
            ImageSource::File { path } => Image::open_path(path, config, lock),
            ImageSource::Null { size_bytes } => Image::null(*size_bytes, config),
        }
    }

    fn open_path(path: &Path, config: &DiskConfig, lock: LockImage) -> Result<Image, StartError> {
        let fail = |source: io::Error| open_error(path, source);
        // Looked at before it is opened, because opening a terminal or a tape does things to it...
        kind_of(path, &fs::metadata(path).map_err(fail)?)?;
        // ...and again afterwards, since it may have been replaced. O_NONBLOCK is for that case only:
        // opening a FIFO would wait for its other end.
        let mut file = OpenOptions::new()
            .read(true)
            .write(!config.read_only)
            .custom_flags((OFlags::NONBLOCK | OFlags::NOCTTY).bits().cast_signed())
            .open(path)
            .map_err(fail)?;
        let kind = kind_of(path, &file.metadata().map_err(fail)?)?;
        fcntl_setfl(&file, OFlags::empty()).map_err(|errno| fail(errno.into()))?;
        let file_system = FileSystem::of(&file).map_err(fail)?;
        if kind == ImageKind::BlockDevice && !config.read_only && is_set_read_only(&file) {
            return Err(fail(Errno::ROFS.into()));
        }
        if config.lock == LockWhen::Always {
            lock(&file, path, config)?;
        }

        let facts = statx(
            &file,
            "",
            AtFlags::EMPTY_PATH,
            StatxFlags::BASIC_STATS | StatxFlags::DIOALIGN,
        )
        .map_err(|errno| fail(errno.into()))?;
        let size_bytes = match kind {
            ImageKind::BlockDevice => file.seek(SeekFrom::End(0)).map_err(fail)?,
            _ => facts.stx_size,
        };
        let block_bytes = config.logical_block_size;
        check_size(path, kind, size_bytes, block_bytes)?;

        let device = match kind {
            ImageKind::BlockDevice => (facts.stx_rdev_major, facts.stx_rdev_minor),
            _ => (facts.stx_dev_major, facts.stx_dev_minor),
        };
        let queue = QueueLimits::of_device(device.0, device.1);

        let (mut dio_mem_align, mut dio_offset_align) = (1, 1);
        let mapping = match kind {
            ImageKind::File => map(path, &file, medium(file_system, &facts), size_bytes, config)?,
            _ if config.engine == EngineKind::Mmap => return Err(not_in_memory(path)),
            _ => None,
        };
        let mut direct = config.cache.is_direct() && mapping.is_none();
        let alignment = if direct {
            open_direct(&file, &facts, &queue, block_bytes)
        } else {
            None
        };
        match alignment {
            Some(Alignment { memory, offset }) if offset <= block_bytes => {
                (dio_mem_align, dio_offset_align) = (memory, offset);
            }
            _ if direct => {
                // What was tried may have left the flag on.
                fcntl_setfl(&file, OFlags::empty()).map_err(|errno| fail(errno.into()))?;
                direct = false;
                warn_of_page_cache(path, alignment, block_bytes);
            }
            _ => {}
        }
        let witness = match file_system {
            FileSystem::BlockDevice | FileSystem::Tmpfs | FileSystem::Hugetlbfs { .. } => None,
            _ if config.read_only => None,
            _ => open_witness(&file),
        };

        let mut image = Image {
            kind,
            file_system,
            size_bytes,
            direct,
            dio_mem_align,
            dio_offset_align,
            physical_block_bytes: block_bytes,
            min_io_bytes: block_bytes,
            opt_io_bytes: 0,
            discard: DiscardLimits::default(),
            write_zeroes: WriteZeroesLimits::default(),
            rotational: queue.rotational,
            read_only: config.read_only,
            io_poll: io_poll(path, (kind, direct), &queue, config)?,
            mapping,
            witness,
            file,
        };
        match kind {
            ImageKind::BlockDevice => image.take_device_limits(&queue, config),
            _ => image.take_file_limits(facts.stx_blksize, config),
        }
        Ok(image)
    }

    /// What the kernel says of a block device's queue.
    fn take_device_limits(&mut self, queue: &QueueLimits, config: &DiskConfig) {
        let block = config.logical_block_size;
        self.physical_block_bytes = power_of_two_at_least(queue.physical_block_bytes, block);
        self.min_io_bytes = multiple_or(queue.min_io_bytes, self.physical_block_bytes);
        self.opt_io_bytes = if queue.opt_io_bytes.is_multiple_of(block) {
            queue.opt_io_bytes
        } else {
            0
        };
        // A device discards and zeroes whole blocks of its own only. Where the guest's are smaller (through
        // the page cache they may be) it could ask for less.
        if !self.read_only && queue.logical_block_bytes <= block {
            if config.discard && queue.discard_max_bytes > 0 {
                self.discard = DiscardLimits {
                    max_bytes: queue.discard_max_bytes,
                    granularity_bytes: multiple_or(queue.discard_granularity_bytes, block),
                };
            }
            self.write_zeroes = WriteZeroesLimits {
                max_bytes: queue.write_zeroes_max_bytes,
                may_unmap: self.discard.max_bytes > 0,
            };
        }
    }

    /// What a file system can do with a file; its block is what it allocates and frees.
    fn take_file_limits(&mut self, fs_block: u32, config: &DiskConfig) {
        let block = config.logical_block_size;
        // Network file systems report a transfer size as their block: megabytes, which no physical
        // block has.
        let bounded = if fs_block.is_power_of_two() {
            fs_block.clamp(512, 4096)
        } else {
            4096
        };
        self.physical_block_bytes = power_of_two_at_least(bounded, block);
        self.min_io_bytes = self.physical_block_bytes;
        if !self.read_only {
            let huge = |mapping: &Arc<Mapping>| matches!(mapping.medium(), Medium::Hugetlbfs(_));
            // Huge pages are set aside for the image; those given back may not be had again.
            let keeps_space = self.mapping.as_ref().is_some_and(huge);
            // Whether the file system can free a part of a file shows when it is told to: a discard is a hint,
            // and done where it cannot. To ask it before would mean to free something, in a file that
            // another process may be writing to.
            if config.discard && !keeps_space {
                let granularity_bytes = self.physical_block_bytes;
                self.discard = DiscardLimits {
                    max_bytes: FILE_RANGE_MAX_BYTES,
                    granularity_bytes,
                };
            }
            self.write_zeroes = WriteZeroesLimits {
                max_bytes: FILE_RANGE_MAX_BYTES,
                may_unmap: self.discard.max_bytes > 0,
            };
        }
    }
}

fn check_size(
    path: &Path,
    kind: ImageKind,
    size_bytes: u64,
    block_bytes: u32,
) -> Result<(), StartError> {
    let path = path.to_owned();
    if size_bytes != 0 && size_bytes.is_multiple_of(u64::from(block_bytes)) {
        Ok(())
    } else if kind == ImageKind::BlockDevice {
        Err(StartError::DeviceSize {
            path,
            size_bytes,
            block_bytes,
        })
    } else if size_bytes == 0 {
        Err(StartError::ImageEmpty { path })
    } else {
        Err(StartError::ImageSize {
            path,
            size_bytes,
            block_bytes,
        })
    }
}

fn open_error(path: &Path, source: io::Error) -> StartError {
    let advice = match Errno::from_io_error(&source) {
        Some(Errno::NOENT | Errno::NOTDIR) => {
            "check the path, or create it with truncate -s 10G PATH"
        }
        Some(Errno::ACCESS | Errno::PERM) => {
            "let this user read and write it, or read it and give --read-only"
        }
        Some(Errno::ROFS) => "serve it with --read-only, or make it writable",
        Some(Errno::BUSY | Errno::TXTBSY) => {
            "find out what else is using it, for example with fuser -v"
        }
        Some(Errno::MFILE | Errno::NFILE) => "raise the limit of open files (ulimit -n)",
        Some(Errno::NXIO | Errno::NODEV | Errno::NOMEDIUM) => {
            "check that the device is there and ready"
        }
        _ => "check the path and the device below it",
    };
    StartError::ImageOpen {
        path: path.to_owned(),
        source,
        advice,
    }
}

fn kind_of(path: &Path, metadata: &Metadata) -> Result<ImageKind, StartError> {
    let file_type = metadata.file_type();
    let kind = if file_type.is_file() {
        return Ok(ImageKind::File);
    } else if file_type.is_block_device() {
        return Ok(ImageKind::BlockDevice);
    } else if file_type.is_dir() {
        "directory"
    } else if file_type.is_char_device() {
        "character device"
    } else if file_type.is_fifo() {
        "named pipe"
    } else if file_type.is_socket() {
        "socket"
    } else {
        "file of an unknown kind"
    };
    Err(StartError::ImageKind {
        path: path.to_owned(),
        kind,
    })
}

fn power_of_two_at_least(value: u32, least: u32) -> u32 {
    if value.is_power_of_two() {
        value.max(least)
    } else {
        least
    }
}

/// `value` if it is a multiple of `unit` and not 0, else `unit`.
fn multiple_or(value: u32, unit: u32) -> u32 {
    if value != 0 && value.is_multiple_of(unit) {
        value
    } else {
        unit
    }
}

#[cfg(test)]
mod tests;
