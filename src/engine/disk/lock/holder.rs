//! Whether anybody who lives has a file open.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Whether another process has the file open, or this one has it more than once. True as well where that
/// cannot be seen: there are processes that this one may not look into. A process that was killed has nothing
/// open, even while I/O that it began goes on.
pub(super) fn is_open_elsewhere(file: &impl AsFd) -> bool {
    is_open_in(Path::new("/proc"), std::process::id(), file).unwrap_or(true)
}

/// The same, with the processes' directories in `proc`, of which the one numbered `me` is our own.
fn is_open_in(proc: &Path, me: u32, file: &impl AsFd) -> io::Result<bool> {
    let wanted = File::from(file.as_fd().try_clone_to_owned()?).metadata()?;
    let wanted = (wanted.dev(), wanted.ino());
    let mut of_ours = 0;
    for process in fs::read_dir(proc)? {
        let process = process?;
        let name = process.file_name();
        let number: Option<u32> = name.to_str().and_then(|name| name.parse().ok());
        let Some(number) = number else { continue };
        let descriptors = match fs::read_dir(process.path().join("fd")) {
            Ok(descriptors) => descriptors,
            // It has ended meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        for descriptor in descriptors.flatten() {
            // Following the link tells the file itself, whatever its name is.
            if let Ok(found) = fs::metadata(descriptor.path())
                && (found.dev(), found.ino()) == wanted
            {
                of_ours += u32::from(number == me);
                if number != me || of_ours > 1 {
                    return Ok(true);
                }
            }
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;
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
