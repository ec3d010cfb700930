//! File descriptors of the process: how many there are, what a number stands for, and what is done when there is none.

mod budget;
mod turn_away;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;

use rustix::fs::{Mode, OFlags, open};
use rustix::io::fcntl_dupfd_cloexec;
use rustix::process::{Resource, getrlimit};

pub use self::budget::{Share, UsedUp, settle};
pub use self::turn_away::TurnAway;

/// Opens `/proc/self/fd`, which tells an eventfd from other anonymous inodes; `fstat` does not.
///
/// It is opened once for the process and kept, so that sessions work where `/proc` cannot be
/// reached later, inside a sandbox.
///
/// # Errors
///
/// `/proc` is not mounted or may not be read.
pub fn open_fd_table() -> io::Result<BorrowedFd<'static>> {
    static TABLE: OnceLock<OwnedFd> = OnceLock::new();
    if let Some(table) = TABLE.get() {
        return Ok(table.as_fd());
    }
    let table = open(
        "/proc/self/fd",
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(|errno| {
        let error = io::Error::from(errno);
        io::Error::new(
            error.kind(),
            format!("cannot open /proc/self/fd, mount /proc: {error}"),
        )
    })?;
    Ok(TABLE.get_or_init(|| table).as_fd())
}

/// Whether this process may make a file of so many bytes, in memory as well.
pub fn may_be_made(bytes: usize) -> bool {
    let limit = getrlimit(Resource::Fsize).current;
    limit.is_none_or(|limit| bytes as u64 <= limit)
}

/// The same open file under a descriptor of the lowest free number that is not below `least`.
///
/// A process that is killed lets go of high numbers first (the kernel's task work is a stack: close_files in
/// fs/file.c, task_work_run in kernel/task_work.c). So a listener above all connections is closed before them,
/// and a front end that connects the moment it sees the hang-up is refused, and not reset.
pub fn number_from(fd: OwnedFd, least: i32) -> OwnedFd {
    match fcntl_dupfd_cloexec(&fd, least) {
        Ok(high) => high,
        Err(errno) => {
            log::warn!(
                "a listening socket stays below its connections, because no descriptor from {least} on is to be \
                 had: {errno}; raise the limit of open files (ulimit -n)"
            );
            fd
        }
    }
}
