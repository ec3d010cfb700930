//! What the descriptors of another process are, asked of the kernel.
//!
//! What belongs to a session's rings and memory is judged by the session's own rules. These are the descriptors that no
//! front end could have sent: where others connect, and the connection itself.

use std::os::fd::AsFd;

use rustix::net::sockopt::{socket_acceptconn, socket_domain, socket_type};
use rustix::net::{AddressFamily, SocketType};

use crate::vhost_user::guard::CarriedSession;
use crate::vhost_user::handover::CarriedListener;

/// A stream socket of the Unix domain that listens: from anything else connections could not be accepted.
pub(super) fn check_listening(listener: &CarriedListener) -> Result<(), String> {
    if is_stream(&listener.socket) && socket_acceptconn(&listener.socket) == Ok(true) {
        return Ok(());
    }
    Err("came as a descriptor that is no listening Unix stream socket".to_owned())
}

/// A connected stream socket of the Unix domain.
pub(super) fn check_session(session: &CarriedSession) -> Result<(), String> {
    // A front end that has left just now is not connected either, and its session ends as any other.
    let socket = &session.front_end;
    if is_stream(socket) && socket_acceptconn(socket) == Ok(false) {
        return Ok(());
    }
    Err("its front end came as a descriptor that is no connected Unix stream socket".to_owned())
}

fn is_stream(socket: &impl AsFd) -> bool {
    socket_domain(socket) == Ok(AddressFamily::UNIX)
        && socket_type(socket) == Ok(SocketType::STREAM)
}
