//! What answers for an image's bytes: a device, memory, a file system of this kernel, another program
//! (FUSE) or another machine.
//!
//! Two things depend on it. A durable write (`RWF_DSYNC`) is relied on only where it was seen to reach
//! the device, because a file system may accept the flag and drop it: FUSE does so for asynchronous
//! direct writes (Linux 6.18). And a request that another program or machine answers may block whoever
//! submits it, or touches its pages, for as long as that program or machine likes.

use std::fmt;
use std::io;
use std::os::fd::AsFd;

use rustix::fs::{FileType, fstat, fstatfs};

/// What answers for the bytes of an open file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileSystem {
    /// A block device itself.
    BlockDevice,
    /// tmpfs; a memfd is a file of tmpfs as well.
    Tmpfs,
    /// Huge pages.
    Hugetlbfs {
        /// The size of each in bytes.
        page_bytes: u64,
    },
    /// A file system of this kernel on a local device, for which `RWF_DSYNC` was seen to reach the device.
    Local(&'static str),
    /// Another program, through FUSE; virtiofs too.
    Fuse,
    /// Another machine, or a file system that is shared with other machines.
    Network(&'static str),
    /// A file system about which nothing is known, by its number in linux/magic.h.
    Other(u32),
}

/// File systems of which `a_durable_write_reaches_the_device` (tests/faults) has seen that they pass
/// `RWF_DSYNC` on. The numbers are those of linux/magic.h. ext2 and ext3 have the number of ext4, whose driver
/// serves them.
const LOCAL: [(u32, &str); 3] = [
    (0xef53, "ext4"),
    (0x5846_5342, "XFS"),
    (0x9123_683e, "btrfs"),
];

/// linux/magic.h, fs/ceph/super.h, uapi/linux/gfs2_ondisk.h, and what the file systems outside of the kernel
/// say of themselves.
const NETWORK: [(u32, &str); 18] = [
    (0x6969, "NFS"),
    (0xff53_4d42, "CIFS"),
    (0xfe53_4d42, "SMB"),
    (0x517b, "SMB"),
    (0x0102_1997, "9p"),
    (0x00c3_6400, "Ceph"),
    (0x5346_414f, "AFS"),
    (0x6b41_4653, "AFS"),
    (0x7375_7245, "Coda"),
    (0x564c, "NCP"),
    (0x7461_636f, "OCFS2"),
    (0x0116_1970, "GFS2"),
    (0x0bd0_0bd0, "Lustre"),
    (0x4750_4653, "GPFS"),
    (0x1983_0326, "BeeGFS"),
    (0x2003_0528, "OrangeFS"),
    (0x786f_4256, "vboxsf"),
    (0xbacb_acbc, "vmhgfs"),
];

const TMPFS: u32 = 0x0102_1994;
const HUGETLBFS: u32 = 0x9584_58f6;
const FUSE: u32 = 0x6573_5546;

impl FileSystem {
    /// Asks the kernel what `file` is on.
    ///
    /// # Errors
    ///
    /// The kernel does not say.
    pub fn of(file: impl AsFd) -> io::Result<FileSystem> {
        // A device's node has a file system too, which says nothing about the device.
        let mode = fstat(&file)?.st_mode;
        if FileType::from_raw_mode(mode) == FileType::BlockDevice {
            return Ok(FileSystem::BlockDevice);
        }
        let facts = fstatfs(&file)?;
        // The field has another width and sign on each architecture; the numbers have 32 bits.
        #[expect(clippy::cast_possible_truncation, reason = "see above")]
        let magic = facts.f_type as u32;
        let block_bytes = u64::try_from(facts.f_bsize).unwrap_or(4096);
        Ok(FileSystem::from_magic(magic, block_bytes))
    }

    /// The file system with this number, whose blocks have so many bytes.
    pub fn from_magic(magic: u32, block_bytes: u64) -> FileSystem {
        let name_in = |list: &[(u32, &'static str)]| {
            let found = list.iter().find(|(number, _)| *number == magic);
            found.map(|(_, name)| *name)
        };
        match magic {
            TMPFS => FileSystem::Tmpfs,
            HUGETLBFS => FileSystem::Hugetlbfs {
                page_bytes: block_bytes,
            },
            FUSE => FileSystem::Fuse,
            _ => {
                let network = || name_in(&NETWORK).map(FileSystem::Network);
                let known = name_in(&LOCAL).map(FileSystem::Local).or_else(network);
                known.unwrap_or(FileSystem::Other(magic))
            }
        }
    }

    /// Whether a write with `RWF_DSYNC` is durable when it completes. Where that is not known, a write
    /// has to be followed by a sync.
    pub fn keeps_dsync(self) -> bool {
        match self {
            FileSystem::BlockDevice
            | FileSystem::Tmpfs
            | FileSystem::Hugetlbfs { .. }
            | FileSystem::Local(_) => true,
            FileSystem::Fuse | FileSystem::Network(_) | FileSystem::Other(_) => false,
        }
    }

    /// Whether the bytes lie in this machine's memory, so that a page fault waits for no device.
    pub fn is_memory(self) -> bool {
        matches!(self, FileSystem::Tmpfs | FileSystem::Hugetlbfs { .. })
    }

    /// Whether another program or another machine answers for the bytes, so that a request or a page
    /// fault may last as long as that one likes.
    pub fn is_remote(self) -> bool {
        matches!(self, FileSystem::Fuse | FileSystem::Network(_))
    }
}

impl fmt::Display for FileSystem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            FileSystem::BlockDevice => f.write_str("a block device"),
            FileSystem::Tmpfs => f.write_str("tmpfs"),
            FileSystem::Hugetlbfs { .. } => f.write_str("hugetlbfs"),
            FileSystem::Local(name) | FileSystem::Network(name) => f.write_str(name),
            FileSystem::Fuse => f.write_str("FUSE"),
            FileSystem::Other(magic) => write!(f, "file system {magic:#x}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn a_file_systems_number_decides_what_it_can_be_relied_on_for() {
        for (magic, name, keeps_dsync, is_remote) in [
            (TMPFS, "tmpfs", true, false),
            (HUGETLBFS, "hugetlbfs", true, false),
            (0xef53, "ext4", true, false),
            (0x5846_5342, "XFS", true, false),
            (0x9123_683e, "btrfs", true, false),
            (FUSE, "FUSE", false, true),
            (0x6969, "NFS", false, true),
            (0xfe53_4d42, "SMB", false, true),
            (0x0102_1997, "9p", false, true),
            // overlayfs may have anything below.
            (0x794c_7630, "file system 0x794c7630", false, false),
        ] {
            let system = FileSystem::from_magic(magic, 4096);
            assert_eq!(
                (
                    system.to_string().as_str(),
                    system.keeps_dsync(),
                    system.is_remote()
                ),
                (name, keeps_dsync, is_remote)
            );
        }
    }

    #[test]
    fn an_open_file_tells_its_file_system() {
        let dir = tempfile::tempdir_in("/dev/shm").expect("a directory on tmpfs");
        let file = File::create(dir.path().join("image")).expect("a file");
        assert_eq!(FileSystem::of(&file).expect("known"), FileSystem::Tmpfs);
        let proc = File::open("/proc/self/maps").expect("a file of procfs");
        assert_eq!(
            FileSystem::of(&proc).expect("known"),
            FileSystem::Other(0x9fa0)
        );
    }
}
