//! Which processes have a file or a socket open: those that go on, and those that are dying.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, StatxFlags, statx};

use crate::sys::dying::{self, Dying};

/// Where the processes are.
const PROC: &str = "/proc";

/// Whether another process has the file open and goes on, or this one has it more than once. True as well where that
/// cannot be seen: there are processes that this one may not look into. A process that was killed does not count,
/// even while I/O that it began goes on.
pub fn is_open_elsewhere(file: &impl AsFd) -> bool {
    let found = identity(file).and_then(|wanted| {
        let others = |number, count| count > usize::from(number == std::process::id());
        is_open_in(Path::new(PROC), wanted, others)
    });
    found.unwrap_or(true)
}

/// Whether any process has the socket with this inode open and goes on; `socket` is any other. True as well where that
/// cannot be seen.
pub fn is_socket_open(inode: u64, socket: &impl AsFd) -> bool {
    // All sockets are files of one file system.
    let found = identity(socket).and_then(|(major, minor, _)| {
        is_open_in(Path::new(PROC), (major, minor, inode), |_, count| count > 0)
    });
    found.unwrap_or(true)
}

/// Whether a process that goes on is seen to have a lock on the file, with one of its descriptors.
pub fn is_locked_by_living(file: &impl AsFd) -> bool {
    is_locked_in(Path::new(PROC), file).unwrap_or(false)
}

/// Whether a process that goes on has the file open so many times that `counts` says so of its number and that. The
/// processes' directories are in `proc`.
fn is_open_in(
    proc: &Path,
    wanted: Identity,
    counts: impl Fn(u32, usize) -> bool,
) -> io::Result<bool> {
    for number in processes(proc)? {
        let count = match descriptors(proc, number, wanted) {
            Ok(found) => found.len(),
            // It has ended meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        if counts(number, count) && dying::find_in(proc, number).is_none() {
            return Ok(true);
        }
    }
    Ok(false)
}

fn is_locked_in(proc: &Path, file: &impl AsFd) -> io::Result<bool> {
    let wanted = identity(file)?;
    for number in processes(proc)? {
        let found = descriptors(proc, number, wanted).unwrap_or_default();
        // The kernel lists the locks that a descriptor has (proc_pid_fdinfo(5)).
        let has_lock = |descriptor: &PathBuf| {
            let info = || {
                let name = descriptor.file_name()?;
                let directory = descriptor.parent()?.parent()?;
                fs::read_to_string(directory.join("fdinfo").join(name)).ok()
            };
            info().is_some_and(|info| info.lines().any(|line| line.starts_with("lock:")))
        };
        if found.iter().any(has_lock) && dying::find_in(proc, number).is_none() {
            return Ok(true);
        }
    }
    Ok(false)
}

/// A process that is dying and has the file open, if one can be seen.
pub fn dying_holder(file: &impl AsFd) -> Option<Dying> {
    dying_holder_in(Path::new(PROC), file).ok()?
}

fn dying_holder_in(proc: &Path, file: &impl AsFd) -> io::Result<Option<Dying>> {
    let wanted = identity(file)?;
    for number in processes(proc)? {
        let Some(found) = dying::find_in(proc, number) else {
            continue;
        };
        // The first thread may have let go of the files that the others still have.
        let threads = dying::threads_in(proc, number);
        let has_it = |thread: &PathBuf| are_in(thread, wanted).is_ok_and(|found| !found.is_empty());
        if threads.iter().any(has_it) {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

/// Device and inode. A server of a file system that hangs is not asked.
type Identity = (u32, u32, u64);

fn identity_at(directory: impl AsFd, path: &Path, flags: AtFlags) -> io::Result<Identity> {
    let flags = flags | AtFlags::STATX_DONT_SYNC;
    let found = statx(directory, path, flags, StatxFlags::INO)?;
    Ok((found.stx_dev_major, found.stx_dev_minor, found.stx_ino))
}

fn identity(file: &impl AsFd) -> io::Result<Identity> {
    identity_at(file, Path::new(""), AtFlags::EMPTY_PATH)
}

fn processes(proc: &Path) -> io::Result<Vec<u32>> {
    let mut numbers = Vec::new();
    for process in fs::read_dir(proc)? {
        let name = process?.file_name();
        numbers.extend(name.to_str().and_then(|name| name.parse::<u32>().ok()));
    }
    Ok(numbers)
}

/// The descriptors of a process that are the file.
fn descriptors(proc: &Path, number: u32, wanted: Identity) -> io::Result<Vec<PathBuf>> {
    let directory = proc.join(number.to_string());
    // A first thread that has ended has no files, and others may.
    if fs::read_dir(directory.join("fd"))?.next().is_none() {
        for thread in dying::threads_in(proc, number) {
            match are_in(&thread, wanted) {
                Ok(found) if found.is_empty() => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                outcome => return outcome,
            }
        }
        return Ok(Vec::new());
    }
    are_in(&directory, wanted)
}

/// The descriptors that are the file, by the directory of a process or a thread.
fn are_in(directory: &Path, wanted: Identity) -> io::Result<Vec<PathBuf>> {
    let descriptors = fs::read_dir(directory.join("fd"))?;
    let paths = descriptors.flatten().map(|descriptor| descriptor.path());
    let is_it = |path: &PathBuf| {
        // Following the link tells the file itself, whatever its name is.
        identity_at(CWD, path, AtFlags::empty()).is_ok_and(|found| found == wanted)
    };
    Ok(paths.filter(is_it).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::unix::fs::symlink;
    use std::os::unix::net::{UnixListener, UnixStream};

    /// Whether a process other than `me` has it.
    fn is_open_in(proc: &Path, me: u32, file: &File) -> io::Result<bool> {
        super::is_open_in(proc, identity(file)?, |number, count| {
            count > usize::from(number == me)
        })
    }

    #[test]
    fn a_file_is_found_by_what_it_is_and_not_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let (image, other) = (dir.path().join("image"), dir.path().join("other"));
        let file = File::create(&image).unwrap();
        File::create(&other).unwrap();
        let proc = dir.path().join("proc");
        for process in ["7", "12", "self"] {
            fs::create_dir_all(proc.join(process).join("fd")).unwrap();
        }
        fs::create_dir(proc.join("9")).unwrap();
        symlink(&other, proc.join("7/fd/3")).unwrap();
        symlink("pipe:[7]", proc.join("7/fd/4")).unwrap();
        symlink(&image, proc.join("self/fd/3")).unwrap();
        symlink(&image, proc.join("12/fd/3")).unwrap();
        assert!(!is_open_in(&proc, 12, &file).unwrap(), "but for us");
        assert!(is_open_in(&proc, 13, &file).unwrap());
        symlink(&image, proc.join("12/fd/4")).unwrap();
        assert!(is_open_in(&proc, 12, &file).unwrap(), "twice");
        fs::remove_file(proc.join("12/fd/4")).unwrap();
        fs::remove_file(proc.join("12/fd/3")).unwrap();
        assert!(!is_open_in(&proc, 13, &file).unwrap());
        let renamed = dir.path().join("renamed");
        fs::rename(&image, &renamed).unwrap();
        symlink(&renamed, proc.join("7/fd/5")).unwrap();
        assert!(is_open_in(&proc, 13, &file).unwrap());
    }

    #[test]
    fn a_socket_is_found_by_its_inode() {
        let directory = tempfile::tempdir().unwrap();
        let bound = UnixListener::bind(directory.path().join("s")).unwrap();
        let (_, _, inode) = identity(&bound).unwrap();
        let (other, _end) = UnixStream::pair().unwrap();
        assert!(is_socket_open(inode, &other));
        drop(bound);
        if !rustix::process::geteuid().is_root() {
            println!("skipped: only root can look into all processes");
            return;
        }
        assert!(!is_socket_open(inode, &other));
    }

    #[test]
    fn a_process_that_has_it_is_found() {
        let file = tempfile::tempfile().unwrap();
        let mut child = std::process::Command::new("sleep")
            .arg("600")
            .stdin(file.try_clone().unwrap())
            .spawn()
            .unwrap();
        assert!(is_open_elsewhere(&file));
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
