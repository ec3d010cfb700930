//! Guest memory in a file on a disk's file system, which is legitimate (NVDIMM, `memory-backend-file`), and may freeze.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use super::*;

/// Frozen, until this is dropped.
struct Frozen<'a>(&'a Path);

impl<'a> Frozen<'a> {
    fn new(path: &'a Path) -> Frozen<'a> {
        run("fsfreeze", &["--freeze", text(path)]);
        Frozen(path)
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        let _ = Command::new("fsfreeze")
            .args(["--unfreeze", text(self.0)])
            .status();
    }
}

/// Where the data is; the ring and its headers are in a memfd, so that this test does not wait itself.
const DATA: u64 = 1 << 30;

#[test]
fn frozen_guest_memory_holds_up_its_own_disk_only() {
    if !may_mount() {
        return;
    }
    let mount = Mount::ext4("defaults");
    let images = tempfile::tempdir().expect("a directory");
    let image = images.path().join("image");
    sparse(&image, 1 << 20);
    sparse(&images.path().join("other.img"), 1 << 20);
    let spec = format!(
        "socket-path={0}/other.sock,blk-file={0}/other.img",
        text(images.path())
    );
    let served = Served::start(&image, &["--workers", "1", "--disk", &spec]);
    let mut other = Disk::attach(&images.path().join("other.sock"), 1);
    other.write(0, 0, &[3; 4096]);

    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(mount.path("memory"));
    let memory = GuestMemory::with_file((0, 16 << 20), (DATA, 1 << 20), file.expect("made").into());
    let setup = Setup::default();
    let mut front = Front::connect_with(
        served.daemon.socket(),
        &setup,
        Arc::new(memory.expect("mapped")),
    )
    .expect("such memory is served");
    let mut queue = front.queue(0, QueueSetup::default()).expect("a queue");
    let read = |queue: &mut Queue, nth: u64, page: u64| {
        let data = [Seg::writable(DATA + page * 4096, 4096)];
        queue.push(nth, kind::IN, 0, 0, &data).expect("room");
        queue.publish();
    };
    read(&mut queue, 0, 0);
    assert_eq!(finish(&mut queue).status, status::OK);

    let frozen = Frozen::new(mount.dir.path());
    // A page that is not there yet has to be made writable by the file system.
    read(&mut queue, 1, 9);
    // Whoever is to wait for it does: then the others are served all the same.
    let log = served.daemon.stderr();
    for nth in 0..200 {
        other.write(0, nth % 64 * 8, &[4; 4096]);
        assert_eq!(other.read(0, nth % 64 * 8, 4096), [4; 4096]);
    }
    assert!(!queue.has_completions(), "it was not frozen: {log}");
    drop(frozen);
    assert_eq!(finish(&mut queue).status, status::OK);
    drop((front, other));
    served.daemon.stop();
}
