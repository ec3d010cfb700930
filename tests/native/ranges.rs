//! Flush, discard, write-zeroes and the serial number.

use crate::support::disk::{Range, kind, status};
use crate::support::*;
use rustix::fs::{FallocateFlags, fallocate};
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

const MIB: usize = 1 << 20;

/// Bytes the file system keeps for a file.
fn allocated(path: &Path) -> u64 {
    let file = File::options()
        .write(true)
        .open(path)
        .expect("the image can be opened");
    // Blocks of delayed allocation are not counted before they are written.
    file.sync_all().expect("the image can be synced");
    fs::metadata(path).expect("the image is there").blocks() * 512
}

/// True if files beside `path` can have holes punched into them.
fn punches_holes(path: &Path) -> bool {
    let probe = path.with_extension("probe");
    fs::write(&probe, vec![1; MIB]).expect("a file beside the image can be written");
    let file = File::options()
        .write(true)
        .open(&probe)
        .expect("the probe can be opened");
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(&file, flags, 0, MIB as u64).is_ok()
}

#[test]
fn a_discarded_range_reads_as_zeroes_and_frees_space() {
    let content = Rng::new(20).bytes(8 * MIB);
    let daemon = Daemon::start(&Spec::image_of(&content).args(["--discard", "on"]));
    let mut disk = Disk::attach(daemon.socket(), 1);
    let before = allocated(daemon.image());
    let range = Range::new(2048, 4096);
    let done = disk.clear(0, kind::DISCARD, range);
    assert_eq!((done.status, done.len), (status::OK, 1));
    disk.flush(0);
    assert!(disk.read(0, 0, MIB) == content[..MIB], "before the range");
    assert!(
        disk.read(0, 6144, MIB) == content[3 * MIB..4 * MIB],
        "after it"
    );
    if punches_holes(daemon.image()) {
        assert!(disk.read(0, 2048, 2 * MIB).iter().all(|byte| *byte == 0));
        assert!(allocated(daemon.image()) < before, "space came free");
    }
    let len = fs::metadata(daemon.image())
        .expect("the image is there")
        .len();
    assert_eq!(len, content.len() as u64, "the image keeps its size");
}

#[test]
fn zeroes_are_written_with_and_without_unmap() {
    let content = Rng::new(21).bytes(8 * MIB);
    let daemon = Daemon::start(&Spec::image_of(&content).args(["--discard", "on"]));
    let mut disk = Disk::attach(daemon.socket(), 1);
    let before = allocated(daemon.image());
    // Odd sectors: no file system's block boundary.
    for (range, from) in [
        (Range::new(1001, 3003), 1001),
        (Range::new(9001, 3003).unmap(), 9001),
    ] {
        let done = disk.clear(0, kind::WRITE_ZEROES, range);
        assert_eq!((done.status, done.len), (status::OK, 1));
        let mut model = content.clone();
        let start = from * 512;
        model[start..start + 3003 * 512].fill(0);
        let near = (from as u64 - 10, start - 10 * 512, 3023 * 512);
        assert!(disk.read(0, near.0, near.2) == model[near.1..near.1 + near.2]);
        if range.flags == 0 {
            assert!(allocated(daemon.image()) >= before, "the space is kept");
        }
    }
    disk.flush(0);
    let len = fs::metadata(daemon.image())
        .expect("the image is there")
        .len();
    assert_eq!(len, content.len() as u64, "the image keeps its size");
}

#[test]
fn several_ranges_in_one_request_are_all_cleared() {
    let content = vec![0xee; 8 * MIB];
    let daemon = Daemon::start(&Spec::image_of(&content));
    let mut disk = Disk::attach(daemon.socket(), 1);
    let config = disk.front.config().expect("a config space");
    let most = config.max_write_zeroes_seg.min(16);
    let ranges: Vec<Range> = (0..most)
        .map(|n| Range::new(u64::from(n) * 100, 10 + n))
        .collect();
    let request = Request::ranges(kind::WRITE_ZEROES, disk.mem(), &ranges);
    let done = disk.run(0, &request);
    assert_eq!((done.status, done.len), (status::OK, 1));
    let read = disk.read(0, 0, 100 * 512 * most as usize);
    for (n, part) in read.chunks(100 * 512).enumerate() {
        let cleared = (10 + n) * 512;
        assert!(part[..cleared].iter().all(|byte| *byte == 0), "range {n}");
        assert!(
            part[cleared..].iter().all(|byte| *byte == 0xee),
            "after range {n}"
        );
    }
}

#[test]
fn a_range_may_reach_the_last_sector() {
    let daemon = Daemon::start(&Spec::image_of(&vec![0xee; MIB]));
    let mut disk = Disk::attach(daemon.socket(), 1);
    let done = disk.clear(0, kind::WRITE_ZEROES, Range::new(2047, 1));
    assert_eq!(done.status, status::OK);
    assert!(disk.read(0, 2047, 512).iter().all(|byte| *byte == 0));
    assert!(disk.read(0, 2046, 512).iter().all(|byte| *byte == 0xee));
}

#[test]
fn the_serial_number_is_twenty_bytes() {
    let whole = "12345678901234567890";
    for serial in ["disk-7", whole] {
        let daemon = Daemon::start(&Spec::image(MIB as u64).args(["--serial", serial]));
        let mut disk = Disk::attach(daemon.socket(), 1);
        let gpa = disk.mem().alloc(32, 1);
        disk.mem().fill(gpa, 32, 0xa5);
        let done = disk.run(0, &Request::get_id(Seg::writable(gpa, 20)));
        assert_eq!((done.status, done.len), (status::OK, 21));
        let mut expected = [0; 20];
        expected[..serial.len()].copy_from_slice(serial.as_bytes());
        let mut answer = disk.mem().read_vec(gpa, 32);
        let after = answer.split_off(20);
        assert_eq!(answer, expected);
        assert_eq!(after, [0xa5; 12], "nothing is written past the buffer");
        drop(disk);
        assert_eq!(daemon.stop().disks[0].serial, serial);
    }
}

#[test]
fn a_flush_is_counted_and_answered() {
    let daemon = Daemon::start(&Spec::image(MIB as u64));
    let mut disk = Disk::attach(daemon.socket(), 2);
    for n in 0..10 {
        disk.write(n % 2, n as u64, &[n as u8; 512]);
        disk.flush(n % 2);
    }
    drop(disk);
    let summary = daemon.stop();
    if !Daemon::is_peer() {
        assert_eq!(summary.total(|queue| queue.flush), 10);
    }
}
