//! An image's second open file.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use rustix::fs::OFlags;

/// Opens `file` once more: an open file description of its own, whose view of failed write-backs is not
/// used up by anybody else. By its number, so that it is the same file whatever its name stands for by
/// now. `None` where that cannot be had (no /proc); then more is taken for lost than is.
pub(super) fn open_witness(file: &File) -> Option<OwnedFd> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
        .open(path);
    match opened {
        Ok(file) => Some(file.into()),
        Err(error) => {
            log::debug!("the image cannot be opened a second time: {error}");
            None
        }
    }
}
