//! The program as a person or a script meets it: what it prints, how it exits, what it leaves behind.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{Pid, Signal, geteuid, kill_process};
use tempfile::TempDir;

const PROGRAM: &str = env!("CARGO_BIN_EXE_vhost-user-blkmq");

/// How long the program may take for anything; far more than it needs on a busy machine.
const DEADLINE: Duration = Duration::from_secs(30);

/// A directory with an image of 1 MiB, and room for a socket.
struct Place {
    dir: TempDir,
}

impl Place {
    fn new() -> Place {
        let dir = tempfile::tempdir().expect("a directory");
        let place = Place { dir };
        File::create(place.image())
            .expect("an image")
            .set_len(1 << 20)
            .expect("a size");
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn image(&self) -> PathBuf {
        self.path("disk.img")
    }

    fn socket(&self) -> PathBuf {
        self.path("disk.sock")
    }

    /// The program with the socket of this place and `image`.
    fn serving(&self, image: &Path) -> Command {
        let mut command = Command::new(PROGRAM);
        command
            .arg("--socket-path")
            .arg(self.socket())
            .arg("--blk-file")
            .arg(image);
        command
    }
}

/// A process that is killed when the test is over, however it ends.
struct Daemon {
    child: Child,
    stderr: Receiver<String>,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It has usually exited by now; then there is nothing to kill and nothing to say.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Daemon {
    /// Starts `command` and waits until it says that it is ready.
    fn ready(mut command: Command) -> Daemon {
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let mut child = command.spawn().expect("the program starts");
        let pipe = child.stderr.take().expect("a pipe");
        let (lines, stderr) = channel();
        thread::spawn(move || {
            for line in BufReader::new(pipe).lines().map_while(Result::ok) {
                if lines.send(line).is_err() {
                    break;
                }
            }
        });
        let daemon = Daemon { child, stderr };
        daemon.wait_for("listening on");
        daemon
    }

    fn wait_for(&self, part: &str) {
        let end = Instant::now() + DEADLINE;
        let mut seen = Vec::new();
        loop {
            match self
                .stderr
                .recv_timeout(end.saturating_duration_since(Instant::now()))
            {
                Ok(line) if line.contains(part) => return,
                Ok(line) => seen.push(line),
                Err(why) => panic!("no {part:?} on stderr ({why}), but: {seen:#?}"),
            }
        }
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("the process is there");
    }

    fn exit_status(&mut self) -> ExitStatus {
        exit_status(&mut self.child)
    }
}

/// Waits for a process to end; kills it and fails if it takes too long.
fn exit_status(child: &mut Child) -> ExitStatus {
    let end = Instant::now() + DEADLINE;
    loop {
        match child.try_wait().expect("the process is ours") {
            Some(status) => return status,
            None if Instant::now() < end => thread::sleep(Duration::from_millis(5)),
            None => {
                child.kill().expect("it can be killed");
                panic!("the program has not ended after {DEADLINE:?}");
            }
        }
    }
}

/// Runs a command that is expected to end by itself.
fn output(command: &mut Command) -> Output {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().expect("the program starts");
    let status = exit_status(&mut child);
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    child
        .stdout
        .take()
        .expect("a pipe")
        .read_to_end(&mut stdout)
        .expect("its output");
    child
        .stderr
        .take()
        .expect("a pipe")
        .read_to_end(&mut stderr)
        .expect("its errors");
    Output {
        status,
        stdout,
        stderr,
    }
}

/// Runs a command that has to fail with `code`, without output and with one line that holds all
/// `parts`, and without leaving a socket behind in `place`.
fn refused(place: &Place, code: i32, command: &mut Command, parts: &[&str]) {
    let Output {
        status,
        stdout,
        stderr,
    } = output(command);
    let stderr = String::from_utf8(stderr).expect("text");
    assert_eq!(status.code(), Some(code), "{command:?}: {stderr}");
    assert_eq!(stdout, b"", "{command:?}");
    assert_eq!(stderr.lines().count(), 1, "{command:?}: {stderr}");
    assert!(
        stderr.starts_with("vhost-user-blkmq: "),
        "{command:?}: {stderr}"
    );
    for part in parts {
        assert!(
            stderr.contains(part),
            "no {part:?} in the error of {command:?}: {stderr}"
        );
    }
    assert!(
        !place.socket().exists(),
        "{command:?} has left its socket behind"
    );
}

#[test]
fn capabilities_are_printed_whatever_else_is_given() {
    for args in [
        &["--print-capabilities"][..],
        &[
            "--print-capabilities",
            "--nonsense",
            "-x",
            "--num-queues=none",
        ],
        &[
            "--blk-file",
            "/nowhere",
            "--fd",
            "7",
            "--socket-path",
            "/nowhere/s",
            "--print-capabilities",
        ],
    ] {
        let output = output(Command::new(PROGRAM).args(args));
        assert_eq!(output.status.code(), Some(0));
        assert_eq!(
            output.stdout,
            b"{\"type\":\"block\",\"features\":[\"read-only\",\"blk-file\"]}\n"
        );
        assert_eq!(output.stderr, b"");
    }
}

#[test]
fn help_and_version_go_to_stdout() {
    for arg in ["--help", "-h", "--version"] {
        let output = output(Command::new(PROGRAM).arg(arg));
        assert_eq!(output.status.code(), Some(0));
        assert!(
            !output.stdout.is_empty() && output.stderr.is_empty(),
            "{arg}"
        );
    }
}

#[test]
fn wrong_words_are_one_line_and_status_2() {
    let place = Place::new();
    for (args, part) in [
        (&["--nonsense"][..], "'--nonsense'"),
        (&["--num-queues", "0"], "0 is not in 1..=256"),
        (&["--num-queues", "many"], "'many' for '--num-queues"),
        (&["--queue-size", "100"], "power of two"),
        (&["--workers", "0"], "0 is not in 1..=256"),
        (
            &["--worker-cpus", "3-1"],
            "'3-1' is neither a CPU nor a range",
        ),
        (&["--worker-cpus", "0,0"], "CPU 0 is in the list twice"),
        (&["--vcpus", "0"], "0 is not in 1..=4096"),
        (
            &["--logical-block-size", "1000"],
            "use 512, 1024, 2048 or 4096",
        ),
        (
            &["--serial", "a serial of more than twenty bytes"],
            "at most 20",
        ),
        (
            &["--cache", "fast"],
            "writeback, none, writethrough, directsync, unsafe",
        ),
        (&["--engine", "magic"], "auto, io_uring, mmap, null"),
        (&["--discard", "maybe"], "'maybe' for '--discard"),
        (&["--poll-us", "-1"], "-1 is not in 0..=1000000"),
        (&["--queue-map", "sideways"], "grouping, modulo"),
        (&["--disk", "colour=red"], "there is no key 'colour'"),
        (&["--fd", "7"], "cannot be used with"),
        (&["--size", "1G"], "an image has its own size"),
        (&["--engine", "null"], "the null engine has no image"),
        (
            &["--queue-map", "0,9", "--num-queues", "4"],
            "names queue 9",
        ),
        (&["--queue-map", "0,1", "--vcpus", "3"], "lists 2 vCPUs"),
    ] {
        refused(&place, 2, place.serving(&place.image()).args(args), &[part]);
    }
}

#[test]
fn too_little_is_told_what_is_missing() {
    let place = Place::new();
    refused(
        &place,
        2,
        &mut Command::new(PROGRAM),
        &["--blk-file PATH", "--socket-path PATH"],
    );
    refused(
        &place,
        2,
        Command::new(PROGRAM).arg("--blk-file").arg(place.image()),
        &["--socket-path PATH"],
    );
    let mut null = Command::new(PROGRAM);
    null.args(["--engine", "null", "--socket-path"])
        .arg(place.socket());
    refused(&place, 2, &mut null, &["--size"]);
    let mut twice = place.serving(&place.image());
    twice.arg("--disk").arg(format!(
        "socket-path={},blk-file={}",
        place.socket().display(),
        place.image().display()
    ));
    refused(&place, 2, &mut twice, &["is given for two disks"]);
}

#[test]
fn a_missing_image_is_refused() {
    let place = Place::new();
    let missing = place.path("missing.img");
    refused(
        &place,
        1,
        &mut place.serving(&missing),
        &["missing.img", "No such file or directory"],
    );
    assert!(!missing.exists(), "it was created");
}

#[test]
fn an_image_that_is_no_disk_is_refused() {
    let place = Place::new();
    refused(
        &place,
        1,
        &mut place.serving(place.dir.path()),
        &["is a directory"],
    );
    refused(
        &place,
        1,
        &mut place.serving(Path::new("/dev/null")),
        &["is a character device"],
    );
}

#[test]
fn an_image_of_a_bad_size_is_refused() {
    let place = Place::new();
    let image = File::create(place.image()).expect("an image");
    refused(&place, 1, &mut place.serving(&place.image()), &["is empty"]);
    image.set_len(1000).expect("a size");
    refused(
        &place,
        1,
        &mut place.serving(&place.image()),
        &["1000 bytes", "truncate -s %512"],
    );
    image.set_len(512 * 9).expect("a size");
    let mut command = place.serving(&place.image());
    command.args(["--logical-block-size", "4096"]);
    refused(
        &place,
        1,
        &mut command,
        &["4608 bytes", "truncate -s %4096"],
    );
    assert_eq!(
        image.metadata().expect("metadata").len(),
        512 * 9,
        "the image was changed"
    );
}

/// Runs as a user without rights, since root may do everything.
#[test]
fn an_image_without_permission_is_refused() {
    const NOBODY: u32 = 65534;
    let place = Place::new();
    let open = |path: &Path, mode| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("permissions");
    };
    // The build's directory may be closed to other users: the program is run from here instead.
    let program = place.path("program");
    fs::copy(PROGRAM, &program).expect("a copy");
    open(&program, 0o755);
    open(place.dir.path(), 0o777);
    let daemon = |image: &Path| {
        let mut command = Command::new(&program);
        command
            .arg("--socket-path")
            .arg(place.socket())
            .arg("--blk-file")
            .arg(image);
        if geteuid().is_root() {
            command.uid(NOBODY).gid(NOBODY);
        }
        command
    };
    open(&place.image(), 0o000);
    refused(
        &place,
        1,
        &mut daemon(&place.image()),
        &["Permission denied", "--read-only"],
    );
    open(&place.image(), 0o444);
    refused(
        &place,
        1,
        &mut daemon(&place.image()),
        &["Permission denied", "--read-only"],
    );
    // The advice is right: this user may read it.
    let mut reading = daemon(&place.image());
    reading.arg("--read-only");
    Daemon::ready(reading);
}

#[test]
fn a_socket_that_someone_listens_on_is_left_alone() {
    let place = Place::new();
    let listener = UnixListener::bind(place.socket()).expect("a socket");
    let output = output(&mut place.serving(&place.image()));
    let stderr = String::from_utf8(output.stderr).expect("text");
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(
        stderr.contains("disk.sock") && stderr.contains("is in use"),
        "{stderr}"
    );
    UnixStream::connect(place.socket()).expect("the other process still has its socket");
    drop(listener);
}

#[test]
fn a_file_where_the_socket_should_be_is_left_alone() {
    let place = Place::new();
    fs::write(place.socket(), "dear").expect("a file");
    let output = output(&mut place.serving(&place.image()));
    let stderr = String::from_utf8(output.stderr).expect("text");
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert_eq!(fs::read(place.socket()).expect("the file"), b"dear");
}

#[test]
fn a_socket_that_a_dead_process_left_is_taken_over() {
    let place = Place::new();
    drop(UnixListener::bind(place.socket()).expect("a socket"));
    let mut daemon = Daemon::ready(place.serving(&place.image()));
    UnixStream::connect(place.socket()).expect("the daemon listens");
    daemon.signal(Signal::TERM);
    assert_eq!(daemon.exit_status().code(), Some(0));
    assert!(!place.socket().exists());
}

#[test]
fn a_socket_in_a_missing_directory_is_refused() {
    let place = Place::new();
    let mut command = Command::new(PROGRAM);
    command
        .arg("--socket-path")
        .arg(place.path("missing/disk.sock"));
    command.arg("--blk-file").arg(place.image());
    refused(
        &place,
        1,
        &mut command,
        &["missing/disk.sock", "No such file or directory"],
    );
}

#[test]
fn a_socket_path_that_is_too_long_is_refused() {
    let place = Place::new();
    let mut command = Command::new(PROGRAM);
    command
        .arg("--socket-path")
        .arg(place.path(&"long".repeat(30)));
    command.arg("--blk-file").arg(place.image());
    refused(&place, 1, &mut command, &["longlong", "107 bytes"]);
}

#[test]
fn when_one_disk_cannot_be_served_no_socket_is_left_of_the_others() {
    let place = Place::new();
    let mut command = place.serving(&place.image());
    command.arg("--disk").arg(format!(
        "socket-path={},blk-file=/nowhere",
        place.path("b.sock").display()
    ));
    refused(&place, 1, &mut command, &["/nowhere"]);
    assert!(!place.path("b.sock").exists());
}

#[test]
fn a_file_descriptor_that_is_no_socket_is_refused() {
    let place = Place::new();
    let with_fd = |fd: i32| {
        let mut command = Command::new(PROGRAM);
        command
            .arg("--fd")
            .arg(fd.to_string())
            .arg("--blk-file")
            .arg(place.image());
        command
    };
    refused(&place, 1, &mut with_fd(999), &["999", "--fd"]);
    // Standard input of these processes is /dev/null.
    refused(&place, 1, &mut with_fd(0), &["file descriptor 0", "--fd"]);
}

#[test]
fn a_listening_socket_can_be_inherited() {
    let place = Place::new();
    let listener = OwnedFd::from(UnixListener::bind(place.socket()).expect("a socket"));
    fcntl_setfd(&listener, FdFlags::empty()).expect("it can be inherited");
    let mut command = Command::new(PROGRAM);
    command
        .arg("--fd")
        .arg(listener.as_raw_fd().to_string())
        .arg("--blk-file")
        .arg(place.image());
    let mut daemon = Daemon::ready(command);
    UnixStream::connect(place.socket()).expect("the daemon listens");
    daemon.signal(Signal::TERM);
    assert_eq!(daemon.exit_status().code(), Some(0));
    assert!(
        place.socket().exists(),
        "the parent's socket is the parent's to remove"
    );
}

#[test]
fn a_signal_ends_the_daemon_and_removes_its_socket() {
    for signal in [Signal::TERM, Signal::INT] {
        let place = Place::new();
        let mut daemon = Daemon::ready(place.serving(&place.image()));
        let kind = fs::metadata(place.socket())
            .expect("the socket is there")
            .file_type();
        assert!(kind.is_socket());
        daemon.signal(signal);
        assert_eq!(daemon.exit_status().code(), Some(0), "{signal:?}");
        assert!(
            !place.socket().exists(),
            "{signal:?} has left the socket behind"
        );
    }
}

#[test]
fn a_signal_ends_the_daemon_while_a_front_end_is_connected() {
    let place = Place::new();
    let mut daemon = Daemon::ready(place.serving(&place.image()));
    let front_end = UnixStream::connect(place.socket()).expect("the daemon listens");
    daemon.signal(Signal::TERM);
    assert_eq!(daemon.exit_status().code(), Some(0));
    assert!(!place.socket().exists());
    drop(front_end);
}
