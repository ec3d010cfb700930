//! Daemons that start at the same time.

use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use crate::support::DEADLINE;
use crate::support::enter::Gate;

/// A daemon, which ends however the test ends.
struct Started {
    child: Child,
    log: std::path::PathBuf,
}

impl Started {
    fn new(socket: &Path, log: &str, prepare: impl FnOnce(&mut Command)) -> Started {
        let log = socket.with_file_name(log);
        let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-user-blkmq"));
        command
            .args(["--engine", "null", "--size", "1M", "--workers", "1"])
            .args(["--summary", "none"])
            .arg("--socket-path")
            .arg(socket)
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(&log).expect("a file"));
        prepare(&mut command);
        let child = command.spawn().expect("the program starts");
        Started { child, log }
    }

    fn said(&self) -> String {
        std::fs::read_to_string(&self.log).expect("text")
    }

    /// Whether it has the directory open, which it locks while it makes its socket.
    fn is_in(&self, directory: &Path) -> bool {
        let descriptors = std::fs::read_dir(format!("/proc/{}/fd", self.child.id()));
        let descriptors = descriptors.into_iter().flatten().flatten();
        descriptors
            .filter_map(|descriptor| std::fs::read_link(descriptor.path()).ok())
            .any(|target| target == directory)
    }

    /// Waits until something is so.
    fn wait(&mut self, what: &str, mut is_so: impl FnMut(&mut Started) -> bool) {
        let deadline = Instant::now() + DEADLINE;
        while !is_so(self) {
            assert!(Instant::now() < deadline, "{what}: {}", self.said());
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The second one starts when the first one's socket is there and does not listen yet, like one that was left behind.
#[test]
fn of_two_daemons_that_start_on_one_path_one_serves_and_the_other_says_so() {
    let dir = tempfile::tempdir().expect("a directory");
    let socket = dir.path().join("s");
    let (release, released) = mpsc::channel::<()>();
    let mut first = Started::new(&socket, "first", |command| {
        // It ends with the program.
        Gate::put_on_call(command, libc::SYS_listen).answer(move |_| {
            let _ = released.recv();
            None
        });
    });
    first.wait("its socket is bound", |_| socket.exists());
    let mut second = Started::new(&socket, "second", |_| ());
    second.wait("it looks at the path", |second| {
        second.is_in(dir.path()) || second.said().contains("listening on")
    });
    drop(release);
    first.wait("it listens", |first| first.said().contains("listening on"));
    second.wait("it is told", |second| !second.said().is_empty());
    let said = second.said();
    assert!(
        said.contains("is in use: another process is listening on it"),
        "{said}"
    );
    let status = second.child.wait().expect("it ends");
    assert_eq!(status.code(), Some(1));
    UnixStream::connect(&socket).expect("the first one's");
}

/// The process that began to listen has ended, and its parent has not been told; another one has the socket and accepts.
#[test]
fn a_socket_that_a_process_has_left_to_another_is_in_use() {
    let dir = tempfile::tempdir().expect("a directory");
    let socket = dir.path().join("s");
    let listener = UnixListener::bind(&socket).expect("a socket");
    let theirs = listener.try_clone().expect("a duplicate");
    let mut command = Command::new("true");
    // SAFETY: needed to run code between fork and exec, where only what may be done in a signal handler may be done: it
    // makes one system call, and allocates nothing.
    unsafe { command.pre_exec(move || Ok(rustix::net::listen(&theirs, 16)?)) };
    let mut child = command.spawn().expect("true is there");
    let stat = format!("/proc/{}/stat", child.id());
    let deadline = Instant::now() + DEADLINE;
    while !std::fs::read_to_string(&stat).is_ok_and(|stat| stat.contains(") Z ")) {
        assert!(Instant::now() < deadline, "it ends");
        std::thread::sleep(Duration::from_millis(2));
    }
    let mut daemon = Started::new(&socket, "log", |_| ());
    daemon.wait("it is told", |daemon| !daemon.said().is_empty());
    assert!(daemon.said().contains("is in use"), "{}", daemon.said());
    child.wait().expect("it has ended");
    UnixStream::connect(&socket).expect("it is still this process's");
}
