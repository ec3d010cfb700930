//! Faults fed to a slot by hand: what no disk at hand would do to us.

mod waiting;

use std::fs::File;
use std::sync::Arc;

use io_uring::opcode as op;

use super::*;
use crate::engine::memory::Memory;
use crate::engine::target::{FileTarget, IoPoll};
use crate::engine::{SyncFault, ZERO_BYTES};
use crate::mq::limits::MAX_SEGMENTS;
use crate::sys::filesystem::FileSystem;

const EAGAIN: i32 = -libc::EAGAIN;
const EINTR: i32 = -libc::EINTR;
const EOPNOTSUPP: i32 = -libc::EOPNOTSUPP;
const EIO: Next = Next::Done(Err(Errno(libc::EIO)));

/// A slot with a disk, the memory it needs, and a shorthand for feeding it.
struct Bench {
    slot: Slot,
    disk: Disk,
    counters: EngineCounters,
    extents: Vec<Extent>,
    _own: Vec<iovec>,
}

impl Bench {
    fn new(direct: bool, block_device: bool) -> Self {
        let file = File::open("/dev/null").unwrap().into();
        let target = Target::File(FileTarget {
            file,
            file_system: FileSystem::Local("ext4"),
            size_bytes: 1 << 40,
            direct,
            memory_align: 512,
            offset_align: 512,
            granularity: 0,
            block_device,
            ignore_flush: false,
            io_poll: IoPoll::Never,
            mapping: None,
        });
        let empty = iovec {
            iov_base: ptr::null_mut(),
            iov_len: 0,
        };
        let mut own = vec![empty; usize::from(MAX_SEGMENTS)];
        Bench {
            slot: Slot::new(NonNull::new(own.as_mut_ptr()).unwrap()),
            disk: Disk::new(0, target).unwrap(),
            counters: EngineCounters::default(),
            extents: Vec::new(),
            _own: own,
        }
    }

    /// Starts a transfer; its buffers are never touched because nothing is bounced.
    fn transfer(&mut self, op: Op, segments: &[iovec], fua: bool) {
        let total = segments.iter().map(|s| s.iov_len as u64).sum();
        self.slot.claim(1, 0, op, total);
        let count = u32::try_from(segments.len()).unwrap();
        // SAFETY: the tests keep the segments alive, and nothing is submitted. Unsafe because the
        // slot cannot know.
        unsafe {
            self.slot
                .start_transfer(4096, segments.as_ptr(), count, false, fua, None)
        };
    }

    fn ranges(&mut self, op: Op, lens: &[u64], unmap: bool, fua: bool) -> Next {
        self.extents = lens
            .iter()
            .enumerate()
            .map(|(i, len)| Extent {
                offset: (i as u64) << 30,
                len: *len,
            })
            .collect();
        self.slot.claim(1, 0, op, lens.iter().sum());
        let count = u16::try_from(lens.len()).unwrap();
        let can = self.disk.can;
        self.slot
            .start_ranges(&self.extents, count, fua, unmap, can, &mut self.counters)
    }

    fn feed(&mut self, res: i32) -> Next {
        self.slot
            .on_cqe(res, &mut self.disk, &self.extents, &mut self.counters)
    }

    /// The code of the SQE the slot would submit.
    fn code(&mut self) -> u32 {
        self.slot
            .sqe(&self.disk, &self.extents, ptr::null())
            .get_opcode()
    }

    /// What is left of the segments, as (address, length).
    fn left(&self) -> Vec<(usize, usize)> {
        let count = self.slot.segment_count as usize;
        // SAFETY: the slot's segments are valid while the test runs. Unsafe because they are raw.
        let left = unsafe { std::slice::from_raw_parts(self.slot.segments, count) };
        left.iter()
            .map(|s| (s.iov_base.addr(), s.iov_len))
            .collect()
    }
}

fn segments(list: &[(usize, usize)]) -> Vec<iovec> {
    list.iter()
        .map(|(a, l)| iovec {
            iov_base: ptr::without_provenance_mut(*a),
            iov_len: *l,
        })
        .collect()
}

#[test]
fn a_whole_transfer_is_done_with_its_bytes() {
    let mut b = Bench::new(false, false);
    let list = segments(&[(0x1000, 4096)]);
    b.transfer(Op::Read, &list, false);
    assert_eq!(b.code(), u32::from(op::Read::CODE));
    assert_eq!(b.feed(4096), Next::Done(Ok(4096)));
}

#[test]
fn a_short_transfer_goes_on_inside_a_segment_without_changing_the_callers_array() {
    let mut b = Bench::new(false, false);
    let list = segments(&[(0x1000, 1000), (0x5000, 0), (0x9000, 3000)]);
    b.transfer(Op::Write, &list, false);
    assert_eq!(b.code(), u32::from(op::Writev::CODE));
    assert_eq!(b.feed(300), Next::Issue);
    assert_eq!(b.left(), [(0x1000 + 300, 700), (0x5000, 0), (0x9000, 3000)]);
    assert_eq!(b.feed(700), Next::Issue);
    assert_eq!(b.left(), [(0x9000, 3000)]);
    assert_eq!(b.code(), u32::from(op::Write::CODE));
    assert_eq!(b.feed(1), Next::Issue);
    assert_eq!(b.left(), [(0x9001, 2999)]);
    assert_eq!(b.feed(2999), Next::Done(Ok(4000)));
    assert_eq!(list[0].iov_len, 1000);
    assert_eq!(b.counters.continued, 3);
}

#[test]
fn a_transfer_that_moves_nothing_more_is_an_error() {
    for op in [Op::Read, Op::Write] {
        let mut b = Bench::new(false, false);
        let list = segments(&[(0x1000, 4096)]);
        b.transfer(op, &list, false);
        assert_eq!(b.feed(512), Next::Issue);
        assert_eq!(b.feed(0), EIO);
    }
}

#[test]
fn a_direct_transfer_goes_on_at_an_aligned_place() {
    let mut b = Bench::new(true, false);
    let list = segments(&[(0x1000, 4096)]);
    b.transfer(Op::Read, &list, false);
    assert_eq!(b.feed(1100), Next::Issue);
    assert_eq!((b.slot.done, b.left()), (1024, vec![(0x1400, 3072)]));
    // A file that ends inside a block never gets further.
    assert_eq!(b.feed(76), EIO);
}

#[test]
fn random_short_transfers_add_up() {
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = |below: u64| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed % below
    };
    for _ in 0..500 {
        let count = 1 + random(40);
        let list: Vec<_> = (0..count)
            .map(|i| {
                (
                    usize::try_from(i << 20).unwrap(),
                    usize::try_from(random(3000)).unwrap(),
                )
            })
            .collect();
        let mut bytes: Vec<usize> = list.iter().flat_map(|(a, l)| *a..a + l).collect();
        if bytes.is_empty() {
            continue;
        }
        let list = segments(&list);
        let mut b = Bench::new(false, false);
        b.transfer(Op::Read, &list, false);
        let total = bytes.len() as u64;
        loop {
            let moved = 1 + usize::try_from(random(bytes.len() as u64)).unwrap();
            bytes.drain(..moved);
            let next = b.feed(i32::try_from(moved).unwrap());
            if bytes.is_empty() {
                assert_eq!(next, Next::Done(Ok(total)));
                break;
            }
            assert_eq!(next, Next::Issue);
            let left: Vec<usize> = b.left().iter().flat_map(|(a, l)| *a..a + l).collect();
            assert_eq!(left, bytes);
        }
    }
}

#[test]
fn eagain_is_tried_again_with_delays_and_then_reported() {
    let mut b = Bench::new(false, false);
    let list = segments(&[(0x1000, 4096)]);
    b.transfer(Op::Read, &list, false);
    assert_eq!(b.feed(EAGAIN), Next::Issue);
    assert_eq!(b.code(), u32::from(op::Read::CODE), "first without a delay");
    for _ in 1..RETRIES {
        assert_eq!(b.feed(EAGAIN), Next::Issue);
        assert_eq!(b.code(), u32::from(op::Timeout::CODE));
        assert_eq!(b.feed(-libc::ETIME), Next::Issue);
        assert_eq!(b.code(), u32::from(op::Read::CODE));
    }
    assert_eq!(b.feed(EAGAIN), Next::Done(Err(Errno(libc::EAGAIN))));
    assert_eq!(b.counters.retried, u64::from(RETRIES));
}

#[test]
fn progress_renews_the_patience() {
    let mut b = Bench::new(false, false);
    let list = segments(&[(0x1000, 4096)]);
    b.transfer(Op::Write, &list, false);
    for round in 0..4 {
        for _ in 0..RETRIES {
            assert_eq!(b.feed(EINTR), Next::Issue);
            assert_eq!(b.code(), u32::from(op::Write::CODE), "EINTR needs no delay");
        }
        let expected = if round == 3 {
            Next::Done(Ok(4096))
        } else {
            Next::Issue
        };
        assert_eq!(b.feed(1024), expected);
    }
}

#[test]
fn a_durable_write_falls_back_to_a_sync() {
    let mut b = Bench::new(false, false);
    b.disk.can.nowait = false;
    let list = segments(&[(0x1000, 4096)]);
    b.transfer(Op::Write, &list, true);
    b.code();
    assert_eq!(b.feed(EOPNOTSUPP), Next::Issue);
    assert_eq!(b.code(), u32::from(op::Write::CODE));
    assert_eq!(b.feed(4096), Next::Issue);
    assert_eq!(b.code(), u32::from(op::Fsync::CODE));
    assert_eq!(b.feed(0), Next::Done(Ok(4096)));
    b.slot.release();
    // It is remembered: the next one does not ask.
    b.transfer(Op::Write, &list, true);
    b.code();
    assert_eq!(b.feed(4096), Next::Issue);
    assert_eq!(b.feed(-libc::EIO), EIO, "a failed sync fails the write");
}

#[test]
fn a_durable_write_falls_back_when_another_one_learned_it_meanwhile() {
    let mut b = Bench::new(false, false);
    let list = segments(&[(0x1000, 4096)]);
    b.transfer(Op::Write, &list, true);
    b.code();
    b.disk.can.dsync = false;
    assert_eq!(b.feed(EOPNOTSUPP), Next::Issue);
    b.code();
    assert_eq!(
        b.feed(EOPNOTSUPP),
        Next::Done(Err(Errno(libc::EOPNOTSUPP))),
        "not for ever"
    );
}

/// FUSE accepts `RWF_DSYNC` and drops it.
#[test]
fn a_durable_write_is_followed_by_a_sync_where_the_flag_is_not_known_to_be_kept() {
    for file_system in [
        FileSystem::Fuse,
        FileSystem::Network("NFS"),
        FileSystem::Other(1),
    ] {
        let mut b = Bench::new(true, false);
        let Target::File(mut file) = b.disk.target else {
            unreachable!("made so")
        };
        file.file_system = file_system;
        b.disk = Disk::new(0, Target::File(file)).unwrap();
        let list = segments(&[(0x1000, 4096)]);
        b.transfer(Op::Write, &list, true);
        assert_eq!(b.code(), u32::from(op::Write::CODE));
        assert_eq!(b.feed(4096), Next::Issue, "{file_system}");
        assert_eq!(b.code(), u32::from(op::Fsync::CODE));
        assert_eq!(b.feed(0), Next::Done(Ok(4096)));
    }
}

#[test]
fn a_durable_write_is_one_step_where_the_disk_can() {
    let mut b = Bench::new(false, false);
    let list = segments(&[(0x1000, 4096)]);
    b.transfer(Op::Write, &list, true);
    b.code();
    assert_eq!(b.feed(4096), Next::Done(Ok(4096)));
}

#[test]
fn an_error_ends_the_command() {
    for errno in [libc::EIO, libc::ENOSPC, libc::EBADF, libc::EOPNOTSUPP] {
        let mut b = Bench::new(false, false);
        let list = segments(&[(0x1000, 4096)]);
        b.transfer(Op::Write, &list, false);
        assert_eq!(b.feed(512), Next::Issue);
        assert_eq!(b.feed(-errno), Next::Done(Err(Errno(errno))));
    }
}

#[test]
fn discard_tries_what_there_is_and_is_a_hint_in_the_end() {
    let mut b = Bench::new(false, true);
    assert_eq!(
        b.ranges(Op::Discard, &[4096, 0, 8192], false, false),
        Next::Issue
    );
    assert_eq!(b.slot.stage, Stage::Range(Method::Discard));
    assert_eq!(b.code(), u32::from(op::UringCmd16::CODE));
    assert_eq!(b.feed(EOPNOTSUPP), Next::Issue);
    assert_eq!(b.slot.stage, Stage::Range(Method::Punch));
    assert_eq!(b.code(), u32::from(op::Fallocate::CODE));
    assert_eq!(b.feed(EOPNOTSUPP), Next::Done(Ok(12288)));
    assert_eq!(b.counters.discards_ignored, 2, "the empty range is none");
    b.slot.release();
    assert_eq!(
        b.ranges(Op::Discard, &[4096], false, false),
        Next::Done(Ok(4096)),
        "remembered"
    );
}

#[test]
fn einval_is_about_one_range_only() {
    let mut b = Bench::new(false, true);
    b.ranges(Op::Discard, &[4096, 4096], false, false);
    b.code();
    assert_eq!(b.feed(-libc::EINVAL), Next::Issue);
    assert_eq!(b.slot.stage, Stage::Range(Method::Punch));
    b.code();
    assert_eq!(b.feed(0), Next::Issue);
    assert_eq!(b.slot.stage, Stage::Range(Method::Discard));
    b.code();
    assert_eq!(b.feed(0), Next::Done(Ok(8192)));
}

#[test]
fn zeroing_ends_in_writing_zeroes() {
    let long = u64::from(ZERO_BYTES) + 4096;
    let mut b = Bench::new(false, false);
    assert_eq!(
        b.ranges(Op::WriteZeroes, &[long, 512], true, true),
        Next::Issue
    );
    assert_eq!(b.slot.stage, Stage::Range(Method::Punch));
    assert_eq!(b.feed(EOPNOTSUPP), Next::Issue);
    assert_eq!(b.slot.stage, Stage::Range(Method::ZeroRange));
    assert_eq!(b.feed(EOPNOTSUPP), Next::Issue);
    assert_eq!(b.slot.stage, Stage::Range(Method::Write));
    assert_eq!(b.feed(1 << 20), Next::Issue);
    assert_eq!(b.feed(1000), Next::Issue, "short writes go on");
    assert_eq!(b.feed(3096), Next::Issue);
    assert_eq!((b.slot.range, b.slot.done), (1, 0));
    assert_eq!(b.feed(512), Next::Issue);
    assert_eq!(b.slot.stage, Stage::Sync, "durable");
    assert_eq!(b.feed(0), Next::Done(Ok(long + 512)));
}

#[test]
fn zeroing_that_keeps_the_space_does_not_punch() {
    let mut b = Bench::new(false, false);
    b.ranges(Op::WriteZeroes, &[4096], false, false);
    assert_eq!(b.slot.stage, Stage::Range(Method::ZeroRange));
    assert_eq!(b.feed(EOPNOTSUPP), Next::Issue);
    assert_eq!(b.slot.stage, Stage::Range(Method::Write));
    assert_eq!(b.feed(0), EIO);
}

#[test]
fn zeroing_fails_when_the_disk_fails() {
    let mut b = Bench::new(false, false);
    b.ranges(Op::WriteZeroes, &[4096], true, false);
    assert_eq!(b.feed(-libc::ENOSPC), Next::Done(Err(Errno(libc::ENOSPC))));
}

#[test]
#[should_panic(expected = "a driver tag is used twice")]
fn a_tag_in_use_is_not_claimed() {
    let mut b = Bench::new(false, false);
    let list = segments(&[(0x1000, 4096)]);
    b.transfer(Op::Read, &list, false);
    b.slot.claim(2, 0, Op::Read, 512);
}

impl Bench {
    fn flush(&mut self) {
        self.slot.claim(1, 0, Op::Flush, 0);
        self.slot.start_flush();
    }
}

/// fsync(2) reports a failed write-back once, and takes the pages for clean.
#[test]
fn no_sync_of_the_page_cache_is_believed_after_one_has_failed() {
    let mut b = Bench::new(false, false);
    b.flush();
    assert_eq!(b.feed(-libc::EIO), EIO);
    b.slot.release();
    b.flush();
    assert_eq!(b.feed(0), EIO, "the kernel has forgotten, we have not");
}

#[test]
fn a_durable_write_that_failed_may_have_had_the_error_of_others() {
    let mut b = Bench::new(false, false);
    let list = segments(&[(0x1000, 4096)]);
    b.transfer(Op::Write, &list, true);
    b.code();
    assert_eq!(b.feed(-libc::EIO), EIO);
    assert_eq!(b.disk.sync_fault.errno(), Some(Errno(libc::EIO)));
}

#[test]
fn errors_of_one_request_do_not_end_belief() {
    let list = segments(&[(0x1000, 4096)]);
    for (op, fua, errno) in [
        (Op::Read, false, libc::EIO),
        (Op::Write, false, libc::EIO),
        (Op::Write, true, libc::EFAULT),
    ] {
        let mut b = Bench::new(false, false);
        b.transfer(op, &list, fua);
        b.code();
        assert_eq!(b.feed(-errno), Next::Done(Err(Errno(errno))));
        assert_eq!(b.disk.sync_fault.errno(), None, "{op:?} {errno}");
    }
    let mut b = Bench::new(false, false);
    b.flush();
    b.slot.cancelled = true;
    assert_eq!(
        b.feed(-libc::ECANCELED),
        Next::Done(Err(Errno(libc::ECANCELED)))
    );
    assert_eq!(b.disk.sync_fault.errno(), None, "given up by the watchdog");
}

#[test]
fn without_a_page_cache_a_failed_sync_is_the_devices_to_repeat() {
    let mut b = Bench::new(true, false);
    b.flush();
    assert_eq!(b.feed(-libc::EIO), EIO);
    b.slot.release();
    b.flush();
    assert_eq!(b.feed(0), Next::Done(Ok(0)));
}

impl Bench {
    /// The image is open a second time.
    fn with_witness(direct: bool) -> Self {
        let mut b = Bench::new(direct, false);
        let witness = File::open("/dev/null").unwrap().into();
        b.disk.sync_fault = Arc::new(SyncFault::new(0, "s", Some(witness)));
        b
    }

    /// A durable write that ends in `errno`.
    fn durable_write(&mut self, list: &[iovec], errno: i32) -> Next {
        self.transfer(Op::Write, list, true);
        self.code();
        self.feed(-errno)
    }

    fn asks_the_witness(&mut self) -> bool {
        self.slot.stage == Stage::Witness && self.code() == u32::from(op::Fsync::CODE)
    }
}

/// A durable write lacks space of its own, or hears of pages that lacked it: the kernel has one word for both, and says
/// it once.
#[test]
fn what_a_failed_durable_write_means_is_asked_of_the_witness() {
    let list = segments(&[(0x1000, 4096)]);
    for direct in [false, true] {
        for errno in [libc::ENOSPC, libc::EDQUOT, libc::ETIMEDOUT] {
            let failed = Next::Done(Err(Errno(errno)));
            let mut b = Bench::with_witness(direct);
            assert_eq!(b.durable_write(&list, errno), Next::Issue);
            assert!(b.disk.sync_fault.is_doubted());
            assert_eq!(b.feed(0), failed, "the write failed all the same");
            assert_eq!(b.disk.sync_fault.errno(), None, "nothing else is lost");
            assert!(!b.disk.sync_fault.is_doubted());
            b.slot.release();
            assert_eq!(b.durable_write(&list, errno), Next::Issue);
            assert_eq!(b.feed(-libc::EIO), failed);
            assert_eq!(b.disk.sync_fault.errno(), Some(Errno(libc::EIO)));
            assert!(!b.disk.sync_fault.is_doubted());
        }
    }
    // Without one nothing is believed that may be lost.
    let mut b = Bench::new(false, false);
    let failed = Next::Done(Err(Errno(libc::ENOSPC)));
    assert_eq!(b.durable_write(&list, libc::ENOSPC), failed);
    assert_eq!(b.disk.sync_fault.errno(), Some(Errno(libc::ENOSPC)));
}

/// XFS writes a part of a shared block through the page cache, whatever the file is open with.
#[test]
fn a_failed_sync_past_the_page_cache_is_asked_of_the_witness() {
    let mut b = Bench::with_witness(true);
    b.flush();
    assert_eq!(b.feed(-libc::EIO), Next::Issue);
    assert!(b.asks_the_witness());
    assert_eq!(b.feed(0), EIO);
    assert_eq!(b.disk.sync_fault.errno(), None, "the device's to repeat");
    b.slot.release();
    b.flush();
    b.feed(-libc::EIO);
    assert_eq!(b.feed(-libc::ENOSPC), EIO);
    b.slot.release();
    b.flush();
    assert_eq!(b.feed(0), EIO);
}

#[test]
fn nothing_is_durable_while_the_witness_is_asked() {
    let list = segments(&[(0x1000, 4096)]);
    let mut b = Bench::with_witness(true);
    b.disk.sync_fault.doubt();
    b.transfer(Op::Write, &list, true);
    b.code();
    assert_eq!(b.feed(4096), Next::Issue);
    assert!(b.asks_the_witness());
    assert_eq!(b.feed(0), Next::Issue, "asked again until it is known");
    b.disk.sync_fault.end_doubt();
    assert_eq!(b.feed(0), Next::Done(Ok(4096)));
    b.slot.release();
    b.disk.sync_fault.doubt();
    b.flush();
    assert_eq!(b.feed(0), Next::Issue);
    b.disk.sync_fault.set(Errno(libc::EIO));
    assert_eq!(b.feed(0), EIO);
    assert!(b.disk.sync_fault.is_doubted(), "that of another");
}

#[test]
fn a_durable_write_fails_after_a_sync_has_failed_meanwhile() {
    let mut b = Bench::new(false, false);
    let list = segments(&[(0x1000, 4096)]);
    b.transfer(Op::Write, &list, true);
    b.code();
    b.disk.sync_fault.set(Errno(libc::EIO));
    assert_eq!(b.feed(4096), EIO);
}

/// A file system that demands more of offsets than when the image was opened.
#[test]
fn direct_io_that_refuses_the_guests_blocks_is_left() {
    let mut b = Bench::new(true, false);
    let list = segments(&[(0x1000, 512)]);
    b.transfer(Op::Write, &list, false);
    b.slot.offset = 512;
    assert_eq!(b.feed(-libc::EINVAL), Next::Issue);
    assert!(b.slot.wants_bounce, "it may be the buffer");
    b.slot.wants_bounce = false;
    let mut memory = Memory::new(1).unwrap();
    memory.add_disk(0).unwrap();
    b.slot.bounce = memory.take_bounce(0);
    b.slot.op = Op::Read;
    assert_eq!(b.feed(-libc::EINVAL), Next::Issue, "it is the offset");
    assert!(!b.disk.can.direct);
    assert_eq!(b.feed(-libc::EINVAL), Next::Done(Err(Errno(libc::EINVAL))));
}
