//! The limit of locked memory. Newer kernels charge a ring's memory to the user (Linux 6.14 and later), to all
//! the processes of that user together, unless it may lock any (CAP_IPC_LOCK, which the sandbox gives up).

use std::io;

use rustix::process::{Resource, getrlimit};

use crate::worker::{WorkerOptions, make_engine};

/// Says so if there is no room for the rings of as many workers once more. A daemon that takes over has its
/// rings while this one still has its own, and then it would be too late to raise the limit.
pub(super) fn check(options: WorkerOptions, workers: usize) {
    let Some(limit) = getrlimit(Resource::Memlock).current else {
        return;
    };
    let again: io::Result<Vec<_>> = (0..workers).map(|_| make_engine(options)).collect();
    if again.is_err_and(|error| error.kind() == io::ErrorKind::OutOfMemory) {
        log::warn!(
            "the user may lock {limit} bytes of memory, and rings take so much of it that a daemon which takes over \
             from this one could not start beside it: raise the limit (ulimit -Hl, LimitMEMLOCK=)"
        );
    }
}
