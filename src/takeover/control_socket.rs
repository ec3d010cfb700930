//! The control socket that goes along.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use crate::config::SocketSource;

use super::receiver::listen_anew;
use super::socket_name;
use crate::sys::listener::SocketFile;
use crate::vhost_user::handover::CarriedListener;

/// The control socket, which the new process takes over as well if it has the same place for its own.
#[derive(Debug)]
pub struct ControlSocket {
    name: String,
    listener: OwnedFd,
    file: Mutex<Option<SocketFile>>,
}

impl ControlSocket {
    /// Of `listener`, whose file is at `path`.
    ///
    /// # Errors
    ///
    /// No descriptor to be had.
    pub fn new(
        path: &Path,
        listener: &UnixListener,
        file: SocketFile,
    ) -> io::Result<ControlSocket> {
        Ok(ControlSocket {
            name: socket_name(&SocketSource::Path(path.to_owned())),
            listener: listener.as_fd().try_clone_to_owned()?,
            file: Mutex::new(Some(file)),
        })
    }

    /// The file is this process's from now on, and so is the socket.
    pub fn adopt(&self) {
        if let Some(file) = &mut *self.lock()
            && file.adopt()
        {
            listen_anew(&self.listener);
        }
    }

    pub(super) fn carry(&self) -> io::Result<CarriedListener> {
        Ok(CarriedListener {
            socket: self.listener.try_clone()?,
            file: self.lock().as_ref().map(SocketFile::identity),
        })
    }

    /// The file is another process's from now on.
    pub(super) fn leave(&self) {
        if let Some(file) = self.lock().take() {
            file.leave();
        }
    }

    /// Removes the file, unless it is another process's. A client that is still being answered keeps the socket, and
    /// with it this, until the process has ended.
    pub fn remove_file(&self) {
        drop(self.lock().take());
    }

    /// What both processes call it.
    pub(super) fn name(&self) -> &String {
        &self.name
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<SocketFile>> {
        self.file.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
