//! What only shows when all disks and groups are looked at together.

use std::path::Path;

use crate::config::tuning::Group;
use crate::error::StartError;

use crate::config::{DiskConfig, OnError, SocketSource};

use super::usage;

/// Two disks on one socket would take each other's front end.
pub(super) fn no_socket_twice(disks: &[DiskConfig]) -> Result<(), StartError> {
    for (index, disk) in disks.iter().enumerate() {
        if disks[..index]
            .iter()
            .any(|earlier| earlier.socket == disk.socket)
        {
            let socket = match &disk.socket {
                SocketSource::Path(path) => format!("the socket {:?}", Path::new(path)),
                SocketSource::Fd(fd) => format!("file descriptor {fd}"),
            };
            return usage(format!(
                "{socket} is given for two disks; each disk needs one of its own"
            ));
        }
    }
    Ok(())
}

/// A disk in a group nobody described would have no limit because of a typing error.
pub(super) fn check_groups(groups: &[Group], disks: &[DiskConfig]) -> Result<(), StartError> {
    for (index, group) in groups.iter().enumerate() {
        if groups[..index]
            .iter()
            .any(|earlier| earlier.name == group.name)
        {
            return usage(format!(
                "--group-limit names the group '{}' twice; put all its limits into one",
                group.name
            ));
        }
    }
    let named = disks.iter().filter_map(|disk| disk.group.as_ref());
    match named
        .into_iter()
        .find(|name| groups.iter().all(|group| group.name != **name))
    {
        Some(name) => usage(format!(
            "a disk is in the group '{name}', which has no limits; give --group-limit {name},iops=RATE"
        )),
        None => Ok(()),
    }
}

pub(super) fn check_control_path(
    path: Option<&Path>,
    disks: &[DiskConfig],
) -> Result<(), StartError> {
    let Some(path) = path else {
        return Ok(());
    };
    if disks
        .iter()
        .any(|disk| disk.socket == SocketSource::Path(path.to_owned()))
    {
        return usage(format!(
            "{path:?} is given for a disk and for --control-path; each needs a socket of its own"
        ));
    }
    Ok(())
}

/// Nobody could resume a disk that is held.
pub(super) fn check_on_error(
    control: Option<&Path>,
    disks: &[DiskConfig],
) -> Result<(), StartError> {
    let stops = |disk: &DiskConfig| disk.on_error != OnError::Report;
    if control.is_none() && disks.iter().any(stops) {
        return usage(
            "a disk that stops at an error (--on-error) has to be resumed: give --control-path PATH \
             for blkmqctl"
                .to_owned(),
        );
    }
    Ok(())
}
