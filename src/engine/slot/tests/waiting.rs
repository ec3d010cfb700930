//! Steps that would have to wait, that go to a kernel thread, or that go in pieces.

use super::*;
use crate::engine::sim::Sqe;
use crate::engine::{CACHED_PIECE_BYTES, DIRECT_PIECE_BYTES};

const ECANCELED: i32 = -libc::ECANCELED;

impl Bench {
    /// The SQE the slot would submit, and whether a kernel thread does it from the first.
    fn sqe(&mut self) -> (Sqe, bool) {
        let entry = self.slot.sqe(&self.disk, &self.extents, ptr::null());
        (Sqe::of(&entry), Sqe::is_async(&entry))
    }

    fn nowait(&mut self) -> bool {
        self.sqe().0.rw_flags & libc::RWF_NOWAIT.cast_unsigned() != 0
    }
}

#[test]
fn a_transfer_that_would_wait_is_refused_and_goes_to_a_kernel_thread() {
    let list = segments(&[(0x1000, 4096)]);
    let cases = [
        (Op::Read, true, true),
        (Op::Read, false, false),
        (Op::Write, true, true),
        (Op::Write, false, true),
    ];
    for (op, direct, refused) in cases {
        let mut b = Bench::new(direct, false);
        b.transfer(op, &list, false);
        assert_eq!(b.nowait(), refused, "{op:?}, direct: {direct}");
        assert!(!b.slot.needs_lane(&b.disk) && !b.sqe().1);
        assert_eq!(b.feed(EAGAIN), Next::Issue);
        assert!(b.slot.needs_lane(&b.disk) && b.sqe().1 && !b.nowait());
        assert_eq!(
            b.counters.punted,
            u64::from(refused),
            "and no try is used up"
        );
        assert_eq!(b.feed(4096), Next::Done(Ok(4096)));
    }
}

#[test]
fn a_file_that_cannot_promise_not_to_wait_is_never_tried_by_who_submits() {
    let list = segments(&[(0x1000, 4096)]);
    let mut b = Bench::new(true, false);
    b.transfer(Op::Write, &list, false);
    assert!(b.nowait());
    assert_eq!(b.feed(EOPNOTSUPP), Next::Issue);
    for _ in 0..2 {
        assert!(b.slot.needs_lane(&b.disk) && b.sqe().1 && !b.nowait());
        assert_eq!(b.feed(4096), Next::Done(Ok(4096)));
        b.slot.release();
        b.transfer(Op::Read, &list, false);
    }
}

#[test]
fn images_of_other_programs_and_machines_are_never_tried_by_who_submits() {
    let list = segments(&[(0x1000, 4096)]);
    for file_system in [FileSystem::Fuse, FileSystem::Network("NFS")] {
        let mut b = Bench::new(false, false);
        let Target::File(file) = b.disk.target else {
            unreachable!()
        };
        b.disk = Disk::new(
            0,
            Target::File(FileTarget {
                file_system,
                ..file
            }),
        )
        .unwrap();
        b.transfer(Op::Read, &list, false);
        assert!(b.slot.needs_lane(&b.disk) && b.sqe().1);
    }
}

#[test]
fn what_is_given_up_unasked_is_tried_again_for_as_long_as_it_takes() {
    let mut b = Bench::new(true, false);
    b.flush();
    for _ in 0..100 {
        assert_eq!(b.feed(ECANCELED), Next::Issue);
        assert!(b.slot.is_delayed());
        assert_eq!(b.code(), u32::from(op::Timeout::CODE));
        assert_eq!(b.feed(-libc::ETIME), Next::Issue);
        assert_eq!(b.code(), u32::from(op::Fsync::CODE));
    }
    assert_eq!(b.counters.threadless, 100);
    assert_eq!(b.feed(0), Next::Done(Ok(0)));
}

#[test]
fn what_is_given_up_by_the_watchdog_ends_even_between_two_tries() {
    let mut b = Bench::new(true, false);
    b.flush();
    assert_eq!(b.feed(ECANCELED), Next::Issue);
    b.code();
    b.slot.cancelled = true;
    let gone = Next::Done(Err(Errno(libc::ECANCELED)));
    assert_eq!(b.feed(ECANCELED), gone, "the delay was given up");
    b.slot.release();
    b.flush();
    b.slot.cancelled = true;
    assert_eq!(b.feed(ECANCELED), gone);
}

#[test]
fn a_large_transfer_goes_in_pieces_of_whole_segments_or_parts_of_one() {
    for (direct, piece) in [(true, DIRECT_PIECE_BYTES), (false, CACHED_PIECE_BYTES)] {
        let piece = piece as usize;
        let list = segments(&[
            (1 << 30, piece / 2),
            (2 << 30, piece / 4),
            (3 << 30, 2 * piece + 512),
        ]);
        let total = list.iter().map(|s| s.iov_len).sum::<usize>();
        let mut b = Bench::new(direct, false);
        b.transfer(Op::Read, &list, false);
        let mut moved = 0;
        for expected in [3 * piece / 4, piece, piece, 512] {
            let (sqe, _) = b.sqe();
            let bytes = sqe.segments().iter().map(|s| s.iov_len).sum::<usize>();
            assert_eq!((bytes, sqe.off), (expected, 4096 + moved as u64));
            moved += bytes;
            let next = b.feed(i32::try_from(bytes).unwrap());
            let done = Next::Done(Ok(total as u64));
            assert_eq!(next, if moved == total { done } else { Next::Issue });
        }
        assert_eq!(b.counters.continued, 0, "none was short");
    }
}

#[test]
fn ranges_go_in_pieces_that_follow_each_other() {
    let len = (5 << 20) + 512;
    let mut b = Bench::new(false, false);
    b.ranges(Op::Discard, &[len, 4096], false, false);
    let mut at = 0;
    while at < len {
        let (offset, bytes) = b.sqe().0.range();
        assert_eq!(offset, at);
        at += bytes;
        b.disk.pace.took(bytes, 0);
        assert_eq!(b.feed(0), Next::Issue);
    }
    assert_eq!(at, len);
    assert_eq!(b.sqe().0.range(), (1 << 30, 4096));
    assert_eq!(b.feed(0), Next::Done(Ok(len + 4096)));
}
