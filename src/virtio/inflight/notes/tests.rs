use std::fs::File;
use std::os::unix::fs::FileExt;

use super::super::tests::{live, old_region, region, stores_of};
use super::super::{records_at, region_bytes};
use super::*;

const NOTES: Notes = Notes {
    size_bytes: 1 << 40,
    logical_block_size: 4096,
    read_only: false,
    write_through: false,
    in_doubt: false,
    started: false,
};

/// Where the notes of a region for `queues` queues begin.
fn place(queues: u16) -> u64 {
    records_at(queues) as u64 + u64::from(queues) * 16448 + 64
}

fn poke(file: &File, at: u64, byte: u8) {
    file.write_all_at(&[byte], at).unwrap();
}

#[test]
fn notes_are_read_back_by_the_next_process() {
    let (region, file) = region(3, 128);
    assert_eq!(region.notes(), None);
    for n in 0..20_u32 {
        let notes = Notes {
            size_bytes: u64::from(n) << 30,
            write_through: n & 1 != 0,
            read_only: n & 2 != 0,
            started: n & 4 != 0,
            in_doubt: n & 8 != 0,
            ..NOTES
        };
        region.write_notes(&notes);
        let size = region_bytes(3) as u64;
        let next = InflightRegion::map(&file, 0, size, 3, 128).unwrap();
        assert_eq!(next.notes(), Some(notes), "change {n}");
    }
}

#[test]
fn notes_begin_with_their_version_behind_the_records() {
    let (region, file) = region(2, 8);
    region.write_notes(&NOTES);
    let mut words = [0; 128];
    file.read_exact_at(&mut words, place(2)).unwrap();
    let word = |index: usize| u64::from_ne_bytes(words[8 * index..][..8].try_into().unwrap());
    assert_eq!(word(0).to_be_bytes(), *b"BLKMQ\0\0\x01");
    assert_eq!([word(1), word(2), word(3)], [1, 1 << 40, 4096]);
    assert_eq!(word(8), 0, "the second slot has not been used");
    region.write_notes(&Notes {
        write_through: true,
        ..NOTES
    });
    file.read_exact_at(&mut words, place(2)).unwrap();
    let word = |index: usize| u64::from_ne_bytes(words[8 * index..][..8].try_into().unwrap());
    assert_eq!([word(9), word(11)], [2, 1 << 32 | 4096]);
}

/// A process that is killed at any store of a change leaves the notes before the change, or those after it.
#[test]
fn notes_survive_a_kill_at_every_store() {
    let after = Notes {
        write_through: true,
        size_bytes: 1 << 41,
        ..NOTES
    };
    let (whole, _) = region(1, 8);
    whole.write_notes(&NOTES);
    let stores = stores_of(|| whole.write_notes(&after));
    for first in [false, true] {
        for lifetime in 0..=stores {
            let (region, _) = region(1, 8);
            if !first {
                region.write_notes(&NOTES);
            }
            live(lifetime, || region.write_notes(&after));
            let before = (!first).then_some(NOTES);
            let expected = if lifetime == stores {
                Some(after)
            } else {
                before
            };
            assert_eq!(region.notes(), expected, "{lifetime} of {stores} stores");
            // The next process writes on.
            region.write_notes(&NOTES);
            assert_eq!(region.notes(), Some(NOTES));
        }
    }
}

#[test]
fn damaged_notes_are_no_notes() {
    for at in 0..64 {
        let (region, file) = region(1, 8);
        region.write_notes(&NOTES);
        let mut byte = [0];
        file.read_exact_at(&mut byte, place(1) + at).unwrap();
        poke(&file, place(1) + at, byte[0] ^ 0x80);
        assert_eq!(region.notes(), None, "byte {at}");
        region.write_notes(&NOTES);
        assert_eq!(region.notes(), Some(NOTES), "byte {at}");
    }
}

/// A region of the last release, or of another back end.
#[test]
fn a_region_without_a_mark_has_no_notes_and_records_of_the_size_said() {
    for size in [2112, 16448, 16448 + 192, region_bytes(1), 1 << 20] {
        let (_, file) = old_region(8, 1024);
        let region = InflightRegion::map(&file, 0, size as u64, 1, 128).unwrap();
        assert_eq!(
            (region.queue_size(), region.records_at()),
            (128, 0),
            "{size} bytes"
        );
        region.write_notes(&NOTES);
        assert_eq!(region.notes(), None, "{size} bytes");
        region.void_notes();
        assert!(region.queue(0, 256).is_none());
        let mut bytes = vec![0xff; 8 * 16448];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert!(bytes.iter().all(|byte| *byte == 0), "{size} bytes");
    }
}

/// Void notes are never older notes: the guest has chosen since.
#[test]
fn notes_that_are_void_survive_a_kill_at_every_store() {
    let other = Notes {
        write_through: true,
        ..NOTES
    };
    for slots in 0..3 {
        for lifetime in 0..=2 {
            let (region, _) = region(1, 8);
            for notes in [&NOTES, &other].into_iter().take(slots) {
                region.write_notes(notes);
            }
            let newest = region.notes();
            live(lifetime, || region.void_notes());
            let left = if lifetime < 2 { newest } else { None };
            assert_eq!(region.notes(), left, "{slots} slots, {lifetime} stores");
            region.void_notes();
            assert_eq!(region.notes(), None);
            // As after a take-over that failed.
            region.write_notes(&NOTES);
            assert_eq!(region.notes(), Some(NOTES));
        }
    }
}

/// A front end may round the size up that it was told.
#[test]
fn a_region_whose_size_was_rounded_up_is_still_ours() {
    let (region, file) = region(1, 128);
    region.write_notes(&NOTES);
    let size = region_bytes(1) as u64;
    let again = InflightRegion::map(&file, 0, size + 4096, 1, 128).unwrap();
    assert_eq!((again.queue_size(), again.notes()), (1024, Some(NOTES)));
}
