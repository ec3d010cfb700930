//! Requests no good driver sends: each gets its answer, and the disk goes on.

use crate::support::disk::{Range, kind, status};
use crate::support::front::request::SET_VRING_ERR;
use crate::support::*;
use std::fs;
use std::os::fd::AsFd;

const DISK: u64 = 1 << 20;
const SECTORS: u64 = DISK / SECTOR;

/// Sends each request, alternately direct and indirect; `expected` is status and used length.
fn check(disk: &mut Disk, cases: Vec<(&str, Request, (u8, u32))>) {
    for (name, request, expected) in cases {
        for indirect in [false, true] {
            disk.queues[0].set_indirect(indirect);
            let done = disk.run(0, &request);
            assert_eq!(
                (done.status, done.len),
                expected,
                "{name} (indirect: {indirect}): status and used length"
            );
            let good = disk.read(0, 0, 512);
            assert_eq!(good.len(), 512, "after {name} the disk goes on");
        }
    }
}

#[test]
fn unknown_requests_are_unsupported() {
    let daemon = Daemon::start(&Spec::image(DISK));
    let mut disk = Disk::attach(daemon.socket(), 1);
    let gpa = disk.mem().alloc(4096, 4096);
    let unsupported = (status::UNSUPP, 1);
    let mut cases = Vec::new();
    for kind in [2, 3, 5, 9, 99, u32::MAX, kind::SECURE_ERASE] {
        cases.push(("no data", Request::new(kind, 0, &[]), unsupported));
        let data = [Seg::readable(gpa, 512)];
        cases.push(("readable data", Request::new(kind, 0, &data), unsupported));
        let data = [Seg::writable(gpa, 512)];
        cases.push(("writable data", Request::new(kind, 0, &data), unsupported));
    }
    check(&mut disk, cases);
}

#[test]
fn bad_reads_and_writes_are_errors() {
    let content = Rng::new(30).bytes(DISK as usize);
    let daemon = Daemon::start(&Spec::image_of(&content));
    let mut disk = Disk::attach(daemon.socket(), 1);
    let gpa = disk.mem().alloc(65536, 4096);
    let failed = (status::IOERR, 1);
    let r = |len| Seg::readable(gpa, len);
    let w = |len| Seg::writable(gpa, len);
    let nowhere = 1 << 50;
    let mut cases = vec![
        (
            "a read of readable memory",
            Request::read(0, &[r(512)]),
            failed,
        ),
        (
            "a write of writable memory",
            Request::write(0, &[w(512)]),
            failed,
        ),
        (
            "a read into memory that is not there",
            Request::read(0, &[Seg::writable(nowhere, 512)]),
            failed,
        ),
        (
            "a write from memory that is not there",
            Request::write(0, &[Seg::readable(nowhere, 512)]),
            failed,
        ),
        (
            "a read into the end of the address space",
            Request::read(0, &[Seg::writable(u64::MAX - 100, 512)]),
            failed,
        ),
        (
            "a readable buffer behind a writable one",
            Request::read(0, &[w(512), r(512)]),
            failed,
        ),
        (
            "a short header",
            Request::read(0, &[]).split_header(&[8]),
            failed,
        ),
    ];
    for sector in [
        SECTORS,
        SECTORS + 1,
        1 << 40,
        1 << 55,
        u64::MAX,
        u64::MAX / 512,
    ] {
        cases.push((
            "a read past the end",
            Request::read(sector, &[w(512)]),
            failed,
        ));
        cases.push((
            "a write past the end",
            Request::write(sector, &[r(512)]),
            failed,
        ));
    }
    cases.push((
        "a read over the end",
        Request::read(SECTORS - 1, &[w(1024)]),
        failed,
    ));
    cases.push((
        "a write over the end",
        Request::write(SECTORS - 1, &[r(1024)]),
        failed,
    ));
    for len in [1, 511, 513, 1000] {
        cases.push((
            "a read of half sectors",
            Request::read(0, &[w(len)]),
            failed,
        ));
        cases.push((
            "a write of half sectors",
            Request::write(0, &[r(len)]),
            failed,
        ));
    }
    check(&mut disk, cases);
    assert!(
        disk.read_all(0) == content,
        "no bad request changed anything"
    );
    drop(disk);
    let image = fs::read(daemon.image()).expect("the image can be read");
    assert!(image == content, "nor did it grow the image");
    daemon.stop();
}

#[test]
fn bad_ranges_and_flushes_are_refused() {
    let content = Rng::new(31).bytes(DISK as usize);
    let daemon = Daemon::start(&Spec::image_of(&content).args(["--discard", "on"]));
    let mut disk = Disk::attach(daemon.socket(), 1);
    let config = disk.front.config().expect("a config space");
    let failed = (status::IOERR, 1);
    let unsupported = (status::UNSUPP, 1);
    let mut cases = Vec::new();
    for kind in [kind::DISCARD, kind::WRITE_ZEROES] {
        let most = if kind == kind::DISCARD {
            config.max_discard_seg
        } else {
            config.max_write_zeroes_seg
        };
        let ranges = |ranges: &[Range]| Request::ranges(kind, disk.mem(), ranges);
        let flagged = Range {
            flags: 0x8000_0000,
            ..Range::new(0, 8)
        };
        let too_many = vec![Range::new(0, 8); most as usize + 1];
        let gpa = disk.mem().alloc(64, 16);
        cases.extend([
            (
                "a range past the end",
                ranges(&[Range::new(SECTORS, 8)]),
                failed,
            ),
            (
                "a range over the end",
                ranges(&[Range::new(SECTORS - 4, 8)]),
                failed,
            ),
            (
                "a range beyond all",
                ranges(&[Range::new(u64::MAX - 3, 8)]),
                failed,
            ),
            (
                "the longest range",
                ranges(&[Range::new(0, u32::MAX)]),
                failed,
            ),
            ("an unknown flag", ranges(&[flagged]), unsupported),
            ("more ranges than allowed", ranges(&too_many), failed),
            (
                "half a range",
                Request::new(kind, 0, &[Seg::readable(gpa, 8)]),
                failed,
            ),
            (
                "a range and a half",
                Request::new(kind, 0, &[Seg::readable(gpa, 24)]),
                failed,
            ),
            ("no range", Request::new(kind, 0, &[]), failed),
            (
                "a writable range",
                Request::new(kind, 0, &[Seg::writable(gpa, 16)]),
                failed,
            ),
        ]);
    }
    let unmap = [Range::new(0, 8).unmap()];
    cases.push((
        "a discard with the unmap flag",
        Request::ranges(kind::DISCARD, disk.mem(), &unmap),
        unsupported,
    ));
    cases.push((
        "a flush whose sector is not 0, which says nothing",
        Request::new(kind::FLUSH, 8, &[]),
        (status::OK, 1),
    ));
    check(&mut disk, cases);
    assert!(
        disk.read_all(0) == content,
        "no bad request changed anything"
    );
}

#[test]
fn a_chain_that_cannot_be_answered_stops_its_queue_only() {
    let content = Rng::new(34).bytes(DISK as usize);
    let daemon = Daemon::start(&Spec::image_of(&content));
    let mut disk = Disk::attach(daemon.socket(), 2);
    let gpa = disk.mem().alloc(4096, 4096);
    for round in 0..3 {
        let err = Event::new().expect("an eventfd");
        disk.front
            .send_vring_fd(SET_VRING_ERR, 0, Some(err.as_fd()))
            .expect("the error eventfd is set");
        let request = Request::write(0, &[Seg::readable(gpa, 512)]).no_status();
        request.push(&mut disk.queues[0], 0);
        disk.queues[0].publish();
        assert_eq!(err.wait(DEADLINE), 1, "the front end is told");
        assert!(
            daemon.wait_for_message("queue 0: stopped"),
            "and so is the log"
        );
        assert!(disk.read(1, 0, 4096) == content[..4096], "queue 1 goes on");
        assert!(disk.queues[0].reap().is_none(), "nothing came back");
        // The driver resets its queue and starts again.
        disk.front.stop(0).expect("the ring stops");
        disk.queues[0].reset(0);
        disk.front.start(&disk.queues[0]).expect("the ring starts");
        disk.front.enable(0, true).expect("the ring is enabled");
        assert!(
            disk.read(0, 0, 4096) == content[..4096],
            "round {round}: queue 0 is back"
        );
    }
    assert!(disk.read_all(1) == content, "nothing was written");
}

#[test]
fn good_and_bad_requests_in_one_batch_get_their_own_answers() {
    let content = Rng::new(32).bytes(DISK as usize);
    let daemon = Daemon::start(&Spec::image_of(&content));
    let mut disk = Disk::attach(daemon.socket(), 1);
    let gpa = disk.mem().alloc(64 * 512, 4096);
    let queue = &mut disk.queues[0];
    let expected = |n: u64| match n % 4 {
        0 | 2 => (status::OK, 513),
        1 => (status::IOERR, 1),
        _ => (status::UNSUPP, 1),
    };
    for n in 0..40 {
        let data = [Seg::writable(gpa + n * 512, 512)];
        let (kind, sector) = match n % 4 {
            1 => (kind::IN, SECTORS + n),
            3 => (77, n),
            _ => (kind::IN, n),
        };
        queue
            .push(n, kind, 0, sector, &data)
            .expect("the ring has room");
    }
    queue.publish();
    for done in disk::finish_all(queue, 40) {
        let n = done.token;
        assert_eq!((done.status, done.len), expected(n), "request {n}");
        if done.status == status::OK {
            let at = n as usize * 512;
            assert!(disk.front.mem.read_vec(gpa + n * 512, 512) == content[at..at + 512]);
        }
    }
}

#[test]
fn a_read_only_disk_is_read_only() {
    let content = Rng::new(33).bytes(DISK as usize);
    let daemon = Daemon::start(&Spec::image_of(&content).read_only());
    let mut disk = Disk::attach(daemon.socket(), 1);
    assert_ne!(disk.front.offered & features::RO, 0, "and says so");
    let gpa = disk.mem().alloc(4096, 4096);
    let failed = (status::IOERR, 1);
    let range = [Range::new(0, 8)];
    let cases = vec![
        (
            "a write",
            Request::write(0, &[Seg::readable(gpa, 4096)]),
            failed,
        ),
        (
            "a discard",
            Request::ranges(kind::DISCARD, disk.mem(), &range),
            failed,
        ),
        (
            "a write-zeroes",
            Request::ranges(kind::WRITE_ZEROES, disk.mem(), &range),
            failed,
        ),
        ("a flush", Request::flush(), (status::OK, 1)),
    ];
    check(&mut disk, cases);
    assert!(disk.read_all(0) == content);
    drop(disk);
    let image = fs::read(daemon.image()).expect("the image can be read");
    assert!(image == content);
    daemon.stop();
}
