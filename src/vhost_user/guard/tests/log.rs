//! The dirty log: what is refused, and what the one who marks pages hears of the rest.

use std::sync::Mutex;

use super::*;
use crate::virtio::dirty_log::DirtyLog;

const PAGE: u64 = 0x1000;
const LOG_ALL: u64 = 1 << 26;
const USER: u64 = 0x7000_0000;

/// Takes down what it is told.
#[derive(Debug, Default)]
struct Keeper(Mutex<Vec<String>>);

impl LogKeeper for Keeper {
    fn set_log(&self, log: DirtyLog) {
        log.mark(0, 1);
        let line = format!("a log of {} pages", log.pages());
        self.0.lock().unwrap().push(line);
    }

    fn log_used_at(&self, queue: u32, address: Option<u64>) {
        let line = format!("queue {queue} at {address:x?}");
        self.0.lock().unwrap().push(line);
    }
}

/// The session's end, how many messages passed, and what the keeper heard.
fn exchange(messages: Vec<Sent>) -> (String, usize, Vec<String>) {
    let keeper = Arc::new(Keeper::default());
    let Bench {
        front_end,
        device,
        guard,
    } = bench();
    let guard = guard.with_log(Arc::clone(&keeper) as Arc<dyn LogKeeper>);
    for message in opening().iter().chain(&messages) {
        send(&front_end, message);
    }
    drop(front_end);
    let end = guard.run().to_string();
    let passed = find_all(&device).len() - opening().len();
    let heard = std::mem::take(&mut *keeper.0.lock().unwrap());
    (end, passed, heard)
}

#[track_caller]
fn heard(messages: Vec<Sent>) -> Vec<String> {
    let count = messages.len();
    let (end, passed, heard) = exchange(messages);
    assert_eq!(
        (passed, &*end),
        (count, "the front end closed the connection")
    );
    heard
}

#[track_caller]
fn refuse(messages: Vec<Sent>, text: &str) {
    let count = messages.len();
    let (end, passed, _) = exchange(messages);
    assert!(end.contains(text), "{end}");
    assert_eq!(passed, count - 1, "{end}");
}

fn memory(pages: u64) -> Sent {
    mem_table(&[[0, pages * PAGE, USER, 0]]).with(file_of(pages * PAGE))
}

fn log_of(size: u64, offset: u64, file: impl Into<OwnedFd>) -> Sent {
    u64s(R::SET_LOG_BASE, &[size, offset]).with(file)
}

fn features(extra: u64) -> Sent {
    u64s(R::SET_FEATURES, &[PROTOCOL_FEATURES | extra])
}

fn ring(queue: u64, flags: u64, log: u64) -> Sent {
    let words = [queue | flags << 32, USER, USER, USER, log];
    u64s(R::SET_VRING_ADDR, &words)
}

#[test]
fn a_log_is_mapped_where_the_message_says() {
    let file = file_of(3 * PAGE);
    let copy = file.try_clone().unwrap();
    let heard = heard(vec![memory(16), log_of(2, PAGE, file)]);
    assert_eq!(heard, ["a log of 16 pages"]);
    let mut bytes = vec![0; 3 * PAGE as usize];
    std::os::unix::fs::FileExt::read_exact_at(&copy, &mut bytes, 0).unwrap();
    let marked: Vec<usize> = (0..bytes.len()).filter(|at| bytes[*at] != 0).collect();
    assert_eq!(marked, [PAGE as usize], "the keeper's mark on page 0");
}

#[test]
fn a_log_is_part_of_a_file_that_can_be_written() {
    refuse(
        vec![log_of(0, 0, file_of(PAGE))],
        "dirty log of 0x0 bytes at 0x0",
    );
    refuse(vec![log_of(1, 8, file_of(PAGE))], "at 0x8: expected some");
    refuse(
        vec![log_of(u64::MAX, PAGE, file_of(PAGE))],
        "dirty log of 0xffffffffffffffff bytes",
    );
    refuse(
        vec![log_of(PAGE, PAGE, file_of(2 * PAGE - 1))],
        "needs 0x2000 bytes of a file of 0x1fff on tmpfs",
    );
    refuse(vec![log_of(8, 0, event())], "of an eventfd");
    let elsewhere = File::options()
        .read(true)
        .write(true)
        .open("/proc/self/coredump_filter");
    refuse(
        vec![log_of(1, 0, elsewhere.unwrap())],
        "on file system 0x9fa0",
    );
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(PAGE).unwrap();
    let read_only = File::open(file.path()).unwrap();
    refuse(
        vec![log_of(8, 0, read_only)],
        "of a file not open for reading and writing",
    );
    refuse(vec![u64s(R::SET_LOG_BASE, &[8, 0])], "0 file descriptors");
    refuse(
        vec![u64s(R::SET_LOG_BASE, &[8]).with(file_of(PAGE))],
        "payload of 8 bytes",
    );
}

#[test]
fn a_log_reaches_as_far_as_the_memory_does_while_pages_are_marked() {
    let log = |bytes| log_of(bytes, 0, file_of(PAGE));
    let short = "dirty log of 16 pages for guest memory that ends at page 17";
    refuse(vec![memory(17), log(2)], short);
    refuse(vec![log(2), memory(17), features(LOG_ALL)], short);
    refuse(vec![log(2), features(LOG_ALL), memory(17)], short);
    let more = one_region(R::ADD_MEM_REG, [16 * PAGE, 1, USER + 16 * PAGE, 0]);
    refuse(
        vec![log(2), features(LOG_ALL), memory(16), more.with(file_of(1))],
        short,
    );
    // Before, and after a longer one has come, the memory may be larger.
    let heard = heard(vec![
        log(2),
        memory(17),
        log(3),
        features(LOG_ALL),
        features(0),
        memory(100),
    ]);
    assert_eq!(heard, ["a log of 16 pages", "a log of 24 pages"]);
}

#[test]
fn the_keeper_hears_where_each_used_ring_is_logged() {
    let heard = heard(vec![
        memory(16),
        ring(0, 0, u64::MAX),
        ring(1, 1, 0x4004),
        ring(1, 0, 0x4004),
    ]);
    assert_eq!(
        heard,
        [
            "queue 0 at None",
            "queue 1 at Some(4004)",
            "queue 1 at None"
        ]
    );
    refuse(
        vec![memory(16), ring(2, 1, 0x4002)],
        "used ring's log at 0x4002 is not aligned to 4",
    );
}
