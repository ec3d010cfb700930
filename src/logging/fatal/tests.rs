//! A process that ends by a panic is this test program once more.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::sync::mpsc;

use rustix::pipe::{PipeFlags, pipe_with};

use super::*;
use crate::config::SandboxLayers;
use crate::sandbox;
use crate::sys::child;

const PANIC: &str = "BLKMQ_FATAL_PANIC";

/// The child's part; as a test of its own it does nothing.
#[test]
fn child() {
    let Ok(wanted) = std::env::var(PANIC) else {
        return;
    };
    abort_on_panic();
    let layers = SandboxLayers::all(wanted == "sandbox");
    sandbox::enter(layers, None, &[]).expect("put on");
    sandbox::seal(layers).expect("put on");
    let worker = thread::Builder::new().name("worker-7".to_owned());
    let worker = worker.spawn(|| panic!("17 rings,\n16 places"));
    // As a daemon, which does not look at its workers until the end.
    let _ = worker.expect("it starts").join();
    mpsc::channel::<()>()
        .1
        .recv_timeout(Duration::from_secs(20))
        .unwrap_err();
    println!("still there");
}

fn panicking(how: &str) -> Command {
    let mut command = child::of(module_path!(), "child");
    command.env(PANIC, how);
    command
}

#[test]
fn a_panic_in_any_thread_ends_the_process_with_one_line() {
    for how in ["free", "sandbox"] {
        let output = panicking(how).output().expect("it starts");
        assert_eq!(output.status.signal(), Some(libc::SIGABRT), "{output:?}");
        let stderr = String::from_utf8(output.stderr).expect("text");
        let line = stderr.lines().last().expect("a line");
        assert!(
            line.starts_with(
                "vhost-user-blkmq: this is a bug, and the process ends: thread 'worker-7' at src/"
            ) && line.ends_with(": 17 rings, 16 places"),
            "{stderr}"
        );
    }
}

#[test]
fn a_panic_ends_the_process_though_its_line_cannot_be_written() {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).expect("a pipe");
    fill(&writer);
    let mut child = panicking("free")
        .stdout(Stdio::null())
        .stderr(Stdio::from(writer))
        .spawn()
        .expect("it starts");
    assert_eq!(child.wait().expect("ours").signal(), Some(libc::SIGABRT));
    drop(reader);
}

/// Fills a pipe or a socket.
fn fill(stream: &impl AsFd) {
    while write_at_once(stream.as_fd(), &[b'x'; 4096]).is_ok() {}
    while write_at_once(stream.as_fd(), b"x").is_ok() {}
}

#[test]
fn a_last_line_arrives_where_there_is_room_and_waits_for_none() {
    let (mut reader, writer) = io::pipe().expect("a pipe");
    write_at_once(writer.as_fd(), b"line\n").expect("there is room");
    let mut got = [0; 5];
    reader.read_exact(&mut got).expect("it arrived");
    assert_eq!(&got, b"line\n");
    fill(&writer);

    let (mut reader, writer) = UnixStream::pair().expect("a pair");
    write_at_once(writer.as_fd(), b"line\n").expect("there is room");
    reader.read_exact(&mut got).expect("it arrived");
    assert_eq!(&got, b"line\n");
    fill(&writer);
    drop(reader);
    assert_eq!(write_at_once(writer.as_fd(), b"x"), Err(Errno::PIPE));

    let file = tempfile::NamedTempFile::new().expect("a file");
    write_at_once(file.as_fd(), b"one\n").expect("there is room");
    write_at_once(file.as_fd(), b"two\n").expect("there is room");
    let text = std::fs::read_to_string(file.path()).expect("the file");
    assert_eq!(text, "one\ntwo\n");
}

#[test]
fn a_line_is_one_line_and_is_cut() {
    let mut line = Line::new("a\nb\t");
    let _ = write!(line, "{}", "x".repeat(2 * LINE_BYTES));
    let (bytes, len) = line.with_end();
    assert_eq!(len, LINE_BYTES);
    assert!(bytes.starts_with(b"vhost-user-blkmq: a b xxx"));
    assert_eq!(bytes.iter().filter(|b| b.is_ascii_control()).count(), 1);
    assert_eq!(bytes[LINE_BYTES - 1], b'\n');
}
