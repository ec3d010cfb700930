//! All that is opened by name, with the rights of whoever started the process: images, sockets, and the
//! connection to the daemon that the disks are taken over from. After this a sandbox may close.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;

use crate::config::{Config, DiskConfig, SocketSource};
use crate::disk::size_watch::GrowthWatch;
use crate::error::StartError;
use crate::image::Image;
use crate::sandbox::{Identity, find_group};
use crate::sys::listener::{Access, Door, SocketFile, Turns, claim, listen_privately};
use crate::takeover::{Predecessor, Trusted, remember_directory};

/// The control socket: its listener and its file.
pub(super) type ControlDoor = (UnixListener, SocketFile);

/// What the process was started for, open.
pub(super) struct Opening {
    /// The user to become.
    pub(super) identity: Option<Identity>,
    /// The daemon that has the disks so far.
    pub(super) predecessor: Option<Predecessor>,
    /// By disk.
    pub(super) images: Vec<Image>,
    pub(super) growth: GrowthWatch,
    pub(super) doors: Doors,
}

/// Where others connect. What the predecessor has is not among it.
pub(super) struct Doors {
    /// By disk.
    pub(super) disks: Vec<Option<Door>>,
    pub(super) control: Option<ControlDoor>,
}

/// What the parent process passed to each disk with `--fd`.
#[derive(Debug)]
pub(super) struct Passed(Vec<Option<OwnedFd>>);

impl Passed {
    /// Takes it. To be called before the process opens anything.
    pub(super) fn claim(disks: &[DiskConfig]) -> Result<Passed, StartError> {
        let passed = disks.iter().map(|disk| match disk.socket {
            SocketSource::Path(_) => Ok(None),
            SocketSource::Fd(fd) => claim(fd).map(Some),
        });
        passed.collect::<Result<_, _>>().map(Passed)
    }
}

impl Opening {
    /// Opens it all, or nothing.
    pub(super) fn new(config: &Config, passed: Passed) -> Result<Opening, StartError> {
        remember_directory(config)?;
        let identity = config.user.as_ref().map(Identity::find).transpose()?;
        let access = config
            .disks
            .iter()
            .map(|disk| access(disk, identity.as_ref()))
            .collect::<Result<Vec<_>, _>>()?;
        let predecessor = match &config.take_over {
            Some(path) => {
                let becomes = identity.as_ref().map(|user| user.ids().0);
                Predecessor::find(path, config, Trusted::new(becomes))?
            }
            None => None,
        };
        let inherits = |disk: &DiskConfig| predecessor.as_ref().is_some_and(|p| p.serves(disk));
        let images = config
            .disks
            .iter()
            .map(|disk| match inherits(disk) {
                true => Image::open_beside(disk),
                false => Image::open(disk),
            })
            .collect::<Result<Vec<_>, _>>()?;
        if let Some(predecessor) = &predecessor {
            predecessor.check(&config.disks, &images)?;
        }
        let growth = GrowthWatch::new(&images);
        let mut turns = Turns::default();
        let disks = config
            .disks
            .iter()
            .zip(access)
            .zip(passed.0)
            .map(|((disk, access), passed)| match (&disk.socket, passed) {
                _ if inherits(disk) => Ok(None),
                (_, Some(socket)) => Door::inherit(socket).map(Some),
                (SocketSource::Path(path), None) => {
                    Door::bind_for(path, access, &mut turns).map(Some)
                }
                (SocketSource::Fd(_), None) => Ok(None),
            })
            .collect::<Result<Vec<_>, _>>()?;
        let inherits_control = predecessor
            .as_ref()
            .is_some_and(Predecessor::has_our_control_socket);
        let uid = identity.as_ref().map(|user| user.ids().0);
        let control = config
            .control_path
            .as_deref()
            .filter(|_| !inherits_control)
            .map(|path| listen_privately(path, "--control-path", uid, &mut turns))
            .transpose()?;
        Ok(Opening {
            identity,
            predecessor,
            images,
            growth,
            doors: Doors { disks, control },
        })
    }
}

/// Who may connect to a disk's socket.
fn access(disk: &DiskConfig, user: Option<&Identity>) -> Result<Access, StartError> {
    let given = disk.socket_group.as_deref();
    let group = given.map(|name| {
        find_group(name).ok_or_else(|| {
            StartError::Usage(format!(
                "--socket-group: there is no group '{name}' on this machine; give a name or a number \
                 that exists (see --help)"
            ))
        })
    });
    Ok(Access {
        mode: disk.socket_mode,
        uid: user.map(|user| user.ids().0),
        gid: group.transpose()?.or(user.map(|user| user.ids().1)),
    })
}

/// Where a file may be made for a moment, if the directory for temporary files is not to be written to: where the
/// sockets are, and where most systems let everybody write.
pub(super) fn directories(config: &Config) -> Vec<&Path> {
    let sockets = paths(config).into_iter();
    let parents = sockets.map(|socket| match socket.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    });
    parents
        .chain(["/run", "/dev/shm", "/var/tmp"].map(Path::new))
        .collect()
}

/// The sockets whose files are removed at the end.
pub(super) fn paths(config: &Config) -> Vec<&Path> {
    let disks = config.disks.iter().filter_map(|disk| match &disk.socket {
        SocketSource::Path(path) => Some(path.as_path()),
        SocketSource::Fd(_) => None,
    });
    disks.chain(config.control_path.as_deref()).collect()
}
