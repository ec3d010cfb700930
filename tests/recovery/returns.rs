//! Front ends that connect again the instant they see that the daemon is gone, and never try twice: Cloud
//! Hypervisor up to v53.0. What it cannot stand is a connection that is taken and reset.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread::JoinHandle;
use std::time::Instant;

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::{FdFlags, fcntl_dupfd_cloexec, fcntl_setfd};
use rustix::process::Signal;

use crate::support::*;

/// GET_FEATURES, version 1, no payload.
const ASK: [u8; 12] = [1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];

/// Connects, and is served.
fn connect(socket: &Path) -> UnixStream {
    let mut stream = UnixStream::connect(socket).expect("the daemon listens");
    stream
        .set_read_timeout(Some(DEADLINE))
        .expect("sockets have time limits");
    stream.write_all(&ASK).expect("a message can be sent");
    stream.read_exact(&mut [0; 20]).expect("an answer");
    stream
}

/// What became of the one connection that a front end makes when it is hung up on.
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    /// Nobody listens: it waits, and tries again.
    Refused,
    /// It was let in, and then reset: it gives the disk up.
    Reset,
}

/// Waits for the hang-up on a thread of its own, without ever sleeping, and connects.
fn returns_at_once(stream: UnixStream, socket: &Path) -> JoinHandle<Outcome> {
    let socket = socket.to_owned();
    stream.set_nonblocking(true).expect("a flag");
    std::thread::spawn(move || {
        let deadline = Instant::now() + DEADLINE;
        while (&stream)
            .read(&mut [0; 1])
            .is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
        {
            assert!(Instant::now() < deadline, "no hang-up");
        }
        let mut again = match UnixStream::connect(&socket) {
            Ok(again) => again,
            Err(error) => {
                let expected = [ErrorKind::NotFound, ErrorKind::ConnectionRefused];
                assert!(expected.contains(&error.kind()), "{error}");
                return Outcome::Refused;
            }
        };
        let _ = again.write_all(&ASK);
        let answer = again.read(&mut [0; 20]);
        assert!(!matches!(answer, Ok(20)), "the daemon has gone");
        Outcome::Reset
    })
}

fn outcomes(signal: Signal, rounds: usize) -> Vec<Outcome> {
    (0..rounds)
        .map(|_| {
            let slow = slow_to_close();
            let mut daemon = Daemon::start_ours(&Spec::image(1 << 20));
            drop(slow);
            let front_end = returns_at_once(connect(daemon.socket()), daemon.socket());
            daemon.signal(signal);
            let outcome = front_end.join().expect("the front end lives");
            daemon.wait_exit();
            outcome
        })
        .collect()
}

/// A descriptor for the daemon to inherit, above what it opens first and below its connections. When it is
/// killed, the kernel needs some time to free this much memory, and by then it has closed what is above.
fn slow_to_close() -> OwnedFd {
    const BYTES: usize = 64 << 20;
    let memory = memfd_create("slow to close", MemfdFlags::CLOEXEC).expect("memory");
    let high = fcntl_dupfd_cloexec(&memory, 15).expect("a descriptor");
    fcntl_setfd(&high, FdFlags::empty()).expect("it can be inherited");
    File::from(memory)
        .write_all(&vec![1; BYTES])
        .expect("memory");
    high
}

#[test]
fn a_front_end_that_returns_at_once_is_not_reset_when_the_daemon_is_stopped() {
    let outcomes = outcomes(Signal::TERM, 3);
    assert!(
        outcomes.iter().all(|outcome| *outcome == Outcome::Refused),
        "{outcomes:?}"
    );
}

#[test]
fn a_front_end_that_returns_at_once_is_not_reset_when_the_daemon_is_killed() {
    let rounds = std::env::var("BLKMQ_ROUNDS").map_or(3, |n| n.parse().expect("a number"));
    let outcomes = outcomes(Signal::KILL, rounds);
    assert!(
        outcomes.iter().all(|outcome| *outcome == Outcome::Refused),
        "{outcomes:?}"
    );
    println!("{rounds} front ends returned, none was reset");
}

/// The listener is above whatever else the daemon opens, so that the kernel closes it first.
#[test]
fn listeners_live_at_high_descriptor_numbers() {
    let daemon = Daemon::start_ours(&Spec::image(1 << 20));
    let _stream = connect(daemon.socket());
    let folder = format!("/proc/{}/fd", daemon.pid());
    let mut sockets: Vec<u32> = std::fs::read_dir(folder)
        .expect("the daemon's descriptors")
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| {
            let target = std::fs::read_link(path).unwrap_or_default();
            target.to_string_lossy().starts_with("socket:")
        })
        .map(|path| {
            let name = path.file_name().expect("a number");
            name.to_string_lossy().parse().expect("a number")
        })
        .collect();
    sockets.sort_unstable();
    let [.., connection, listener] = sockets[..] else {
        panic!("no two sockets: {sockets:?}");
    };
    assert!(listener > 800 && connection < 256, "{sockets:?}");
}
