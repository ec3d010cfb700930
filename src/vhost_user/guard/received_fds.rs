//! What a received file descriptor is, asked of the kernel and not of the one who sent it.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::fs::{FileType, OFlags, fcntl_getfl, fstat, fstatfs, readlinkat};
use rustix::net::sockopt::{socket_domain, socket_type};
use rustix::net::{AddressFamily, SocketType};

use crate::sys::fds::open_fd_table;
use crate::sys::filesystem::FileSystem;

/// What stands behind a file descriptor, as far as a session cares.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum FdKind {
    Eventfd,
    /// A pipe or FIFO, and whether this end can be written.
    Pipe {
        writable: bool,
    },
    /// A stream socket of the Unix domain.
    UnixStream,
    /// A regular file: memfd, hugetlbfs, shared memory, a file on disk.
    File {
        bytes: u64,
        read_write: bool,
        /// What answers for its pages: this machine's memory, or a file system for which a page fault may
        /// wait. Never another program or another machine.
        on: FileSystem,
    },
    /// A character device, whose size nobody can tell (device DAX).
    Device {
        read_write: bool,
    },
    /// Anything else, named for a message.
    Other(String),
}

impl FdKind {
    /// Asks the kernel. Changes nothing: flags belong to the description shared with the sender.
    pub(super) fn of(fd: &OwnedFd) -> io::Result<FdKind> {
        let access = fcntl_getfl(fd)? & OFlags::ACCMODE;
        let read_write = access == OFlags::RDWR;
        let link = link(fd)?;
        // Before the file system is asked anything more: one that a program implements may not answer,
        // or not when one of its pages is touched.
        let on = file_system(fd)?;
        if on.is_remote() {
            return Ok(FdKind::Other(format!(
                "{link} on {on}, where another program or machine answers for each page"
            )));
        }
        // Before the file type: newer kernels call anonymous inodes regular files.
        if link == "anon_inode:[eventfd]" {
            return Ok(FdKind::Eventfd);
        }
        if link.starts_with("anon_inode:") {
            return Ok(FdKind::Other(link));
        }
        let stat = fstat(fd)?;
        Ok(match FileType::from_raw_mode(stat.st_mode) {
            FileType::Fifo => FdKind::Pipe {
                writable: access != OFlags::RDONLY,
            },
            FileType::RegularFile => FdKind::File {
                bytes: u64::try_from(stat.st_size).unwrap_or(0),
                read_write,
                on,
            },
            FileType::CharacterDevice => FdKind::Device { read_write },
            FileType::Socket
                if socket_domain(fd)? == AddressFamily::UNIX
                    && socket_type(fd)? == SocketType::STREAM =>
            {
                FdKind::UnixStream
            }
            _ => FdKind::Other(link),
        })
    }

    /// The kind in words, for a message.
    pub(super) fn describe(&self) -> String {
        match self {
            FdKind::Eventfd => "an eventfd".into(),
            FdKind::Pipe { writable: true } => "a pipe".into(),
            FdKind::Pipe { writable: false } => "the reading end of a pipe".into(),
            FdKind::UnixStream => "a Unix stream socket".into(),
            FdKind::File {
                read_write: true,
                on,
                ..
            } => format!("a file on {on}"),
            FdKind::File { .. } => "a file not open for reading and writing".into(),
            FdKind::Device { read_write: true } => "a character device".into(),
            FdKind::Device { .. } => "a character device not open for reading and writing".into(),
            FdKind::Other(name) => name.clone(),
        }
    }
}

/// What mappings of a file come in multiples of, in bytes: a page of hugetlbfs, and 1 where the kernel rounds.
pub(super) fn granule(on: FileSystem) -> u64 {
    match on {
        FileSystem::Hugetlbfs { page_bytes } => page_bytes,
        _ => 1,
    }
}

/// What answers for the bytes of a file. Asks nothing else of it.
fn file_system(file: &OwnedFd) -> io::Result<FileSystem> {
    let system = fstatfs(file)?;
    // A file system's number is a bit pattern of 32 bits, whatever the type of the field.
    let number = u32::try_from(system.f_type & 0xffff_ffff).unwrap_or(0);
    let block = u64::try_from(system.f_bsize).unwrap_or(1);
    Ok(FileSystem::from_magic(number, block))
}

/// Where the kernel says that `fd` points, such as `anon_inode:[eventfd]` or `pipe:[1234]`.
fn link(fd: &OwnedFd) -> io::Result<String> {
    let target = readlinkat(open_fd_table()?, fd.as_raw_fd().to_string(), Vec::new())?;
    // One line in a log, whatever a file's name holds.
    Ok(target.to_string_lossy().escape_debug().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};
    use rustix::fs::{Mode, open};
    use std::os::unix::net::{UnixDatagram, UnixStream};

    #[test]
    fn mappings_come_in_huge_pages_where_there_are_any() {
        let page_bytes = 2 << 20;
        assert_eq!(granule(FileSystem::Hugetlbfs { page_bytes }), page_bytes);
        assert_eq!(granule(FileSystem::Local("ext4")), 1);
    }

    #[test]
    fn kinds_are_told_apart() {
        let event = eventfd(0, EventfdFlags::empty()).unwrap();
        assert_eq!(FdKind::of(&event).unwrap(), FdKind::Eventfd);

        let (reader, writer) = rustix::pipe::pipe().unwrap();
        assert_eq!(
            FdKind::of(&reader).unwrap(),
            FdKind::Pipe { writable: false }
        );
        assert_eq!(
            FdKind::of(&writer).unwrap(),
            FdKind::Pipe { writable: true }
        );

        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(12345).unwrap();
        assert_eq!(
            FdKind::of(&file.into()).unwrap(),
            FdKind::File {
                bytes: 12345,
                read_write: true,
                on: FileSystem::Tmpfs
            }
        );

        let null = open("/dev/null", OFlags::RDONLY, Mode::empty()).unwrap();
        assert_eq!(
            FdKind::of(&null).unwrap(),
            FdKind::Device { read_write: false }
        );

        // An anonymous inode like an eventfd, and not one.
        let epoll =
            rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC).unwrap();
        assert_eq!(
            FdKind::of(&epoll).unwrap(),
            FdKind::Other("anon_inode:[eventpoll]".into())
        );

        let (stream, _peer) = UnixStream::pair().unwrap();
        assert_eq!(FdKind::of(&stream.into()).unwrap(), FdKind::UnixStream);
        let (datagram, _peer) = UnixDatagram::pair().unwrap();
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        for other in [OwnedFd::from(datagram), tcp.into()] {
            let kind = FdKind::of(&other).unwrap();
            assert!(kind.describe().starts_with("socket:["), "{kind:?}");
        }
    }
}
