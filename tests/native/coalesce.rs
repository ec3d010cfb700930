//! Interrupt coalescing: fewer calls where more is to come, none that stays away.

use crate::support::disk::{kind, status};
use crate::support::*;

/// Runs reads of 4 KiB at a queue depth, asleep on the call eventfd whenever nothing is done; returns the
/// calls that the daemon made.
fn calls(spec: &Spec, depth: u16, total: u64) -> u64 {
    let daemon = Daemon::start_ours(&spec.clone().queues(1));
    let mut disk = Disk::attach(daemon.socket(), 1);
    let gpa = disk.mem().alloc(4096, 4096);
    let queue = &mut disk.queues[0];
    let (mut issued, mut done) = (0, 0);
    while done < total {
        while issued < total && queue.in_flight() < depth {
            let data = [Seg::writable(gpa, 4096)];
            // No two are neighbours, so that none are merged.
            queue
                .push(issued, kind::IN, 0, issued % 512 * 16, &data)
                .expect("the ring has room");
            issued += 1;
        }
        queue.publish();
        // Taken one at a time, so that the driver asks for a call whenever it finds nothing.
        let completion = queue.wait(DEADLINE);
        let completion = completion.unwrap_or_else(|| panic!("a call within {DEADLINE:?}"));
        assert_eq!(completion.status, status::OK);
        done += 1;
    }
    drop(disk);
    let summary = daemon.stop();
    assert_eq!(summary.total(|queue| queue.requests), total);
    summary.total(|queue| queue.calls)
}

/// A disk that finishes a request each 2.5 ms, and a guest that wants to know of each: without coalescing
/// there are as many calls, with two at a time half, with 10 ms a quarter.
#[test]
fn calls_wait_for_more_to_tell() {
    let paced = Spec::null(1 << 30).args(["--limit", "iops=400/1"]);
    let by_twos = paced.clone().args(["--coalesce", "10000:2"]);
    let late = paced.clone().args(["--coalesce", "10000:1024"]);
    let [at_once, by_twos, late] = [&paced, &by_twos, &late].map(|spec| calls(spec, 32, 64));
    println!("{at_once} calls, {by_twos} by twos, {late} with coalescing");
    assert!(late < by_twos && by_twos < at_once);
}

/// A driver that sleeps until it is called is called in the end, however little there is to tell.
#[test]
fn no_call_stays_away() {
    for how in ["1:2", "100:3", "10000:1024"] {
        for depth in [2, 7, 64] {
            let spec = Spec::image_of(&vec![7; 4 << 20]).args(["--coalesce", how]);
            assert!(calls(&spec, depth, 300) > 0);
        }
    }
}
