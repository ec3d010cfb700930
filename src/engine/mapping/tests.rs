use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;
use std::thread;

use libc::iovec;
use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, memfd_create};

use super::*;
use crate::engine::{
    COPY_TURN_BYTES, Command, DiskSlot, Engine, Event, Extent, FileTarget, IoPoll, Payload, Target,
};
use crate::mq::ids::DriverTag;
use crate::mq::request::Op;

const P: u64 = PAGE_BYTES;

/// A sparse file in memory.
fn sparse(size: u64) -> File {
    let file: File = memfd_create("image", MemfdFlags::CLOEXEC).unwrap().into();
    file.set_len(size).unwrap();
    file
}

fn allocated(file: &File) -> u64 {
    file.metadata().unwrap().blocks() * 512
}

fn map(file: &File, medium: Medium) -> Arc<Mapping> {
    let size = file.metadata().unwrap().len();
    Arc::new(Mapping::new(file, size, true, medium).unwrap())
}

fn engine_on(file: &File, mapping: &Arc<Mapping>) -> (Engine, DiskSlot) {
    let mut engine = Engine::new(64, 1).unwrap();
    let target = Target::File(FileTarget {
        file: file.try_clone().unwrap().into(),
        file_system: FileSystem::Local("ext4"),
        size_bytes: file.metadata().unwrap().len(),
        direct: false,
        memory_align: 1,
        offset_align: 1,
        granularity: 0,
        block_device: false,
        ignore_flush: !mapping.medium().needs_sync(),
        io_poll: IoPoll::Never,
        mapping: Some(Arc::clone(mapping)),
    });
    let disk = engine.add_disk(target).unwrap();
    (engine, disk)
}

fn segments(bytes: &mut [u8]) -> [iovec; 1] {
    [iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    }]
}

fn tag(index: u16) -> DriverTag {
    DriverTag {
        index,
        generation: 1,
    }
}

fn queue(
    engine: &mut Engine,
    disk: DiskSlot,
    index: u16,
    op: Op,
    offset: u64,
    buffer: &[iovec; 1],
) {
    let command = Command {
        op,
        offset,
        bytes: buffer[0].iov_len as u64,
        fua: false,
        unmap: false,
        polled: false,
        payload: Payload::Buffers(buffer),
    };
    // SAFETY: the tests keep buffers and segments until the command is done. Unsafe because
    // `queue_rq` is.
    unsafe { engine.queue_rq(disk, tag(index), command) }.unwrap();
}

/// The end of the only command.
fn end(engine: &mut Engine) -> Result<u64, i32> {
    loop {
        let mut ended = None;
        engine
            .reap(&mut |event| {
                if let Event::Done { result, .. } = event {
                    ended = Some(result.map_err(|errno| errno.0));
                }
            })
            .unwrap();
        if let Some(result) = ended {
            return result;
        }
        engine.wait(None).unwrap();
    }
}

fn transfer(
    engine: &mut Engine,
    disk: DiskSlot,
    op: Op,
    offset: u64,
    bytes: &mut [u8],
) -> Result<u64, i32> {
    let segments = segments(bytes);
    queue(engine, disk, 0, op, offset, &segments);
    end(engine)
}

fn ranges(
    engine: &mut Engine,
    disk: DiskSlot,
    op: Op,
    unmap: bool,
    (offset, len): (u64, u64),
) -> Result<u64, i32> {
    let mut extents = [Extent { offset, len }].into_iter();
    let command = Command {
        op,
        offset: 0,
        bytes: len,
        fua: false,
        unmap,
        polled: false,
        payload: Payload::Extents(&mut extents),
    };
    // SAFETY: a range has no buffers. Unsafe because `queue_rq` is.
    unsafe { engine.queue_rq(disk, tag(0), command) }.unwrap();
    end(engine)
}

#[test]
fn a_mapping_knows_what_is_there_from_the_start() {
    let file = sparse(64 * P);
    file.write_all_at(&[1; 3 * P as usize], 5 * P).unwrap();
    file.write_all_at(&[1], 40 * P + 7).unwrap();
    let mapping = map(&file, Medium::Tmpfs);
    assert_eq!(mapping.run(0, 64 * P), (5 * P, false));
    assert_eq!(mapping.run(5 * P, 59 * P), (3 * P, true));
    assert!(mapping.knows(40 * P, P));
    assert!(!mapping.knows(41 * P, P));
}

#[test]
fn reading_a_hole_leaves_it_a_hole() {
    let file = sparse(1 << 20);
    let mapping = map(&file, Medium::Tmpfs);
    let (mut engine, disk) = engine_on(&file, &mapping);
    let mut bytes = vec![0xee; 1 << 20];
    assert_eq!(
        transfer(&mut engine, disk, Op::Read, 0, &mut bytes),
        Ok(1 << 20)
    );
    assert!(bytes.iter().all(|b| *b == 0));
    assert_eq!(allocated(&file), 0);
    assert_eq!(
        transfer(&mut engine, disk, Op::Write, 8 * P + 512, &mut [7; 512]),
        Ok(512)
    );
    assert_eq!(allocated(&file), P);
    assert!(mapping.knows(8 * P, P));
    let before = engine.counters().copy_calls;
    let mut back = [0; 1024];
    assert_eq!(
        transfer(&mut engine, disk, Op::Read, 8 * P, &mut back),
        Ok(1024)
    );
    assert!(back[..512] == [0; 512] && back[512..] == [7; 512]);
    assert_eq!(engine.counters().copy_calls, before, "by the mapping");
}

#[test]
fn what_others_wrote_is_learned_by_reading_it() {
    let file = sparse(16 * P);
    let mapping = map(&file, Medium::Tmpfs);
    let (mut engine, disk) = engine_on(&file, &mapping);
    file.write_all_at(&[9; 512], 3 * P + 3584).unwrap();
    file.write_all_at(&[0; 512], 9 * P).unwrap();
    let mut bytes = vec![0; 16 * P as usize];
    // In segments that end within pages.
    let cut = 3 * P as usize + 3700;
    let (first, second) = bytes.split_at_mut(cut);
    let both = [segments(first)[0], segments(second)[0]];
    let command = Command {
        op: Op::Read,
        offset: 0,
        bytes: 16 * P,
        fua: false,
        unmap: false,
        polled: false,
        payload: Payload::Buffers(&both),
    };
    // SAFETY: the buffers live until the end. Unsafe because `queue_rq` is.
    unsafe { engine.queue_rq(disk, tag(0), command) }.unwrap();
    assert_eq!(end(&mut engine), Ok(16 * P));
    assert!(mapping.knows(3 * P, P));
    for page in (0..16).filter(|page| *page != 3) {
        assert!(!mapping.knows(page * P, P), "page {page} may be a hole");
    }
}

#[test]
fn a_discard_frees_pages_that_are_not_touched_afterwards() {
    let file = sparse(64 * P);
    file.write_all_at(&vec![1; 64 * P as usize], 0).unwrap();
    let mapping = map(&file, Medium::Tmpfs);
    let (mut engine, disk) = engine_on(&file, &mapping);
    assert_eq!(
        ranges(&mut engine, disk, Op::Discard, false, (512, 32 * P)),
        Ok(32 * P)
    );
    assert_eq!(allocated(&file), 33 * P);
    let mut bytes = vec![1; 64 * P as usize];
    assert_eq!(
        transfer(&mut engine, disk, Op::Read, 0, &mut bytes),
        Ok(64 * P)
    );
    assert!(bytes[..512] == [1; 512]);
    assert!(bytes[512..][..32 * P as usize].iter().all(|b| *b == 0));
    assert!(bytes[512 + 32 * P as usize..].iter().all(|b| *b == 1));
    assert_eq!(allocated(&file), 33 * P, "holes stay holes");
}

#[test]
fn zeroes_that_keep_the_space_are_written_by_the_engine() {
    let file = sparse(64 * P);
    file.write_all_at(&vec![1; 32 * P as usize], 0).unwrap();
    let mapping = map(&file, Medium::Tmpfs);
    let (mut engine, disk) = engine_on(&file, &mapping);
    let range = (16 * P + 1024, 32 * P);
    assert_eq!(
        ranges(&mut engine, disk, Op::WriteZeroes, false, range),
        Ok(32 * P)
    );
    assert_eq!(allocated(&file), 49 * P);
    let mut bytes = vec![0; 64 * P as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes[..16 * P as usize + 1024].iter().all(|b| *b == 1));
    assert!(bytes[16 * P as usize + 1024..].iter().all(|b| *b == 0));
    assert_eq!(engine.counters().zeroes_written, 0);
}

#[test]
fn truncation_is_an_error_and_then_the_truth() {
    for medium in [Medium::Tmpfs, Medium::Dax] {
        let file = sparse(64 * P);
        file.write_all_at(&vec![3; 64 * P as usize], 0).unwrap();
        let mapping = map(&file, medium);
        let (mut engine, disk) = engine_on(&file, &mapping);
        let mut page = vec![0; P as usize];
        assert_eq!(transfer(&mut engine, disk, Op::Read, 0, &mut page), Ok(P));
        file.set_len(4 * P).unwrap();
        for op in [Op::Read, Op::Write] {
            let result = transfer(&mut engine, disk, op, 8 * P, &mut page);
            // The write by system call makes the file longer.
            let expected = [Err(libc::EIO), Ok(P)][usize::from(op == Op::Write)];
            assert_eq!(result, expected, "{medium:?} {op:?}");
            assert!(mapping.is_lost());
        }
        let mut page = vec![0; P as usize];
        assert_eq!(transfer(&mut engine, disk, Op::Read, P, &mut page), Ok(P));
        assert!(page.iter().all(|b| *b == 3), "what is left is served");
        let past = transfer(&mut engine, disk, Op::Read, 60 * P, &mut page);
        assert_eq!(past, Err(libc::EIO));
    }
}

#[test]
fn a_large_copy_that_is_lost_halfway_fails() {
    let file = sparse(1 << 20);
    file.write_all_at(&vec![3; 1 << 20], 0).unwrap();
    let mapping = map(&file, Medium::Tmpfs);
    let (mut engine, disk) = engine_on(&file, &mapping);
    let mut bytes = vec![0; 1 << 20];
    let segments = segments(&mut bytes);
    queue(&mut engine, disk, 0, Op::Read, 0, &segments);
    let mut events = 0;
    engine.reap(&mut |_| events += 1).unwrap();
    assert_eq!(events, 0, "one turn is not enough for it");
    file.set_len(1 << 19).unwrap();
    assert_eq!(end(&mut engine), Err(libc::EIO));
}

#[test]
fn large_copies_take_turns_and_small_ones_do_not_wait_for_them() {
    let file = sparse(8 << 20);
    file.write_all_at(&vec![3; 8 << 20], 0).unwrap();
    let mapping = map(&file, Medium::Tmpfs);
    let (mut engine, disk) = engine_on(&file, &mapping);
    let mut large = vec![0; 4 << 20];
    let mut other = vec![0; 1 << 20];
    let mut small = vec![0; 4096];
    let large = segments(&mut large);
    let other = segments(&mut other);
    let small = segments(&mut small);
    queue(&mut engine, disk, 0, Op::Read, 0, &large);
    queue(&mut engine, disk, 1, Op::Read, 0, &other);
    let mut order = Vec::new();
    let mut turns = 0;
    while order.len() < 12 {
        turns += 1;
        assert!(engine.has_events(), "or the worker would sleep");
        engine
            .reap(&mut |event| match event {
                Event::Done { tag, result } => {
                    result.unwrap();
                    order.push(tag.index);
                }
                other => panic!("{other:?}"),
            })
            .unwrap();
        if turns <= 10 {
            queue(&mut engine, disk, 2, Op::Read, 4 << 20, &small);
        }
    }
    let bytes: u64 = 5 << 20;
    assert_eq!(order[..10], [2; 10], "one in each turn");
    assert_eq!(order[10..], [1, 0], "the shorter one is over first");
    assert_eq!(turns, bytes / COPY_TURN_BYTES);
}

#[test]
fn a_mapping_for_reading_is_not_written_to() {
    let file = sparse(4 * P);
    file.write_all_at(&[1; 512], 0).unwrap();
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    let read_only = File::open(path).unwrap();
    assert!(Mapping::new(&read_only, 4 * P, true, Medium::Tmpfs).is_err());
    let mapping = Mapping::new(&read_only, 4 * P, false, Medium::Tmpfs).unwrap();
    let mapping = Arc::new(mapping);
    let (mut engine, disk) = engine_on(&read_only, &mapping);
    let mut bytes = [0; 512];
    let result = transfer(&mut engine, disk, Op::Read, 0, &mut bytes);
    assert_eq!((result, bytes), (Ok(512), [1; 512]));
}

#[test]
fn the_medium_is_what_the_file_system_says() {
    let medium = |file: &File, is_dax| medium_of(FileSystem::of(file).unwrap(), is_dax);
    let memory = sparse(P);
    assert_eq!(medium(&memory, false), Some(Medium::Tmpfs));
    let disk = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    assert_eq!(medium(&disk, false), None);
    assert_eq!(medium(&disk, true), Some(Medium::Dax));
    let flags = MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    if let Ok(huge) = memfd_create("huge", flags) {
        let huge = File::from(huge);
        assert_eq!(medium(&huge, false), Some(Medium::Hugetlbfs(2 << 20)));
    }
}

/// Writers and discards on the same pages from several threads: whatever the order, a page that is
/// known at the end is there.
#[test]
fn known_pages_are_there_whatever_threads_did() {
    let file = sparse(64 * P);
    let mapping = map(&file, Medium::Tmpfs);
    for round in 0..50 {
        thread::scope(|scope| {
            for thread in 0..2_u64 {
                let (file, mapping) = (&file, &mapping);
                scope.spawn(move || {
                    for i in 0..64 {
                        let page = (i * 7 + thread * 13 + round) % 64;
                        let since = mapping.now();
                        file.write_all_at(&[1; 512], page * P).unwrap();
                        mapping.wrote(since, page * P, 512);
                    }
                });
            }
            scope.spawn(|| {
                for page in 0..64 {
                    mapping.discards(page * P, P);
                    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                    fallocate(&file, flags, page * P, P).unwrap();
                    mapping.discarded();
                }
            });
        });
        for page in 0..64 {
            let start = seek(&file, SeekFrom::Data(page * P));
            assert!(
                !mapping.knows(page * P, P) || start == Ok(page * P),
                "page {page} is known and a hole"
            );
        }
    }
}

#[test]
fn a_file_may_grow_as_far_as_it_is_mapped() {
    let file = sparse(4 * P);
    let mapping = map(&file, Medium::Tmpfs);
    let (mut engine, disk) = engine_on(&file, &mapping);
    file.set_len(64 * P).unwrap();
    engine.resize_disk(disk, 64 * P).unwrap();
    let mut bytes = [5; 512];
    for _ in 0..2 {
        let result = transfer(&mut engine, disk, Op::Write, 60 * P, &mut bytes);
        assert_eq!(result, Ok(512));
    }
    assert!(mapping.knows(60 * P, P));
    let refused = engine.resize_disk(disk, mapping.reach_bytes() + P);
    assert!(refused.unwrap_err().to_string().contains("mapped up to"));
    let result = transfer(&mut engine, disk, Op::Read, 64 * P, &mut bytes);
    assert_eq!(result, Err(libc::EIO), "it keeps its size");
}
