//! Disks of one worker: those that misbehave, and the one beside them.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::process::geteuid;
use serde_json::Value;
use tempfile::TempDir;
use vhost_user_blkmq::control::client;

use super::text;
use crate::support::disk::{Range, kind, status};
use crate::support::*;

/// How often the disk beside does what it does.
pub const TIMES: u64 = 5;

/// Bytes of the disk beside.
const OTHER: u64 = 8 << 20;

pub fn sparse(path: &Path, bytes: u64) {
    let made = File::create(path).and_then(|file| file.set_len(bytes));
    made.expect("a file");
}

pub fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output();
    let output = output.unwrap_or_else(|error| panic!("{program}: {error}"));
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {error}");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// An ext4 on a loop device with images in it, which can be frozen. Unmounted at the end.
pub struct Frozen {
    dir: TempDir,
    _medium: TempDir,
    device: String,
    images: usize,
}

impl Frozen {
    /// With so many images of 1 MiB. `None`, with a word on stderr, where this process may not mount.
    pub fn new(images: usize) -> Option<Frozen> {
        Frozen::of(images, 64 << 20, 1 << 20)
    }

    /// The same with other sizes, of the file system and of each image.
    pub fn of(images: usize, bytes: u64, image_bytes: u64) -> Option<Frozen> {
        if !geteuid().is_root() {
            eprintln!("skipped: only root can mount and freeze a file system");
            return None;
        }
        let medium = tempfile::tempdir().expect("a directory");
        let file = medium.path().join("medium");
        sparse(&file, bytes);
        run("mkfs.ext4", &["-q", text(&file)]);
        let device = run("losetup", &["--find", "--show", text(&file)]);
        let dir = tempfile::tempdir().expect("a directory");
        let frozen = Frozen {
            dir,
            _medium: medium,
            device,
            images,
        };
        run(
            "mount",
            &["-t", "ext4", &frozen.device, text(frozen.dir.path())],
        );
        for image in frozen.images() {
            sparse(&image, image_bytes);
        }
        Some(frozen)
    }

    pub fn images(&self) -> Vec<PathBuf> {
        let path = |number| self.dir.path().join(format!("{number}.img"));
        (0..self.images).map(path).collect()
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Frozen as long as what it returns lives, which is to end before the processes that wait for the file system.
    pub fn freeze(&self) -> Cold {
        run("fsfreeze", &["--freeze", text(self.dir.path())]);
        Cold(self.dir.path().to_path_buf())
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        for (program, args) in [
            ("umount", ["-l", text(self.dir.path())]),
            ("losetup", ["--detach", &self.device]),
        ] {
            let _ = Command::new(program).args(args).status();
        }
    }
}

/// A file system is frozen.
pub struct Cold(PathBuf);

impl Drop for Cold {
    fn drop(&mut self) {
        let args = ["--unfreeze", text(&self.0)];
        let _ = Command::new("fsfreeze").args(args).status();
    }
}

/// A daemon with some disks that may misbehave and one that does not, all on one worker.
pub struct Party {
    pub daemon: Daemon,
    dir: TempDir,
    sockets: Vec<PathBuf>,
}

impl Party {
    /// The first image is the daemon's own disk, with the options in `more`.
    pub fn start(images: &[PathBuf], more: &[&str]) -> Party {
        Party::with_queues(images, 2, more)
    }

    /// The same, and the daemon's own disk has so many queues.
    fn with_queues(images: &[PathBuf], queues: usize, more: &[&str]) -> Party {
        let dir = tempfile::tempdir().expect("a directory");
        let other = dir.path().join("other.img");
        sparse(&other, OTHER);
        let rest = images[1..].iter().chain([&other]);
        let sockets: Vec<PathBuf> = (0..images.len())
            .map(|number| dir.path().join(format!("{number}.sock")))
            .collect();
        let disks = rest.zip(&sockets).flat_map(|(image, socket)| {
            let keys = format!(
                "socket-path={},blk-file={},num-queues=1",
                text(socket),
                text(image)
            );
            ["--disk".to_owned(), keys]
        });
        let control = dir.path().join("control.sock");
        let args = ["--workers", "1", "--control-path", text(&control)].map(str::to_owned);
        let more = more.iter().map(|word| (*word).to_owned());
        let args: Vec<String> = args.into_iter().chain(more).chain(disks).collect();
        let spec = Spec::path(&images[0]).queues(queues).args(args);
        Party {
            daemon: Daemon::start_ours(&spec),
            dir,
            sockets,
        }
    }

    /// A front end for each of the disks that may misbehave.
    pub fn attach_all(&self) -> Vec<Disk> {
        let (_, rest) = self.sockets.split_last().expect("at least the other");
        let first = [self.daemon.socket()].into_iter();
        let sockets = first.chain(rest.iter().map(PathBuf::as_path));
        sockets.map(|socket| Disk::attach(socket, 1)).collect()
    }

    /// One for the disk beside them.
    pub fn attach_other(&self) -> Disk {
        Disk::attach(self.sockets.last().expect("the other"), 1)
    }

    /// Ends all in good order.
    pub fn end(self, disks: Vec<Disk>, other: Disk) {
        drop((disks, other));
        self.daemon.stop();
    }
}

/// The same with a single disk that may misbehave.
pub struct Pair {
    pub daemon: Daemon,
    dir: TempDir,
    other: PathBuf,
}

impl Pair {
    pub fn start(image: &Path, more: &[&str]) -> Pair {
        Pair::with_queues(image, 2, more)
    }

    /// The same, and the disk that may misbehave has so many queues.
    pub fn with_queues(image: &Path, queues: usize, more: &[&str]) -> Pair {
        let Party {
            daemon,
            dir,
            mut sockets,
        } = Party::with_queues(&[image.to_path_buf()], queues, more);
        let other = sockets.pop().expect("one");
        Pair { daemon, dir, other }
    }

    pub fn attach(&self) -> Disk {
        Disk::attach(self.daemon.socket(), 1)
    }

    pub fn attach_other(&self) -> Disk {
        Disk::attach(&self.other, 1)
    }

    /// The image of the disk beside.
    pub fn other_image(&self) -> PathBuf {
        self.dir.path().join("other.img")
    }

    pub fn status(&self) -> Value {
        let control = self.dir.path().join("control.sock");
        let answer = client::ask(&control, "GET", "/v1/disks", None).expect("an answer");
        serde_json::from_str(&answer).expect("JSON")
    }

    pub fn end(self, disk: Disk, other: Disk) {
        drop((disk, other));
        self.daemon.stop();
    }
}

/// Writes, zeroes, discards, reads and flushes, so many of each, without waiting.
pub fn push_everything(disk: &mut Disk, times: u64) {
    let gpa = disk.mem().alloc(64 << 10, 4096);
    push_everything_at(disk, gpa, times);
}

/// The same with buffers at `gpa`.
pub fn push_everything_at(disk: &mut Disk, gpa: u64, times: u64) {
    let range = Range::new(0, 64);
    disk.mem().write(gpa, &range.to_bytes());
    let queue = &mut disk.queues[0];
    for n in 0..times {
        let data = Seg::readable(gpa + 4096, 4096);
        let range = Seg::readable(gpa, 16);
        for (nth, (op, seg)) in [
            (kind::OUT, data),
            (kind::WRITE_ZEROES, range),
            (kind::DISCARD, range),
            (kind::IN, Seg::writable(gpa + 8192, 4096)),
        ]
        .into_iter()
        .enumerate()
        {
            let sector = if op == kind::OUT || op == kind::IN {
                n * 8
            } else {
                0
            };
            let token = n * 8 + nth as u64;
            queue.push(token, op, 0, sector, &[seg]).expect("room");
        }
        queue.push(n * 8 + 7, kind::FLUSH, 0, 0, &[]).expect("room");
    }
    queue.publish();
}

/// One of each, each waited for.
pub fn use_in_every_way(other: &mut Disk, round: u64) {
    let data = Rng::new(round + 1).bytes(64 << 10);
    let sectors = data.len() as u64 / SECTOR;
    let at = round * 2 * sectors;
    other.write(0, at, &data);
    other.flush(0);
    assert!(other.read(0, at, data.len()) == data, "what was written");
    for (op, start) in [(kind::WRITE_ZEROES, at), (kind::DISCARD, at + sectors)] {
        let done = other.clear(0, op, Range::new(start, sectors as u32));
        assert_eq!(done.status, status::OK, "{op}");
    }
    assert_eq!(other.read(0, at, 4096), [0; 4096]);
}
