//! Standard error and output that take nothing: no disk waits for them, and neither does the end.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};

use rustix::process::Signal;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Action, tcflow};
use vhost_user_blkmq::control::client;

use super::bare::{Bare, PROGRAM, wait_until};
use super::support::*;

/// Has a worker say something: a ring whose index jumps.
fn break_a_ring(socket: &std::path::Path) {
    let mut disk = Disk::attach(socket, 1);
    let gpa = disk.mem().alloc(4096, 4096);
    disk.queues[0].push_chain(7, &[Seg::readable(gpa, 16)], gpa);
    disk.queues[0].publish();
    disk.queues[0].kick();
    // The session is as it was: it says that it ended.
}

/// Far more lines than a pipe holds, by workers and by sessions, from a front end that is up to no good.
fn make_lines(bare: &Bare) {
    for _ in 0..150 {
        break_a_ring(&bare.socket(0));
    }
}

/// Serves and ends as if nothing were the matter.
fn goes_on(bare: Bare) {
    make_lines(&bare);
    bare.work(1);
    bare.signal(Signal::USR1);
    bare.work(0);
    bare.work(1);
    bare.end();
}

/// A stream that is full before the daemon starts.
fn filled(stream: OwnedFd) -> OwnedFd {
    rustix::io::ioctl_fionbio(&stream, true).expect("a flag");
    for piece in [4096, 1] {
        while rustix::io::write(&stream, &vec![b'x'; piece]).is_ok() {}
    }
    rustix::io::ioctl_fionbio(&stream, false).expect("a flag");
    stream
}

#[test]
fn a_full_pipe_under_the_log_holds_nothing_up() {
    let (reader, writer) = std::io::pipe().expect("a pipe");
    let full = filled(writer.into());
    goes_on(Bare::start(2, |command| {
        command.stderr(Stdio::from(full));
    }));
    drop(reader);
}

#[test]
fn a_journals_socket_that_is_not_read_holds_nothing_up() {
    let (ours, theirs) = UnixStream::pair().expect("a pair");
    goes_on(Bare::start(2, |command| {
        command.stderr(Stdio::from(OwnedFd::from(theirs)));
    }));
    drop(ours);
}

/// Both ends of a terminal.
fn terminal() -> (OwnedFd, File) {
    let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("a terminal");
    grantpt(&ours).expect("ours");
    unlockpt(&ours).expect("ours");
    let name = ptsname(&ours, Vec::new()).expect("a name");
    let theirs = File::options()
        .read(true)
        .write(true)
        .open(name.to_str().expect("text"))
        .expect("the other end");
    (ours, theirs)
}

#[test]
fn a_paused_terminal_holds_nothing_up() {
    let (ours, theirs) = terminal();
    tcflow(&theirs, Action::OOff).expect("Ctrl-S");
    let stderr = theirs.try_clone().expect("a duplicate");
    goes_on(Bare::start(2, |command| {
        command.stderr(Stdio::from(stderr));
    }));
    drop((ours, theirs));
}

#[test]
fn a_log_on_a_full_disk_loses_lines_and_nothing_else() {
    let full = File::options()
        .write(true)
        .open("/dev/full")
        .expect("there");
    goes_on(Bare::start(2, |command| {
        command.stderr(Stdio::from(full));
    }));
}

#[test]
fn a_log_whose_reader_has_left_loses_lines_and_nothing_else() {
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    goes_on(Bare::start(2, |command| {
        command.stderr(Stdio::from(OwnedFd::from(writer)));
    }));
}

#[test]
fn a_full_standard_output_keeps_neither_image_nor_socket() {
    let (reader, writer) = std::io::pipe().expect("a pipe");
    let full = filled(writer.into());
    let dir = tempfile::tempdir().expect("a directory");
    let image = dir.path().join("disk.img");
    File::create(&image)
        .and_then(|file| file.set_len(1 << 20))
        .expect("an image");
    let disk = format!(
        "socket-path={},blk-file={}",
        dir.path().join("s").display(),
        image.display()
    );
    let mut first = Bare::start(1, |command| {
        command.args(["--disk", &disk]).stdout(Stdio::from(full));
    });
    first.signal(Signal::TERM);
    wait_until("the sockets are gone", || {
        !first.socket(0).exists() && !dir.path().join("s").exists()
    });
    // The first has not ended, or has just given up: its summary is not read.
    let second = Bare::start(1, |command| {
        command.args(["--disk", &disk]);
    });
    assert!(first.wait_exit().success());
    second.end();
    drop(reader);
}

#[test]
fn a_front_end_cannot_flood_the_log() {
    let (reader, writer) = std::io::pipe().expect("a pipe");
    let bare = Bare::start(2, |command| {
        command.stderr(Stdio::from(OwnedFd::from(writer)));
    });
    let lines = std::thread::spawn(move || {
        let lines = BufReader::new(reader).lines();
        lines.map(|line| line.expect("text")).collect::<Vec<_>>()
    });
    let wanted = 3000;
    for _ in 0..wanted {
        let mut stream = UnixStream::connect(bare.socket(0)).expect("it listens");
        stream.write_all(&[0xff; 64]).expect("taken");
        // Until it is closed.
        let _ = stream.read(&mut [0]);
    }
    bare.work(1);
    bare.end();
    let lines = lines.join().expect("read to the end");
    let of = |part: &str| lines.iter().filter(|line| line.contains(part)).count();
    let written = of("disk d0: ");
    assert!(written >= 1000 && written < wanted, "{written}");
    let left_out: usize = lines
        .iter()
        .filter_map(|line| {
            line.strip_prefix("[WARN ] disk @0: ")?
                .split_once(" log lines")
        })
        .map(|(count, _)| count.parse::<usize>().expect("a number"))
        .sum();
    assert!(left_out > 0, "{lines:?}");
    assert_eq!(
        of("disk d1: a front end connected"),
        2,
        "the other disk has its own share"
    );
    assert_eq!(of("finishing what is in flight"), 1);
}

#[test]
fn an_error_that_cannot_be_written_is_still_told_by_the_status() {
    let full = || {
        File::options()
            .write(true)
            .open("/dev/full")
            .expect("there")
    };
    for (args, code) in [
        (&["--nonsense"][..], 2),
        (
            &["--socket-path", "/nowhere/s", "--blk-file", "/nowhere/i"],
            1,
        ),
    ] {
        let status = Command::new(PROGRAM).args(args).stderr(full()).status();
        assert_eq!(status.expect("it starts").code(), Some(code), "{args:?}");
    }
    let help = Command::new(PROGRAM).arg("--help").stdout(full()).status();
    assert_eq!(help.expect("it starts").code(), Some(0));
    let tool = env!("CARGO_BIN_EXE_blkmqctl");
    for (args, code) in [
        (&["status"][..], 2),
        (&["--control-path", "/nowhere/s", "status"], 1),
    ] {
        let status = Command::new(tool)
            .env_remove("BLKMQ_CONTROL_PATH")
            .args(args)
            .stderr(full())
            .status();
        assert_eq!(status.expect("it starts").code(), Some(code), "{args:?}");
    }
}

/// At `trace`, in every state of the process: nothing that the log does is refused by the sandbox.
#[test]
fn the_control_socket_is_answered_while_the_log_is_stuck() {
    let (reader, writer) = std::io::pipe().expect("a pipe");
    let full = filled(writer.into());
    let dir = tempfile::tempdir().expect("a directory");
    let control = dir.path().join("control");
    let bare = Bare::start(2, |command| {
        command
            .args(["--log", "trace", "--control-path"])
            .arg(&control)
            .stderr(Stdio::from(full));
    });
    make_lines(&bare);
    let status = client::ask(&control, "GET", "/v1/disks", None).expect("an answer");
    assert!(status.contains("\"d1\""), "{status}");
    bare.end();
    drop(reader);
}
