//! Buffers whose pages are lost: what is there then are zeros that no guest wrote. They are not answered for,
//! and as far as it can be seen in time they are not written.

use super::*;

use std::ptr::{self, NonNull};

use crate::sys::sigbus::Guarded;

const PAGE: usize = 4096;
const SIZE: u64 = 1 << 20;
const KINDS: [On; 3] = [On::Direct, On::Buffered, On::Mapped];

/// Guest memory: a file of ones, which can be truncated.
struct Guest {
    file: OwnedFd,
    base: NonNull<u8>,
    len: usize,
    guarded: Option<Guarded>,
}

impl Guest {
    fn new(pages: usize) -> Guest {
        let len = pages * PAGE;
        let file =
            rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).expect("a memfd");
        rustix::fs::ftruncate(&file, len as u64).expect("of any size");
        let access = rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice. Unsafe because the file is truncated
        // later, which only raw accesses meet.
        let base = unsafe {
            rustix::mm::mmap(
                ptr::null_mut(),
                len,
                access,
                rustix::mm::MapFlags::SHARED,
                &file,
                0,
            )
        };
        let base = NonNull::new(base.expect("mapped").cast::<u8>()).unwrap();
        // SAFETY: a whole mapping, which is unmapped after the guard is gone. Unsafe because it may be replaced.
        let guarded = Some(unsafe { Guarded::buffers(base, len, PAGE) }.expect("guarded"));
        // SAFETY: as long as the mapping. Unsafe because it is no Rust object.
        unsafe { base.as_ptr().write_bytes(1, len) };
        Guest {
            file,
            base,
            len,
            guarded,
        }
    }

    fn segment(&self, at: usize, len: usize) -> [iovec; 1] {
        assert!(at + len <= self.len);
        [iovec {
            iov_base: self.base.as_ptr().wrapping_add(at).cast(),
            iov_len: len,
        }]
    }

    /// All but so many pages go.
    fn keep(&self, pages: usize) {
        rustix::fs::ftruncate(&self.file, (pages * PAGE) as u64).expect("shorter");
    }

    /// A thread of ours finds out.
    fn touch(&self, page: usize) -> u8 {
        let at = self.base.as_ptr().wrapping_add(page * PAGE);
        // SAFETY: in the mapping, which is guarded. Unsafe because it is no Rust object.
        unsafe { at.read_volatile() }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        drop(self.guarded.take());
        // SAFETY: mapped in `new`, and nothing uses it any more. Unsafe because unmapping is.
        unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) }.unwrap();
    }
}

const LOST: Result<u64, Errno> = Err(Errno(libc::EFAULT));

/// Queues without submitting.
fn queue(engine: &mut Engine, disk: DiskSlot, at: u16, op: Op, segments: &[iovec]) {
    let command = transfer(op, u64::from(at) * PAGE as u64 * 2, segments);
    // SAFETY: the guest outlives the engine in each test, whatever is lost of it. Unsafe because
    // `queue_rq` is.
    unsafe { engine.queue_rq(disk, tag(at, 1), command) }.unwrap();
}

/// The results of so many commands, by tag.
fn results(engine: &mut Engine, count: usize) -> Vec<Result<u64, Errno>> {
    engine.commit_rqs().unwrap();
    let events = reap_until(engine, |events| events.len() == count);
    let mut done: Vec<_> = events
        .iter()
        .map(|event| match event {
            Event::Done { tag, result } => (tag.index, *result),
            other => panic!("{other:?}"),
        })
        .collect();
    done.sort_unstable_by_key(|(index, _)| *index);
    done.into_iter().map(|(_, result)| result).collect()
}

/// An image and an engine that serves it.
fn served(on: On) -> (Image, Vec<u8>, Engine, DiskSlot) {
    let image = Image::new(on, SIZE);
    let before = image.content();
    let mut engine = engine(32);
    let disk = engine.add_disk(image.target()).unwrap();
    (image, before, engine, disk)
}

#[test]
fn a_write_that_is_queued_when_its_page_is_lost_is_not_sent() {
    for on in KINDS {
        let guest = Guest::new(8);
        let (image, before, mut engine, disk) = served(on);
        let (kept, gone) = (guest.segment(0, PAGE), guest.segment(5 * PAGE, PAGE));
        // Of two parts, so that an array is named and not a buffer.
        let parts = [guest.segment(PAGE, 512)[0], guest.segment(6 * PAGE, 512)[0]];
        queue(&mut engine, disk, 0, Op::Write, &gone);
        guest.keep(4);
        assert_eq!(guest.touch(5), 0, "zeros for us");
        queue(&mut engine, disk, 1, Op::Write, &kept);
        queue(&mut engine, disk, 2, Op::Write, &parts);
        guest.touch(6);
        assert_eq!(
            results(&mut engine, 3),
            [LOST, Ok(PAGE as u64), LOST],
            "{on:?}"
        );
        let mut expected = before;
        expected[2 * PAGE..3 * PAGE].fill(1);
        assert!(image.content() == expected, "{on:?}: zeros");
    }
}

#[test]
fn a_transfer_that_is_under_way_when_its_page_is_lost_fails() {
    for on in KINDS {
        let guest = Guest::new(8);
        let (_image, _, mut engine, disk) = served(on);
        queue(
            &mut engine,
            disk,
            0,
            Op::Write,
            &guest.segment(5 * PAGE, PAGE),
        );
        queue(
            &mut engine,
            disk,
            1,
            Op::Read,
            &guest.segment(6 * PAGE, PAGE),
        );
        queue(&mut engine, disk, 2, Op::Read, &guest.segment(PAGE, PAGE));
        engine.commit_rqs().unwrap();
        guest.keep(4);
        guest.touch(5);
        guest.touch(6);
        assert_eq!(
            results(&mut engine, 3),
            [LOST, LOST, Ok(PAGE as u64)],
            "{on:?}"
        );
        // Not as long as the page is lost.
        queue(
            &mut engine,
            disk,
            3,
            Op::Write,
            &guest.segment(5 * PAGE, PAGE),
        );
        assert_eq!(results(&mut engine, 1), [LOST], "{on:?}");
        drop(guest);
        // Other memory may lie there then.
        let guest = Guest::new(8);
        queue(
            &mut engine,
            disk,
            3,
            Op::Write,
            &guest.segment(5 * PAGE, PAGE),
        );
        assert_eq!(results(&mut engine, 1), [Ok(PAGE as u64)], "{on:?}");
    }
}

#[test]
fn a_copy_that_finds_its_page_gone_is_not_written() {
    for (on, skew) in [(On::Direct, 3), (On::Mapped, 0), (On::Mapped, 3)] {
        let guest = Guest::new(8);
        let (image, before, mut engine, disk) = served(on);
        guest.keep(4);
        queue(&mut engine, disk, 0, Op::Write, &guest.segment(skew, 512));
        queue(
            &mut engine,
            disk,
            1,
            Op::Write,
            &guest.segment(5 * PAGE + skew, 512),
        );
        // It begins on a page that is there.
        queue(
            &mut engine,
            disk,
            2,
            Op::Write,
            &guest.segment(4 * PAGE - 509, 512),
        );
        queue(
            &mut engine,
            disk,
            3,
            Op::Read,
            &guest.segment(6 * PAGE + skew, 512),
        );
        assert_eq!(
            results(&mut engine, 4),
            [Ok(512), LOST, LOST, LOST],
            "{on:?} {skew}"
        );
        let mut expected = before;
        expected[..512].fill(1);
        assert!(image.content() == expected, "{on:?} {skew}: zeros");
    }
}

/// Only a range that loses many pages goes as a whole, and then what is still in its file counts as lost.
#[test]
fn a_range_that_loses_many_pages_is_lost_as_a_whole() {
    for on in KINDS {
        let guest = Guest::new(64);
        let (image, before, mut engine, disk) = served(on);
        queue(&mut engine, disk, 0, Op::Write, &guest.segment(0, PAGE));
        guest.keep(4);
        for page in 4..12 {
            guest.touch(page);
        }
        assert_eq!(guest.touch(0), 1);
        guest.touch(20);
        assert_eq!(guest.touch(0), 0);
        assert_eq!(results(&mut engine, 1), [LOST], "{on:?}");
        assert!(image.content() == before, "{on:?}: zeros");
    }
}
