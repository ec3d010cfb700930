//! Front ends that come, go, and come back.

use crate::support::disk::kind;
use crate::support::*;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::Signal;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

const DISK: u64 = 8 << 20;

#[test]
fn a_front_end_that_returns_finds_its_disk() {
    let daemon = Daemon::start(&Spec::image(DISK));
    let mut model = vec![0; 65536];
    for round in 0..20_u64 {
        let mut disk = Disk::attach(daemon.socket(), 1 + round as usize % 4);
        assert!(disk.read(0, 0, model.len()) == model, "round {round}");
        model = Rng::new(round).bytes(model.len());
        let last = disk.queues.len() - 1;
        disk.write(last, 0, &model);
    }
}

#[test]
fn a_front_end_may_leave_in_the_middle_of_its_requests() {
    let mut daemon = Daemon::start(&Spec::image(64 << 20));
    for round in 0..20_u64 {
        let mut disk = Disk::attach(daemon.socket(), 2);
        let len = 256 << 10;
        let gpa = disk.mem().alloc(len, 4096);
        for queue in &mut disk.queues {
            for n in 0..60 {
                let data = [Seg::readable(gpa, len)];
                queue
                    .push(n, kind::OUT, 0, n * (len as u64 / SECTOR), &data)
                    .expect("the ring has room");
            }
            queue.publish();
        }
        if round % 2 == 0 {
            let queue = &mut disk.queues[0];
            queue.wait(DEADLINE).expect("one of them completes");
        }
    }
    assert!(daemon.is_running());
    let mut disk = Disk::attach(daemon.socket(), 1);
    disk.write(0, 0, &[9; 4096]);
    assert_eq!(disk.read(0, 0, 4096), [9; 4096]);
}

#[test]
fn two_hundred_sessions_leave_nothing_behind() {
    let daemon = Daemon::start(&Spec::image(DISK));
    let session = || {
        let mut disk = Disk::attach(daemon.socket(), 4);
        for queue in 0..4 {
            disk.write(queue, 0, &[3; 65536]);
        }
    };
    for _ in 0..20 {
        session();
    }
    // At rest: a fifth of a second without a change, so that nothing of the last session is counted.
    let mut last = daemon.stats();
    let mut same = 0;
    let before = daemon.wait_stats(|now| {
        same = if (now.fds, now.threads) == (last.fds, last.threads) {
            same + 1
        } else {
            0
        };
        last.clone_from(now);
        same >= 20
    });
    for _ in 0..200 {
        session();
    }
    let after = daemon.wait_stats(|now| now.fds == before.fds && now.threads == before.threads);
    assert!(
        after.rss_kib < before.rss_kib + 2048,
        "memory grew from {} to {} KiB",
        before.rss_kib,
        after.rss_kib
    );
    daemon.stop();
}

#[test]
fn a_second_front_end_waits_until_the_first_has_left() {
    // GET_FEATURES, version 1, no payload.
    const ASK: [u8; 12] = [1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];
    let daemon = Daemon::start(&Spec::image(DISK));
    let mut first = Disk::attach(daemon.socket(), 1);
    let mut second = UnixStream::connect(daemon.socket()).expect("the socket takes connections");
    second
        .set_read_timeout(Some(DEADLINE))
        .expect("sockets have time limits");
    second.write_all(&ASK).expect("the socket takes a message");
    let quiet = Timespec {
        tv_sec: 0,
        tv_nsec: 200_000_000,
    };
    let ready = poll(&mut [PollFd::new(&second, PollFlags::IN)], Some(&quiet));
    assert_eq!(ready, Ok(0), "no answer while the first is served");
    first.write(0, 0, &[5; 512]);
    assert_eq!(
        first.read(0, 0, 512),
        [5; 512],
        "the first is served as before"
    );
    drop(first);
    let mut answer = [0; 20];
    second
        .read_exact(&mut answer)
        .expect("an answer once the first has left");
    assert_eq!(answer[..4], [1, 0, 0, 0], "it answers GET_FEATURES");
    drop(second);
    let mut third = Disk::attach(daemon.socket(), 1);
    assert_eq!(third.read(0, 0, 512), [5; 512]);
}

#[test]
fn sigterm_during_a_session_ends_cleanly() {
    let mut daemon = Daemon::start(&Spec::image(DISK));
    let mut disk = Disk::attach(daemon.socket(), 2);
    disk.write(0, 0, &[1; 4096]);
    disk.write(1, 8, &[2; 4096]);
    daemon.signal(Signal::TERM);
    daemon.wait_exit();
    assert!(!daemon.socket().exists(), "the socket is gone");
    let (status, stdout, stderr) = daemon.terminate();
    assert!(status.success(), "{status}: {stderr}");
    if !Daemon::is_peer() {
        let summary: Summary = serde_json::from_str(&stdout).expect("a summary");
        assert_eq!(summary.total(|queue| queue.write), 2);
    }
    assert!(disk.front.is_closed(), "and so is the session");
}
