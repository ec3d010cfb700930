//! How many system calls a request costs, by the workers' own count. They make no other on the data
//! path than `io_uring_enter`, which strace confirms at depth 32 (load.rs).

use crate::support::disk::{kind, status};
use crate::support::*;

/// Runs `total` reads of 4 KiB at a queue depth, asleep on the call eventfd between batches.
fn run(disk: &mut Disk, depth: u16, total: u64) {
    let gpa = disk.mem().alloc(4096, 4096);
    let queue = &mut disk.queues[0];
    let mut rng = Rng::new(total);
    let (mut issued, mut done) = (0, 0);
    while done < total {
        while issued < total && queue.in_flight() < depth {
            let data = [Seg::writable(gpa, 4096)];
            queue
                .push(issued, kind::IN, 0, rng.below(1 << 12) * 8, &data)
                .expect("the ring has room");
            issued += 1;
        }
        queue.publish();
        let mut next = queue.wait(DEADLINE);
        assert!(next.is_some(), "a completion within {DEADLINE:?}");
        while let Some(completion) = next {
            assert_eq!(completion.status, status::OK);
            done += 1;
            next = queue.reap();
        }
    }
}

/// System calls a request, all told: what connecting and stopping cost is among them.
fn calls_a_request(spec: &Spec, depth: u16, total: u64) -> f64 {
    let daemon = Daemon::start_ours(&spec.clone().queues(1));
    let mut disk = Disk::attach(daemon.socket(), 1);
    run(&mut disk, depth, total);
    drop(disk);
    let summary = daemon.stop();
    assert_eq!(summary.total(|queue| queue.requests), total);
    let enters: u64 = summary.workers.iter().map(|worker| worker.enters).sum();
    let calls = enters as f64 / total as f64;
    println!("{calls:.3} system calls a request at depth {depth}");
    calls
}

/// A file of one block over and over would be no disk; one that is written can be read.
fn image() -> Spec {
    Spec::image_of(&vec![7; 16 << 20])
}

const DEEP: u64 = 20_000;
const SHALLOW: u64 = 2_000;

/// One that sleeps and brings the call along; if the worker looks for more before it sleeps, the call
/// goes first and sleeping is another.
#[test]
fn a_lone_request_without_an_image_costs_two_system_calls_at_most() {
    assert!(calls_a_request(&Spec::null(1 << 30), 1, SHALLOW) < 2.1);
}

#[test]
fn without_looking_a_lone_request_costs_one_system_call() {
    let spec = Spec::null(1 << 30).args(["--poll-us", "0"]);
    assert!(calls_a_request(&spec, 1, SHALLOW) < 1.1);
}

/// Submit, fetch, call, sleep.
#[test]
fn a_lone_request_to_an_image_costs_four_system_calls_at_most() {
    assert!(calls_a_request(&image(), 1, SHALLOW) < 4.1);
}

/// One that submits and sleeps, one that calls and sleeps.
#[test]
fn without_looking_a_lone_request_to_an_image_costs_two_system_calls() {
    let spec = image().args(["--poll-us", "0"]);
    assert!(calls_a_request(&spec, 1, SHALLOW) < 2.1);
}

/// Whoever has one request waits for exactly that one: a call that is held back would cost one more.
#[test]
fn a_lone_request_is_called_for_at_once_with_coalescing_too() {
    let spec = image().args(["--poll-us", "0", "--coalesce", "10000:1024"]);
    assert!(calls_a_request(&spec, 1, SHALLOW) < 2.1);
}

#[test]
fn at_depth_32_requests_to_an_image_share_system_calls() {
    assert!(calls_a_request(&image(), 32, DEEP) < 0.5);
}
