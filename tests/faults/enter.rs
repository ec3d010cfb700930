//! The system call by which all I/O goes fails: for a moment, for long, for good.

use super::*;

use std::sync::Arc;
use vhost::vhost_user::message::VhostUserProtocolFeatures;

/// All errors after which the same call is right again.
const PASSING: [(i32, &str); 4] = [
    (libc::EAGAIN, "EAGAIN"),
    (libc::EBUSY, "EBUSY"),
    (libc::ENOMEM, "ENOMEM"),
    (libc::EINTR, "EINTR"),
];
const BLOCK: usize = 4096;
/// Requests in flight on each queue.
const DEPTH: usize = 16;

fn gated(args: &[&str]) -> (Served, support::enter::Gate) {
    let dir = tempfile::tempdir().expect("a directory");
    let control = dir.path().join("control.sock");
    let spec = Spec::image(8 << 20)
        .args(["--workers", "1", "--control-path", text(&control)])
        .args(args.iter().copied());
    let (daemon, gate) = Daemon::start_gated(&spec);
    let served = Served {
        daemon,
        _dir: dir,
        control,
    };
    (served, gate)
}

/// Each of [`DEPTH`] places of a queue writes its own block anew, reads it back and compares it, `rounds` times.
fn write_and_read(disk: &mut Disk, rounds: u64) {
    let mem = Arc::clone(&disk.queues[0].mem);
    let gpa = mem.alloc(2 * DEPTH * BLOCK, BLOCK);
    let buffer = |at: usize| gpa + (at * BLOCK) as u64;
    let sector = |at: usize| (at * BLOCK) as u64 / SECTOR;
    // Whether the place reads, and its round.
    let mut places = [(false, 0); 2 * DEPTH];
    let seed = |at: usize, round: u64| round * 1000 + at as u64;
    let push = |queue: &mut Queue, at: usize, (reads, round): (bool, u64)| {
        let (op, data) = if reads {
            mem.fill(buffer(at), BLOCK, 0xee);
            (kind::IN, Seg::writable(buffer(at), BLOCK))
        } else {
            mem.write(buffer(at), &Rng::new(seed(at, round)).bytes(BLOCK));
            (kind::OUT, Seg::readable(buffer(at), BLOCK))
        };
        queue
            .push(at as u64, op, 0, sector(at), &[data])
            .expect("room");
    };
    for (at, place) in places.iter().enumerate() {
        push(&mut disk.queues[at / DEPTH], at, *place);
    }
    disk.queues.iter_mut().for_each(Queue::publish);
    let mut out = [true; 2 * DEPTH];
    while let Some(queue) = disk.queues.iter_mut().find(|queue| queue.in_flight() > 0) {
        let done = finish(queue);
        let at = done.token as usize;
        assert!(std::mem::replace(&mut out[at], false), "ended twice");
        assert_eq!(done.status, status::OK);
        let (reads, round) = places[at];
        if reads {
            let found = mem.read_vec(buffer(at), BLOCK);
            assert!(
                found == Rng::new(seed(at, round)).bytes(BLOCK),
                "other data"
            );
        }
        places[at] = (!reads, round + u64::from(reads));
        if places[at].1 < rounds {
            out[at] = true;
            push(queue, at, places[at]);
            queue.publish();
        }
    }
    assert!(places.iter().all(|place| *place == (false, rounds)));
}

#[test]
fn calls_that_fail_now_and_then_delay_requests_and_lose_none() {
    for (errno, name) in PASSING {
        let (served, gate) = gated(&[]);
        let mut disk = Disk::attach(served.daemon.socket(), 2);
        let mut rng = Rng::new(u64::from(errno.unsigned_abs()));
        let mut burst = 0;
        // Two of three fail, one by one and up to five in a row.
        gate.answer(move |_| {
            if burst == 0 {
                burst = rng.below(8);
                return None;
            }
            burst -= 1;
            (burst < 5).then_some(errno)
        });
        write_and_read(&mut disk, 20);
        // Between two sessions as well: watches, calls and cancels.
        drop(disk);
        let mut disk = Disk::attach(served.daemon.socket(), 2);
        disk.write(1, 0, &[7; BLOCK]);
        assert_eq!(disk.read(0, 0, BLOCK), [7; BLOCK]);
        assert!(gate.refused() > 50, "{name}: {} only", gate.refused());
        gate.answer(|_| None);
        drop(disk);
        served.daemon.stop();
    }
}

/// Every call fails for more than a second, those that only wait as well: nothing can be submitted, and nothing heard.
#[test]
fn calls_that_fail_for_long_are_tried_at_leisure_and_requests_end_when_they_work_again() {
    for (errno, name) in PASSING {
        let (served, gate) = gated(&["--timeout", "1"]);
        let mut disk = Disk::attach(served.daemon.socket(), 1);
        disk.write(0, 0, &[7; BLOCK]);
        let gpa = disk.mem().alloc(BLOCK, BLOCK);
        gate.answer(move |_| Some(errno));
        let queue = &mut disk.queues[0];
        for n in 0..64 {
            let data = [Seg::writable(gpa, BLOCK)];
            queue.push(n, kind::IN, 0, 0, &data).expect("room");
        }
        queue.publish();
        let told = "io_uring has taken no requests for a second: ";
        assert!(
            served.daemon.wait_for_message(told),
            "{name}: nobody is told"
        );
        let (begun, before) = (Instant::now(), gate.refused());
        while gate.refused() < before + 100 {
            std::thread::yield_now();
        }
        // At most three in a turn, and ten milliseconds between two turns. A worker that did not wait makes a hundred
        // in a few.
        let took = begun.elapsed();
        assert!(took.as_millis() > 200, "{name}: 100 calls in {took:?}");
        // Whoever asks is answered, and the watchdog is awake.
        assert_eq!(served.disk(0)["connected"], true);
        assert!(
            served.daemon.wait_for_message("has not come back for"),
            "{name}"
        );
        assert_eq!(
            disk.queues[0].device_used_idx(),
            1,
            "{name}: no answer is made up"
        );

        gate.answer(|_| None);
        for done in finish_all(&mut disk.queues[0], 64) {
            assert_eq!(done.status, status::OK, "{name}");
        }
        assert_eq!(disk.mem().read_vec(gpa, BLOCK), [7; BLOCK]);
        assert!(
            served
                .daemon
                .wait_for_message("io_uring takes requests again")
        );
        let metrics = client::ask(&served.control, "GET", "/metrics", None).expect("metrics");
        let refused = metrics
            .lines()
            .find_map(|line| line.strip_prefix("blkmq_worker_refused_total{worker=\"0\"} "))
            .unwrap_or_else(|| panic!("{metrics}"));
        assert!(
            refused.parse::<f64>().expect("a number") >= 100.0,
            "{refused}"
        );
        let log = served.daemon.stderr();
        assert_eq!(log.matches(told).count(), 1, "{name}: one line\n{log}");
        drop(disk);
        served.daemon.stop();
    }
}

/// The next `count` requests that end, all of them well.
fn ended_well(queue: &mut Queue, count: usize) -> Vec<u64> {
    let done = finish_all(queue, count);
    assert!(done.iter().all(|done| done.status == status::OK));
    done.iter().map(|done| done.token).collect()
}

/// With the kernel's word that the ring is none, nothing can be known of what is in flight. The daemon ends at once and
/// says why, and the next one takes the requests up.
#[test]
fn a_ring_that_dies_ends_the_daemon_and_the_next_one_completes_each_request_once() {
    for errno in [libc::EBADF, libc::ENXIO] {
        let (mut served, gate) = gated(&[]);
        let setup = Setup {
            protocol: protocol::KNOWN | VhostUserProtocolFeatures::INFLIGHT_SHMFD,
            ..Setup::default()
        };
        let mut front = Front::connect(served.daemon.socket(), &setup).expect("a session");
        let region = front.new_inflight(1, 128).expect("a region");
        front.set_inflight(&region).expect("it is taken");
        let mut queue = front.queue(0, QueueSetup::default()).expect("a queue");
        let gpa = front.mem.alloc(32 * BLOCK, BLOCK);
        let push = |queue: &mut Queue, n: u64| {
            let data = [Seg::readable(gpa + n * BLOCK as u64, BLOCK)];
            let content = Rng::new(n + 1).bytes(BLOCK);
            queue.mem.write(data[0].gpa, &content);
            queue.push(n, kind::OUT, 0, n * 8, &data).expect("room");
            queue.publish();
        };
        // A part is answered, a part is the kernel's or has just been, and what comes later is queued, or still in the
        // ring.
        (0..8).for_each(|n| push(&mut queue, n));
        let mut seen: Vec<u64> = ended_well(&mut queue, 8);
        let mut good = 1;
        gate.answer(move |enter| {
            if good == 0 {
                return Some(errno);
            }
            good -= i32::from(enter.to_submit > 0);
            None
        });
        (8..32).for_each(|n| push(&mut queue, n));
        let status = served.daemon.wait_exit();
        assert_eq!(
            std::os::unix::process::ExitStatusExt::signal(&status),
            Some(Signal::ABORT.as_raw()),
            "{status}"
        );
        let error = std::io::Error::from_raw_os_error(errno);
        let told = format!("worker 0: the io_uring is unusable: {error}");
        assert!(
            served.daemon.wait_for_message(&told),
            "{}",
            served.daemon.stderr()
        );

        let next = served.daemon.beside(&Spec::image(8 << 20));
        assert!(next.wait_for_message("listening on"), "{}", next.stderr());
        let mem = Arc::clone(&front.mem);
        drop(front);
        let mut front = Front::connect_with(next.socket(), &setup, mem).expect("it is served");
        front.set_inflight(&region).expect("it is taken");
        front.start(&queue).expect("it starts");
        front.enable(0, true).expect("it is enabled");
        seen.extend(ended_well(&mut queue, 24));
        seen.sort_unstable();
        assert_eq!(seen, (0..32).collect::<Vec<_>>(), "each exactly once");
        let image = fs::read(next.image()).expect("the image");
        for n in 0..32 {
            let found = &image[n * BLOCK..(n + 1) * BLOCK];
            assert!(found == Rng::new(n as u64 + 1).bytes(BLOCK), "block {n}");
        }
        next.stop();
    }
}
