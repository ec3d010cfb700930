//! The way back to the front end: telling it that the disk's configuration has changed.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;
use rustix::net::{SendFlags, send};
use vhost::vhost_user::message::BackendReq;

use crate::disk::resize::ConfigChanged;

use super::wire::{HEADER_BYTES, Header, VERSION};

/// Tells the front end of one session that the config space has changed, so that it reads it
/// again. It may be cloned and used by any thread; it outlives its session, and then does nothing.
#[derive(Clone, Debug)]
pub struct ConfigNotifier {
    channel: Arc<Channel>,
}

impl ConfigNotifier {
    pub(super) fn new(channel: Arc<Channel>) -> ConfigNotifier {
        ConfigNotifier { channel }
    }
}

impl ConfigChanged for ConfigNotifier {
    /// Sends CONFIG_CHANGE_MSG (vhost-user, "Back-end message types") and never blocks.
    ///
    /// `true` means that the front end has the message or will find it; `false`, that it gave no
    /// back-end channel, did not negotiate BACKEND_REQ and CONFIG, or has left. A channel that is
    /// full counts as sent: what fills it is earlier notifications that were not read yet, and
    /// whoever reads those reads the newest configuration.
    ///
    /// # Errors
    ///
    /// What `send` says where the front end has closed the channel or it is broken.
    fn config_changed(&self) -> io::Result<bool> {
        let state = self.channel.state();
        let Some(socket) = state.socket.as_ref().filter(|_| state.negotiated) else {
            return Ok(false);
        };
        // No NEED_REPLY: nobody reads the channel for an answer.
        let message = Header {
            request: BackendReq::CONFIG_CHANGE_MSG.into(),
            flags: VERSION,
            size: 0,
        };
        loop {
            match send(
                socket,
                &message.encode(),
                SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
            ) {
                Ok(HEADER_BYTES) => return Ok(true),
                // A stream socket of the Unix domain takes twelve bytes as a whole or not.
                Ok(_) => return Err(io::ErrorKind::WriteZero.into()),
                Err(Errno::AGAIN) => return Ok(true),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

/// A duplicate of the back-end channel and whether it may be used.
#[derive(Debug, Default)]
pub(super) struct Channel {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    socket: Option<OwnedFd>,
    negotiated: bool,
}

impl Channel {
    /// Uses `socket` from now on, in place of any other.
    pub(super) fn set_socket(&self, socket: OwnedFd) {
        self.state().socket = Some(socket);
    }

    /// Another descriptor for the channel, if the front end gave one.
    pub(super) fn duplicate(&self) -> io::Result<Option<OwnedFd>> {
        self.state()
            .socket
            .as_ref()
            .map(OwnedFd::try_clone)
            .transpose()
    }

    /// Whether BACKEND_REQ and CONFIG are negotiated.
    pub(super) fn set_negotiated(&self, negotiated: bool) {
        self.state().negotiated = negotiated;
    }

    /// Closes the duplicate: the session is over.
    pub(super) fn close(&self) {
        *self.state() = State::default();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change is a single assignment, so a panic elsewhere leaves nothing half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_full_channel_does_not_block_and_a_closed_one_is_an_error() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let channel = Arc::new(Channel::default());
        let notifier = ConfigNotifier::new(Arc::clone(&channel));
        assert!(!notifier.config_changed().unwrap());
        channel.set_socket(ours.into());
        assert!(!notifier.config_changed().unwrap());
        channel.set_negotiated(true);

        // More than any socket buffer holds at twelve bytes each.
        for _ in 0..100_000 {
            assert!(notifier.config_changed().unwrap());
        }
        let mut message = [0; 12];
        theirs.read_exact(&mut message).unwrap();
        let words: Vec<u32> = message
            .chunks(4)
            .map(|w| u32::from_ne_bytes(w.try_into().unwrap()))
            .collect();
        assert_eq!(words, [2, 1, 0]);

        drop(theirs);
        assert!(notifier.config_changed().is_err());
        channel.close();
        assert!(!notifier.config_changed().unwrap());
    }
}
