//! What the disk costs: nothing when idle, little when busy.

use crate::support::disk::{kind, status};
use crate::support::*;
use std::io::{BufRead, BufReader};
use std::process::{Child, ChildStderr, Command, Stdio};
use std::time::{Duration, Instant};

/// Runs `total` reads of 4 KiB at queue depth 32 on one queue, asleep on the call eventfd between batches.
fn run_qd32(queue: &mut Queue, gpa: u64, total: u64) {
    let mut issued = 0;
    let mut done = 0;
    let mut rng = Rng::new(total);
    while done < total {
        while issued < total && queue.in_flight() < 32 {
            let data = [Seg::writable(gpa, 4096)];
            let sector = rng.below(1 << 17) * 8;
            queue
                .push(issued, kind::IN, 0, sector, &data)
                .expect("the ring has room");
            issued += 1;
        }
        queue.publish();
        let mut next = queue.wait(DEADLINE);
        assert!(next.is_some(), "a completion within {DEADLINE:?}");
        while let Some(completion) = next {
            assert_eq!((completion.status, completion.len), (status::OK, 4097));
            done += 1;
            next = queue.reap();
        }
    }
}

/// Waits until the process has done nothing at all for half a second.
fn settle(daemon: &Daemon) -> ProcStats {
    let deadline = Instant::now() + DEADLINE;
    let mut last = daemon.stats();
    loop {
        std::thread::sleep(Duration::from_millis(500));
        let now = daemon.stats();
        if (&now.switches, &now.ticks) == (&last.switches, &last.ticks) {
            return now;
        }
        assert!(
            Instant::now() < deadline,
            "the daemon never comes to rest: {last:?} then {now:?}"
        );
        last = now;
    }
}

#[test]
fn an_idle_disk_costs_nothing() {
    let daemon = Daemon::start(&Spec::image(64 << 20).queues(8));
    let mut disk = Disk::attach(daemon.socket(), 8);
    for queue in 0..8 {
        disk.write(queue, queue as u64 * 128, &[1; 65536]);
        assert_eq!(disk.read(queue, queue as u64 * 128, 65536), [1; 65536]);
    }
    let before = settle(&daemon);
    std::thread::sleep(Duration::from_secs(5));
    let after = daemon.stats();
    assert_eq!(before.switches, after.switches, "a thread woke up");
    assert_eq!(before.ticks, after.ticks, "a thread used CPU time");
    assert_eq!(disk.read(0, 0, 512), [1; 512], "and it wakes up when asked");
}

/// Counts the system calls of a process with strace, which stops it at each: good for counts, not for times.
struct Strace {
    child: Child,
    stderr: BufReader<ChildStderr>,
}

impl Strace {
    /// Attaches to all threads of `pid`; `None` where strace is missing or not allowed to.
    fn attach(pid: u32, threads: usize) -> Option<Self> {
        let mut child = Command::new("strace")
            .args(["-f", "-c", "-U", "calls,name", "-p", &pid.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .ok()?;
        let mut stderr = BufReader::new(child.stderr.take().expect("stderr is a pipe"));
        // One line tells of the process, or one for each thread it has.
        let mut line = String::new();
        let read = stderr.read_line(&mut line).unwrap_or(0);
        if read == 0 || !line.contains("attached") {
            // It ends by itself when it cannot attach.
            let _ = child.kill();
            let _ = child.wait();
            return None;
        }
        assert!(threads > 0, "a process has threads");
        Some(Self { child, stderr })
    }

    /// Detaches and returns the number of calls, and strace's table.
    fn finish(mut self) -> (u64, String) {
        let pid = i32::try_from(self.child.id()).expect("process numbers have 31 bits");
        let pid = rustix::process::Pid::from_raw(pid).expect("a child's number is not 0");
        rustix::process::kill_process(pid, rustix::process::Signal::INT)
            .expect("a child takes signals");
        let table: Vec<String> = self.stderr.lines().map_while(Result::ok).collect();
        self.child.wait().expect("a child can be waited for");
        let total = table
            .iter()
            .find(|line| line.trim_end().ends_with("total"))
            .and_then(|line| line.split_whitespace().next()?.parse().ok())
            .unwrap_or(0);
        (total, table.join("\n"))
    }
}

#[test]
fn at_depth_32_there_are_few_system_calls_a_request() {
    let daemon = Daemon::start(&Spec::null(1 << 30));
    let mut disk = Disk::attach(daemon.socket(), 1);
    let gpa = disk.mem().alloc(4096, 4096);
    let total = 50_000;
    run_qd32(&mut disk.queues[0], gpa, 5000);
    let Some(strace) = Strace::attach(daemon.pid(), daemon.stats().threads) else {
        // Without strace, the context switches still tell whether the daemon sleeps for each request.
        let before: u64 = daemon.stats().switches.values().sum();
        run_qd32(&mut disk.queues[0], gpa, total);
        let switches = daemon.stats().switches.values().sum::<u64>() - before;
        assert!(switches < total / 5, "{switches} context switches");
        return;
    };
    run_qd32(&mut disk.queues[0], gpa, total);
    let (calls, table) = strace.finish();
    assert!(calls > 0, "strace saw the daemon at work:\n{table}");
    assert!(
        calls < total / 5,
        "{calls} system calls for {total} requests:\n{table}"
    );
    drop(disk);
    let summary = daemon.stop();
    if !Daemon::is_peer() {
        assert_eq!(summary.total(|queue| queue.requests), total + 5000);
        assert!(summary.total(|queue| queue.calls) < total / 5);
    }
}

/// Their fair share of driver tags is less than what is taken of a ring at a time as a rule, and what exceeds it went
/// the long way through staging.
#[test]
fn many_busy_queues_stage_next_to_nothing() {
    const QUEUES: usize = 64;
    const DEPTH: u64 = 16;
    const ROUNDS: u64 = 20;
    let spec = Spec::null(1 << 30)
        .queues(QUEUES)
        .args(["--workers", "1", "--scheduler", "none"]);
    let daemon = Daemon::start_ours(&spec);
    let mut disk = Disk::attach(daemon.socket(), QUEUES);
    let data = [Seg::writable(disk.mem().alloc(4096, 4096), 4096)];
    for round in 0..ROUNDS {
        for queue in &mut disk.queues {
            for slot in 0..DEPTH {
                // No two are neighbours, which would be merged.
                let sector = (round * DEPTH + slot) * 64;
                let pushed = queue.push(slot, kind::IN, 0, sector, &data);
                pushed.expect("the ring has room");
            }
            queue.publish();
        }
        for queue in &mut disk.queues {
            for _ in 0..DEPTH {
                let completion = queue.wait(DEADLINE).expect("a completion in time");
                assert_eq!(completion.status, status::OK);
            }
        }
    }
    drop(disk);
    let summary = daemon.stop();
    let (requests, staged) = (
        summary.total(|queue| queue.requests),
        summary.total(|queue| queue.staged),
    );
    assert_eq!(requests, QUEUES as u64 * DEPTH * ROUNDS);
    // Before a ring was served once, nobody knows that it is answered at once, and takes all of it.
    let first = QUEUES as u64 * DEPTH;
    assert!(staged <= first, "{staged} of {requests} staged");
}
