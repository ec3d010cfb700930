//! Images that lie in memory: mapped and copied, and no different from any other.

use crate::support::disk::{Range, kind, status};
use crate::support::*;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

const MIB: usize = 1 << 20;

/// A file in /dev/shm, as long as this lives.
struct InMemory {
    dir: TempDir,
}

impl InMemory {
    fn new(size: usize) -> Self {
        let dir = tempfile::tempdir_in("/dev/shm").expect("/dev/shm is there");
        let memory = Self { dir };
        let file = File::create(memory.path()).expect("a file in memory");
        file.set_len(size as u64).expect("a size");
        memory
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("disk.img")
    }

    fn allocated(&self) -> u64 {
        let facts = fs::metadata(self.path()).expect("the image is there");
        facts.blocks() * 512
    }

    fn spec(&self) -> Spec {
        Spec::path(&self.path())
    }
}

/// Starts a daemon, and makes sure that it maps the image.
fn start(spec: &Spec) -> Daemon {
    let daemon = Daemon::start(spec);
    let log = daemon.stderr();
    assert!(log.contains("engine mmap, in memory (tmpfs)"), "{log}");
    daemon
}

#[test]
fn what_is_written_is_in_the_image_and_holes_stay_holes() {
    let image = InMemory::new(16 * MIB);
    let daemon = start(&image.spec());
    let mut disk = Disk::attach(daemon.socket(), 2);
    assert!(disk.read_all(0).iter().all(|byte| *byte == 0));
    assert_eq!(image.allocated(), 0, "reading takes no memory");
    let data = Rng::new(30).bytes(3 * MIB);
    for (piece, sector) in data.chunks(MIB).zip([4096, 6144, 8192]) {
        disk.write(0, sector, piece);
    }
    disk.write(1, 9, &data[..512]);
    disk.flush(0);
    let read = |disk: &mut Disk, queue| -> Vec<u8> {
        let pieces = [4096, 6144, 8192];
        pieces.map(|sector| disk.read(queue, sector, MIB)).concat()
    };
    assert!(read(&mut disk, 1) == data);
    assert_eq!(image.allocated(), 3 * MIB as u64 + 4096);
    let content = fs::read(image.path()).expect("the image can be read");
    assert!(content[2 * MIB..5 * MIB] == data);
    assert!(content[9 * 512..10 * 512] == data[..512]);

    let done = disk.clear(1, kind::DISCARD, Range::new(4096, 4096));
    assert_eq!(done.status, status::OK);
    assert_eq!(
        image.allocated(),
        MIB as u64 + 4096,
        "a discard gives it back"
    );
    let mut expected = data;
    expected[..2 * MIB].fill(0);
    assert!(read(&mut disk, 0) == expected);
    let done = disk.clear(0, kind::WRITE_ZEROES, Range::new(8192, 100));
    assert_eq!(done.status, status::OK);
    expected[2 * MIB..2 * MIB + 51_200].fill(0);
    assert!(read(&mut disk, 1) == expected);
    assert_eq!(
        image.allocated(),
        MIB as u64 + 4096,
        "for nothing that is read"
    );
    daemon.stop();
}

#[test]
fn random_io_on_an_image_in_memory() {
    let image = InMemory::new(8 * MIB);
    let (setup, queue) = (Setup::default(), QueueSetup::default());
    let daemon = start(&image.spec());
    crate::io::random_io_against(daemon, vec![0; 8 * MIB], &setup, queue, 31);
}

#[test]
fn an_image_is_mapped_unless_the_user_says_otherwise() {
    let image = InMemory::new(MIB);
    let daemon = Daemon::start(&image.spec().args(["--engine", "io_uring"]));
    assert!(daemon.stderr().contains("engine io_uring, "));
    let mut disk = Disk::attach(daemon.socket(), 1);
    let data = Rng::new(32).bytes(65536);
    disk.write(0, 8, &data);
    assert!(disk.read(0, 8, data.len()) == data);
    drop(disk);
    daemon.stop();
}

#[test]
fn a_read_only_image_in_memory_is_only_read() {
    let image = InMemory::new(MIB);
    let data = Rng::new(33).bytes(65536);
    let file = File::options().write(true).open(image.path());
    let file = file.expect("the image can be written");
    file.write_all_at(&data, 4096).expect("written");
    let daemon = start(&image.spec().read_only());
    let mut disk = Disk::attach(daemon.socket(), 1);
    assert!(disk.read(0, 8, data.len()) == data);
    let request = Request::write(0, &[Seg::readable(disk.mem().alloc(512, 512), 512)]);
    assert_eq!(disk.run(0, &request).status, status::IOERR);
    assert!(disk.read(0, 8, data.len()) == data);
    daemon.stop();
}

#[test]
fn an_image_truncated_while_it_is_served_fails_its_requests_and_nothing_else() {
    let image = InMemory::new(8 * MIB);
    let data = Rng::new(34).bytes(8 * MIB);
    fs::write(image.path(), &data).expect("the image can be written");
    let mut daemon = start(&image.spec());
    let mut disk = Disk::attach(daemon.socket(), 2);
    assert!(disk.read(0, 0, MIB) == data[..MIB]);
    let file = File::options().write(true).open(image.path());
    let file = file.expect("the image can be opened");
    file.set_len(2 * MIB as u64).expect("truncated");
    for queue in [0, 1] {
        let segment = Seg::writable(disk.mem().alloc(MIB, 4096), MIB);
        let request = Request::read(4 * MIB as u64 / SECTOR, &[segment]);
        assert_eq!(disk.run(queue, &request).status, status::IOERR);
    }
    assert!(daemon.wait_for_message("lost pages"));
    for queue in [0, 1] {
        assert!(disk.read(queue, 0, MIB) == data[..MIB], "the rest");
    }
    assert!(daemon.is_running());
    let summary = daemon.stderr().matches("lost pages").count();
    assert_eq!(summary, 1, "said once");
    daemon.stop();
}

/// A file system in memory with room for so much, mounted as long as this lives; `None` for a user who may
/// not mount.
struct SmallMemory(TempDir);

impl SmallMemory {
    fn new(size: &str) -> Option<Self> {
        let dir = tempfile::tempdir().expect("a directory");
        let options = std::ffi::CString::new(format!("size={size}")).expect("no zero");
        match mount("tmpfs", dir.path(), "tmpfs", MountFlags::empty(), &*options) {
            Ok(()) => Some(Self(dir)),
            Err(error) => {
                eprintln!("not tested, because no file system can be mounted: {error}");
                None
            }
        }
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for SmallMemory {
    fn drop(&mut self) {
        let _ = unmount(self.0.path(), UnmountFlags::DETACH);
    }
}

#[test]
fn a_full_file_system_in_memory_is_an_io_error() {
    let Some(memory) = SmallMemory::new("4M") else {
        return;
    };
    let path = memory.path().join("disk.img");
    let file = File::create(&path).expect("a file");
    file.set_len(64 * MIB as u64).expect("a size");
    let mut daemon = start(&Spec::path(&path));
    let mut disk = Disk::attach(daemon.socket(), 2);
    let data = Rng::new(35).bytes(MIB);
    let mut failed = 0;
    for place in 0..64 {
        let gpa = disk.mem().alloc(MIB, 4096);
        disk.mem().write(gpa, &data);
        let request = Request::write(place * MIB as u64 / SECTOR, &[Seg::readable(gpa, MIB)]);
        let status = disk.run(place as usize % 2, &request).status;
        assert!(matches!(status, status::OK | status::IOERR));
        failed += u64::from(status == status::IOERR);
        if failed == 2 {
            break;
        }
    }
    assert_eq!(failed, 2, "4 MiB do not hold more");
    assert!(disk.read(0, 0, MIB) == data, "what was written is there");
    // What is there can be written again, and what is given back can be used elsewhere.
    disk.write(1, 0, &data[..65536]);
    let done = disk.clear(0, kind::DISCARD, Range::new(0, 2048));
    assert_eq!(done.status, status::OK);
    disk.write(0, 60 * MIB as u64 / SECTOR, &data[..MIB / 2]);
    assert!(disk.read(1, 60 * MIB as u64 / SECTOR, MIB / 2) == data[..MIB / 2]);
    assert!(daemon.is_running());
    assert!(!daemon.stderr().contains("lost pages"));
    daemon.stop();
}

#[test]
fn an_image_in_memory_may_grow() {
    let image = InMemory::new(4 * MIB);
    let daemon = start(&image.spec());
    let mut disk = Disk::attach(daemon.socket(), 1);
    let data = Rng::new(36).bytes(MIB);
    disk.write(0, 0, &data);
    let file = File::options().write(true).open(image.path());
    let file = file.expect("the image can be opened");
    file.set_len(32 * MIB as u64).expect("a size");
    drop(file);
    let end = 31 * MIB as u64 / SECTOR;
    // The daemon is told by the kernel, some time.
    assert!(daemon.wait_for_message("grew from"), "{}", daemon.stderr());
    disk.write(0, end, &data);
    assert!(disk.read(0, end, MIB) == data);
    assert!(disk.read(0, 0, MIB) == data);
    daemon.stop();
}
