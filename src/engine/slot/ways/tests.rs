use std::fs::File;
use std::ptr::{self, NonNull};

use libc::iovec;
use proptest::prelude::*;

use super::super::{Next, Slot, Stage};
use crate::engine::memory::PAGE_BYTES;
use crate::engine::target::{Disk, FileTarget, IoPoll, Target};
use crate::engine::{EngineCounters, Errno};
use crate::mq::request::Op;
use crate::sys::filesystem::FileSystem;

fn disk() -> Disk {
    let target = Target::File(FileTarget {
        file: File::open("/dev/null").unwrap().into(),
        file_system: FileSystem::Local("ext4"),
        size_bytes: 1 << 30,
        direct: true,
        memory_align: 4,
        offset_align: 512,
        granularity: 0,
        block_device: false,
        ignore_flush: false,
        io_poll: IoPoll::Always,
        mapping: None,
    });
    Disk::new(0, target).unwrap()
}

/// A transfer under way of one segment at this address; no data is touched.
fn slot(own: &mut [iovec; 1], address: usize, len: usize) -> Slot {
    own[0] = iovec {
        iov_base: ptr::without_provenance_mut(address),
        iov_len: len,
    };
    let mut slot = Slot::new(NonNull::new(own.as_mut_ptr()).unwrap());
    slot.claim(1, 0, Op::Write, len as u64);
    // SAFETY: the caller keeps the segment, and nothing is submitted. Unsafe because the slot cannot
    // know.
    unsafe { slot.start_transfer(0, own.as_ptr(), 1, true, false, None) };
    slot
}

const NOTHING: [iovec; 1] = [iovec {
    iov_base: ptr::null_mut(),
    iov_len: 0,
}];

#[test]
fn a_buffer_refused_for_its_alignment_is_copied_and_so_are_those_that_follow() {
    let (mut disk, mut own, mut counters) = (disk(), NOTHING, EngineCounters::default());
    let mut slot = slot(&mut own, 0x10000 + 512, 8192);
    let next = slot.on_cqe(-libc::EINVAL, &mut disk, &[], &mut counters);
    assert_eq!((next, slot.wants_bounce), (Next::Issue, true));
    assert_eq!(disk.align, (4, 512), "not proved yet");
    slot.learn_alignment(&mut disk);
    assert_eq!(disk.align, (1024, 512), "lengths were not to blame");
    slot.learn_alignment(&mut disk);
    assert_eq!(disk.align, (1024, 512));
}

#[test]
fn a_refusal_that_alignment_does_not_explain_is_an_error() {
    let (mut disk, mut own, mut counters) = (disk(), NOTHING, EngineCounters::default());
    let mut slot = slot(&mut own, 0x10000, 2 * PAGE_BYTES);
    let next = slot.on_cqe(-libc::EINVAL, &mut disk, &[], &mut counters);
    assert_eq!(next, Next::Done(Err(Errno(libc::EINVAL))));
    assert_eq!(disk.align, (4, 512));
}

#[test]
fn what_cannot_be_polled_goes_the_usual_way() {
    for (errno, polls_on) in [
        (libc::EAGAIN, true),
        (libc::EINVAL, true),
        (libc::EOPNOTSUPP, false),
    ] {
        let (mut disk, mut own, mut counters) = (disk(), NOTHING, EngineCounters::default());
        let mut slot = slot(&mut own, 0x10000, 4096);
        slot.polled = true;
        assert!(slot.goes_polled());
        let next = slot.on_cqe(-errno, &mut disk, &[], &mut counters);
        assert_eq!((next, slot.goes_polled()), (Next::Issue, false));
        assert_eq!(disk.can.poll, polls_on, "{errno}");
        assert_eq!(counters.retried, 0, "all tries are left");
        let next = slot.on_cqe(4096, &mut disk, &[], &mut counters);
        assert_eq!(next, Next::Done(Ok(4096)));
    }
    // A real error is one.
    let (mut disk, mut own, mut counters) = (disk(), NOTHING, EngineCounters::default());
    let mut slot = slot(&mut own, 0x10000, 4096);
    slot.polled = true;
    let next = slot.on_cqe(-libc::EIO, &mut disk, &[], &mut counters);
    assert_eq!(next, Next::Done(Err(Errno(libc::EIO))));
    assert_eq!(slot.stage, Stage::Transfer);
}

proptest! {
    /// A device that demands more than it says: whatever comes gets through, and each thing it refuses
    /// is learned, so that few are refused before no more are.
    #[test]
    fn any_alignment_that_a_device_demands_is_learned(
        demanded in (2u32..=12, 9u32..=12),
        transfers in proptest::collection::vec((2u32..=13, 1usize..64, 9u32..=13, 1usize..8), 1..60),
    ) {
        let demanded = (1 << demanded.0, 1 << demanded.1);
        let (mut disk, mut own, mut counters) = (disk(), NOTHING, EngineCounters::default());
        let refuses = |(addresses, lengths): (usize, usize), address: usize, len: usize| {
            address & (addresses - 1) != 0 || len & (lengths - 1) != 0
        };
        let mut refused = 0;
        for (address_unit, address, len_unit, len) in transfers {
            let (address, len) = (address << address_unit, len << len_unit);
            // As it is started: what is known to be refused is not tried.
            let known = refuses(disk.align, address, len);
            let mut slot = slot(&mut own, address, len);
            if !known && refuses(demanded, address, len) {
                let next = slot.on_cqe(-libc::EINVAL, &mut disk, &[], &mut counters);
                prop_assert_eq!((next, slot.wants_bounce), (Next::Issue, true));
                refused += 1;
            }
            let next = slot.on_cqe(i32::try_from(len).unwrap(), &mut disk, &[], &mut counters);
            prop_assert_eq!(next, Next::Done(Ok(len as u64)));
            prop_assert!(!refuses(demanded, address, len) || refuses(disk.align, address, len));
            prop_assert!(disk.align.0 <= PAGE_BYTES && disk.align.1 <= PAGE_BYTES);
        }
        // Each makes one of the two coarser, by a power of two at least.
        prop_assert!(refused <= 10 + 3, "{refused} were tried in vain");
    }
}
