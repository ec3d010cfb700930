//! What becomes of requests when the image below fails: real file systems that are full, frozen or read-only, a
//! device that ends early, files that were cut or replaced.
//!
//! Mounting needs root. Without it the tests that mount say so and prove nothing.

#![allow(
    clippy::cast_possible_truncation,
    reason = "test code: sizes and offsets are small and known"
)]

#[path = "faults/durable.rs"]
mod durable;
#[path = "faults/enter.rs"]
mod enter;
#[path = "support/fuse.rs"]
mod fuse;
#[path = "faults/held.rs"]
mod held;
#[path = "faults/images.rs"]
mod images;
#[path = "faults/memory.rs"]
mod memory;
#[path = "faults/neighbours.rs"]
mod neighbours;
mod support;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use rustix::process::{Signal, geteuid};
use serde_json::Value;
use support::disk::{finish, finish_all, kind, status};
use support::*;
use tempfile::TempDir;
use vhost_user_blkmq::control::client;

/// Whether this test can mount things.
fn may_mount() -> bool {
    let root = geteuid().is_root();
    if !root {
        eprintln!("skipped: only root can mount a file system");
    }
    root
}

fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program)
        .args(args)
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(
        output.status.success(),
        "{program} {args:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a plain name")
}

/// A mounted file system, unmounted at the end.
struct Mount {
    dir: TempDir,
    /// What has to be detached after that.
    device: Option<Loop>,
}

impl Mount {
    /// In memory, with room for `bytes`.
    fn tmpfs(bytes: u64) -> Mount {
        let dir = tempfile::tempdir().expect("a directory");
        let size = format!("size={bytes}");
        run(
            "mount",
            &["-t", "tmpfs", "-o", &size, "tmpfs", text(dir.path())],
        );
        Mount { dir, device: None }
    }

    /// An ext4 of 32 MiB on a loop device.
    fn ext4(options: &str) -> Mount {
        Mount::made("ext4", 32 << 20, options)
    }

    /// A file system of this kind on a loop device of so many bytes; `None` where there is no such thing.
    fn of(kind: &str, bytes: u64) -> Option<Mount> {
        let known = fs::read_to_string("/proc/filesystems").expect("a list");
        let there = known.lines().any(|line| line.trim() == kind);
        let program = format!("mkfs.{kind}");
        let made = Command::new(&program).arg("-V").output().is_ok();
        if !there || !made {
            eprintln!("skipped for {kind}: no {program}, or the kernel has no such file system");
            return None;
        }
        Some(Mount::made(kind, bytes, "defaults"))
    }

    fn made(kind: &str, bytes: u64, options: &str) -> Mount {
        Mount::on(kind, Loop::new(bytes), &[], options)
    }

    /// On this device, with more to say to mkfs.
    fn on(kind: &str, device: Loop, mkfs: &[&str], options: &str) -> Mount {
        let args = [&["-q"], mkfs, &[text(&device.path)]].concat();
        run(&format!("mkfs.{kind}"), &args);
        let dir = tempfile::tempdir().expect("a directory");
        run(
            "mount",
            &[
                "-t",
                kind,
                "-o",
                options,
                text(&device.path),
                text(dir.path()),
            ],
        );
        Mount {
            dir,
            device: Some(device),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A sparse image in it.
    fn image(&self, bytes: u64) -> PathBuf {
        let path = self.path("disk.img");
        sparse(&path, bytes);
        path
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount")
            .args(["-l", text(self.dir.path())])
            .status();
        drop(self.device.take());
    }
}

/// A loop device on a file, detached at the end.
struct Loop {
    path: PathBuf,
    file: PathBuf,
    _dir: Option<TempDir>,
}

impl Loop {
    fn new(bytes: u64) -> Loop {
        Loop::with(bytes, &[])
    }

    /// On a sparse file of so many bytes.
    fn on(file: PathBuf, bytes: u64) -> Loop {
        Loop::set_up(file, bytes, &[])
    }

    /// One that refuses to be written to, and can be opened for writing all the same. (What `blockdev --setro` says would
    /// stay with the device.)
    fn read_only(bytes: u64) -> Loop {
        Loop::with(bytes, &["--read-only"])
    }

    /// With more to say to losetup.
    fn with(bytes: u64, more: &[&str]) -> Loop {
        let dir = tempfile::tempdir().expect("a directory");
        let mut device = Loop::set_up(dir.path().join("medium"), bytes, more);
        device._dir = Some(dir);
        device
    }

    fn set_up(file: PathBuf, bytes: u64, more: &[&str]) -> Loop {
        sparse(&file, bytes);
        let args = [more, &["--find", "--show", text(&file)]].concat();
        let path = run("losetup", &args);
        Loop {
            path: path.into(),
            file,
            _dir: None,
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup")
            .args(["--detach", text(&self.path)])
            .status();
    }
}

fn sparse(path: &Path, bytes: u64) {
    File::create(path)
        .and_then(|file| file.set_len(bytes))
        .expect("a file");
}

/// A daemon with a control socket.
struct Served {
    daemon: Daemon,
    _dir: TempDir,
    control: PathBuf,
}

impl Served {
    fn start(image: &Path, more: &[&str]) -> Served {
        let dir = tempfile::tempdir().expect("a directory");
        let control = dir.path().join("control.sock");
        let mut args = vec!["--control-path", text(&control)];
        args.extend(more);
        Served {
            daemon: Daemon::start_ours(&Spec::path(image).args(args)),
            _dir: dir,
            control: control.clone(),
        }
    }

    fn ask(&self, method: &str, path: &str) -> Result<Value, String> {
        client::ask(&self.control, method, path, None)
            .map(|text| serde_json::from_str(&text).expect("JSON"))
            .map_err(|error| error.to_string())
    }

    fn disk(&self, index: usize) -> Value {
        self.ask("GET", &format!("/v1/disks/@{index}"))
            .expect("an answer")
    }

    /// Waits until the disk is held.
    fn wait_held(&self) {
        let deadline = Instant::now() + DEADLINE;
        while self.disk(0)["held"] != true {
            assert!(
                Instant::now() < deadline,
                "it is not held: {}",
                self.disk(0)
            );
            std::thread::yield_now();
        }
    }

    fn resume(&self) {
        self.ask("POST", "/v1/disks/@0/resume").expect("resumed");
    }
}

/// Takes the room that is left, except for a little; removed to make room again.
fn fill(mount: &Mount, leave: usize) -> PathBuf {
    use std::io::Write;
    let path = mount.path("filler");
    let mut file = File::create(&path).expect("a file");
    while file.write_all(&[1; 4096]).is_ok() {}
    let len = file.metadata().expect("facts").len();
    file.set_len(len - leave as u64).expect("a little less");
    path
}

fn write_at(gpa: u64, sector: u64, len: usize) -> Request {
    Request::write(sector, &[Seg::readable(gpa, len)])
}

#[test]
fn a_full_file_system_is_an_error_for_the_guest_and_a_line_in_the_log() {
    if !may_mount() {
        return;
    }
    let mount = Mount::tmpfs(4 << 20);
    let image = mount.image(64 << 20);
    let served = Served::start(&image, &[]);
    let mut disk = Disk::attach(served.daemon.socket(), 1);
    disk.write(0, 0, &[1; 4096]);
    let filler = fill(&mount, 0);
    let gpa = disk.mem().alloc(65536, 4096);
    for nth in 0..20 {
        let request = write_at(gpa, 2048 + nth * 128, 65536);
        assert_eq!(disk.run(0, &request).status, status::IOERR);
    }
    assert_eq!(
        disk.read(0, 0, 4096),
        [1; 4096],
        "what there is can be read"
    );
    let seen = served.disk(0);
    assert_eq!(seen["held"], false);
    assert!(
        seen["io_errors"]["no_space"].as_u64().unwrap() >= 20,
        "{seen}"
    );
    let log = served.daemon.stderr();
    assert!(
        log.contains("Write of 65536 bytes at sector 2048 failed: No space left on device"),
        "{log}"
    );
    let lines = log.lines().filter(|line| line.contains("failed:")).count();
    assert!(lines < 20, "one line a second at most:\n{log}");
    fs::remove_file(filler).expect("removed");
    disk.write(0, 2048, &[2; 4096]);
}

#[test]
fn a_disk_without_space_is_held_until_there_is_and_others_go_on() {
    if !may_mount() {
        return;
    }
    for policy in ["stop", "enospc"] {
        let mount = Mount::tmpfs(4 << 20);
        let image = mount.image(64 << 20);
        let other = tempfile::tempdir().expect("a directory");
        sparse(&other.path().join("other.img"), 1 << 20);
        let spec = format!(
            "socket-path={0}/other.sock,blk-file={0}/other.img",
            text(other.path())
        );
        let served = Served::start(&image, &["--on-error", policy, "--disk", &spec]);
        let mut disk = Disk::attach(served.daemon.socket(), 4);
        disk.write(0, 0, &[1; 4096]);
        let filler = fill(&mount, 0);
        // Neighbours, so that they are merged and fail together, and as many on another queue.
        let gpa = disk.mem().alloc(4096, 4096);
        disk.mem().fill(gpa, 4096, 0x5a);
        for queue in [0, 3] {
            for nth in 0..16u64 {
                let sector = 4096 + queue as u64 * 1024 + nth * 8;
                write_at(gpa, sector, 4096).push(&mut disk.queues[queue], nth);
            }
            disk.queues[queue].publish();
        }
        served.wait_held();
        // What comes now waits as well, wherever it comes.
        Request::flush().push(&mut disk.queues[1], 99);
        disk.queues[1].publish();
        let mut elsewhere = Disk::attach(&other.path().join("other.sock"), 1);
        for _ in 0..100 {
            elsewhere.write(0, 8, &[3; 512]);
        }
        let refused = client::ask(
            &served.control,
            "PATCH",
            "/v1/disks/@0",
            Some(&serde_json::json!({ "scheduler": "mq-deadline" })),
        );
        assert!(
            refused.is_err_and(|error| error.to_string().contains("resume it first")),
            "emptying it would fail what is held"
        );
        // Resumed too early it is held again.
        served.resume();
        served.wait_held();
        assert!(
            [0, 3]
                .iter()
                .all(|queue| !disk.queues[*queue].has_completions())
        );
        fs::remove_file(filler).expect("removed");
        served.resume();
        for queue in [0, 3] {
            for done in finish_all(&mut disk.queues[queue], 16) {
                assert_eq!(done.status, status::OK);
            }
        }
        assert_eq!(finish(&mut disk.queues[1]).status, status::OK);
        assert_eq!(served.disk(0)["held"], false);
        assert_eq!(disk.read(2, 4096, 65536), [0x5a; 65536]);
        assert_eq!(disk.read(2, 4096 + 3072, 65536), [0x5a; 65536]);
        let log = served.daemon.stderr();
        assert!(log.contains("the disk is held"), "{log}");
        drop((disk, elsewhere));
        served.daemon.stop();
    }
}

#[test]
fn what_is_held_ends_when_the_front_end_wants_its_queue_back() {
    if !may_mount() {
        return;
    }
    let mount = Mount::tmpfs(4 << 20);
    let image = mount.image(64 << 20);
    let served = Served::start(&image, &["--on-error", "stop"]);
    let mut disk = Disk::attach(served.daemon.socket(), 1);
    let filler = fill(&mount, 0);
    let gpa = disk.mem().alloc(4096, 4096);
    let hold = |disk: &mut Disk| {
        write_at(gpa, 4096, 4096).push(&mut disk.queues[0], 0);
        disk.queues[0].publish();
        served.wait_held();
        assert!(!disk.queues[0].has_completions());
    };
    // New memory needs empty queues: tried once more, in vain.
    hold(&mut disk);
    disk.front.send_memory(false).expect("adopted");
    assert_eq!(finish(&mut disk.queues[0]).status, status::IOERR);
    assert_eq!(served.disk(0)["held"], false);
    // So does a queue that is disabled, and one that is stopped.
    hold(&mut disk);
    disk.front.enable(0, false).expect("disabled");
    assert_eq!(finish(&mut disk.queues[0]).status, status::IOERR);
    disk.front.enable(0, true).expect("enabled");
    served.resume();
    hold(&mut disk);
    disk.front.stop(0).expect("stopped");
    assert_eq!(finish(&mut disk.queues[0]).status, status::IOERR);
    assert_eq!(served.disk(0)["held"], false);
    drop(disk);
    assert!(served.daemon.wait_for_message("the session ended"));
    // A front end that goes, and the end of the daemon.
    let mut disk = Disk::attach(served.daemon.socket(), 1);
    hold(&mut disk);
    drop(disk);
    let mut disk = Disk::attach(served.daemon.socket(), 1);
    assert_eq!(served.disk(0)["held"], false, "a new session begins anew");
    hold(&mut disk);
    served.daemon.stop();
    drop(filler);
}

#[test]
fn an_image_that_was_cut_short_is_an_error_and_not_an_endless_loop() {
    let dir = tempfile::tempdir().expect("a directory");
    let image = dir.path().join("disk.img");
    sparse(&image, 1 << 20);
    let served = Served::start(&image, &[]);
    let mut disk = Disk::attach(served.daemon.socket(), 1);
    disk.write(0, 0, &[1; 8192]);
    File::options()
        .write(true)
        .open(&image)
        .and_then(|file| file.set_len(4096))
        .expect("cut");
    let gpa = disk.mem().alloc(65536, 4096);
    for (sector, len) in [(8, 4096), (0, 8192), (2040, 4096), (7, 1024)] {
        let read = Request::read(sector, &[Seg::writable(gpa, len)]);
        assert_eq!(disk.run(0, &read).status, status::IOERR, "{sector} {len}");
    }
    assert_eq!(disk.read(0, 0, 4096), [1; 4096], "what is left can be read");
    disk.write(0, 2040, &[2; 4096]);
    assert_eq!(disk.read(0, 8, 4096), [0; 4096], "a write extends it again");
    assert!(served.disk(0)["io_errors"]["io"].as_u64().unwrap() >= 4);
}

#[test]
fn an_image_that_was_replaced_is_served_as_it_was_opened() {
    let dir = tempfile::tempdir().expect("a directory");
    let image = dir.path().join("disk.img");
    sparse(&image, 1 << 20);
    let served = Served::start(&image, &[]);
    let mut disk = Disk::attach(served.daemon.socket(), 1);
    disk.write(0, 0, &[1; 512]);
    let new = dir.path().join("new.img");
    sparse(&new, 1 << 20);
    fs::rename(&new, &image).expect("renamed over it");
    assert_eq!(disk.read(0, 0, 512), [1; 512]);
    disk.write(0, 0, &[2; 512]);
    assert_eq!(fs::read(&image).expect("the new one")[..512], [0; 512]);
    fs::remove_file(&image).expect("removed");
    assert_eq!(disk.read(0, 0, 512), [2; 512]);
}

#[test]
fn a_device_that_fails_is_named_and_each_request_gets_its_own_status() {
    if !may_mount() {
        return;
    }
    let device = Loop::new(1 << 20);
    let served = Served::start(&device.path, &[]);
    let mut disk = Disk::attach(served.daemon.socket(), 1);
    disk.write(0, 0, &[1; 4096]);
    // The device keeps its size, and has nothing behind its second half any more.
    File::options()
        .write(true)
        .open(&device.file)
        .and_then(|file| file.set_len(512 << 10))
        .expect("cut");
    let gpa = disk.mem().alloc(8 * 4096, 4096);
    // Eight neighbours across the middle, merged into one.
    for nth in 0..8u64 {
        let data = Seg::writable(gpa + nth * 4096, 4096);
        Request::read(1024 - 32 + nth * 8, &[data]).push(&mut disk.queues[0], nth);
    }
    disk.queues[0].publish();
    let mut all: Vec<(u64, u8)> = finish_all(&mut disk.queues[0], 8)
        .iter()
        .map(|done| (done.token, done.status))
        .collect();
    all.sort_unstable();
    let expected: Vec<(u64, u8)> = (0..8)
        .map(|nth| (nth, if nth < 4 { status::OK } else { status::IOERR }))
        .collect();
    assert_eq!(all, expected);
    let log = served.daemon.stderr();
    assert!(log.contains("failed: Input/output error"), "{log}");
}

#[test]
fn a_file_system_that_became_read_only_is_an_error_for_writers_alone() {
    if !may_mount() {
        return;
    }
    let mount = Mount::ext4("errors=remount-ro");
    let image = mount.image(8 << 20);
    let served = Served::start(&image, &[]);
    let mut disk = Disk::attach(served.daemon.socket(), 1);
    disk.write(0, 0, &[1; 4096]);
    let device = mount.device.as_ref().expect("it has one").path.clone();
    let name = device.file_name().expect("a name").to_str().expect("text");
    fs::write(
        format!("/sys/fs/ext4/{name}/trigger_fs_error"),
        "a test wants it",
    )
    .expect("an error");
    let gpa = disk.mem().alloc(4096, 4096);
    let request = write_at(gpa, 4096, 4096);
    assert_eq!(disk.run(0, &request).status, status::IOERR);
    assert_eq!(disk.read(0, 0, 4096), [1; 4096]);
    let errors = served.disk(0)["io_errors"].clone();
    assert!(
        errors["denied"].as_u64().unwrap() + errors["io"].as_u64().unwrap() >= 1,
        "{errors}"
    );
}

#[test]
fn a_request_that_does_not_come_back_is_named_and_may_still_come_back() {
    if !may_mount() {
        return;
    }
    let mount = Mount::ext4("defaults");
    let image = mount.image(8 << 20);
    let served = Served::start(&image, &["--timeout", "1"]);
    let mut disk = Disk::attach(served.daemon.socket(), 1);
    disk.write(0, 0, &[1; 4096]);
    run("fsfreeze", &["--freeze", text(mount.dir.path())]);
    let gpa = disk.mem().alloc(4096, 4096);
    write_at(gpa, 4096, 4096).push(&mut disk.queues[0], 7);
    disk.queues[0].publish();
    let named = served
        .daemon
        .wait_for_message("Write of 4096 bytes at sector 4096 has not come back");
    run("fsfreeze", &["--unfreeze", text(mount.dir.path())]);
    assert!(named, "{}", served.daemon.stderr());
    assert_eq!(finish(&mut disk.queues[0]).status, status::OK);
}
