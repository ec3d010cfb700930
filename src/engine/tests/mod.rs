//! The engine on real files, eventfds and pipes.

mod bounces;
mod lost;
mod refused;

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use libc::iovec;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd};
use rustix::fs::{OFlags, fcntl_setfl};

use super::mapping::{Mapping, Medium};
use super::uring::Ask;
use super::*;
use crate::mq::request::Op;
use crate::sys::filesystem::FileSystem;

const PATIENCE: Duration = Duration::from_secs(20);

/// A file of random content, and its target.
struct Image {
    file: File,
    size: u64,
    on: On,
}

#[derive(Clone, Copy, Debug)]
enum On {
    /// The build's file system, with O_DIRECT.
    Direct,
    /// The same through the page cache.
    Buffered,
    /// Memory: no ZERO_RANGE there.
    Tmpfs,
    /// The same, mapped.
    Mapped,
    /// A file of the build's file system, mapped as if it were persistent memory.
    Dax,
}

impl On {
    const ALL: [On; 5] = [On::Direct, On::Buffered, On::Tmpfs, On::Mapped, On::Dax];

    fn medium(self) -> Option<Medium> {
        match self {
            On::Direct | On::Buffered | On::Tmpfs => None,
            On::Mapped => Some(Medium::Tmpfs),
            On::Dax => Some(Medium::Dax),
        }
    }
}

impl Image {
    fn new(on: On, size: u64) -> Self {
        let file = match on {
            On::Tmpfs | On::Mapped => {
                rustix::fs::memfd_create("image", rustix::fs::MemfdFlags::CLOEXEC)
                    .unwrap()
                    .into()
            }
            _ => tempfile::tempfile().unwrap(),
        };
        let mut random = Random(size | 1);
        let content: Vec<u8> = (0..size).map(|_| random.byte()).collect();
        file.write_all_at(&content, 0).unwrap();
        if matches!(on, On::Direct) {
            file.sync_all().unwrap();
            fcntl_setfl(&file, OFlags::DIRECT).expect("a file system with O_DIRECT");
        }
        Image { file, size, on }
    }

    fn target(&self) -> Target {
        let direct = rustix::fs::fcntl_getfl(&self.file)
            .unwrap()
            .contains(OFlags::DIRECT);
        Target::File(FileTarget {
            file: self.file.try_clone().unwrap().into(),
            file_system: FileSystem::Local("ext4"),
            size_bytes: self.size,
            direct,
            memory_align: 512,
            offset_align: 512,
            granularity: 0,
            block_device: false,
            ignore_flush: false,
            io_poll: IoPoll::Never,
            mapping: self.on.medium().map(|medium| {
                Arc::new(Mapping::new(&self.file, self.size, true, medium).expect("a mapping"))
            }),
        })
    }

    /// The content, read past the engine.
    fn content(&self) -> Vec<u8> {
        let path = format!(
            "/proc/self/fd/{}",
            std::os::fd::AsRawFd::as_raw_fd(&self.file)
        );
        let mut content = Vec::new();
        File::open(path).unwrap().read_to_end(&mut content).unwrap();
        content
    }
}

struct Random(u64);

impl Random {
    fn next(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % below
    }

    fn byte(&mut self) -> u8 {
        u8::try_from(self.next(256)).unwrap()
    }

    fn fill(&mut self, bytes: &mut [u8]) {
        bytes.iter_mut().for_each(|b| *b = self.byte());
    }
}

/// Memory that starts `skew` bytes after a page's start.
struct Buffer {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl Buffer {
    fn new(len: usize, skew: usize) -> Self {
        let memory = vec![0xee; len + 8192];
        let start = memory.as_ptr().align_offset(4096) + skew;
        Buffer { memory, start, len }
    }

    fn bytes(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len]
    }

    /// As segments of these lengths, the last one taking the rest.
    fn segments(&mut self, lens: &[usize]) -> Vec<iovec> {
        let mut rest = self.bytes();
        let mut segments = Vec::new();
        for len in lens.iter().copied().chain([usize::MAX]) {
            let (segment, left) = rest.split_at_mut(len.min(rest.len()));
            segments.push(iovec {
                iov_base: segment.as_mut_ptr().cast(),
                iov_len: segment.len(),
            });
            rest = left;
            if rest.is_empty() {
                break;
            }
        }
        segments
    }
}

fn tag(index: u16, generation: u16) -> DriverTag {
    DriverTag { index, generation }
}

fn engine(depth: u16) -> Engine {
    Engine::new(depth, 8).unwrap()
}

fn transfer<'a>(op: Op, offset: u64, segments: &'a [iovec]) -> Command<'a> {
    let bytes = segments.iter().map(|s| s.iov_len as u64).sum();
    Command {
        op,
        offset,
        bytes,
        fua: false,
        unmap: false,
        polled: false,
        payload: Payload::Buffers(segments),
    }
}

const FLUSH: Command<'static> = Command {
    op: Op::Flush,
    offset: 0,
    bytes: 0,
    fua: false,
    unmap: false,
    polled: false,
    payload: Payload::None,
};

/// Waits until `until` says that what was reported is enough.
fn reap_until(engine: &mut Engine, mut until: impl FnMut(&[Event]) -> bool) -> Vec<Event> {
    let deadline = Instant::now() + PATIENCE;
    let mut events = Vec::new();
    loop {
        engine.reap(&mut |e| events.push(e)).unwrap();
        if until(&events) {
            return events;
        }
        assert!(
            Instant::now() < deadline,
            "nothing more came than {events:?}"
        );
        engine.wait(Some(Duration::from_millis(100))).unwrap();
    }
}

/// One command, from beginning to end.
fn run(engine: &mut Engine, disk: DiskSlot, command: Command<'_>) -> Result<u64, Errno> {
    // SAFETY: the buffers outlive this call, which returns when the command is done. Unsafe because
    // `queue_rq` is.
    unsafe { engine.queue_rq(disk, tag(0, 7), command) }.unwrap();
    match reap_until(engine, |events| !events.is_empty())[..] {
        [
            Event::Done {
                tag:
                    DriverTag {
                        index: 0,
                        generation: 7,
                    },
                result,
            },
        ] => result,
        ref other => panic!("{other:?}"),
    }
}

fn run_ranges(
    engine: &mut Engine,
    disk: DiskSlot,
    op: Op,
    unmap: bool,
    ranges: &[(u64, u64)],
) -> Result<u64, Errno> {
    let mut extents = ranges.iter().map(|(offset, len)| Extent {
        offset: *offset,
        len: *len,
    });
    let bytes = ranges.iter().map(|r| r.1).sum();
    let payload = Payload::Extents(&mut extents);
    run(
        engine,
        disk,
        Command {
            op,
            offset: 0,
            bytes,
            fua: true,
            unmap,
            polled: false,
            payload,
        },
    )
}

fn new_eventfd(flags: EventfdFlags) -> (OwnedFd, OwnedFd) {
    let fd = eventfd(0, flags | EventfdFlags::CLOEXEC).unwrap();
    (fd.try_clone().unwrap(), fd)
}

fn kick(fd: impl AsFd) {
    rustix::io::write(fd, &1u64.to_ne_bytes()).unwrap();
}

#[test]
fn null_completes_in_order_and_without_the_kernel() {
    let mut engine = engine(64);
    let disk = engine
        .add_disk(Target::Null {
            size_bytes: 1 << 40,
        })
        .unwrap();
    let mut buffer = Buffer::new(512, 0);
    let segments = buffer.segments(&[]);
    let before = engine.counters();
    for i in 0..64 {
        // SAFETY: the buffer is alive until the end. Unsafe because `queue_rq` is.
        unsafe { engine.queue_rq(disk, tag(i, 3), transfer(Op::Read, 0, &segments)) }.unwrap();
    }
    assert_eq!(engine.in_flight(), 64);
    engine.commit_rqs().unwrap();
    engine.wait(None).unwrap();
    let mut events = Vec::new();
    engine.reap(&mut |e| events.push(e)).unwrap();
    let expected: Vec<_> = (0..64)
        .map(|i| Event::Done {
            tag: tag(i, 3),
            result: Ok(512),
        })
        .collect();
    assert_eq!(events, expected);
    assert_eq!(engine.in_flight(), 0);
    assert_eq!(engine.counters().enters, before.enters);
    assert_eq!(buffer.bytes(), [0xee; 512], "left as it was");
}

#[test]
fn data_goes_to_the_disk_and_back_whatever_the_buffers() {
    for on in On::ALL {
        let image = Image::new(on, 4 << 20);
        let mut engine = engine(4);
        let disk = engine.add_disk(image.target()).unwrap();
        let mut model = image.content();
        let many = vec![512; 1500];
        let odd = [1, 511, 4096, 3, 1000];
        for (len, skew, lens) in [
            (512, 0, &[][..]),
            (4096, 512, &[]),
            (4096, 1, &[]),
            (1 << 20, 0, &[4096, 8192]),
            ((1 << 20) + 512, 7, &[]),
            (1 << 20, 0, &odd),
            (1500 * 512, 0, &many),
            (1500 * 512, 3, &many),
            (2 << 20, 0, &many),
        ] {
            let offset = 512 * 9;
            let mut out = Buffer::new(len, skew);
            Random(len as u64 + 99).fill(out.bytes());
            let segments = out.segments(lens);
            let result = run(&mut engine, disk, transfer(Op::Write, offset, &segments));
            assert_eq!(result, Ok(len as u64), "{on:?} {len} {skew}");
            model[512 * 9..512 * 9 + len].copy_from_slice(out.bytes());
            let mut back = Buffer::new(len, skew);
            let segments = back.segments(lens);
            let result = run(&mut engine, disk, transfer(Op::Read, offset, &segments));
            assert_eq!(result, Ok(len as u64));
            assert!(back.bytes() == out.bytes(), "{on:?} {len} {skew}");
            assert!(image.content() == model, "{on:?} {len} {skew}");
        }
        let bounced = engine.counters().bounced;
        assert_eq!(bounced, if matches!(on, On::Direct) { 8 } else { 0 });
    }
}

#[test]
fn merged_parts_are_one_transfer() {
    let image = Image::new(On::Direct, 1 << 20);
    let mut engine = engine(4);
    let disk = engine.add_disk(image.target()).unwrap();
    let mut buffers: Vec<Buffer> = (0..5).map(|_| Buffer::new(4096, 0)).collect();
    let parts: Vec<Vec<iovec>> = buffers.iter_mut().map(|b| b.segments(&[1024])).collect();
    let before = engine.counters().sqes;
    let mut slices = parts.iter().map(Vec::as_slice);
    let payload = Payload::Merged(&mut slices);
    let command = Command {
        op: Op::Read,
        offset: 8192,
        bytes: 5 * 4096,
        fua: false,
        unmap: false,
        polled: false,
        payload,
    };
    assert_eq!(run(&mut engine, disk, command), Ok(5 * 4096));
    assert_eq!(engine.counters().sqes - before, 1);
    let content = image.content();
    for (i, buffer) in buffers.iter_mut().enumerate() {
        let at = 8192 + i * 4096;
        assert!(buffer.bytes() == &content[at..at + 4096]);
    }
}

#[test]
fn a_truncated_image_is_an_error_and_a_write_beyond_the_end_does_not_grow_it() {
    for on in [On::Direct, On::Buffered] {
        let image = Image::new(on, 1 << 20);
        let mut engine = engine(4);
        let disk = engine.add_disk(image.target()).unwrap();
        image.file.set_len((1 << 19) + 700).unwrap();
        let mut buffer = Buffer::new(8192, 0);
        let segments = buffer.segments(&[]);
        for offset in [1 << 19, (1 << 19) + 4096, 768 << 10] {
            let result = run(&mut engine, disk, transfer(Op::Read, offset, &segments));
            assert_eq!(result, Err(Errno(libc::EIO)), "{on:?} {offset}");
        }
        for offset in [1 << 20, (1 << 20) - 4096, u64::MAX - 511] {
            let result = run(&mut engine, disk, transfer(Op::Write, offset, &segments));
            assert_eq!(result, Err(Errno(libc::EIO)));
        }
        let result = run_ranges(
            &mut engine,
            disk,
            Op::WriteZeroes,
            false,
            &[((1 << 20) - 512, 1024)],
        );
        assert_eq!(result, Err(Errno(libc::EIO)));
        assert_eq!(image.file.metadata().unwrap().len(), (1 << 19) + 700);
    }
}

#[test]
fn ranges_are_discarded_and_zeroed() {
    for on in On::ALL {
        let size = 4 << 20;
        let image = Image::new(on, size);
        let mut engine = engine(4);
        let disk = engine.add_disk(image.target()).unwrap();
        let mut model = image.content();
        let blocks = image.file.metadata().unwrap().blocks();
        for (op, unmap, ranges) in [
            (Op::Discard, false, &[(0, 65536), (1 << 20, 1 << 20)][..]),
            (
                Op::WriteZeroes,
                true,
                &[(200_704, 8192), (262_144, 0), (300_032, 512)],
            ),
            (
                Op::WriteZeroes,
                false,
                &[(2 << 20, (1 << 20) + 1024), (512 * 7001, 512)],
            ),
        ] {
            let sum = ranges.iter().map(|r| r.1).sum();
            let result = run_ranges(&mut engine, disk, op, unmap, ranges);
            assert_eq!(result, Ok(sum), "{on:?} {op:?}");
            for (offset, len) in ranges {
                let at = usize::try_from(*offset).unwrap();
                model[at..at + usize::try_from(*len).unwrap()].fill(0);
            }
            assert!(image.content() == model, "{on:?} {op:?}");
        }
        let metadata = image.file.metadata().unwrap();
        assert_eq!(metadata.len(), size);
        assert!(metadata.blocks() < blocks, "space was freed");
        let counters = engine.counters();
        assert_eq!(counters.discards_ignored, 0);
        assert_eq!(
            counters.zeroes_written,
            if matches!(on, On::Tmpfs) { 2 } else { 0 }
        );
    }
}

#[test]
fn a_flush_and_durable_writes_reach_the_disk() {
    let image = Image::new(On::Buffered, 1 << 20);
    let mut engine = engine(4);
    let disk = engine.add_disk(image.target()).unwrap();
    let mut buffer = Buffer::new(4096, 0);
    let segments = buffer.segments(&[]);
    let command = Command {
        fua: true,
        ..transfer(Op::Write, 0, &segments)
    };
    assert_eq!(run(&mut engine, disk, command), Ok(4096));
    let before = engine.counters().sqes;
    assert_eq!(run(&mut engine, disk, FLUSH), Ok(0));
    assert_eq!(engine.counters().sqes - before, 1, "a flush is really sent");

    let Target::File(file) = engine.remove_disk(disk) else {
        unreachable!()
    };
    let file = Target::File(FileTarget {
        ignore_flush: true,
        io_poll: IoPoll::Never,
        mapping: None,
        ..file
    });
    let disk = engine.add_disk(file).unwrap();
    let before = engine.counters().sqes;
    assert_eq!(run(&mut engine, disk, FLUSH), Ok(0));
    assert_eq!(engine.counters().sqes, before, "unless told to ignore it");
}

#[test]
fn without_bounce_buffers_a_completion_wakes() {
    let image = Image::new(On::Direct, 1 << 20);
    let mut engine = engine(64);
    let disk = engine.add_disk(image.target()).unwrap();
    let mut buffers: Vec<Buffer> = (0..64).map(|_| Buffer::new(4096, 1)).collect();
    let segments: Vec<Vec<iovec>> = buffers.iter_mut().map(|b| b.segments(&[])).collect();
    let (mut next, mut done, mut busy) = (0, 0, 0);
    while done < 64 {
        while next < 64 {
            let command = transfer(Op::Read, 4096 * next as u64, &segments[next]);
            // SAFETY: the buffers are alive until the engine is. Unsafe because `queue_rq` is.
            let queued =
                unsafe { engine.queue_rq(disk, tag(u16::try_from(next).unwrap(), 0), command) };
            if let Err(why) = queued {
                assert_eq!(why, Busy::WakesOnCompletion);
                assert!(engine.in_flight() > 0, "or nobody would wake us");
                busy += 1;
                break;
            }
            next += 1;
        }
        done += reap_until(&mut engine, |events| !events.is_empty()).len();
    }
    assert!(busy > 0);
    let content = image.content();
    for (i, buffer) in buffers.iter_mut().enumerate() {
        assert!(buffer.bytes() == &content[i * 4096..(i + 1) * 4096]);
    }
    assert_eq!(
        engine.memory_free_bounces(),
        usize::from(BOUNCE_OF_DISK + BOUNCE_SHARED)
    );
}

/// Random operations on disjoint places, many at once, against a plain array.
fn against_a_model(on: On, operations: u32) {
    const PLACES: u16 = 64;
    const PLACE: usize = 64 << 10;
    const DEPTH: u16 = 32;
    let image = Image::new(on, u64::from(PLACES) * PLACE as u64);
    let mut engine = engine(DEPTH);
    let disk = engine.add_disk(image.target()).unwrap();
    let mut model = image.content();
    let mut random = Random(0x5eed);

    struct Flying {
        op: Op,
        at: usize,
        place: u64,
        buffer: Buffer,
        segments: Vec<iovec>,
    }
    let mut flying: Vec<Option<Flying>> = (0..DEPTH).map(|_| None).collect();
    let mut taken = [false; PLACES as usize];
    let (mut queued, mut done) = (0, 0);
    while done < operations {
        for index in 0..DEPTH {
            if queued == operations || flying[usize::from(index)].is_some() {
                continue;
            }
            let place = random.next(u64::from(PLACES));
            if taken[usize::try_from(place).unwrap()] {
                continue;
            }
            let within = random.next(PLACE as u64 / 512);
            let blocks = 1 + random.next((PLACE as u64 / 512 - within).min(48));
            let len = usize::try_from(blocks * 512).unwrap();
            let at = usize::try_from(place * PLACE as u64 + within * 512).unwrap();
            let op = match random.next(20) {
                0 => Op::Discard,
                1 => Op::WriteZeroes,
                2 => Op::Flush,
                3..=10 => Op::Read,
                _ => Op::Write,
            };
            let skew = if random.next(4) == 0 {
                usize::try_from(random.next(600)).unwrap()
            } else {
                0
            };
            let mut buffer = Buffer::new(len, skew);
            if op == Op::Write {
                random.fill(buffer.bytes());
            }
            let lens: Vec<usize> = (0..random.next(5))
                .map(|_| 512 * (1 + usize::try_from(random.next(8)).unwrap()))
                .collect();
            let segments = buffer.segments(&lens);
            let fua = random.next(8) == 0;
            let unmap = random.next(2) == 0;
            let mut extents = [Extent {
                offset: at as u64,
                len: len as u64,
            }]
            .into_iter();
            let (bytes, payload) = match op {
                Op::Flush => (0, Payload::None),
                Op::Read | Op::Write => (len as u64, Payload::Buffers(&segments)),
                _ => (len as u64, Payload::Extents(&mut extents)),
            };
            let command = Command {
                op,
                offset: at as u64,
                bytes,
                fua,
                unmap,
                polled: false,
                payload,
            };
            let generation = u16::try_from(queued % 60_000).unwrap();
            // SAFETY: buffers and segments are kept in `flying` until done. Unsafe because
            // `queue_rq` is.
            if unsafe { engine.queue_rq(disk, tag(index, generation), command) }.is_err() {
                break;
            }
            taken[usize::try_from(place).unwrap()] = true;
            flying[usize::from(index)] = Some(Flying {
                op,
                at,
                place,
                buffer,
                segments,
            });
            queued += 1;
        }
        for event in reap_until(&mut engine, |events| !events.is_empty()) {
            let Event::Done { tag, result } = event else {
                panic!("{event:?}")
            };
            let mut f = flying[tag.index()].take().unwrap();
            let range = f.at..f.at + f.buffer.len;
            assert_eq!(
                result,
                Ok(if f.op == Op::Flush {
                    0
                } else {
                    f.buffer.len as u64
                })
            );
            match f.op {
                Op::Read => assert!(f.buffer.bytes() == &model[range], "{on:?} at {}", f.at),
                Op::Write => model[range].copy_from_slice(f.buffer.bytes()),
                Op::Discard | Op::WriteZeroes => model[range].fill(0),
                Op::Flush => {}
            }
            drop(f.segments);
            taken[usize::try_from(f.place).unwrap()] = false;
            done += 1;
        }
    }
    assert!(image.content() == model);
    assert_eq!(engine.counters().stale, 0);
}

trait TagIndex {
    fn index(&self) -> usize;
}

impl TagIndex for DriverTag {
    fn index(&self) -> usize {
        usize::from(self.index)
    }
}

#[test]
fn ten_thousand_operations_agree_with_a_model_direct() {
    against_a_model(On::Direct, 10_000);
}

#[test]
fn ten_thousand_operations_agree_with_a_model_buffered() {
    against_a_model(On::Buffered, 10_000);
}

#[test]
fn ten_thousand_operations_agree_with_a_model_in_memory() {
    against_a_model(On::Tmpfs, 10_000);
}

#[test]
fn ten_thousand_operations_agree_with_a_model_mapped() {
    against_a_model(On::Mapped, 10_000);
}

#[test]
fn ten_thousand_operations_agree_with_a_model_on_persistent_memory() {
    against_a_model(On::Dax, 10_000);
}

#[test]
fn each_source_ends_a_wait() {
    let mut engine = engine(4);
    let (ours, theirs) = new_eventfd(EventfdFlags::empty());
    engine.watch(ours, 42).unwrap();
    let waker = Waker::new().unwrap();
    engine.watch_waker(&waker).unwrap();
    for _ in 0..50 {
        // The other thread acts whenever it is scheduled, before or while we wait.
        thread::scope(|s| {
            s.spawn(|| kick(&theirs));
            let events = reap_until(&mut engine, |events| !events.is_empty());
            assert_eq!(events, [Event::Kick(42)]);
            s.spawn(|| waker.wake());
            let events = reap_until(&mut engine, |events| !events.is_empty());
            assert_eq!(events, [Event::Message]);
        });
    }
    let start = Instant::now();
    engine.wait(Some(Duration::from_millis(30))).unwrap();
    assert!(start.elapsed() >= Duration::from_millis(30));
    assert_eq!(engine.counters().rearmed, 0, "armed once");
}

#[test]
fn what_came_before_the_watch_is_reported() {
    let mut engine = engine(4);
    let (ours, theirs) = new_eventfd(EventfdFlags::empty());
    kick(&theirs);
    engine.watch(ours, 1).unwrap();
    reap_until(&mut engine, |events| events.contains(&Event::Kick(1)));
}

#[test]
fn no_kick_comes_after_unwatch_and_the_fd_is_let_go() {
    let mut engine = engine(4);
    for token in 0..100 {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        engine.watch(reader, token).unwrap();
        rustix::io::write(&writer, b"kick").unwrap();
        if token % 2 == 0 {
            reap_until(&mut engine, |events| events.contains(&Event::Kick(token)));
        }
        rustix::io::write(&writer, b"kick").unwrap();
        drop(engine.unwatch(token).unwrap());
        // Only the ring could still hold the reading end.
        assert_eq!(
            rustix::io::write(&writer, b"x"),
            Err(rustix::io::Errno::PIPE)
        );
        let mut events = Vec::new();
        engine.reap(&mut |e| events.push(e)).unwrap();
        assert_eq!(events, []);
    }
    assert!(engine.unwatch(5).is_none());
}

#[test]
fn a_hang_up_is_reported_once_and_does_not_spin() {
    let mut engine = engine(4);
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    engine.watch(reader, 3).unwrap();
    drop(writer);
    let events = reap_until(&mut engine, |events| !events.is_empty());
    assert_eq!(
        events,
        [Event::WatchLost {
            token: 3,
            error: Errno(libc::EPIPE)
        }]
    );
    let before = engine.counters();
    engine.wait(Some(Duration::from_millis(20))).unwrap();
    let mut late = Vec::new();
    engine.reap(&mut |e| late.push(e)).unwrap();
    engine.wait(Some(Duration::from_millis(20))).unwrap();
    assert_eq!(late, []);
    assert!(
        engine.counters().cqes - before.cqes <= 2,
        "the poll's and the cancel's last words"
    );
    assert!(engine.unwatch(3).is_some());
}

#[test]
fn what_cannot_be_polled_is_refused() {
    let mut engine = engine(4);
    let error = engine
        .watch(tempfile::tempfile().unwrap().into(), 9)
        .unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    assert!(engine.unwatch(9).is_none());
}

#[test]
fn a_poll_the_kernel_ended_is_armed_again() {
    let mut engine = engine(4);
    let (ours, theirs) = new_eventfd(EventfdFlags::empty());
    engine.watch(ours, 6).unwrap();
    // The kernel ends a poll when it has no room for completions: the end, without "more".
    let mut events = Vec::new();
    engine.feed_watch(6, i32::from(libc::POLLIN), 0, &mut |e| events.push(e));
    assert_eq!(events, [Event::Kick(6)]);
    assert_eq!(engine.counters().rearmed, 1);
    kick(&theirs);
    reap_until(&mut engine, |events| events.contains(&Event::Kick(6)));
}

/// Waits for an eventfd's count, and takes it.
fn read_soon(fd: &OwnedFd) -> u64 {
    let mut poll = [PollFd::new(fd, PollFlags::IN)];
    let patience = Timespec {
        tv_sec: 20,
        tv_nsec: 0,
    };
    assert_eq!(
        rustix::event::poll(&mut poll, Some(&patience)),
        Ok(1),
        "nothing was written"
    );
    let mut count = [0; 8];
    rustix::io::read(fd, &mut count).unwrap();
    u64::from_ne_bytes(count)
}

#[test]
fn a_device_begins_before_a_long_batch_ends() {
    let image = Image::new(On::Buffered, 1 << 20);
    let mut engine = engine(64);
    let disk = engine.add_disk(image.target()).unwrap();
    let mut buffer = Buffer::new(512, 0);
    let segments = buffer.segments(&[]);
    // With 2 of them, with 4, 8 and so on more, and with the rest; two or one with one call.
    for (count, calls) in [(64, 6), (8, 3), (2, 1), (1, 1), (32, 5)] {
        let before = engine.counters().enters;
        for i in 0..count {
            // SAFETY: the buffer is alive until the end. Unsafe because `queue_rq` is.
            unsafe { engine.queue_rq(disk, tag(i, 1), transfer(Op::Read, 0, &segments)) }.unwrap();
        }
        engine.commit_rqs().unwrap();
        assert_eq!(engine.counters().enters - before, calls, "{count} at once");
        let events = reap_until(&mut engine, |events| events.len() == usize::from(count));
        let ok = |event: &Event| {
            matches!(
                event,
                Event::Done {
                    result: Ok(512),
                    ..
                }
            )
        };
        assert!(events.iter().all(ok), "{events:?}");
    }
}

#[test]
fn calls_reach_every_kind_of_eventfd() {
    let mut engine = engine(4);
    for flags in [EventfdFlags::NONBLOCK, EventfdFlags::empty()] {
        let (ours, theirs) = new_eventfd(flags);
        let call = engine.add_call(ours, 1).unwrap();
        for _ in 0..20 {
            engine.call(call);
            engine.commit_rqs().unwrap();
            assert_eq!(read_soon(&theirs), 1, "without our doing more");
            reap_until(&mut engine, |_| true);
        }
        engine.remove_call(call);
        engine.call(call);
        engine.commit_rqs().unwrap();
    }
}

#[test]
fn a_full_eventfd_holds_up_nobody() {
    let image = Image::new(On::Buffered, 1 << 20);
    // A blocking one is written to once; otherwise one write in 64 says when it is over.
    for (flags, waiting) in [(EventfdFlags::NONBLOCK, 64), (EventfdFlags::empty(), 1)] {
        let mut engine = engine(4);
        let disk = engine.add_disk(image.target()).unwrap();
        let (ours, theirs) = new_eventfd(flags);
        rustix::io::write(&theirs, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        let call = engine.add_call(ours, 1).unwrap();
        let mut buffer = Buffer::new(4096, 0);
        let segments = buffer.segments(&[]);
        for _ in 0..100 {
            engine.call(call);
            assert_eq!(
                run(&mut engine, disk, transfer(Op::Read, 0, &segments)),
                Ok(4096)
            );
        }
        let counters = engine.counters();
        assert_eq!(
            (counters.calls, counters.calls_folded),
            (waiting, 100 - waiting)
        );
        // When there is room again, the call comes, and one for all that were folded.
        let mut count = [0; 8];
        rustix::io::read(&theirs, &mut count).unwrap();
        fcntl_setfl(&theirs, OFlags::NONBLOCK).unwrap();
        let mut sum = 0;
        reap_until(&mut engine, |_| {
            if rustix::io::read(&theirs, &mut count).is_ok() {
                sum += u64::from_ne_bytes(count);
            }
            sum == waiting + 1
        });
        // Again full, and removed while a write waits.
        rustix::io::write(&theirs, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        engine.call(call);
        engine.commit_rqs().unwrap();
        engine.remove_call(call);
    }
}

#[test]
fn a_broken_call_fd_is_reported_once() {
    let mut engine = engine(4);
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    drop(reader);
    let call = engine.add_call(writer, 8).unwrap();
    engine.call(call);
    let events = reap_until(&mut engine, |events| !events.is_empty());
    assert_eq!(
        events,
        [Event::CallLost {
            token: 8,
            error: Errno(libc::EPIPE)
        }]
    );
    let before = engine.counters().sqes;
    engine.call(call);
    assert_eq!(engine.counters().sqes, before);
}

#[test]
fn nothing_is_lost_when_the_submission_queue_is_full() {
    let mut engine = Engine::new(1, 600).unwrap();
    let fds: Vec<_> = (0..600)
        .map(|_| new_eventfd(EventfdFlags::NONBLOCK))
        .collect();
    let (ours, theirs): (Vec<_>, Vec<_>) = fds.into_iter().unzip();
    let calls: Vec<_> = ours
        .into_iter()
        .map(|fd| engine.add_call(fd, 0).unwrap())
        .collect();
    let before = engine.counters().enters;
    for call in &calls {
        engine.call(*call);
    }
    assert!(
        engine.counters().enters > before,
        "the queue is smaller than that"
    );
    engine.commit_rqs().unwrap();
    for fd in &theirs {
        let mut count = [0; 8];
        rustix::io::read(fd, &mut count).unwrap();
        assert_eq!(u64::from_ne_bytes(count), 1);
    }
}

#[test]
fn a_stale_completion_is_counted_and_ignored() {
    let image = Image::new(On::Buffered, 1 << 20);
    let mut engine = engine(4);
    let disk = engine.add_disk(image.target()).unwrap();
    let mut buffer = Buffer::new(4096, 0);
    let segments = buffer.segments(&[]);
    // SAFETY: the buffer is alive until the engine is. Unsafe because `queue_rq` is.
    unsafe { engine.queue_rq(disk, tag(2, 9), transfer(Op::Read, 0, &segments)) }.unwrap();
    let mut events = Vec::new();
    for (index, generation) in [(2, 8), (1, 0), (999, 9)] {
        engine.feed_slot(tag(index, generation), 4096, &mut |e| events.push(e));
    }
    assert_eq!(events, []);
    assert_eq!(engine.counters().stale, 3);
    let events = reap_until(&mut engine, |events| !events.is_empty());
    assert_eq!(
        events,
        [Event::Done {
            tag: tag(2, 9),
            result: Ok(4096)
        }]
    );
}

#[test]
fn a_request_that_hangs_can_be_given_up() {
    // Nobody writes into the pipe, so a read of it never ends by itself.
    let (pipe, _writer) = rustix::pipe::pipe().unwrap();
    let mut engine = engine(4);
    let disk = engine
        .add_disk(Target::File(FileTarget {
            file: pipe,
            file_system: FileSystem::Local("ext4"),
            size_bytes: 1 << 20,
            direct: false,
            memory_align: 1,
            offset_align: 1,
            granularity: 0,
            block_device: false,
            ignore_flush: false,
            io_poll: IoPoll::Never,
            mapping: None,
        }))
        .unwrap();
    let mut buffer = Buffer::new(512, 0);
    let segments = buffer.segments(&[]);
    let command = transfer(Op::Read, 0, &segments);
    // SAFETY: the buffer is alive until the engine is. Unsafe because `queue_rq` is.
    unsafe { engine.queue_rq(disk, tag(1, 7), command) }.unwrap();
    engine.commit_rqs().unwrap();
    // Not this one: a tag that was given to somebody else since.
    engine.cancel_rq(tag(1, 6));
    engine.commit_rqs().unwrap();
    engine.wait(Some(Duration::from_millis(50))).unwrap();
    engine
        .reap(&mut |event| panic!("{event:?} before it was given up"))
        .unwrap();
    engine.cancel_rq(tag(1, 7));
    let events = reap_until(&mut engine, |events| !events.is_empty());
    let expected = Event::Done {
        tag: tag(1, 7),
        result: Err(Errno(libc::ECANCELED)),
    };
    assert_eq!(events, [expected]);
    assert_eq!(engine.in_flight(), 0);
}

#[test]
fn dropping_an_engine_waits_for_what_is_in_flight() {
    let image = Image::new(On::Direct, 4 << 20);
    let mut engine = engine(32);
    let disk = engine.add_disk(image.target()).unwrap();
    let mut buffers: Vec<Buffer> = (0..32).map(|i| Buffer::new(65536, i % 2)).collect();
    let segments: Vec<Vec<iovec>> = buffers.iter_mut().map(|b| b.segments(&[])).collect();
    for (i, segments) in segments.iter().enumerate().take(24) {
        let command = transfer(Op::Write, 65536 * i as u64, segments);
        // SAFETY: the buffers outlive the engine. Unsafe because `queue_rq` is.
        unsafe { engine.queue_rq(disk, tag(u16::try_from(i).unwrap(), 0), command) }.unwrap();
        if i == 12 {
            engine.commit_rqs().unwrap();
        }
    }
    drop(engine);
    assert!(image.content()[..24 * 65536].iter().all(|b| *b == 0xee));
}

#[test]
fn nothing_queued_makes_no_system_call() {
    let mut engine = engine(4);
    let before = engine.counters().enters;
    for _ in 0..100 {
        engine.commit_rqs().unwrap();
        assert_eq!(engine.reap(&mut |e| panic!("{e:?}")).unwrap(), 0);
    }
    assert_eq!(engine.counters().enters, before);
}

#[test]
fn a_disks_place_is_used_again() {
    let images = [
        Image::new(On::Buffered, 4096),
        Image::new(On::Buffered, 8192),
    ];
    let mut engine = engine(4);
    for round in 0..6 {
        let image = &images[round % 2];
        let disk = engine.add_disk(image.target()).unwrap();
        assert_eq!(disk, DiskSlot(0));
        let mut buffer = Buffer::new(4096, 0);
        let segments = buffer.segments(&[]);
        assert_eq!(
            run(&mut engine, disk, transfer(Op::Read, 0, &segments)),
            Ok(4096)
        );
        assert!(buffer.bytes() == &image.content()[..4096]);
        engine.remove_disk(disk);
    }
}

#[test]
fn an_alignment_that_cannot_be_served_is_refused() {
    let image = Image::new(On::Direct, 4096);
    let Target::File(file) = image.target() else {
        unreachable!()
    };
    let file = FileTarget {
        memory_align: 65536,
        ..file
    };
    let error = engine(1).add_disk(Target::File(file)).unwrap_err();
    assert!(error.to_string().contains("65536"), "{error}");
}

#[test]
fn direct_io_that_wants_more_alignment_than_it_said_gets_it() {
    let image = Image::new(On::Direct, 1 << 20);
    let Target::File(file) = image.target() else {
        unreachable!()
    };
    let mut engine = engine(64);
    // More fine than the file system is known to take.
    let file = FileTarget {
        memory_align: 1,
        ..file
    };
    let disk = engine.add_disk(Target::File(file)).unwrap();
    let content = image.content();
    let mut buffers: Vec<Buffer> = (0..64).map(|_| Buffer::new(4096, 1)).collect();
    let segments: Vec<Vec<iovec>> = buffers.iter_mut().map(|b| b.segments(&[])).collect();
    // More of them than there are bounce buffers.
    for (i, segments) in segments.iter().enumerate() {
        let command = transfer(Op::Read, 4096 * i as u64, segments);
        // SAFETY: the buffers are alive until the engine is. Unsafe because `queue_rq` is.
        unsafe { engine.queue_rq(disk, tag(u16::try_from(i).unwrap(), 0), command) }.unwrap();
    }
    let events = reap_until(&mut engine, |events| events.len() == 64);
    for event in events {
        assert!(
            matches!(
                event,
                Event::Done {
                    result: Ok(4096),
                    ..
                }
            ),
            "{event:?}"
        );
    }
    for (i, buffer) in buffers.iter_mut().enumerate() {
        assert!(buffer.bytes() == &content[i * 4096..(i + 1) * 4096]);
    }
    assert_eq!(engine.counters().bounced, 64);
    assert_eq!(
        engine.memory_free_bounces(),
        usize::from(BOUNCE_OF_DISK + BOUNCE_SHARED)
    );
    let sqes = engine.counters().sqes;
    let mut buffer = Buffer::new(4096, 1);
    let segments = buffer.segments(&[]);
    let result = run(&mut engine, disk, transfer(Op::Read, 0, &segments));
    assert_eq!(result, Ok(4096));
    assert_eq!(engine.counters().sqes - sqes, 1, "it was learned");
}

/// io_uring tries without blocking first, within the call that submits: so a batch of reads that the page
/// cache has costs one system call, and nobody waits for those it does not have.
#[test]
fn what_the_page_cache_has_is_read_by_the_call_that_submits() {
    let image = Image::new(On::Buffered, 1 << 20);
    let mut engine = engine(32);
    if !engine.describe().contains("deferred") {
        // Where the kernel may finish requests while this looks, nothing can be told apart.
        return;
    }
    let disk = engine.add_disk(image.target()).unwrap();
    image.file.sync_all().unwrap();
    let forget = rustix::fs::Advice::DontNeed;
    rustix::fs::fadvise(&image.file, 0, None, forget).unwrap();
    rustix::fs::fadvise(&image.file, 0, None, rustix::fs::Advice::Random).unwrap();
    let mut buffers: Vec<Buffer> = (0..32).map(|_| Buffer::new(4096, 0)).collect();
    let segments: Vec<Vec<iovec>> = buffers.iter_mut().map(|b| b.segments(&[])).collect();
    let mut pass = || {
        for (i, segments) in segments.iter().enumerate() {
            let command = transfer(Op::Read, 32768 * i as u64, segments);
            let tag = tag(u16::try_from(i).unwrap(), 1);
            // SAFETY: the buffers are alive until the engine is. Unsafe because `queue_rq` is.
            unsafe { engine.queue_rq(disk, tag, command) }.unwrap();
        }
        let enters = engine.counters().enters;
        engine.commit_rqs().unwrap();
        assert_eq!(engine.counters().enters, enters + 1);
        let at_once = match engine.has_events() {
            true => engine.reap(&mut |_| {}).unwrap(),
            false => 0,
        };
        while engine.in_flight() > 0 {
            engine.wait(None).unwrap();
            engine.reap(&mut |_| {}).unwrap();
        }
        at_once
    };
    // The device begins with 2, 4 and 8 of them before the batch ends, and may have done those by then.
    assert!(pass() <= 2 + 4 + 8, "nothing was in the cache");
    // Whoever is short of memory may take pages out of it.
    assert!((0..10).any(|_| pass() == 32), "all of it was");
    let content = image.content();
    for (i, buffer) in buffers.iter_mut().enumerate() {
        assert!(buffer.bytes() == &content[i * 32768..i * 32768 + 4096]);
    }
}

/// The device here has no queues to be polled, so that such a read would never come back: what goes to
/// the ring that polls is a file without direct I/O, which the kernel refuses at once.
#[test]
fn what_the_ring_that_polls_refuses_is_done_by_the_other_one() {
    let image = Image::new(On::Buffered, 1 << 20);
    let Target::File(file) = image.target() else {
        unreachable!()
    };
    let mut engine = engine(8);
    let file = FileTarget {
        io_poll: IoPoll::Always,
        ..file
    };
    let disk = engine.add_disk(Target::File(file)).unwrap();
    let mut buffer = Buffer::new(4096, 0);
    let segments = buffer.segments(&[]);
    for op in [Op::Read, Op::Write, Op::Read] {
        let result = run(&mut engine, disk, transfer(op, 8192, &segments));
        assert_eq!(result, Ok(4096));
    }
    assert_eq!(engine.counters().polled, 1, "tried once");
    assert_eq!(run(&mut engine, disk, FLUSH), Ok(0));
    let Target::File(file) = engine.remove_disk(disk) else {
        unreachable!()
    };
    // Only whoever polls, where that is asked for.
    let file = FileTarget {
        io_poll: IoPoll::PollQueues,
        ..file
    };
    let disk = engine.add_disk(Target::File(file)).unwrap();
    for polled in [false, true] {
        let command = Command {
            polled,
            ..transfer(Op::Read, 8192, &segments)
        };
        assert_eq!(run(&mut engine, disk, command), Ok(4096));
        assert_eq!(engine.counters().polled, 1 + u64::from(polled));
    }
}

#[test]
fn an_older_kernels_ring_does_the_same() {
    for skipped_modes in 0..3 {
        for all in [false, true] {
            let ask = Ask {
                skipped_modes,
                fixed_files: all,
                silent_writes: all,
                polled: false,
                restricted: all,
                ..Ask::ALL
            };
            let mut engine = Engine::asking(4, 8, ask).unwrap();
            let image = Image::new(On::Buffered, 1 << 20);
            let disk = engine.add_disk(image.target()).unwrap();
            let mut buffer = Buffer::new(8192, 0);
            buffer.bytes().fill(0x5a);
            let segments = buffer.segments(&[4096]);
            let write = transfer(Op::Write, 4096, &segments);
            assert_eq!(run(&mut engine, disk, write), Ok(8192));
            assert_eq!(run(&mut engine, disk, FLUSH), Ok(0));
            buffer.bytes().fill(0);
            let segments = buffer.segments(&[512, 100]);
            let read = transfer(Op::Read, 4096, &segments);
            assert_eq!(run(&mut engine, disk, read), Ok(8192));
            assert!(buffer.bytes().iter().all(|byte| *byte == 0x5a));

            let (ours, theirs) = new_eventfd(EventfdFlags::NONBLOCK);
            engine.watch(ours, 3).unwrap();
            let (ours, called) = new_eventfd(EventfdFlags::NONBLOCK);
            let call = engine.add_call(ours, 4).unwrap();
            let waker = Waker::new().unwrap();
            engine.watch_waker(&waker).unwrap();
            for _ in 0..200 {
                kick(&theirs);
                reap_until(&mut engine, |events| events.contains(&Event::Kick(3)));
                engine.call(call);
                engine.commit_rqs().unwrap();
                assert_eq!(read_soon(&called), 1);
                waker.wake();
                reap_until(&mut engine, |events| events.contains(&Event::Message));
            }
            engine.unwatch(3);
            engine.remove_call(call);
        }
    }
}
