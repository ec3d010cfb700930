use super::*;
use vm_memory::GuestAddress;

fn region(gpa: u64, len: u64, host: usize) -> Region {
    Region {
        gpa,
        len,
        host: NonNull::without_provenance(host.try_into().unwrap()),
    }
}

/// A table that is only asked for addresses: nothing is mapped.
fn table(regions: &[Region]) -> Result<MemoryTable, MemoryError> {
    // SAFETY: these tests never access the memory. Unsafe because the constructor is.
    unsafe { MemoryTable::new(regions.to_vec(), Arc::new(())) }
}

fn pieces(table: &MemoryTable, gpa: u64, len: u64) -> (bool, Vec<(usize, usize)>) {
    let mut pieces = Vec::new();
    let whole = table.host_segments(gpa, len, |host, bytes| {
        pieces.push((host.addr().get(), bytes));
        true
    });
    (whole, pieces)
}

#[test]
fn addresses_are_found_in_their_region_only() {
    let table = table(&[
        region(0x3000, 0x1000, 0x70_0000),
        region(0x1000, 0x1000, 0x50_0000),
        region(0x2000, 0x1000, 0x90_0000),
    ])
    .unwrap();
    let host = |gpa, len| table.host(gpa, len).map(|host| host.addr().get());
    assert_eq!(host(0x1000, 0x1000), Some(0x50_0000));
    assert_eq!(host(0x1fff, 1), Some(0x50_0fff));
    assert_eq!(host(0x1fff, 2), None);
    assert_eq!(host(0x0fff, 1), None);
    assert_eq!(host(0x3abc, 4), Some(0x70_0abc));
    assert_eq!(host(0x3fff, 1), Some(0x70_0fff));
    assert_eq!(host(0x4000, 0), None);
    assert_eq!(host(0x4000, 1), None);
    assert_eq!(host(u64::MAX, 1), None);
    assert_eq!(host(0x1000, u64::MAX), None);

    let mut hit = Region::NONE;
    for (gpa, len) in [
        (0x1000, 1),
        (0x1004, 8),
        (0x2000, 1),
        (0x1fff, 2),
        (0x4000, 1),
        (0, 1),
    ] {
        assert_eq!(
            table.host_near(&mut hit, gpa, len),
            table.host(gpa, len),
            "{gpa:#x} {len}"
        );
    }
}

#[test]
fn a_buffer_may_go_on_in_the_next_region() {
    let table = table(&[
        region(0x1000, 0x1000, 0x50_0000),
        region(0x2000, 0x10, 0x90_0000),
        region(0x2010, 0x1000, 0x70_0000),
        region(0x8000, 0x1000, 0x30_0000),
    ])
    .unwrap();
    assert_eq!(pieces(&table, 0x1ffe, 2), (true, vec![(0x50_0ffe, 2)]));
    let three = vec![(0x50_0ffe, 2), (0x90_0000, 0x10), (0x70_0000, 1)];
    assert_eq!(pieces(&table, 0x1ffe, 0x13), (true, three));
    assert_eq!(pieces(&table, 0x300f, 2), (false, vec![(0x70_0fff, 1)]));
    assert_eq!(pieces(&table, 0x7fff, 2), (false, vec![]));
    assert_eq!(pieces(&table, 0x5000, 0), (true, vec![]));
    assert!(!pieces(&table, u64::MAX, u64::MAX).0);
    let mut calls = 0;
    assert!(!table.host_segments(0x1fff, 2, |_, _| {
        calls += 1;
        false
    }));
    assert_eq!(calls, 1);
}

#[test]
fn impossible_regions_are_refused() {
    let error = |regions: &[Region]| table(regions).unwrap_err();
    let length = |gpa, len| MemoryError::Length { gpa, len };
    assert_eq!(error(&[region(0x1000, 0, 0x1000)]), length(0x1000, 0));
    assert_eq!(error(&[region(u64::MAX, 2, 0x1000)]), length(u64::MAX, 2));
    assert_eq!(error(&[region(0, u64::MAX, 0x1000)]), length(0, u64::MAX));
    assert_eq!(
        error(&[region(0, 0x1000, usize::MAX - 1)]),
        length(0, 0x1000)
    );
    let overlap = [
        region(0x2000, 0x1000, 0x1000),
        region(0x1000, 0x1001, 0x9000),
    ];
    assert_eq!(
        error(&overlap),
        MemoryError::Overlap {
            first: 0x1000,
            second: 0x2000
        }
    );
    assert!(table(&[]).unwrap().host(0, 1).is_none());
}

#[test]
fn the_mappings_live_as_long_as_the_table() {
    let ranges = [
        (GuestAddress(0x1000), 0x1000),
        (GuestAddress(0x4000), 0x2000),
    ];
    let memory = Arc::new(GuestMemoryMmap::<()>::from_ranges(&ranges).unwrap());
    let weak = Arc::downgrade(&memory);
    let table = MemoryTable::from_guest_memory(memory, None).unwrap();
    let found: Vec<_> = table
        .regions()
        .iter()
        .map(|region| (region.gpa, region.len))
        .collect();
    assert_eq!(found, [(0x1000, 0x1000), (0x4000, 0x2000)]);
    assert!(weak.upgrade().is_some());
    let mut bytes = [1; 2];
    assert!(table.read(0x5ffe, &mut bytes));
    assert_eq!(bytes, [0, 0]);
    assert!(!table.read(0x5fff, &mut bytes));
    drop(table);
    assert!(weak.upgrade().is_none());
}
