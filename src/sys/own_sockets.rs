//! Which sockets lead to this process: a connection that a front end sends must not be the other end of its own.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;
use rustix::net::sockopt::socket_peercred;
use rustix::net::{SocketAddrAny, SocketAddrUnix, getpeername, getsockname};
use rustix::process::getpid;

/// Names under which others have listened for us: a daemon that was taken over from, or whoever opened a socket and
/// passed it on. There are as many as disks at most.
static NAMES: Mutex<BTreeSet<SocketAddrUnix>> = Mutex::new(BTreeSet::new());

fn names() -> MutexGuard<'static, BTreeSet<SocketAddrUnix>> {
    // An insertion is whole or has not begun, as far as a set can be seen after a panic elsewhere.
    NAMES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Remembers the name of a socket that listens, or of one that was accepted from it, as ours. It can be told by nothing
/// else that a connection leads to us where it was made before we listened.
///
/// # Errors
///
/// It is no socket.
pub fn remember_socket(socket: &impl AsFd) -> io::Result<()> {
    if let Some(name) = name(Some(getsockname(socket)?)) {
        names().insert(name);
    }
    Ok(())
}

/// A name of the Unix domain, if there is one: a pair of sockets has none.
fn name(address: Option<SocketAddrAny>) -> Option<SocketAddrUnix> {
    // The address of a socket without a name is its family and nothing else (unix(7)).
    let named = address.filter(|a| a.addr_len() as usize > size_of::<libc::sa_family_t>())?;
    SocketAddrUnix::try_from(named).ok()
}

/// Whether `socket` is the other end of a connection to a socket of this process.
///
/// The kernel knows who listened when it was made (SO_PEERCRED), and that it was under a name tells a connection from a
/// pair of sockets. Where another process listened then, the name is that of a socket which we have now. It cannot be
/// changed: it is the one of our end.
///
/// # Errors
///
/// The kernel does not say who is at the other end.
pub fn leads_to_us(socket: &OwnedFd) -> io::Result<bool> {
    let peer = match getpeername(socket) {
        Ok(peer) => name(peer),
        Err(Errno::NOTCONN) => None,
        Err(errno) => return Err(errno.into()),
    };
    let Some(peer) = peer else { return Ok(false) };
    Ok(names().contains(&peer) || socket_peercred(socket)?.pid == getpid())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::{UnixListener, UnixStream};

    #[test]
    fn a_connection_to_us_is_told_from_others() {
        let directory = tempfile::TempDir::new().unwrap();
        let path = directory.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let theirs = UnixStream::connect(&path).unwrap();
        let (ours, _) = listener.accept().unwrap();
        let (one, _other) = UnixStream::pair().unwrap();
        for (socket, leads) in [
            (theirs.into(), true),
            (ours.into(), false),
            (one.into(), false),
            (OwnedFd::from(listener), false),
        ] {
            assert_eq!(leads_to_us(&socket).unwrap(), leads, "{socket:?}");
        }
    }
}
