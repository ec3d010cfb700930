//! A session that finds out that it cannot serve the disk, and ends itself.

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::OnceLock;

use super::SessionState;

/// The device's end of the session, for a session that has to end from within, and why it did.
#[derive(Debug, Default)]
pub(super) struct EndFromWithin {
    device: OnceLock<UnixStream>,
    reason: OnceLock<String>,
}

impl SessionState {
    /// Lets the session end itself.
    ///
    /// # Errors
    ///
    /// The process is out of descriptors.
    pub fn can_give_up(&self, device: &UnixStream) -> io::Result<()> {
        let _ = self.end.device.set(device.try_clone()?);
        Ok(())
    }

    /// Ends the session: the disk cannot be served now, and the front end is to try again later.
    pub(super) fn give_up(&self, reason: &str) {
        // The first reason is the one that counts.
        let _ = self.end.reason.set(reason.to_owned());
        if let Some(device) = self.end.device.get() {
            // An error means that it is closed already.
            let _ = device.shutdown(Shutdown::Both);
        }
    }

    /// Why the session ended itself, if it did.
    pub fn gave_up(&self) -> Option<&str> {
        self.end.reason.get().map(String::as_str)
    }
}
