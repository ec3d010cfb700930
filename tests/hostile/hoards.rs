//! A guest that takes what the disks of a worker share, and does not give it back.

use crate::support::disk::kind;
use crate::support::*;
use tempfile::TempDir;

const DISK: u64 = 8 << 20;

/// A disk that may do one operation a second, so that what it has in flight stays there.
pub fn slow_disk() -> Spec {
    Spec::image(DISK).args(["--limit", "iops=1"])
}

/// Two disks on one worker, the first of them slow.
fn two_disks(dir: &TempDir) -> (Daemon, Disk, Disk) {
    let image = dir.path().join("other.img");
    let file = std::fs::File::create(&image).expect("an image");
    file.set_len(DISK).expect("a sparse image");
    let socket = dir.path().join("other.sock");
    let other = format!(
        "socket-path={},blk-file={}",
        socket.display(),
        image.display()
    );
    let daemon = Daemon::start_ours(&slow_disk().args(["--workers", "1", "--disk", &other]));
    let slow = Disk::attach(daemon.socket(), 4);
    let other = Disk::attach(&socket, 1);
    (daemon, slow, other)
}

/// Takes what there is to take with requests on the slow disk.
pub type Hoard = fn(&mut Disk);

/// All of this file, for the measurement.
pub const ALL: &[(&str, Hoard)] = &[
    (
        "the_room_for_long_requests_cannot_be_hoarded",
        long_requests,
    ),
    ("tags_cannot_be_hoarded", tags),
];

/// Requests of many buffers, 64 on each queue.
fn long_requests(slow: &mut Disk) {
    let gpa = slow.mem().alloc(1 << 20, 4096);
    let segs: Vec<Seg> = (0..40)
        .map(|n| Seg::writable(gpa + n * 4096, 512))
        .collect();
    for queue in &mut slow.queues {
        for n in 0..64 {
            queue
                .push(n, kind::IN, 0, 0, &segs)
                .expect("room in the ring");
        }
        queue.publish();
    }
}

/// Requests of one buffer, as many as there is room for.
fn tags(slow: &mut Disk) {
    let gpa = slow.mem().alloc(4096, 4096);
    for queue in &mut slow.queues {
        let mut n = 0;
        while queue
            .push(n, kind::IN, 0, n * 16, &[Seg::writable(gpa, 4096)])
            .is_some()
        {
            n += 1;
        }
        queue.publish();
    }
}

/// Requests of many buffers borrow room for them. One disk's must not be able to borrow it all.
#[test]
fn the_room_for_long_requests_cannot_be_hoarded() {
    let dir = TempDir::new().expect("a directory");
    let (_daemon, mut slow, mut other) = two_disks(&dir);
    long_requests(&mut slow);
    let gpa = other.mem().alloc(1 << 20, 4096);
    let segs: Vec<Seg> = (0..40)
        .map(|n| Seg::writable(gpa + n * 4096, 512))
        .collect();
    for _ in 0..100 {
        let done = Request::read(0, &segs).run(&mut other.queues[0]);
        assert_eq!((done.status, done.len), (0, 40 * 512 + 1));
    }
    let answered: u16 = slow.queues.iter().map(Queue::device_used_idx).sum();
    assert!(
        answered < 64,
        "the other disk waited for {answered} requests of the slow one"
    );
}

/// The same with requests of one buffer each: what they take is tags.
#[test]
fn tags_cannot_be_hoarded() {
    let dir = TempDir::new().expect("a directory");
    let (_daemon, mut slow, mut other) = two_disks(&dir);
    tags(&mut slow);
    let data = Rng::new(2).bytes(4096);
    for sector in 0..100 {
        other.write(0, sector * 8, &data);
    }
    let answered: u16 = slow.queues.iter().map(Queue::device_used_idx).sum();
    assert!(
        answered < 64,
        "the other disk waited for {answered} requests of the slow one"
    );
}
