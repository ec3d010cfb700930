//! What sysfs tells of a block device's request queue.
//!
//! The files are described in the kernel's Documentation/ABI/stable/sysfs-block.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::str::FromStr;

/// The limits of a request queue. A value that the kernel does not tell is 0, which for each of them
/// means "nothing special", except for the logical block, which is then 512.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct QueueLimits {
    /// `logical_block_size`: the unit the device is addressed in.
    pub logical_block_bytes: u32,
    /// `physical_block_size`.
    pub physical_block_bytes: u32,
    /// `minimum_io_size`.
    pub min_io_bytes: u32,
    /// `optimal_io_size`.
    pub opt_io_bytes: u32,
    /// `discard_max_bytes`: what one discard may cover; 0 for a device without.
    pub discard_max_bytes: u64,
    /// `discard_granularity`.
    pub discard_granularity_bytes: u32,
    /// `write_zeroes_max_bytes`; 0 for a device without.
    pub write_zeroes_max_bytes: u64,
    /// `rotational`.
    pub rotational: bool,
    /// `io_poll`: the device has queues whose completions can be polled for.
    pub io_poll: bool,
}

impl QueueLimits {
    /// The limits of the device with these numbers. A partition has its disk's. Where sysfs knows no
    /// such device (a file system without one, a container without /sys) they are those of a plain one.
    pub(super) fn of_device(major: u32, minor: u32) -> QueueLimits {
        let device = format!("/sys/dev/block/{major}:{minor}");
        let device = Path::new(&device);
        let own = device.join("queue");
        // The entry is a link into the device tree, where a partition's directory lies in its disk's.
        QueueLimits::from_dir(&if own.is_dir() {
            own
        } else {
            device.join("../queue")
        })
    }

    fn from_dir(queue: &Path) -> QueueLimits {
        QueueLimits {
            logical_block_bytes: value(queue, "logical_block_size").unwrap_or(512),
            physical_block_bytes: value(queue, "physical_block_size").unwrap_or(0),
            min_io_bytes: value(queue, "minimum_io_size").unwrap_or(0),
            opt_io_bytes: value(queue, "optimal_io_size").unwrap_or(0),
            discard_max_bytes: value(queue, "discard_max_bytes").unwrap_or(0),
            discard_granularity_bytes: value(queue, "discard_granularity").unwrap_or(0),
            write_zeroes_max_bytes: value(queue, "write_zeroes_max_bytes").unwrap_or(0),
            rotational: value::<u8>(queue, "rotational").is_some_and(|turns| turns != 0),
            io_poll: value::<u8>(queue, "io_poll").is_some_and(|polls| polls != 0),
        }
    }
}

/// Whether a block device refuses to be written to (`blockdev --setro`, a read-only disk below a
/// partition). It can be opened for writing all the same.
pub(super) fn is_set_read_only(device: &File) -> bool {
    /// `BLKROGET` of uapi/linux/fs.h.
    const BLKROGET: libc::Ioctl = 0x125e;
    let mut read_only: libc::c_int = 0;
    // SAFETY: the request writes one `int`, which lives until the call returns. Unsafe because ioctl takes
    // an address, and what is written there depends on the request.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), BLKROGET, &raw mut read_only) };
    result == 0 && read_only != 0
}

fn value<T: FromStr>(queue: &Path, name: &str) -> Option<T> {
    fs::read_to_string(queue.join(name))
        .ok()?
        .trim()
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_read_from_the_files_of_a_queue() {
        let dir = tempfile::tempdir().expect("a directory");
        for (name, text) in [
            ("logical_block_size", "4096\n"),
            ("physical_block_size", "16384\n"),
            ("minimum_io_size", "16384\n"),
            ("optimal_io_size", "131072\n"),
            ("discard_max_bytes", "2147450880\n"),
            ("discard_granularity", "65536\n"),
            ("write_zeroes_max_bytes", "0\n"),
            ("rotational", "1\n"),
            ("io_poll", "1\n"),
        ] {
            fs::write(dir.path().join(name), text).expect("a file");
        }
        let expected = QueueLimits {
            logical_block_bytes: 4096,
            physical_block_bytes: 16384,
            min_io_bytes: 16384,
            opt_io_bytes: 131_072,
            discard_max_bytes: 2_147_450_880,
            discard_granularity_bytes: 65536,
            write_zeroes_max_bytes: 0,
            rotational: true,
            io_poll: true,
        };
        assert_eq!(QueueLimits::from_dir(dir.path()), expected);
    }

    #[test]
    fn an_unknown_device_has_the_limits_of_a_plain_one() {
        let limits = QueueLimits::of_device(0, u32::MAX);
        assert_eq!(
            (limits.logical_block_bytes, limits.discard_max_bytes),
            (512, 0)
        );
        assert!(!limits.rotational && !limits.io_poll);
    }
}
