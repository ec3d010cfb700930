//! What the last release and the processes after it make of a region.

use std::fs::File;
use std::os::unix::fs::FileExt;

use proptest::prelude::*;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use super::super::tests::{bytes_of, old_region, region};
use super::super::{InflightError, InflightRegion, Notes, Tracker, create};
use super::*;

const NOTES: Notes = Notes {
    size_bytes: 1 << 30,
    logical_block_size: 512,
    read_only: false,
    write_through: true,
    in_doubt: false,
    started: true,
};

/// What the last release does with a ring.
#[derive(Debug, PartialEq, Eq)]
enum Old {
    /// It serves it without a record.
    Untracked,
    /// It does not start it.
    Refused,
    /// It begins a record.
    Begun,
    /// It goes on from a record.
    TakenUp,
}

/// What bb5a7f7 makes of a ring of `ring_size` in a region of `queue_size` at `offset`, written down from its source
/// and not with the code that is tested.
fn old_release(file: &File, offset: u64, index: u16, queue_size: u16, ring_size: u16) -> Old {
    if ring_size > queue_size {
        return Old::Untracked;
    }
    let stride = (16 + 16 * u64::from(queue_size)).div_ceil(64) * 64;
    let header = bytes_of(file, offset + u64::from(index) * stride, 16);
    let half = |at: usize| u16::from_ne_bytes([header[at], header[at + 1]]);
    match half(8) {
        0 => Old::Begun,
        1 if header[..8] == [0; 8] && half(10) == queue_size => Old::TakenUp,
        _ => Old::Refused,
    }
}

/// It forgets all records, as at a reset of the device, or the first `some` of them.
fn old_release_clears(file: &File, queue_size: u16, some: u16) {
    for index in 0..some {
        let record = records_bytes(index, queue_size) as u64;
        file.write_all_at(&[0, 0], record + 8).unwrap();
    }
}

fn map(file: &File, queues: u16, queue_size: u16) -> InflightRegion {
    InflightRegion::map(file, 0, region_bytes(queues) as u64, queues, queue_size).unwrap()
}

/// Begins the records of all queues, with head `index` of queue `index` in flight.
fn serve(region: &InflightRegion, queues: u16, ring_size: u16) {
    for index in 0..queues {
        let queue = region.queue(index, ring_size).unwrap();
        let (mut tracker, _) = Tracker::recover(queue, ring_size, 7).unwrap();
        tracker.take(index % ring_size);
    }
}

fn in_flight(region: &InflightRegion, index: u16, size: u16) -> Result<Vec<u16>, InflightError> {
    let queue = region.queue(index, size).unwrap();
    Tracker::recover(queue, size, 7).map(|(_, recovered)| recovered.heads)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// A restart with the last release, whether rings were started before or not.
    #[test]
    fn the_last_release_starts_no_ring_of_a_region_of_ours(
        queues in 1_u16..=4,
        queue_size in 1_u16..=1024,
        rings in 1_u16..=1024,
        served in any::<bool>(),
    ) {
        let (region, file) = region(queues, queue_size);
        let ring_size = rings.min(queue_size);
        if served {
            serve(&region, queues, ring_size);
        }
        for index in 0..queues {
            let does = old_release(&file, 0, index, queue_size, ring_size);
            prop_assert_eq!(does, Old::Refused, "queue {}", index);
        }
        // And this program after it has lost nothing.
        let again = map(&file, queues, queue_size);
        prop_assert!(again.layout.ours);
        if served {
            for index in 0..queues {
                let heads = in_flight(&again, index, ring_size).unwrap();
                prop_assert_eq!(heads, [index % ring_size]);
            }
        }
    }

    /// A take-over by the last release, which is told where the records are.
    #[test]
    fn the_last_release_finds_the_records_that_it_is_handed(
        queues in 1_u16..=4,
        queue_size in 1_u16..=1024,
        rings in 1_u16..=1024,
    ) {
        let (region, file) = region(queues, queue_size);
        serve(&region, queues, rings);
        region.write_notes(&NOTES);
        let offset = region.records_at() as u64;
        for index in 0..queues {
            let does = old_release(&file, offset, index, MAX_RING_SIZE, rings);
            prop_assert_eq!(does, Old::TakenUp, "queue {}", index);
        }
        // The next take-over brings the same description back.
        let size = region_bytes(queues) as u64 - offset;
        let again =
            InflightRegion::map(&file, offset, size, queues, MAX_RING_SIZE).unwrap();
        prop_assert_eq!((again.records_at(), again.notes()), (0, Some(NOTES)));
        for index in 0..queues {
            prop_assert_eq!(in_flight(&again, index, rings).unwrap(), [index % rings]);
        }
    }

    /// The guest begins anew under the last release. It is killed while it forgets, or later.
    #[test]
    fn records_that_the_last_release_forgot_do_not_come_back(
        queues in 1_u16..=4,
        queue_size in 1_u16..=1024,
        forgotten in 1_u16..=4,
    ) {
        let (region, file) = region(queues, queue_size);
        serve(&region, queues, queue_size);
        region.write_notes(&NOTES);
        old_release_clears(&file, queue_size, forgotten.min(queues));
        for _ in 0..2 {
            let next = map(&file, queues, queue_size);
            prop_assert_eq!((next.records_at(), next.queue_size()), (0, queue_size));
            prop_assert_eq!(next.notes(), None);
            for index in 0..queues {
                prop_assert_eq!(in_flight(&next, index, queue_size), Ok(vec![]));
                let does = old_release(&file, 0, index, queue_size, queue_size);
                prop_assert_eq!(does, Old::TakenUp, "either goes on with it");
            }
        }
    }
}

/// A ring that is larger than the front end said was never tracked by the last release.
#[test]
fn the_last_release_does_not_look_at_a_region_for_a_larger_ring() {
    let (_, file) = region(1, 128);
    assert_eq!(old_release(&file, 0, 0, 128, 1024), Old::Untracked);
}

#[test]
fn regions_of_the_last_release_are_understood() {
    for (queues, size) in [(1, 1), (4, 128), (1, 1024), (256, 1024), (7, 256)] {
        let (region, file) = old_region(queues, size);
        assert_eq!((region.records_at(), region.queue_size()), (0, size));
        serve(&region, queues, size);
        for index in 0..queues {
            let does = old_release(&file, 0, index, size, size);
            assert_eq!(does, Old::TakenUp);
        }
    }
}

/// A front end may say another size when it gives the region back.
#[test]
fn a_region_is_found_whatever_size_the_front_end_says_now() {
    let (region, file) = region(4, 128);
    serve(&region, 4, 256);
    for said in [1, 64, 256, 1024] {
        let again = map(&file, 4, said);
        assert!(again.layout.ours, "{said}");
        for index in 0..4 {
            assert_eq!(in_flight(&again, index, 256), Ok(vec![index]));
        }
    }
}

/// A front end can write everywhere. What it writes over is a region of another program then, and nothing
/// outside of the mapping is touched.
#[test]
fn a_mark_that_was_changed_is_no_mark() {
    let mark = records_at(2) as u64 + 2 * 16448;
    for (at, bytes) in [
        (0, 0_u64.to_ne_bytes()),
        (0, u64::MAX.to_ne_bytes()),
        (8, 0_u64.to_ne_bytes()),
        (8, 1025_u64.to_ne_bytes()),
        (8, (128 + (1_u64 << 16)).to_ne_bytes()),
        (8, u64::MAX.to_ne_bytes()),
    ] {
        let (_, file) = region(2, 128);
        file.write_all_at(&bytes, mark + at).unwrap();
        let next = map(&file, 2, 128);
        assert!(!next.layout.ours, "{at}: {bytes:?}");
        assert_eq!((next.records_at(), next.queue_size()), (0, 128));
        for index in 0..2 {
            let refused = Err(InflightError::Version(PLACEHOLDER));
            assert_eq!(in_flight(&next, index, 128), refused);
        }
    }
}

/// A file of the front end's that begins elsewhere, as one for several disks does.
#[test]
fn a_region_may_begin_anywhere_in_its_file() {
    let bytes = region_bytes(2);
    let file = File::from(create(2, 8).unwrap());
    let copy = File::from(memfd_create("several", MemfdFlags::empty()).unwrap());
    ftruncate(&copy, 8192 + bytes as u64).unwrap();
    copy.write_all_at(&bytes_of(&file, 0, bytes), 8192).unwrap();
    let region = InflightRegion::map(&copy, 8192, bytes as u64, 2, 8).unwrap();
    assert!(region.layout.ours);
    serve(&region, 2, 1024);
    assert_eq!(in_flight(&region, 1, 1024), Ok(vec![1]));
    let behind = bytes_of(&copy, 8192 + records_at(2) as u64 + 16448 + 16 + 16, 1);
    assert_eq!(behind, [1]);
}
