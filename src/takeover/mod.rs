//! Live upgrade: one process takes all disks over from another, with the front ends connected and the
//! guests running.
//!
//! The new process connects to the control socket of the old one and asks with
//! `POST /v1/take-over`; from there on the connection carries frames (`wire.rs`):
//!
//! ```text
//! new                                     old
//!  who listens there? (trust.rs)
//!  POST /v1/take-over {formats} ─────────▶  same user? no disk held after an error? a format both know?
//!  ◀───────────────────────────── 101
//!  Plan {disks, control socket} ─────────▶  are these all my disks?
//!  ◀──────────────────────────── Facts      what each guest was promised
//!  opens images, starts workers
//!  Ready ────────────────────────────────▶  sessions come to rest, disks are held still
//!  ◀──────────────────────────── State      sockets, sessions, memory, rings, eventfds, changes
//!  sets all of it up, holding the disks
//!  Taken ════════════════════════════════▶  leaves without touching anything
//!  releases the disks
//! ```
//!
//! **One moment decides.** `Taken` is a single small write. Before it, nothing of what the old process
//! has is changed: if either side fails, says so, dies or is late, the old one releases its disks and
//! goes on, and the new one ends with an error. After it, the disks are the new one's. That both
//! always agree about it is the socket's work: the old process gives up waiting by shutting down its
//! receiving side, after which the new one's write fails and what was written before is still there
//! to be read.
//!
//! **Nobody writes for both.** A held disk's worker touches neither the guest's memory nor the image
//! (`worker/handover.rs`), and the new process starts each ring on a disk that it holds until `Taken` is
//! written.
//!
//! What travels is described in one place, `state.rs`, under a format number.

mod control_socket;
mod freeze_order;
mod receiver;
mod sender;
mod state;
mod trust;
mod wire;

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::LazyLock;
use std::time::Duration;

use crate::config::{Config, SocketSource};
use crate::error::StartError;
use crate::image::{Image, ImageKind};

pub use control_socket::ControlSocket;
pub use receiver::{Inheritance, Predecessor, TakeOverError};
pub use sender::{Giver, Offer};
pub use trust::Trusted;

/// How long the guests may stand still until it is given up: sessions have to come to rest, what is in
/// flight has to end, and the new process has to set itself up.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long after that sessions that were not ready may take to be closed, if they are to be (`--close-unready`).
const CLOSING: Duration = Duration::from_secs(2);

/// How long the new process may take to open its images and start its workers; the guests run.
const PREPARATION: Duration = Duration::from_secs(60);

/// Where the process was started, which relative paths of sockets are in. The sandbox refuses to tell it later.
static DIRECTORY: LazyLock<Option<PathBuf>> = LazyLock::new(|| std::env::current_dir().ok());

/// Finds out where the process was started. To be called before the sandbox closes.
///
/// # Errors
///
/// It cannot be found out, because the directory was removed for example, and a socket's path is relative to it.
pub fn remember_directory(config: &Config) -> Result<(), StartError> {
    let disks = config.disks.iter().filter_map(|disk| match &disk.socket {
        SocketSource::Path(path) => Some(path),
        SocketSource::Fd(_) => None,
    });
    let mut paths = disks.chain(&config.control_path);
    match (&*DIRECTORY, paths.find(|path| path.is_relative())) {
        (None, Some(path)) => Err(StartError::Usage(format!(
            "the socket {path:?} is relative to the current directory, which cannot be found out; give an \
             absolute path (see --help)"
        ))),
        _ => Ok(()),
    }
}

/// What both processes call a disk: its socket, as the command line gives it. A descriptor has its
/// number in the process that was started with it.
fn socket_name(socket: &SocketSource) -> String {
    match socket {
        // Quoted, so that any name of a file is text, and no two names are the same text.
        SocketSource::Path(path) => {
            let path = DIRECTORY.clone().unwrap_or_default().join(path);
            // Puts no directory before it: it is absolute.
            let plain = std::path::absolute(&path).unwrap_or(path);
            format!("the socket {plain:?}")
        }
        SocketSource::Fd(fd) => format!("file descriptor {fd}"),
    }
}

/// Which file an image is: its device and inode, and the number of a device.
fn file_of(image: &Image) -> Option<[u64; 3]> {
    if image.kind == ImageKind::Null {
        return None;
    }
    let facts = image.file.metadata().ok()?;
    Some(match image.kind {
        // A device may have several nodes.
        ImageKind::BlockDevice => [0, 0, facts.rdev()],
        ImageKind::File | ImageKind::Null => [facts.dev(), facts.ino(), 0],
    })
}
