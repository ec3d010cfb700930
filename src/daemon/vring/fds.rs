//! A ring's file descriptors.

use std::os::fd::{AsFd, OwnedFd};

/// Another descriptor for the same open file; none if there is none to be had, in which case the
/// ring does without it and the log says so.
pub(super) fn duplicate(fd: Option<&impl AsFd>) -> Option<OwnedFd> {
    match fd?.as_fd().try_clone_to_owned() {
        Ok(fd) => Some(fd),
        Err(error) => {
            log::error!("cannot duplicate a ring's file descriptor: {error}");
            None
        }
    }
}
