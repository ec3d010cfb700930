//! A session that finds out that it cannot serve the disk, and ends itself.

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::OnceLock;

use crate::config::LockWhen;

use super::SessionState;

/// The device's end of the session, if the session may have to end from within.
#[derive(Debug, Default)]
pub(super) struct EndFromWithin(OnceLock<UnixStream>);

impl SessionState {
    /// Lets the session end itself, if its disk may turn out to be in use.
    ///
    /// # Errors
    ///
    /// The process is out of descriptors.
    pub fn can_give_up(&self, device: &UnixStream) -> io::Result<()> {
        if self.disk.config.lock == LockWhen::InUse {
            let _ = self.end.0.set(device.try_clone()?);
        }
        Ok(())
    }

    /// Ends the session: the disk cannot be served now, and the front end is to try again later.
    pub(super) fn give_up(&self) {
        if let Some(device) = self.end.0.get() {
            // Closed already is closed.
            let _ = device.shutdown(Shutdown::Both);
        }
    }
}
