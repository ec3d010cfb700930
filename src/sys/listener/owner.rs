//! Who listens at a path, and whether that process can still accept a connection.

use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

use rustix::io::Errno;
use rustix::net::sockopt::socket_peercred;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use rustix::process::Pid;

use super::peer_process;
use crate::sys::dying::{self, Dying};

/// What is found where a socket's file is.
#[derive(Debug)]
pub(super) enum Knock {
    /// No process listens.
    Refused,
    /// The file has been removed meanwhile.
    Gone,
    /// A process listens that will never accept: it was killed, or has ended, and its files are still held by I/O.
    Dying(Dying),
    /// A process listens; or that cannot be known.
    InUse,
}

/// Connects to the socket at `path` to see, and closes the connection.
pub(super) fn knock(path: &Path) -> Knock {
    match try_connect(path) {
        Ok(stream) => match dying_listener(&stream) {
            Some(process) => Knock::Dying(process),
            None => Knock::InUse,
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
