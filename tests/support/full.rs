//! A file system without room.

use std::io::Write;
use std::path::PathBuf;
use std::process::Command;

use rustix::process::geteuid;
use tempfile::TempDir;

/// Bytes of the image.
pub const IMAGE_BYTES: u64 = 8 << 20;

/// A tmpfs that is full, with a sparse image in it. It is unmounted at the end.
pub struct Full(TempDir);

impl Full {
    /// The first 64 KiB of the image are there; `None` where file systems cannot be mounted.
    pub fn new() -> Option<Full> {
        if !geteuid().is_root() {
            println!("skipped: only root can mount a file system");
            return None;
        }
        let full = Full(TempDir::new().expect("a directory"));
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"])
            .arg(full.0.path())
            .status();
        assert!(mounted.expect("it runs").success());
        let mut image = std::fs::File::create(full.image()).expect("an image");
        image.write_all(&[1; 65536]).expect("there is room");
        image.set_len(IMAGE_BYTES).expect("a size");
        let mut filler = std::fs::File::create(full.filler()).expect("a file");
        while filler.write_all(&[1; 4096]).is_ok() {}
        Some(full)
    }

    /// Where the image is.
    pub fn image(&self) -> PathBuf {
        self.0.path().join("disk.img")
    }

    /// Makes room.
    pub fn make_room(&self) {
        std::fs::remove_file(self.filler()).expect("it is there");
    }

    fn filler(&self) -> PathBuf {
        self.0.path().join("filler")
    }
}

impl Drop for Full {
    fn drop(&mut self) {
        // It is gone with the directory if this fails.
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}
