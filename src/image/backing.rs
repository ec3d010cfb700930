//! Which engine an image gets: what it stands on decides, unless the user does.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::Path;
use std::sync::Arc;

use log::warn;
use rustix::fs::Statx;
use rustix::io::Errno;

use super::limits::QueueLimits;
use super::{DiscardLimits, FILE_RANGE_MAX_BYTES, Image, ImageKind, WriteZeroesLimits, open_error};
use crate::config::{DiskConfig, EngineKind, PollDevice};
use crate::engine::IoPoll;
use crate::engine::mapping::{Mapping, Medium, medium_of};
use crate::error::{StartError, reason};
use crate::sys::filesystem::FileSystem;

/// `STATX_ATTR_DAX` of uapi/linux/stat.h: the file is mapped from persistent memory directly.
const STATX_ATTR_DAX: u64 = 0x0020_0000;

impl Image {
    /// The engine that serves it, by the name it has on the command line.
    pub fn engine(&self) -> &'static str {
        match (self.kind, &self.mapping) {
            (ImageKind::Null, _) => "null",
            (_, Some(_)) => "mmap",
            (_, None) => "io_uring",
        }
    }

    /// How it is read and written, for the log.
    pub fn describe(&self) -> String {
        let engine = self.engine();
        match &self.mapping {
            Some(mapping) => format!("engine {engine}, in memory ({})", mapping.medium().name()),
            None if self.kind == ImageKind::Null => format!("engine {engine}"),
            None if self.direct => format!(
                "engine {engine}, O_DIRECT (buffers aligned to {} bytes, offsets to {}){}",
                self.dio_mem_align,
                self.dio_offset_align,
                match self.io_poll {
                    IoPoll::Never => "",
                    IoPoll::PollQueues => ", polled for the guest's poll queues",
                    IoPoll::Always => ", polled",
                }
            ),
            None => format!("engine {engine}, through the host's page cache"),
        }
    }

    /// The null engine's image: everything works and nothing is kept.
    pub(super) fn null(size_bytes: u64, config: &DiskConfig) -> Result<Image, StartError> {
        let path = Path::new("/dev/null");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .map_err(|source| open_error(path, source))?;
        let block = config.logical_block_size;
        let writable = !config.read_only;
        let discard = if config.discard && writable {
            DiscardLimits {
                max_bytes: FILE_RANGE_MAX_BYTES,
                granularity_bytes: block,
            }
        } else {
            DiscardLimits::default()
        };
        Ok(Image {
            file,
            kind: ImageKind::Null,
            file_system: FileSystem::Tmpfs,
            size_bytes,
            direct: false,
            dio_mem_align: 1,
            dio_offset_align: 1,
            physical_block_bytes: block,
            min_io_bytes: block,
            opt_io_bytes: 0,
            discard,
            write_zeroes: WriteZeroesLimits {
                max_bytes: if writable { FILE_RANGE_MAX_BYTES } else { 0 },
                may_unmap: discard.max_bytes > 0,
            },
            rotational: false,
            read_only: config.read_only,
            io_poll: IoPoll::Never,
            mapping: None,
            witness: None,
        })
    }
}

/// The memory in which a regular file lies, if it does.
pub(super) fn medium(file_system: FileSystem, facts: &Statx) -> Option<Medium> {
    let is_dax = facts.stx_attributes.bits() & STATX_ATTR_DAX != 0;
    medium_of(file_system, is_dax)
}

/// Maps a regular file that lies in memory; `None` where another engine serves it.
pub(super) fn map(
    path: &Path,
    file: &File,
    medium: Option<Medium>,
    size_bytes: u64,
    config: &DiskConfig,
) -> Result<Option<Arc<Mapping>>, StartError> {
    let forced = match config.engine {
        EngineKind::Mmap => true,
        EngineKind::Auto => false,
        EngineKind::IoUring | EngineKind::Null => return Ok(None),
    };
    let medium = match medium {
        Some(medium) => medium,
        None if forced => return Err(not_in_memory(path)),
        None => return Ok(None),
    };
    match Mapping::new(file, size_bytes, !config.read_only, medium) {
        Ok(mapping) => Ok(Some(Arc::new(mapping))),
        // A file of huge pages cannot be written in another way.
        Err(error) if forced || matches!(medium, Medium::Hugetlbfs(_)) => {
            Err(not_mapped(path, medium, &error))
        }
        Err(error) => {
            warn!("{path:?} cannot be mapped, and is served by io_uring: {error}");
            Ok(None)
        }
    }
}

/// Whether the device is polled. Asked of sysfs and never tried: on a device without queues for it the
/// first transfer may never come back.
///
/// A file is not polled for, whatever lies below it: its file system may have to wait for a write itself
/// before it can say that it has taken it (ext4 does where the write makes the file longer, or fills a
/// hole), while nobody polls for it, because the ring polls for what was taken. That write would never
/// end (seen with Linux 6.1).
pub(super) fn io_poll(
    path: &Path,
    (kind, direct): (ImageKind, bool),
    queue: &QueueLimits,
    config: &DiskConfig,
) -> Result<IoPoll, StartError> {
    let is_device = kind == ImageKind::BlockDevice;
    let can = is_device && direct && queue.io_poll;
    match config.io_poll {
        PollDevice::Off => Ok(IoPoll::Never),
        PollDevice::Auto if can => Ok(IoPoll::PollQueues),
        PollDevice::Auto => Ok(IoPoll::Never),
        PollDevice::On if can => Ok(IoPoll::Always),
        PollDevice::On => Err(StartError::NotPolled {
            path: path.to_owned(),
            why: if !is_device {
                "it is no block device, and file systems may wait for what nobody polls for"
            } else if !direct {
                "it is not open with O_DIRECT"
            } else {
                "it has no queues for that (queue/io_poll in sysfs is 0)"
            },
        }),
    }
}

pub(super) fn not_in_memory(path: &Path) -> StartError {
    StartError::NotMapped {
        path: path.to_owned(),
        why: "it does not lie in memory (tmpfs, memfd, hugetlbfs, DAX)".to_owned(),
        advice: "use --engine auto",
    }
}

fn not_mapped(path: &Path, medium: Medium, error: &io::Error) -> StartError {
    let no_memory = Errno::from_io_error(error) == Some(Errno::NOMEM);
    StartError::NotMapped {
        path: path.to_owned(),
        why: reason(error),
        advice: match medium {
            Medium::Hugetlbfs(_) if no_memory => {
                "set aside as many huge pages as the image has (sysctl vm.nr_hugepages)"
            }
            Medium::Hugetlbfs(_) => "put the image on tmpfs",
            _ => "use --engine io_uring",
        },
    }
}
