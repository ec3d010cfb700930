//! The in-flight region: whatever a front end hands over as what the process before left, it is
//! refused, or each chain in it is taken once and answered once, and then the region says so.

#![no_main]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost_user_blkmq::mq::request::Status;
use vhost_user_blkmq::virtio::inflight::{self, InflightRegion};
use vhost_user_blkmq::virtio::parse::{Parsed, parse};
use vhost_user_blkmq::virtio::pool::SegmentPool;
use vhost_user_blkmq::virtio::ring::Ring;
use vhost_user_blkmq_fuzz::guest::{AVAIL, DATA, Guest, USED, setup, shape};

#[derive(Arbitrary, Debug)]
struct Entry {
    inflight: u8,
    next: u8,
    counter: u8,
}

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    exponent: u8,
    /// Entries the front end says; the ring's size unless it says otherwise.
    entries: Option<u8>,
    version: u8,
    features: u8,
    desc_num: Option<u16>,
    last_batch_head: u8,
    used_idx: u16,
    /// The ring's used index, from there.
    published: u8,
    /// What the driver made available beyond what was taken.
    available: u8,
    /// A region that this program makes, and not one of the last release.
    ours: bool,
    table: Vec<Entry>,
    /// Written over all of it in the end.
    raw: Option<(u16, &'a [u8])>,
}

fuzz_target!(|input: Input<'_>| {
    let guest = Guest::new();
    let mut setup = setup(input.exponent, true, 0);
    let said = input.entries.map_or(setup.size, u16::from).max(1);
    let (file, size, at, entries) = match input.ours {
        true => {
            let file = inflight::create(2, said).expect("a region");
            (file, inflight::region_bytes(2), inflight::records_at(2), 1024)
        }
        false => {
            let file = memfd_create("region", MemfdFlags::CLOEXEC).expect("a file");
            let size = inflight::records_bytes(2, said);
            ftruncate(&file, size as u64).expect("it grows");
            (file, size, 0, said)
        }
    };
    let mut record = Vec::new();
    record.extend(u64::from(input.features / 128).to_ne_bytes());
    record.extend(u16::from(input.version % 3).to_ne_bytes());
    record.extend(input.desc_num.unwrap_or(entries).to_ne_bytes());
    record.extend(u16::from(input.last_batch_head).to_ne_bytes());
    record.extend(input.used_idx.to_ne_bytes());
    let mut flagged = 0;
    for entry in input.table.iter().take(usize::from(entries)) {
        let flag = if entry.inflight < 250 { entry.inflight & 1 } else { entry.inflight };
        flagged += u16::from(flag == 1);
        record.extend([flag, 0, 0, 0, 0, 0]);
        record.extend(u16::from(entry.next).to_ne_bytes());
        record.extend(u64::from(entry.counter).to_ne_bytes());
    }
    if let Some((at, bytes)) = input.raw {
        let at = usize::from(at) % (record.len() + 1);
        record.truncate(at);
        record.extend(bytes);
    }
    record.truncate(inflight::records_bytes(1, entries));
    let handle = File::from(file.try_clone().expect("a duplicate"));
    handle.write_all_at(&record, at as u64).expect("it fits");
    let region = InflightRegion::map(&file, 0, size as u64, 2, said).expect("a mapping");
    assert_eq!((region.records_at(), region.queue_size()), (at, entries));

    // Every chain is a flush: the ring is what is looked at.
    guest.write(DATA, &4u32.to_le_bytes());
    for head in 0..u64::from(setup.size) {
        let mut descriptor = Vec::new();
        descriptor.extend(DATA.to_le_bytes());
        descriptor.extend(16u32.to_le_bytes());
        descriptor.extend([1, 0]);
        descriptor.extend((setup.size - 1).to_le_bytes());
        if head == u64::from(setup.size) - 1 {
            descriptor.clear();
            descriptor.extend((DATA + 16).to_le_bytes());
            descriptor.extend(17u32.to_le_bytes());
            descriptor.extend([2, 0, 0, 0]);
        }
        guest.write(setup.desc + 16 * head, &descriptor);
        let number = u16::try_from(head).expect("small");
        guest.set(AVAIL + 4 + 2 * head, number);
    }
    let used = input.used_idx.wrapping_add(u16::from(input.published));
    guest.set(USED + 2, used);
    let offered = used.wrapping_add(flagged).wrapping_add(u16::from(input.available));
    guest.set(AVAIL + 2, offered);
    setup.next_avail = used;

    let mut ring = Ring::new(&setup, Arc::clone(&guest.table)).expect("the ring is in memory");
    let Some(queue) = region.queue(0, setup.size) else {
        assert!(setup.size > entries);
        return;
    };
    if ring.track(queue).is_err() {
        return;
    }
    let resumed = ring.to_resume();
    let (mut pool, shape) = (SegmentPool::new(), shape(0));
    let mut seen = vec![false; usize::from(setup.size)];
    let mut taken = 0;
    loop {
        // A driver that offers more than the ring has breaks it.
        let Ok(count) = ring.available() else {
            return;
        };
        if count == 0 {
            break;
        }
        let Ok(Some(head)) = ring.pop_head() else {
            return;
        };
        let index = usize::from(head.index());
        if taken < resumed {
            assert!(!seen[index], "head {index} was taken twice");
            seen[index] = true;
        }
        taken += 1;
        match parse(&mut ring, head, &shape, false, &mut pool) {
            Ok(Parsed::Request(_, io)) => ring.put_used(io.finish(Status::Ok, 0, &mut pool)),
            Ok(Parsed::Done(used)) => ring.put_used(used),
            Ok(Parsed::NoRoom(_)) => panic!("one request at a time always has room"),
            Err(_) => return,
        }
        ring.publish();
    }
    assert_eq!(ring.in_flight(), 0);
    assert!(taken >= resumed);
    let done = guest.get(USED + 2);
    assert_eq!(usize::from(done.wrapping_sub(used)), taken);
    drop(ring);

    // Nothing is left for the next process.
    setup.next_avail = done;
    let mut next = Ring::new(&setup, Arc::clone(&guest.table)).expect("the ring is in memory");
    next.track(region.queue(0, setup.size).expect("as before"))
        .expect("the region is as we left it");
    assert_eq!(next.to_resume(), 0);
});
