//! A daemon that runs out of file descriptors: a session has what it was promised, or ends with that reason, and other
//! disks do not notice.

use crate::ceilings::at_rest;
use crate::stage::{DISK, Stage};
use crate::support::disk::{finish, kind};
use crate::support::*;
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use std::time::Instant;

const QUEUES: usize = 4;

/// Lets the process have so many descriptors.
fn limit(stage: &Stage, count: u64) {
    let pid = Pid::from_raw(stage.daemon.pid().cast_signed()).expect("a process");
    // The soft one is what counts, and can be raised again.
    let path = format!("/proc/{}/limits", stage.daemon.pid());
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
fn whole_or_closed(stage: &Stage) -> bool {
    let socket = std::os::unix::net::UnixStream::connect(stage.socket()).expect("it listens");
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
                stage.daemon.stderr()
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
    for more in 0..80 {
        limit(&stage, at_rest + more);
        let before = stage.daemon.stderr().len();
        let beats = stage.other.count();
        if whole_or_closed(&stage) {
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
                std::thread::yield_now();
            }
        }
        stage
            .other
            .beats(8.max(beats.saturating_sub(stage.other.count())));
    }
    assert!(served > 0, "80 descriptors are enough for {QUEUES} queues");
    stage.serves_again();
    stage.end();
}
