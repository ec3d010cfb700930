//! One disk that comes over: its size, what was changed of it, where its front ends connect, and its session.

use std::io;
use std::time::Instant;

use crate::config::SocketSource;
use crate::image::ImageKind;

use super::super::state::CarriedDisk;
use super::received::{check_listening, check_session};
use crate::disk::Keeping;
use crate::disk::registry::Roster;
use crate::sys::clock::Clock;
use crate::sys::fds::{Share, UsedUp};
use crate::sys::listener::{Door, SocketFile};
use crate::vhost_user::guard::{CarriedSession, FDS_TO_BEGIN, Reason};
use crate::vhost_user::session::StartWith;
use crate::vhost_user::session::{DiskServer, Session};

/// Sets up what a disk's thread begins with. The disk is held from here on.
pub(super) fn begin(
    server: &DiskServer,
    carried: CarriedDisk,
    roster: &Roster,
    clock: Clock,
    deadline: Instant,
) -> Result<StartWith, String> {
    let disk = &server.disk;
    match (&carried.listener, &disk.config.socket) {
        (Some(listener), _) => {
            check_listening(listener).map_err(|why| format!("its socket {why}"))?;
        }
        // Without it no front end could connect ever again. The other is just ending.
        (None, SocketSource::Path(_)) => return Err("its socket did not come along".to_owned()),
        (None, SocketSource::Fd(_)) => {}
    }
    if let Some(session) = &carried.session {
        check_session(session)?;
    }
    disk.set_beside(true);
    // Until the disks are ours, the notes are not.
    disk.set_keeping(Keeping::Elsewhere);
    disk.hold()
        .wait(deadline)
        .map_err(|_| "the workers do not answer")?;
    if disk.size_bytes() < carried.size_bytes {
        let resize = disk.begin_resize().ok_or("its size is being changed")?;
        let size = match disk.image().kind {
            ImageKind::Null => resize.grow_to(carried.size_bytes),
            ImageKind::File | ImageKind::BlockDevice => resize.follow_image(),
        };
        let size = size.map_err(|error| error.to_string())?;
        if size < carried.size_bytes {
            return Err(format!(
                "the image has {size} bytes, less than the {} that the guest was promised",
                carried.size_bytes
            ));
        }
    }
    disk.adopt_changes(
        carried.changes,
        carried.was_write_through,
        clock.now_ns(),
        |name| roster.group(name),
    )
    .map_err(|error| format!("the image cannot be synced: {error}"))?;
    let door = carried.listener.map(|listener| {
        let file = match (&disk.config.socket, listener.file) {
            (SocketSource::Path(path), Some(identity)) => {
                Some(SocketFile::inherited(path, identity))
            }
            _ => None,
        };
        Door::Listening(listener.socket.into(), file)
    });
    let session = carried
        .session
        .map(|session| resume(server, session, deadline))
        .transpose()?;
    Ok(StartWith { door, session })
}

fn resume(
    server: &DiskServer,
    carried: CarriedSession,
    deadline: Instant,
) -> Result<Session, String> {
    let text = |error: io::Error| error.to_string();
    let front_end = carried.front_end.try_clone().map_err(text)?;
    let running: Vec<u16> = carried
        .rings
        .iter()
        .filter(|ring| ring.running)
        .map(|ring| ring.index)
        .collect();
    let share = Share::take(FDS_TO_BEGIN).map_err(|UsedUp| Reason::NoFds.to_string())?;
    let mut session = Session::open(server, front_end.into(), share).map_err(text)?;
    session
        .prime(carried, deadline)
        .map_err(|error| error.to_string())?;
    match running.iter().find(|index| !session.is_running(**index)) {
        Some(index) => Err(format!("queue {index} cannot be started; see above")),
        None => Ok(session),
    }
}
