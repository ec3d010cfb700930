//! Guest memory of which a part is lost while requests use it: what is answered OK is on the disk, and no zeros are
//! that the guest did not write.

use crate::support::disk::{kind, status};
use crate::support::*;
use rustix::fs::ftruncate;
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Instant;

/// Where the data is: in a region of its own, so that rings and headers stay.
const DATA: u64 = 1 << 30;
const PAGE: u64 = 4096;
const PAGES: u64 = 64;
/// What the image holds before.
const OLD: u8 = 0xa5;

/// What a request writes.
fn byte(request: u64) -> u8 {
    1 + (request % 100) as u8
}

/// Where in its page the data of a request begins, and where on the disk it goes.
fn place(request: u64, skew: u64) -> (u64, u64) {
    (DATA + request * PAGE + skew, request * 8)
}

/// Whether the daemon has closed the session.
fn has_left(front: &Front) -> bool {
    let mut byte = [0];
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    !matches!(
        recv(front.socket(), &mut byte, flags),
        Ok((1, _)) | Err(Errno::AGAIN)
    )
}

/// Truncates the second half of the data at some moment of a batch of writes, one from each page, and looks at what
/// became of it. Returns how many writes from pages that stayed went well.
fn lose_half(daemon: &Daemon, image: &Path, skew: u64, before: u64) -> u64 {
    let fill = vec![OLD; (PAGES * PAGE) as usize];
    let content = File::options()
        .read(true)
        .write(true)
        .open(image)
        .expect("the image");
    content.write_all_at(&fill, 0).expect("the old content");
    let setup = Setup {
        memory: vec![(0, 16 << 20), (DATA, 1 << 20)],
        ..Setup::default()
    };
    let mut disk =
        Disk::attach_with(daemon.socket(), &setup, 2, QueueSetup::default()).expect("a session");
    for request in 0..PAGES {
        let (gpa, _) = place(request, skew);
        disk.mem().fill(gpa, 512, byte(request));
    }
    // Lost and kept pages in turn, and on both queues.
    let order: Vec<u64> = (0..PAGES / 2).flat_map(|n| [n, n + PAGES / 2]).collect();
    let push = |disk: &mut Disk, part: &[u64]| {
        for request in part {
            let (gpa, sector) = place(*request, skew);
            let data = [Seg::readable(gpa, 512)];
            let queue = &mut disk.queues[(request % 2) as usize];
            queue
                .push(*request, kind::OUT, 0, sector, &data)
                .expect("room");
        }
    };
    let (first, second) = order.split_at(before as usize);
    push(&mut disk, first);
    disk.queues.iter_mut().for_each(Queue::publish);
    push(&mut disk, second);
    let memory = disk.mem().regions()[1].clone();
    ftruncate(memory.fd(), PAGES / 2 * PAGE).expect("a memfd shrinks");
    disk.queues.iter_mut().for_each(Queue::publish);
    // Either all is answered, or the session is closed when what was in flight has ended.
    let mut answers = BTreeMap::new();
    let deadline = Instant::now() + DEADLINE;
    let mut closed = false;
    loop {
        for queue in &mut disk.queues {
            while let Some(done) = queue.reap() {
                answers.insert(done.token, done.status);
            }
        }
        if answers.len() as u64 == PAGES || closed {
            break;
        }
        // Looked at once more after it is closed.
        closed = has_left(&disk.front);
        assert!(Instant::now() < deadline, "{} answers", answers.len());
        std::thread::yield_now();
    }
    drop(disk);
    let mut good = 0;
    for request in 0..PAGES {
        let mut found = [0; 512];
        content
            .read_exact_at(&mut found, request * PAGE)
            .expect("the content");
        let answer = answers.get(&request).copied();
        let what = format!("request {request}, skew {skew}, {before} before: {answer:?}");
        match answer {
            Some(status::OK) => {
                assert_eq!(found, [byte(request); 512], "{what}");
                good += u64::from(request < PAGES / 2);
            }
            Some(status::IOERR) | None => assert!(
                found == [OLD; 512] || found == [byte(request); 512],
                "{what}: {found:?}"
            ),
            other => panic!("{what}: {other:?}"),
        }
        assert!(
            request < PAGES / 2 || before > 0 || answer != Some(status::OK),
            "{what}: it was gone"
        );
    }
    good
}

fn loses(image: &Path, args: &[&str]) {
    File::create(image)
        .and_then(|file| file.set_len(1 << 20))
        .expect("an image");
    let daemon = Daemon::start_ours(&Spec::path(image).args(args.iter().copied()));
    // 513 bytes into a page O_DIRECT refuses a buffer, and it is copied.
    let mut good = 0;
    for skew in [0, 513] {
        for before in [0, 1, 8, PAGES / 2, PAGES - 4] {
            good += lose_half(&daemon, image, skew, before);
        }
    }
    assert!(good > PAGES / 2, "what is still there is written: {good}");
    daemon.stop();
}

#[test]
fn no_zeros_are_written_from_lost_memory_past_the_page_cache() {
    let dir = tempfile::tempdir().expect("a directory");
    loses(&dir.path().join("image"), &["--cache", "none"]);
}

#[test]
fn no_zeros_are_written_from_lost_memory_through_the_page_cache() {
    let dir = tempfile::tempdir().expect("a directory");
    loses(&dir.path().join("image"), &["--cache", "writeback"]);
}

#[test]
fn no_zeros_are_written_from_lost_memory_to_an_image_in_memory() {
    let dir = tempfile::tempdir_in("/dev/shm").expect("/dev/shm is there");
    loses(&dir.path().join("image"), &[]);
}
