//! What is between a guest's buffers and the disk: nothing, an aligned copy, or the host's page cache.

use crate::support::disk::status;
use crate::support::*;
use rustix::fs::{Advice, fadvise, fsync};
use std::fs::{self, File};

/// Ends the daemon; how many requests went through an aligned buffer.
fn bounced(daemon: Daemon) -> u64 {
    let summary = daemon.stop();
    assert_eq!(summary.total(|queue| queue.errors), 0);
    summary.workers.iter().map(|worker| worker.bounced).sum()
}

#[test]
fn buffers_that_direct_io_does_not_take_are_copied_and_no_others() {
    let content = Rng::new(61).bytes(1 << 20);
    for (skew, copies) in [(0, false), (1, true), (511, true)] {
        let daemon = Daemon::start_ours(&Spec::image_of(&content).args(["--workers", "1"]));
        assert!(
            daemon.stderr().contains("O_DIRECT ("),
            "{}",
            daemon.stderr()
        );
        let mut disk = Disk::attach(daemon.socket(), 1);
        let area = disk.mem().alloc(2 << 20, 4096) + skew;
        // One buffer, several, and more than fit into one aligned buffer.
        let shapes: [&[usize]; 4] = [&[512], &[4096, 4096], &[512, 1024, 65536], &[700 << 10]];
        let mut requests = 0;
        for (nth, shape) in shapes.iter().enumerate() {
            let sector = 3 + nth as u64 * 100;
            let mut at = area;
            let segments: Vec<(u64, usize)> = (shape.iter())
                .map(|len| {
                    at += *len as u64;
                    (at - *len as u64, *len)
                })
                .collect();
            let len = shape.iter().sum::<usize>();
            let into: Vec<Seg> = segments.iter().map(|s| Seg::writable(s.0, s.1)).collect();
            let done = disk.run(0, &Request::read(sector, &into));
            assert_eq!((done.status, done.len as usize), (status::OK, len + 1));
            let from = sector as usize * 512;
            assert!(disk.mem().read_vec(area, len) == content[from..from + len]);
            // Turned round and written elsewhere.
            let mut bytes = content[from..from + len].to_vec();
            bytes.reverse();
            disk.mem().write(area, &bytes);
            let of: Vec<Seg> = segments.iter().map(|s| Seg::readable(s.0, s.1)).collect();
            let done = disk.run(0, &Request::write(sector + 1, &of));
            assert_eq!((done.status, done.len), (status::OK, 1));
            assert!(disk.read(0, sector + 1, len) == bytes);
            disk.write(0, 0, &content);
            requests += 2;
        }
        disk.flush(0);
        assert!(fs::read(daemon.image()).expect("the image") == content);
        drop(disk);
        assert_eq!(bounced(daemon), if copies { requests } else { 0 });
    }
}

#[test]
fn what_the_page_cache_has_is_read_from_there_and_the_rest_from_the_disk() {
    const LEN: usize = 1 << 20;
    let content = Rng::new(62).bytes(LEN);
    let daemon = Daemon::start_ours(&Spec::image_of(&content).args(["--cache", "writeback"]));
    assert!(
        daemon.stderr().contains("through the host's page cache"),
        "{}",
        daemon.stderr()
    );
    let image = File::open(daemon.image()).expect("the image");
    fsync(&image).expect("what is dirty stays in the cache");
    fadvise(&image, 0, None, Advice::DontNeed).expect("the cache forgets");
    let mut disk = Disk::attach(daemon.socket(), 1);
    let mut pass = || {
        let before = read_from_disk(daemon.pid());
        assert!(disk.read(0, 0, LEN) == content);
        read_from_disk(daemon.pid()) - before
    };
    // The kernel reads ahead, but not beyond the end of a file.
    assert_eq!(pass(), LEN as u64, "all of it came from the disk");
    // Whoever is short of memory may take pages out of the cache.
    assert!((0..10).any(|_| pass() == 0), "none of it");
}

/// Bytes a process has made the disks read (procfs, `io`).
fn read_from_disk(pid: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/io")).expect("procfs");
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("read_bytes: "));
    line.expect("a line").parse().expect("a number")
}
