//! A disk that may do one operation a second, with more than that in flight: whoever waits for it to end does not wait
//! for its limits, and limits can still not be passed by.

use super::*;

/// Requests that are in flight: so many seconds' worth.
const TAKEN: u64 = 40;

/// Far less than that many seconds, and far more than anything else takes.
const SOON: Duration = Duration::from_secs(20);

fn limited() -> (Served, Disk) {
    let args = ["--workers", "1", "--limit", "iops=1/1"];
    let served = Served::start(Spec::null(1 << 30), &args);
    let mut disk = Disk::attach(served.daemon.socket(), 1);
    push(&mut disk, TAKEN);
    // It has seen them all when it has answered the first: they come in one drain.
    disk.queues[0].wait(DEADLINE).expect("the first");
    (served, disk)
}

fn push(disk: &mut Disk, count: u64) {
    let gpa = disk.mem().alloc(4096, 4096);
    let queue = &mut disk.queues[0];
    for n in 0..count {
        let data = [Seg::writable(gpa, 4096)];
        queue
            .push(n, kind::IN, 0, n * 80, &data)
            .expect("the ring has room");
    }
    queue.publish();
}

fn start(disk: &mut Disk, base: u16) {
    let Disk { front, queues, .. } = disk;
    front.set_ring(&queues[0], base).expect("set up");
    front.send_call(0, queues[0].call_fd()).expect("a call");
    front.send_kick(&queues[0]).expect("it starts");
    front.enable(0, true).expect("enabled");
}

/// How many more were answered well.
fn reap(disk: &mut Disk) -> u64 {
    let done = std::iter::from_fn(|| disk.queues[0].reap());
    done.inspect(|done| assert_eq!(done.status, status::OK))
        .count() as u64
}

#[test]
fn sigterm_does_not_wait_for_limits() {
    let (served, mut disk) = limited();
    let begin = Instant::now();
    served.daemon.stop();
    assert!(begin.elapsed() < SOON, "{:?}", begin.elapsed());
    assert_eq!(reap(&mut disk), TAKEN - 1);
}

#[test]
fn a_ring_that_is_stopped_does_not_wait_for_limits_and_pays_when_it_starts_again() {
    let (served, mut disk) = limited();
    let begin = Instant::now();
    let base = disk.front.stop(0).expect("it stops");
    assert!(begin.elapsed() < SOON, "{:?}", begin.elapsed());
    assert_eq!(reap(&mut disk), TAKEN - 1);
    // Again and again it would get past its limit that way. But the debt is paid first.
    for _ in 0..3 {
        push(&mut disk, 10);
        start(&mut disk, base);
        assert_eq!(disk.front.stop(0).expect("it stops"), base);
    }
    assert_eq!(reap(&mut disk), 0);
    start(&mut disk, base);
    // Limits can be changed, and end the debt.
    served.patch("0", json!({ "limits": { "iops": null } }));
    finish_all(&mut disk.queues[0], 30);
    assert!(begin.elapsed() < SOON, "{:?}", begin.elapsed());
}

#[test]
fn new_memory_and_another_scheduler_do_not_wait_for_limits() {
    let (served, mut disk) = limited();
    let begin = Instant::now();
    disk.front.send_memory(false).expect("it is adopted");
    assert!(begin.elapsed() < SOON, "{:?}", begin.elapsed());
    assert_eq!(reap(&mut disk), TAKEN - 1);
    drop(disk);
    let (other, mut disk) = limited();
    let begin = Instant::now();
    let shown = other.patch("0", json!({ "scheduler": "kyber" }));
    assert_eq!(shown["scheduler"], "kyber");
    assert!(begin.elapsed() < SOON, "{:?}", begin.elapsed());
    assert_eq!(reap(&mut disk), TAKEN - 1);
    // In the elevator now, behind requests that may not go yet.
    push(&mut disk, 20);
    other.patch("0", json!({ "limits": { "iops": "100/1" } }));
    disk.queues[0].wait(DEADLINE).expect("it goes on");
    other.patch("0", json!({ "limits": { "iops": "1/1" } }));
    let begin = Instant::now();
    other.daemon.stop();
    assert!(begin.elapsed() < SOON, "{:?}", begin.elapsed());
    drop(served);
}
