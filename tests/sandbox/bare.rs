//! A daemon in surroundings of a test's choice: its streams, its signals, its limits, its directories.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use super::support::{DEADLINE, Disk};

pub const PROGRAM: &str = env!("CARGO_BIN_EXE_vhost-user-blkmq");

/// Disks without images, all on one worker, in a directory of their own.
pub struct Bare {
    child: Child,
    dir: TempDir,
}

impl Bare {
    /// Starts `disks` disks after `prepare` has changed the command, and waits until each takes connections. Standard
    /// error goes nowhere unless `prepare` says something else.
    pub fn start(disks: usize, prepare: impl FnOnce(&mut Command)) -> Bare {
        Bare::start_on("1", disks, prepare)
    }

    /// The same on so many workers.
    pub fn start_on(workers: &str, disks: usize, prepare: impl FnOnce(&mut Command)) -> Bare {
        let dir = TempDir::new().expect("a directory");
        let mut command = Command::new(PROGRAM);
        command.args(["--workers", workers]).current_dir(dir.path());
        for disk in 0..disks {
            let socket = dir.path().join(format!("{disk}.sock"));
            command.arg("--disk").arg(format!(
                "socket-path={},engine=null,size=1M,serial=d{disk}",
                socket.display()
            ));
        }
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        prepare(&mut command);
        let child = command.spawn().expect("the program starts");
        let bare = Bare { child, dir };
        for disk in 0..disks {
            wait_until("the daemon listens", || {
                UnixStream::connect(bare.socket(disk)).is_ok()
            });
        }
        bare
    }

    /// A daemon that is started by `command`, with sockets elsewhere.
    pub fn of(command: &mut Command) -> Bare {
        Bare {
            child: command.spawn().expect("the program starts"),
            dir: TempDir::new().expect("a directory"),
        }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn socket(&self, disk: usize) -> PathBuf {
        self.dir.path().join(format!("{disk}.sock"))
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("it runs");
    }

    /// Reads and writes through one queue of a disk.
    pub fn work(&self, disk: usize) {
        let mut disk = Disk::attach(&self.socket(disk), 1);
        disk.write(0, 0, &[7; 4096]);
        disk.read(0, 8, 4096);
        disk.flush(0);
    }

    pub fn wait_exit(&mut self) -> ExitStatus {
        let mut status = None;
        wait_until("the daemon ends", || {
            status = self.child.try_wait().expect("ours");
            status.is_some()
        });
        status.expect("just found")
    }

    /// Sends SIGTERM, waits for the end and checks that it was in good order.
    pub fn end(mut self) {
        self.signal(Signal::TERM);
        let status = self.wait_exit();
        assert!(status.success(), "{status}");
        self.is_clean();
    }

    /// No socket is left.
    pub fn is_clean(&self) {
        let left = fs::read_dir(self.dir.path()).expect("there");
        let left: Vec<_> = left.map(|entry| entry.expect("an entry").path()).collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

/// Has a command run by another program that makes its surroundings: `words` before it.
pub fn under<'a>(words: &'a [&'a str]) -> impl FnOnce(&mut Command) + use<'a> {
    move |command| {
        let mut outer = Command::new(words[0]);
        outer
            .args(&words[1..])
            .arg(command.get_program())
            .args(command.get_args())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        outer.current_dir(command.get_current_dir().expect("given"));
        *command = outer;
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        // It has usually ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !holds() {
        assert!(Instant::now() < deadline, "{what}: not in {DEADLINE:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
