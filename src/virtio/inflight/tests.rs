use std::cell::Cell;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use super::recover::Recovered;
use super::*;

thread_local! {
    /// How many more stores the process lives to see; `None`: it is not going to be killed.
    static LIFE: Cell<Option<u64>> = const { Cell::new(None) };
    /// Stores so far.
    static STORES: Cell<u64> = const { Cell::new(0) };
}

/// What unwinds where a process is killed.
struct Killed;

pub(super) fn kill_point() {
    STORES.set(STORES.get() + 1);
    if let Some(left) = LIFE.get() {
        match left.checked_sub(1) {
            // Not a panic: nobody is told.
            None => resume_unwind(Box::new(Killed)),
            some => LIFE.set(some),
        }
    }
}

/// Runs `process` until it has made `stores` stores; `None` if it was killed before its end.
pub(in crate::virtio) fn live<T>(stores: u64, process: impl FnOnce() -> T) -> Option<T> {
    LIFE.set(Some(stores));
    let end = catch_unwind(AssertUnwindSafe(process));
    LIFE.set(None);
    match end {
        Ok(value) => Some(value),
        Err(killed) if killed.is::<Killed>() => None,
        Err(panic) => resume_unwind(panic),
    }
}

/// How many stores `process` makes.
pub(in crate::virtio) fn stores_of(process: impl FnOnce()) -> u64 {
    let before = STORES.get();
    process();
    STORES.get() - before
}

/// A region for `queues` queues of `size`, and its file.
pub(in crate::virtio) fn region(queues: u16, size: u16) -> (InflightRegion, File) {
    let file = create(queues, size).unwrap();
    let bytes = region_bytes(queues) as u64;
    let region = InflightRegion::map(&file, 0, bytes, queues, size).unwrap();
    (region, file.into())
}

/// The same as the last release left it: records of the size said, and nothing else. A record of a small ring has few
/// entries here, so that few stores begin it.
pub(in crate::virtio) fn old_region(queues: u16, size: u16) -> (InflightRegion, File) {
    let file = memfd_create("old", MemfdFlags::ALLOW_SEALING).unwrap();
    let bytes = records_bytes(queues, size) as u64;
    ftruncate(&file, bytes).unwrap();
    let region = InflightRegion::map(&file, 0, bytes, queues, size).unwrap();
    (region, file.into())
}

/// A record in bytes, as the protocol's document has it.
fn record(version: u16, last: u16, used: u16, entries: &[(u8, u16, u64)]) -> Vec<u8> {
    let mut bytes = 0_u64.to_ne_bytes().to_vec();
    let size = u16::try_from(entries.len()).unwrap();
    for word in [version, size, last, used] {
        bytes.extend(word.to_ne_bytes());
    }
    for &(inflight, next, counter) in entries {
        bytes.extend([inflight, 0, 0, 0, 0, 0]);
        bytes.extend(next.to_ne_bytes());
        bytes.extend(counter.to_ne_bytes());
    }
    bytes
}

pub(super) fn bytes_of(file: &File, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, offset).unwrap();
    bytes
}

#[test]
fn records_are_where_the_document_puts_them() {
    assert_eq!(records_bytes(1, 1), 64);
    assert_eq!(records_bytes(1, 4), 128);
    assert_eq!(records_bytes(3, 128), 3 * 2112);
    assert_eq!(records_bytes(256, 1024), 256 * 16448);
    assert_eq!(
        [1, 3, 4, 256].map(records_at),
        [1 << 16, 1 << 16, 2 << 16, 65 << 16]
    );
    assert_eq!(region_bytes(3), (1 << 16) + 3 * 16448 + 64 + 128);

    let (region, file) = old_region(2, 4);
    let queue = region.queue(1, 4).unwrap();
    let (mut tracker, recovered) = Tracker::recover(queue, 4, 7).unwrap();
    assert_eq!(recovered.next_avail, 7);
    assert_eq!(bytes_of(&file, 128, 80), record(1, 0, 7, &[(0, 0, 0); 4]));
    for head in [2, 0, 3] {
        tracker.take(head);
    }
    let taken = [(1, 0, 1), (0, 0, 0), (1, 0, 0), (1, 0, 2)];
    assert_eq!(bytes_of(&file, 128, 80), record(1, 0, 7, &taken));
    tracker.put(3);
    tracker.put(2);
    tracker.publishes();
    let put = [(1, 0, 1), (0, 0, 0), (1, 3, 0), (1, 0, 2)];
    assert_eq!(bytes_of(&file, 128, 80), record(1, 2, 7, &put));
    tracker.published(2, 9);
    let published = [(1, 0, 1), (0, 0, 0), (0, 3, 0), (0, 0, 2)];
    assert_eq!(bytes_of(&file, 128, 80), record(1, 2, 9, &published));
    // The other queue has not been touched.
    assert_eq!(bytes_of(&file, 0, 128), [0; 128]);

    region.clear();
    let queue = region.queue(1, 4).unwrap();
    let (_, recovered) = Tracker::recover(queue, 4, 0).unwrap();
    assert_eq!(
        recovered,
        Recovered {
            heads: vec![],
            next_avail: 0
        }
    );
}

#[test]
fn a_new_region_cannot_be_made_shorter() {
    let file = create(4, 128).unwrap();
    assert_eq!(ftruncate(&file, 0), Err(Errno::PERM));
    assert!(is_memory(&file));
    // One that could be is sealed when it comes, where that is allowed.
    let open = memfd_create("open", MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&open, 4096).unwrap();
    assert!(is_memory(&open));
    assert_eq!(ftruncate(&open, 0), Err(Errno::PERM));
    let closed = memfd_create("closed", MemfdFlags::empty()).unwrap();
    assert!(is_memory(&closed));
    let elsewhere = File::open("/proc/self/maps").unwrap();
    assert!(!is_memory(&elsewhere.into()));
}

/// The front end truncates the file while a ring keeps its account there.
#[test]
fn a_region_that_is_taken_away_harms_nobody() {
    let file = memfd_create("short", MemfdFlags::empty()).unwrap();
    ftruncate(&file, 8192).unwrap();
    let region = InflightRegion::map(&file, 0, 8192, 1, 256).unwrap();
    let queue = region.queue(0, 256).unwrap();
    let (mut tracker, _) = Tracker::recover(queue, 256, 0).unwrap();
    tracker.take(255);
    ftruncate(&file, 0).unwrap();
    for head in 0..255 {
        tracker.take(head);
        tracker.put(head);
    }
    tracker.publishes();
    tracker.published(255, 255);
    assert!(region.mapping.is_lost());
    region.clear();
}

#[test]
fn a_region_has_no_record_for_a_queue_beyond_it() {
    let (region, _) = old_region(2, 128);
    assert!(region.queue(1, 128).is_some());
    assert!(region.queue(1, 64).is_some());
    assert!(region.queue(2, 64).is_none());
    assert!(region.queue(0, 256).is_none());
}

/// QEMU 10.0.13 asks for a region for its `queue-size` of 128, and starts rings of 1024.
#[test]
fn a_new_region_has_room_for_the_largest_ring_whatever_the_front_end_says() {
    let (region, file) = region(3, 128);
    assert_eq!(region.queue_size(), 1024);
    let queue = region.queue(2, 1024).unwrap();
    let (mut tracker, _) = Tracker::recover(queue, 1024, 0).unwrap();
    tracker.take(1023);
    let record = (1 << 16) + 2 * 16448;
    assert_eq!(bytes_of(&file, record + 10, 2), 1024_u16.to_ne_bytes());
    assert_eq!(bytes_of(&file, record + 16 + 16 * 1023, 1), [1]);
    let again = InflightRegion::map(&file, 0, region_bytes(3) as u64, 3, 128).unwrap();
    let queue = again.queue(2, 1024).unwrap();
    let (_, recovered) = Tracker::recover(queue, 1024, 0).unwrap();
    assert_eq!(recovered.heads, [1023]);
    assert!(region.queue(3, 128).is_none());
}

/// What recovery says to a record of four entries in bytes, for a ring of `size` at used index `used`.
fn recover(bytes: &[u8], size: u16, used: u16) -> Result<Recovered, InflightError> {
    let (region, file) = old_region(1, 4);
    file.write_all_at(bytes, 0).unwrap();
    let before = bytes_of(&file, 0, bytes.len());
    let outcome = Tracker::recover(region.queue(0, size).unwrap(), size, used);
    if outcome.is_err() {
        assert_eq!(bytes_of(&file, 0, bytes.len()), before);
    }
    outcome.map(|(_, recovered)| recovered)
}

#[test]
fn lies_are_refused_and_change_nothing() {
    let good = [(1, 0, 5), (0, 0, 0), (1, 0, 4), (0, 2, 0)];
    let found = |heads: &[u16], next| {
        Ok(Recovered {
            heads: heads.to_vec(),
            next_avail: next,
        })
    };
    assert_eq!(recover(&record(1, 0, 10, &good), 4, 10), found(&[2, 0], 12));
    // The last batch is 3 → 2, and only its flags are cleared.
    assert_eq!(recover(&record(1, 3, 8, &good), 4, 10), found(&[0], 11));
    assert_eq!(recover(&record(1, 3, 0xffff, &good), 4, 1), found(&[0], 2));

    assert_eq!(
        recover(&record(2, 0, 10, &good), 4, 10),
        Err(InflightError::Version(2))
    );
    let mut features = record(1, 0, 10, &good);
    features[7] = 1;
    let features = recover(&features, 4, 10);
    assert!(matches!(features, Err(InflightError::Features(_))));
    assert_eq!(
        recover(&record(1, 0, 10, &good[..3]), 4, 10),
        Err(InflightError::Entries { found: 3, said: 4 })
    );
    // A ring of two entries has no head 2.
    assert_eq!(
        recover(&record(1, 0, 10, &good), 2, 10),
        Err(InflightError::Head { head: 2, size: 2 })
    );
    let flag = [(1, 0, 5), (0, 0, 0), (0xff, 0, 4), (0, 2, 0)];
    assert_eq!(
        recover(&record(1, 0, 10, &flag), 4, 10),
        Err(InflightError::Flag {
            head: 2,
            value: 0xff
        })
    );
    for recorded in [5, 11] {
        assert_eq!(
            recover(&record(1, 0, recorded, &good), 4, 10),
            Err(InflightError::UsedIndex {
                recorded,
                used: 10,
                size: 4
            })
        );
    }
    // A last batch out of the ring, at its head and later, and in a circle.
    for (last, next, head, steps) in [(4, 0, 4, 0), (3, 0xffff, 0xffff, 1), (3, 3, 3, 1)] {
        let mut entries = good;
        entries[3].1 = next;
        assert_eq!(
            recover(&record(1, last, 8, &entries), 4, 10),
            Err(InflightError::Batch { head, steps })
        );
    }
}

#[test]
fn odd_counters_and_an_idle_record_of_another_time_are_no_lies() {
    let all = |counter| [(1, 0, counter); 4];
    for counter in [0, 7, u64::MAX] {
        let recovered = recover(&record(1, 0, 3, &all(counter)), 4, 3).unwrap();
        assert_eq!(recovered.heads, [0, 1, 2, 3]);
        assert_eq!(recovered.next_avail, 7);
    }
    // Nothing in flight, and the ring has begun anew since.
    let idle = record(1, 0xffff, 500, &[(0, 9, 9); 4]);
    let recovered = recover(&idle, 4, 0).unwrap();
    assert_eq!(
        recovered,
        Recovered {
            heads: vec![],
            next_avail: 0
        }
    );
}
