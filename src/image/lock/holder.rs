//! Which processes have a file open: those that go on, and those that are dying.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, StatxFlags, statx};

use crate::sys::dying::{self, Dying};

/// Whether another process has the file open and goes on, or this one has it more than once. True as well where that
/// cannot be seen: there are processes that this one may not look into. A process that was killed does not count,
/// even while I/O that it began goes on.
pub(super) fn is_open_elsewhere(file: &impl AsFd) -> bool {
    is_open_in(Path::new("/proc"), std::process::id(), file).unwrap_or(true)
}

/// The same, with the processes' directories in `proc`, of which the one numbered `me` is our own.
fn is_open_in(proc: &Path, me: u32, file: &impl AsFd) -> io::Result<bool> {
    let wanted = identity(file)?;
    for number in processes(proc)? {
        let count = match count_in(&proc.join(number.to_string()), wanted) {
            Ok(count) => count,
            // It has ended meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        let own = usize::from(number == me);
        if count > own && dying::find_in(proc, number).is_none() {
            return Ok(true);
        }
    }
    Ok(false)
}

/// A process that is dying and has the file open, if one can be seen.
pub(super) fn dying_holder(file: &impl AsFd) -> Option<Dying> {
    dying_holder_in(Path::new("/proc"), file).ok()?
}

fn dying_holder_in(proc: &Path, file: &impl AsFd) -> io::Result<Option<Dying>> {
    let wanted = identity(file)?;
    for number in processes(proc)? {
        let Some(found) = dying::find_in(proc, number) else {
            continue;
        };
        // The first thread may have let go of the files that the others still have.
        let threads = dying::threads_in(proc, number);
        let has_it = |thread| count_in(thread, wanted).is_ok_and(|count| count > 0);
        if threads.iter().any(|thread| has_it(thread)) {
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

/// How many descriptors of a process or a thread, by its directory, are the file.
fn count_in(directory: &Path, wanted: Identity) -> io::Result<usize> {
    let descriptors = fs::read_dir(directory.join("fd"))?;
    let is_it = |descriptor: &fs::DirEntry| {
        // Following the link tells the file itself, whatever its name is.
        identity_at(CWD, &descriptor.path(), AtFlags::empty()).is_ok_and(|found| found == wanted)
    };
    Ok(descriptors.flatten().filter(is_it).count())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::unix::fs::symlink;

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
