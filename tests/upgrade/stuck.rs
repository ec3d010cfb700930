//! Upgrades of a daemon with a disk whose storage does not answer, beside one that is well.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::net::sockopt::socket_peercred;
use rustix::process::geteuid;
use tempfile::TempDir;

use super::support::disk::{finish, status};
use super::support::*;
use super::{Lineage, MIB, client, under_load};

/// An ext4 on a loop device that can be frozen; unmounted at the end.
struct Freezable(TempDir);

impl Freezable {
    /// With an image in it; `None` where file systems cannot be mounted.
    fn new() -> Option<Freezable> {
        if !geteuid().is_root() {
            println!("skipped: only root can mount a file system");
            return None;
        }
        let made = Freezable(TempDir::new().expect("a directory"));
        let medium = made.0.path().join("medium");
        sparse(&medium, 32 * MIB);
        std::fs::create_dir(made.folder()).expect("a folder");
        let run = |program: &str, args: &[&str]| {
            let mut command = Command::new(program);
            let command = command.args(args).arg(&medium);
            if program == "mount" {
                command.arg(made.folder());
            }
            assert!(command.status().expect("it runs").success(), "{program}");
        };
        run("mkfs.ext4", &["-q", "-F"]);
        run("mount", &["-o", "loop"]);
        sparse(&made.image(), 16 * MIB);
        Some(made)
    }

    fn folder(&self) -> PathBuf {
        self.0.path().join("mounted")
    }

    fn image(&self) -> PathBuf {
        self.folder().join("disk.img")
    }

    /// Until what this returns is dropped.
    fn freeze(&self) -> Frozen<'_> {
        self.run_fsfreeze("--freeze");
        Frozen(self)
    }

    fn run_fsfreeze(&self, word: &str) {
        let mut command = Command::new("fsfreeze");
        let command = command.arg(word).arg(self.folder());
        let _ = command.stderr(Stdio::null()).status();
    }
}

/// Dropped before the daemons, which could not end otherwise.
struct Frozen<'a>(&'a Freezable);

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        self.0.run_fsfreeze("--unfreeze");
    }
}

impl Drop for Freezable {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.folder()).status();
    }
}

fn sparse(path: &std::path::Path, bytes: u64) {
    std::fs::File::create(path)
        .and_then(|file| file.set_len(bytes))
        .expect("a file");
}

/// How long a take-over took that has to be refused, and the line it ended with.
fn refused(lineage: &Lineage) -> (Duration, String) {
    let begin = Instant::now();
    let mut new = lineage.daemon.beside(&lineage.spec);
    assert_eq!(new.wait_exit().code(), Some(1), "{}", new.stderr());
    let took = begin.elapsed();
    let (_, _, said) = new.terminate();
    (took, said.lines().last().expect("a line").to_owned())
}

#[test]
fn a_disk_that_is_well_does_not_wait_for_one_that_is_stuck() {
    let Some(freezable) = Freezable::new() else {
        return;
    };
    let other = TempDir::new().expect("a directory");
    let (image, socket) = (other.path().join("disk.img"), other.path().join("s"));
    sparse(&image, 64 * MIB);
    let spec = Spec::path(&freezable.image()).args([
        "--serial".to_owned(),
        "stuck".to_owned(),
        "--disk".to_owned(),
        format!(
            "socket-path={},blk-file={},serial=well",
            socket.display(),
            image.display()
        ),
    ]);
    let lineage = Lineage::start(spec, &["--workers", "1"]);
    let mut stuck = Disk::attach(lineage.daemon.socket(), 1);
    let mut well = Disk::attach(&socket, 2);
    stuck.write(0, 0, &[1; 4096]);
    let frozen = freezable.freeze();
    let gpa = stuck.mem().alloc(4096, 4096);
    Request::write(8, &[Seg::readable(gpa, 4096)]).push(&mut stuck.queues[0], 0);
    stuck.queues[0].publish();
    let mut took = Duration::ZERO;
    let (_, longest) = under_load(&mut well, |progress| {
        // It is not known yet whether the request takes long only, so it is waited for.
        let (waited, line) = refused(&lineage);
        assert!(
            line.contains("disk stuck has requests in flight after 5 seconds"),
            "{line}"
        );
        took = waited;
        progress();
        // Now it is.
        let (_, line) = refused(&lineage);
        assert!(
            line.contains("disk stuck has had a request in flight for"),
            "{line}"
        );
        progress();
    });
    assert!(
        longest * 2 < took,
        "the disk that is well stood still for {longest:?} of {took:?}"
    );
    drop(frozen);
    assert_eq!(finish(&mut stuck.queues[0]).status, status::OK);
    let mut new = lineage.daemon.beside(&lineage.spec);
    assert!(
        new.wait_for_message("took over; the guests go on"),
        "{}",
        new.stderr()
    );
    assert_eq!(stuck.read(0, 0, 4096), [1; 4096]);
    assert!(new.is_running());
}

/// The old process could not be stopped from cutting the image that the new one has extended meanwhile.
#[test]
fn a_disk_whose_size_is_being_changed_is_not_handed_over() {
    let Some(freezable) = Freezable::new() else {
        return;
    };
    let mut lineage = Lineage::start(Spec::path(&freezable.image()), &[]);
    let mut disk = Disk::attach(lineage.daemon.socket(), 1);
    disk.write(0, 0, &[1; 4096]);
    let frozen = freezable.freeze();
    let control = lineage.control();
    let grow = move || {
        let body = serde_json::json!({ "size_bytes": 24 * MIB });
        client::ask(&control, "POST", "/v1/disks/0/resize", Some(&body))
    };
    let blocked = || {
        let threads = std::fs::read_dir(format!("/proc/{}/task", lineage.daemon.pid()));
        let stats = threads.expect("it lives").flatten();
        stats
            .filter_map(|thread| std::fs::read_to_string(thread.path().join("stat")).ok())
            .any(|stat| stat.contains(") D "))
    };
    let asked = std::thread::spawn(grow);
    let deadline = Instant::now() + DEADLINE;
    while !blocked() {
        assert!(Instant::now() < deadline, "nothing is under way");
        std::thread::sleep(Duration::from_millis(2));
    }
    let mut new = lineage.daemon.beside(&lineage.spec);
    assert!(
        new.wait_for_message("another change is under way"),
        "{}",
        new.stderr()
    );
    drop(frozen);
    assert_eq!(new.wait_exit().code(), Some(1));
    assert!(asked.join().expect("it is asked").is_ok(), "it grows");
    lineage.upgrade(&[]);
    assert_eq!(
        lineage.ask("GET", "/v1/disks/0", None)["size_bytes"],
        24 * MIB
    );
    assert_eq!(disk.read(0, 0, 4096), [1; 4096]);
}

/// What else stands for the process that listens is the one that was taken over from. It may take long to end, and is no
/// reason to replace the sockets then.
#[test]
fn the_sockets_that_were_taken_over_are_the_new_daemons_for_the_kernel() {
    let mut lineage = Lineage::start(Spec::image(MIB), &[]);
    for _ in 0..2 {
        let old = lineage.daemon.pid();
        lineage.upgrade(&[]);
        let new = lineage.daemon.pid();
        assert_ne!(old, new);
        for path in [lineage.control(), lineage.daemon.socket().to_owned()] {
            let stream = UnixStream::connect(&path).expect("it listens");
            let peer = socket_peercred(&stream).expect("it is connected");
            assert_eq!(peer.pid.as_raw_pid().unsigned_abs(), new, "{path:?}");
        }
    }
}
