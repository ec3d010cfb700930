//! The gate for stream sockets that a front end sends: its calls, errors, the back-end channel, the channel of a state
//! that is saved. All of them are only written to. No other kind of descriptor that a session takes can hold a descriptor
//! of its own: eventfds, pipes, memory and files.
//!
//! A session ends when its front end has left, which is when the last descriptor of the other end of its connection is
//! closed. If we held one ourselves it would never end, and the disk would not be served again. So what is sent must
//! neither be such an end nor hold one: a message that waits in a socket holds the descriptors that were sent with it,
//! and a socket that listens holds the connections that wait there.

use std::io;
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::sockopt::socket_acceptconn;
use rustix::net::{RecvFlags, Shutdown, recv, shutdown};

use super::refusal::Reason;
use crate::sys::own_sockets::leads_to_us;

/// What is wrong with a stream socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unfit {
    /// It is the other end of a connection to this process.
    LeadsToUs,
    /// It listens.
    Listens,
}

/// Takes a stream socket that is only going to be written to, as `role` says in a message; see [`take`].
pub(super) fn written(socket: &OwnedFd, role: &'static str) -> Result<(), Reason> {
    match take(socket) {
        Ok(Ok(())) => Ok(()),
        Ok(Err(Unfit::LeadsToUs)) => Err(Reason::OwnConnection { role }),
        Ok(Err(Unfit::Listens)) => Err(Reason::Listens { role }),
        Err(error) => Err(Reason::Examine(error.to_string())),
    }
}

/// Takes a stream socket that is only going to be written to. From here on nothing can be put into it, whoever else
/// has it: that belongs to the socket and not to a descriptor, and the sender is to read what we write and nothing
/// else.
fn take(socket: &OwnedFd) -> io::Result<Result<(), Unfit>> {
    if leads_to_us(socket)? {
        return Ok(Err(Unfit::LeadsToUs));
    }
    shutdown(socket, Shutdown::Read)?;
    // After that: what begins to listen now lets nobody in (unix_stream_connect, net/unix/af_unix.c).
    if socket_acceptconn(socket)? {
        return Ok(Err(Unfit::Listens));
    }
    let mut bytes = [0; 4096];
    loop {
        // Without room for descriptors, so that those that were sent are closed by the kernel.
        match recv(socket, &mut bytes, RecvFlags::DONTWAIT) {
            Ok((0, _)) => return Ok(Ok(())),
            Ok(_) | Err(Errno::INTR) => {}
            // Nothing there, or never connected.
            Err(_) => return Ok(Ok(())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::SocketAddrUnix;
    use std::io::{Read, Write};
    use std::os::unix::net::{UnixListener, UnixStream};

    #[test]
    fn what_was_put_into_a_socket_is_gone_and_nothing_more_can_be() {
        let (mut theirs, ours) = UnixStream::pair().unwrap();
        theirs.write_all(&[1; 10_000]).unwrap();
        let ours = OwnedFd::from(ours);
        assert_eq!(take(&ours).unwrap(), Ok(()));
        let error = theirs.write_all(&[1]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
        let mut ours = UnixStream::from(ours);
        assert_eq!(ours.read(&mut [0]).unwrap(), 0);
        ours.write_all(b"call").unwrap();
        let mut got = [0; 4];
        theirs.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"call", "what it is for");
    }

    #[test]
    fn a_socket_that_listens_now_or_later_lets_nobody_in() {
        let directory = tempfile::TempDir::new().unwrap();
        let path = directory.path().join("socket");
        let listener = OwnedFd::from(UnixListener::bind(&path).unwrap());
        assert_eq!(take(&listener).unwrap(), Err(Unfit::Listens));
        let later = rustix::net::socket(
            rustix::net::AddressFamily::UNIX,
            rustix::net::SocketType::STREAM,
            None,
        )
        .unwrap();
        assert_eq!(take(&later).unwrap(), Ok(()));
        let path = directory.path().join("later");
        rustix::net::bind(&later, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        rustix::net::listen(&later, 1).unwrap();
        UnixStream::connect(&path).expect_err("nobody is let in");
    }
}
