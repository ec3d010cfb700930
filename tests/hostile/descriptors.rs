//! A daemon that runs out of file descriptors: a session has what it was promised, or ends with that reason, and other
//! disks do not notice.

use crate::ceilings::{at_rest, daemon_at_rest};
use crate::stage::{DISK, Stage};
use crate::support::disk::{finish, kind};
use crate::support::*;
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use std::path::Path;
use std::sync::Barrier;
use std::thread;
use std::time::Instant;

const QUEUES: usize = 4;

/// Lets the process have so many descriptors.
fn limit(daemon: &Daemon, count: u64) {
    let pid = Pid::from_raw(daemon.pid().cast_signed()).expect("a process");
    // The soft one is what counts, and can be raised again.
    let path = format!("/proc/{}/limits", daemon.pid());
    let limits = std::fs::read_to_string(path).expect("limits");
    let line = limits
        .lines()
        .find(|line| line.starts_with("Max open files"));
    let hard = line
        .and_then(|line| line.split_whitespace().nth(4))
        .expect("a limit");
    let limits = Rlimit {
        current: Some(count),
        maximum: hard.parse().ok(),
    };
    prlimit(Some(pid), Resource::Nofile, limits).expect("a limit can be set");
}

/// Goes as far as it can: a whole session, all of whose queues answer and call, or one that was closed.
fn whole_or_closed(daemon: &Daemon, path: &Path) -> bool {
    let socket = std::os::unix::net::UnixStream::connect(path).expect("it listens");
    let watched = socket.try_clone().expect("a duplicate");
    let mem = std::sync::Arc::new(GuestMemory::new(&Setup::default().memory).expect("memory"));
    let attached = Front::negotiate(socket, &Setup::default(), mem).and_then(|mut front| {
        let queues = (0..QUEUES)
            .map(|index| front.queue(index, QueueSetup::default()))
            .collect::<Result<Vec<_>, _>>()?;
        Ok((front, queues))
    });
    match attached {
        Ok((front, mut queues)) => {
            let gpa = front.mem.alloc(4096, 4096);
            for queue in &mut queues {
                queue.arm(0);
                queue
                    .push(1, kind::IN, 0, 0, &[Seg::writable(gpa, 4096)])
                    .expect("room");
                queue.publish();
                // By its call, which is what was promised.
                assert_eq!(finish(queue).status, 0);
            }
            true
        }
        Err(error) => {
            watched.set_read_timeout(Some(DEADLINE)).expect("a timeout");
            let mut byte = [0];
            let left = std::io::Read::read(&mut &watched, &mut byte);
            assert!(
                matches!(&left, Ok(0))
                    || left
                        .as_ref()
                        .is_err_and(|e| e.kind() == std::io::ErrorKind::ConnectionReset),
                "not served ({error}) and not closed ({left:?}):\n{}",
                daemon.stderr()
            );
            false
        }
    }
}

#[test]
fn a_session_without_descriptors_ends_with_that_reason() {
    let stage = Stage::with(Spec::image(DISK).queues(QUEUES));
    stage.serves_again();
    let at_rest = at_rest(&stage).fds as u64;
    let mut served = 0;
    for more in (0..160).step_by(2) {
        limit(&stage.daemon, at_rest + more);
        let before = stage.daemon.stderr().len();
        let beats = stage.other.count();
        if whole_or_closed(&stage.daemon, stage.socket()) {
            served += 1;
            if served == 3 {
                break;
            }
        } else {
            assert_eq!(
                served, 0,
                "with {more} more it is not served, with fewer it was"
            );
            let deadline = Instant::now() + DEADLINE;
            loop {
                let log = stage.daemon.stderr()[before..].to_owned();
                if log.contains("ulimit -n") {
                    break;
                }
                assert!(
                    Instant::now() < deadline,
                    "with {more} more its end has another reason:\n{log}"
                );
                thread::yield_now();
            }
        }
        stage
            .other
            .beats(8.max(beats.saturating_sub(stage.other.count())));
    }
    assert!(served > 0, "160 descriptors are enough for {QUEUES} queues");
    stage.serves_again();
    stage.end();
}

/// A message that one session loses because another has taken the last descriptor would be no answer and no end.
#[test]
fn of_two_sessions_that_want_the_last_descriptors_at_once_each_is_served_or_turned_away() {
    let dir = tempfile::tempdir().expect("a directory");
    let second = dir.path().join("second.sock");
    let disk = format!("socket-path={},engine=null,size=8M", second.display());
    let spec = Spec::null(DISK)
        .queues(QUEUES)
        .args(["--workers", "2", "--disk", &disk]);
    let daemon = Daemon::start_ours(&spec);
    let both = || {
        let start = Barrier::new(2);
        let paths = [daemon.socket(), &second];
        let served = thread::scope(|scope| {
            let tries = paths.map(|path| {
                let (start, daemon) = (&start, &daemon);
                scope.spawn(move || {
                    start.wait();
                    whole_or_closed(daemon, path)
                })
            });
            tries.map(|one| one.join().expect("served, or turned away"))
        });
        served.into_iter().filter(|served| *served).count()
    };
    assert_eq!(both(), 2, "without a limit");
    // When both have ended: what is open then.
    let at_rest = daemon_at_rest(&daemon).fds;
    let mut counts = [0; 3];
    for more in (0..320).step_by(4) {
        limit(&daemon, at_rest as u64 + more);
        counts[both()] += 1;
    }
    assert!(counts[1] > 0, "one of two: {counts:?}");
    limit(&daemon, 1000);
    assert_eq!(both(), 2, "with enough again");
    let lines = daemon.stderr().matches("turned away").count();
    assert!(lines <= 200, "{lines} lines of two disks");
    daemon.stop();
}
