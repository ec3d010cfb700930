//! Who listens at a path, and whether that process can still accept a connection.

use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

use rustix::io::Errno;
use rustix::net::sockopt::socket_peercred;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, getpeername, socket_with,
};
use rustix::process::Pid;

use super::peer_process;
use crate::sys::dying::{self, Dying};
use crate::sys::holders::is_socket_open;

/// What is found where a socket's file is.
#[derive(Debug)]
pub(super) enum Knock {
    /// No process listens.
    Refused,
    /// The file has been removed meanwhile.
    Gone,
    /// A process listens that will never accept: it was killed, or has ended, and its files are still held by I/O. No
    /// other has the socket.
    Dying(Dying),
    /// A process listens; or that cannot be known.
    InUse,
}

/// Connects to the socket at `path` to see, and closes the connection.
pub(super) fn knock(path: &Path) -> Knock {
    match try_connect(path) {
        Ok(stream) => match dying_listener(&stream) {
            Some(process) if !has_living_holder(&stream) => Knock::Dying(process),
            _ => Knock::InUse,
        },
        Err(Errno::CONNREFUSED) => Knock::Refused,
        Err(Errno::NOENT) => Knock::Gone,
        // A queue that is full among them.
        Err(_) => Knock::InUse,
    }
}

/// Does not wait where the queue of connections is full.
fn try_connect(path: &Path) -> Result<UnixStream, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket.into())
}

/// The process that listens, if it is dying and still has the socket. One that has no threads left, or is gone
/// altogether, has left the socket to another, which may accept; so may one that is outside of our namespace of process
/// numbers.
fn dying_listener(stream: &UnixStream) -> Option<Dying> {
    listener_found(stream).filter(Dying::has_threads)
}

fn listener_found(stream: &UnixStream) -> Option<Dying> {
    let handle = match peer_process(stream) {
        Ok(handle) => handle,
        // A kernel that has no such handles: the number must do.
        Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => {
            let pid = Pid::as_raw(Some(socket_peercred(stream).ok()?.pid));
            return dying::find(u32::try_from(pid).ok().filter(|pid| *pid > 0)?);
        }
        Err(_) => return None,
    };
    let number = || number_of(handle.as_raw_fd()).ok().flatten();
    let found = dying::find(number()?)?;
    // It was not waited for meanwhile, so that its number was its own all the time.
    number().map(|_| found)
}

/// Whether a process that goes on has the socket, too: one that passed it to the one that listens, or one that it was
/// passed to and that does not listen yet. True as well where that cannot be seen.
fn has_living_holder(stream: &UnixStream) -> bool {
    let name = match getpeername(stream) {
        Ok(Some(name)) => SocketAddrUnix::try_from(name).ok(),
        _ => None,
    };
    let Some(path) = name.as_ref().and_then(SocketAddrUnix::path_bytes) else {
        return true;
    };
    let listed = fs::read("/proc/net/unix").unwrap_or_default();
    let inodes = listening_at(&listed, path);
    // Those of other network namespaces are not among them.
    inodes.is_empty() || inodes.iter().any(|inode| is_socket_open(*inode, stream))
}

/// The inodes of the sockets that listen under a name, by the kernel's list (proc_pid_net(5)). There can be several:
/// a socket keeps the name under which it was bound when its file is replaced.
fn listening_at(listed: &[u8], path: &[u8]) -> Vec<u64> {
    /// `__SO_ACCEPTCON` (include/linux/net.h)
    const LISTENS: &[u8] = b"00010000";
    let lines = listed.split(|byte| *byte == b'\n');
    let found = lines.filter_map(|line| {
        let mut rest = line;
        let mut next = || {
            rest = rest.trim_ascii_start();
            let end = rest.iter().position(|byte| *byte == b' ')?;
            let (field, behind) = rest.split_at(end);
            rest = behind;
            Some(field)
        };
        let flags = next()
            .and_then(|_| next())
            .and_then(|_| next())
            .and_then(|_| next())?;
        let inode = next().and_then(|_| next()).and_then(|_| next())?;
        let inode = std::str::from_utf8(inode).ok()?.parse().ok()?;
        let name = rest.strip_prefix(b" ")?;
        (flags == LISTENS && name == path).then_some(inode)
    });
    found.collect()
}

/// The number of the process of a handle; none if it is gone, or in another namespace.
fn number_of(handle: i32) -> io::Result<Option<u32>> {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{handle}"))?;
    let number = info.lines().find_map(|line| line.strip_prefix("Pid:"));
    let number = number.and_then(|number| number.trim().parse().ok());
    Ok(number.filter(|number| *number > 0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    #[test]
    fn a_path_is_judged_by_the_process_that_listens() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        assert!(matches!(knock(&path), Knock::Gone));
        let listener = UnixListener::bind(&path).unwrap();
        assert!(matches!(knock(&path), Knock::InUse), "this process lives");
        let (waiting, _) = listener.accept().unwrap();
        drop((listener, waiting));
        assert!(matches!(knock(&path), Knock::Refused));
    }

    #[test]
    fn a_socket_is_found_in_the_kernels_list_by_its_name() {
        let listed = b"Num       RefCount Protocol Flags    Type St Inode Path\n\
            0000000000000000: 00000002 00000000 00010000 0001 01    71 /a b\n\
            0000000000000000: 00000003 00000000 00000000 0001 03    72 /a b\n\
            0000000000000000: 00000003 00000000 00000000 0001 03    73\n\
            0000000000000000: 00000002 00000000 00010000 0001 01 2063161 /a b\n\
            0000000000000000: 00000002 00000000 00010000 0001 01    75 a\n";
        assert_eq!(listening_at(listed, b"/a b"), [71, 2_063_161]);
        assert_eq!(listening_at(listed, b"a"), [75]);
        assert!(listening_at(listed, b"b").is_empty());
    }

    #[test]
    fn a_socket_that_this_process_has_too_has_a_living_holder() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a b");
        let listener = UnixListener::bind(&path).unwrap();
        let stream = try_connect(&path).unwrap();
        assert!(has_living_holder(&stream));
        drop(listener);
        assert!(has_living_holder(&stream), "it is not in the list any more");
    }

    #[test]
    fn a_socket_whose_queue_is_full_is_in_use_and_not_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        rustix::net::listen(&listener, 1).unwrap();
        let mut waiting = Vec::new();
        while let Ok(stream) = try_connect(&path) {
            waiting.push(stream);
            assert!(waiting.len() < 10, "the queue has an end");
        }
        assert!(matches!(knock(&path), Knock::InUse));
    }
}
