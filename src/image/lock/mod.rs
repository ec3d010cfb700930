//! Locks on an image that keep others from writing to it, in the way QEMU's are.
//!
//! QEMU locks single bytes of the image, far inside the file or not (a lock needs no byte there):
//! byte 100 + *p* is locked by whoever *uses* permission *p*, and byte 200 + *p* by whoever does not
//! *share* it. All locks are read locks, so that several users of a permission get along; a conflict
//! is found by asking whether a write lock would be possible. Everybody takes its own locks first
//! and looks at the others' afterwards: of two that come at the same time, at least one sees the
//! other.
//!
//! | permission | | a writer | a reader |
//! |---|---|---|---|
//! | 0 | sees consistent data | uses | uses |
//! | 1 | writes | uses, does not share | does not share |
//! | 3 | changes the size | does not share | does not share |
//!
//! The locks are those of the open file description (`F_OFD_SETLK`, fcntl(2)): every duplicate of the
//! descriptor has them, in another process as well, and they end with the last one, which is when
//! the last I/O on it has ended.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use log::warn;

use crate::config::DiskConfig;
use crate::error::{Held, StartError};
use crate::logging::show_early;
use crate::sys::dying::Dying;
use crate::sys::holders::{dying_holder, is_locked_by_living, is_open_elsewhere};

const USES_BASE: i64 = 100;
const UNSHARED_BASE: i64 = 200;
/// As many permissions as there is room for between the two, so that those of later QEMUs are
/// dropped with ours.
const PERMISSIONS: i64 = 64;

const CONSISTENT_READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// What nobody else may do meanwhile.
const UNSHARED: [i64; 2] = [WRITE, RESIZE];

/// How long a conflict is waited out. A process that was killed keeps its files open until its last
/// I/O has ended, and whoever supervises it starts the next one at once.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// How long it is waited out after that where no process that lives has the image: then it is only the last I/O
/// of one that was killed, and to serve the image before that has ended would let an old write land on a new
/// one.
const LAST_IO_PATIENCE: Duration = Duration::from_secs(60);

/// After that the log says that a process which is dying is waited for.
const SILENCE: Duration = Duration::from_secs(1);

/// Between two attempts.
const PAUSE: Duration = Duration::from_millis(10);

/// What is done with the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reading, while nobody writes.
    Read,
    /// Reading and writing, alone.
    Write,
}

/// Why an image is not locked.
#[derive(Debug)]
pub enum LockError {
    /// Somebody else has it.
    Held(Held),
    /// Its file system has no such locks, or no room for one.
    Unsupported(io::Error),
}

impl From<io::Error> for LockError {
    fn from(error: io::Error) -> Self {
        LockError::Unsupported(error)
    }
}

/// Locks `file` for `access`, waiting for at most `patience` while somebody else has it. Locking twice
/// is once.
///
/// # Errors
///
/// Somebody else has it still, or there are no locks on this file; then it is not locked.
pub fn lock(file: &impl AsFd, access: Access, patience: Duration) -> Result<(), LockError> {
    let until = Instant::now() + patience;
    loop {
        match lock_once(file, access) {
            Err(LockError::Held(_)) if Instant::now() < until => thread::sleep(PAUSE),
            outcome => return outcome,
        }
    }
}

/// Says what is done with `file`, so that others can respect it, and respects nobody: what QEMU calls
/// `force-share`.
///
/// # Errors
///
/// There are no locks on this file.
pub fn announce(file: &impl AsFd, access: Access) -> io::Result<()> {
    uses(access).try_for_each(|permission| take(file, USES_BASE + permission))
}

/// Gives all locks of [`lock`] and [`announce`] back.
pub fn unlock(file: &impl AsFd) {
    for base in [USES_BASE, UNSHARED_BASE] {
        // Without locks there is nothing to give back.
        let _ = control(file, libc::F_OFD_SETLK, libc::F_UNLCK, base, PERMISSIONS);
    }
}

fn uses(access: Access) -> impl Iterator<Item = i64> {
    [CONSISTENT_READ, WRITE]
        .into_iter()
        .take(if access == Access::Write { 2 } else { 1 })
}

fn lock_once(file: &impl AsFd, access: Access) -> Result<(), LockError> {
    let outcome = take_and_look(file, access);
    if outcome.is_err() {
        unlock(file);
    }
    outcome
}

fn take_and_look(file: &impl AsFd, access: Access) -> Result<(), LockError> {
    announce(file, access)?;
    for permission in UNSHARED {
        take(file, UNSHARED_BASE + permission)?;
    }
    for permission in UNSHARED {
        if is_locked(file, USES_BASE + permission)? {
            return Err(LockError::Held(Held::Writing));
        }
    }
    for permission in uses(access) {
        if is_locked(file, UNSHARED_BASE + permission)? {
            return Err(LockError::Held(Held::Reading));
        }
    }
    Ok(())
}

/// Locks a byte for reading. Somebody who locked it for writing is nobody who keeps to QEMU's rules.
fn take(file: &impl AsFd, byte: i64) -> io::Result<()> {
    control(file, libc::F_OFD_SETLK, libc::F_RDLCK, byte, 1).map(drop)
}

/// Whether somebody else has a lock on a byte.
fn is_locked(file: &impl AsFd, byte: i64) -> io::Result<bool> {
    let found = control(file, libc::F_OFD_GETLK, libc::F_WRLCK, byte, 1)?;
    Ok(i32::from(found.l_type) != libc::F_UNLCK)
}

fn control(
    file: &impl AsFd,
    command: libc::c_int,
    kind: libc::c_int,
    start: i64,
    len: i64,
) -> io::Result<libc::flock> {
    let mut lock = libc::flock {
        l_type: i16::try_from(kind).expect("the kinds of locks are small numbers"),
        l_whence: i16::try_from(libc::SEEK_SET).expect("a small number"),
        l_start: start,
        l_len: len,
        // A lock of the open file description has no owner.
        l_pid: 0,
    };
    // SAFETY: the commands used here read and write the one structure they are given, which lives
    // until the call returns. Unsafe because fcntl takes an address; no crate offers these commands.
    let outcome = unsafe { libc::fcntl(file.as_fd().as_raw_fd(), command, &raw mut lock) };
    if outcome == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(lock)
    }
}

/// Locks the image of `config` as `config` says. Where the file system has no locks it is served all the
/// same, and the log says so.
///
/// # Errors
///
/// [`StartError::ImageInUse`]: somebody else has it, and did not let go of it in time.
pub fn lock_image(file: &impl AsFd, path: &Path, config: &DiskConfig) -> Result<(), StartError> {
    let access = access(config);
    let locked = if config.force_share {
        announce(file, access).map_err(LockError::Unsupported)
    } else {
        lock(file, access, SILENCE).or_else(|error| match error {
            LockError::Held(_) => wait_for(file, path, access),
            error => Err(error),
        })
    };
    match locked {
        Err(LockError::Held(_)) => match dying_locker(file) {
            Some(holder) => Err(StartError::ImageNotReleased {
                path: path.to_owned(),
                holder: holder.to_string(),
            }),
            None => judge(locked, path),
        },
        locked => judge(locked, path),
    }
}

/// The same without waiting.
///
/// # Errors
///
/// [`StartError::ImageInUse`]: another process has it at this moment.
pub fn lock_image_now(
    file: &impl AsFd,
    path: &Path,
    config: &DiskConfig,
) -> Result<(), StartError> {
    let access = access(config);
    let locked = if config.force_share {
        announce(file, access).map_err(LockError::Unsupported)
    } else {
        lock_once(file, access)
    };
    judge(locked, path)
}

fn access(config: &DiskConfig) -> Access {
    match config.read_only {
        true => Access::Read,
        false => Access::Write,
    }
}

/// Waits longer for the image of a process that is dying than for that of one that goes on, and says so.
fn wait_for(file: &impl AsFd, path: &Path, access: Access) -> Result<(), LockError> {
    let dying = dying_locker(file);
    if let Some(holder) = &dying {
        warn!("{path:?} is locked by {holder}; waiting until that has ended");
        show_early();
    }
    lock(file, access, PATIENCE - SILENCE).or_else(|error| match error {
        LockError::Held(_) if dying.is_some() || !is_open_elsewhere(file) => {
            if dying.is_none() {
                warn!(
                    "{path:?}: a process that was killed has I/O on it that has not ended; waiting for that"
                );
                show_early();
            }
            lock(file, access, LAST_IO_PATIENCE)
        }
        error => Err(error),
    })
}

/// A process that is dying and has the image, if no process that goes on has it locked as well.
fn dying_locker(file: &impl AsFd) -> Option<Dying> {
    let dying = dying_holder(file)?;
    // Another one that waits has the lock at times, for a moment.
    let lives = || is_locked_by_living(file);
    let stays = lives() && {
        thread::sleep(3 * PAUSE);
        lives()
    };
    (!stays).then_some(dying)
}

/// The same beside another process that has the image and is about to leave it to us: takes all
/// locks and looks at nobody's. As all are read locks, both have them for a while, and a third sees
/// that the image is in use at every moment.
///
/// # Errors
///
/// None; where the file system has no locks the log says so.
pub fn lock_beside(file: &impl AsFd, path: &Path, config: &DiskConfig) -> Result<(), StartError> {
    let access = access(config);
    let mut taken = announce(file, access);
    if !config.force_share {
        for permission in UNSHARED {
            taken = taken.and_then(|()| take(file, UNSHARED_BASE + permission));
        }
    }
    judge(taken.map_err(LockError::Unsupported), path)
}

fn judge(locked: Result<(), LockError>, path: &Path) -> Result<(), StartError> {
    match locked {
        Ok(()) => Ok(()),
        Err(LockError::Held(by)) => Err(StartError::ImageInUse {
            path: path.to_owned(),
            by,
        }),
        Err(LockError::Unsupported(error)) => {
            warn!(
                "{path:?} cannot be locked ({error}): nothing keeps another process from writing to it"
            );
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests;
