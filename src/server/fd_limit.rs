//! Limits of the process that concern files: how many file descriptors it may need and may have, and how large its
//! files may be.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::config::DiskConfig;
use crate::vhost_user::guard::MAX_REGIONS;
use crate::virtio::inflight::region_bytes;

/// Descriptors of one queue: kick, call and error, each held by the control plane, by what negotiates and
/// by the worker.
pub const FDS_OF_A_QUEUE: u64 = 9;

/// Descriptors of a session beside its queues' and its memory regions': its connection, the one inside the
/// process, events, the back-end channel, and what has been received and is not judged yet.
pub const FDS_OF_A_SESSION: u64 = 80;

/// Descriptors of the process without any session: images, sockets, rings, signals, the control socket's
/// connections, and some to spare.
const FDS_OF_THE_PROCESS: u64 = 256;

/// Descriptors that may be open at once when each disk's front end uses all it can have.
pub fn most(disks: &[DiskConfig]) -> u64 {
    let regions = u64::try_from(MAX_REGIONS).expect("a small number");
    let sessions = disks
        .iter()
        .map(|disk| regions + FDS_OF_A_SESSION + FDS_OF_A_QUEUE * u64::from(disk.num_queues));
    FDS_OF_THE_PROCESS + sessions.sum::<u64>()
}

/// Raises the limit of file sizes to what the system lets us have, and says so if there is still one: a guest's write
/// beyond it fails.
pub fn allow_large(disks: &[DiskConfig]) {
    let limit = getrlimit(Resource::Fsize);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    if let Err(errno) = setrlimit(Resource::Fsize, raised) {
        log::warn!("the limit of file sizes cannot be raised to the hard limit: {errno}");
    }
    // None is no limit.
    if let Some(bytes) = limit.maximum {
        log::warn!(
            "this process may not write beyond byte {bytes} of a file: a guest's requests there fail; raise the \
             hard limit (ulimit -Hf, LimitFSIZE=)"
        );
        let region = disks.iter().map(|disk| region_bytes(disk.num_queues)).max();
        if region.is_some_and(|region| bytes < region as u64) {
            log::warn!(
                "this process may not make in-flight regions, which are files of up to {} bytes: after a crash of it \
                 guests lose requests",
                region.unwrap_or_default()
            );
        }
    }
}

/// The highest number that is asked for: the kernel's table of descriptors is as long as its highest number.
const HIGHEST_NUMBER: u64 = 1 << 16;

/// Allows as many descriptors as the system lets us have, and says so if that may not be enough. Returns the
/// number from which on listeners are to be; see [`crate::sys::fds::number_from`].
pub fn allow(disks: &[DiskConfig]) -> i32 {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    let now = match setrlimit(Resource::Nofile, raised) {
        Ok(()) => raised.current,
        Err(errno) => {
            log::warn!("the limit of open files cannot be raised to the hard limit: {errno}");
            limit.current
        }
    };
    // None is no limit.
    let most = most(disks);
    if let Some(now) = now.filter(|now| *now < most) {
        log::warn!(
            "{now} open files may not be enough: front ends that use all their queues and memory regions \
             need {most}; raise the hard limit (ulimit -Hn, LimitNOFILE=) or lower --num-queues"
        );
    }
    let listeners = disks.len() as u64;
    let last = now.unwrap_or(u64::MAX).saturating_sub(listeners);
    i32::try_from(most.min(HIGHEST_NUMBER).min(last)).expect("HIGHEST_NUMBER has 17 bits")
}
