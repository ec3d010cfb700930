//! What the neighbour of a disk that misbehaves feels: delays of its requests, before and meanwhile, and beside a
//! disk that asks for the same and behaves.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::neighbours::{Frozen, Pair, push_everything, sparse};
use crate::fuse::FuseMount;
use crate::support::disk::{Range, kind};
use crate::support::*;

/// How long each is measured.
const SPAN: Duration = Duration::from_secs(2);

/// Medians of so many runs.
const RUNS: usize = 5;

/// Delays of one kind of request in microseconds: median and 99th percentile.
type Pace = (u64, u64);

/// Of reads of 4 KiB, and of flushes.
type Paces = [Pace; 2];

/// Before and during.
type Delays = [Paces; 2];

/// The delays of a disk's reads and flushes until `until` is over: a flush after seven reads.
fn delays(disk: &mut Disk, until: Duration) -> Paces {
    let begun = Instant::now();
    let mut seen = [Vec::new(), Vec::new()];
    for n in 0_u64.. {
        if begun.elapsed() > until {
            break;
        }
        let at = Instant::now();
        let is_flush = n % 8 == 0;
        match is_flush {
            true => disk.flush(0),
            false => drop(disk.read(0, n % 64 * 8, 4096)),
        }
        seen[usize::from(is_flush)].push(at.elapsed().as_micros() as u64);
    }
    seen.map(|mut times| {
        times.sort_unstable();
        (times[times.len() / 2], times[times.len() * 99 / 100])
    })
}

/// What a disk does while the other is measured.
type Deed = fn(&mut Disk, &AtomicBool);

fn hang(disk: &mut Disk, over: &AtomicBool) {
    push_everything(disk, 10);
    while !over.load(Ordering::Relaxed) {
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn everything(disk: &mut Disk, over: &AtomicBool) {
    while !over.load(Ordering::Relaxed) {
        push_everything(disk, 10);
        while disk.queues[0].in_flight() > 0 {
            disk.queues[0].wait(DEADLINE).expect("it comes back");
        }
    }
}

fn keep_busy(disk: &mut Disk, over: &AtomicBool, bytes: usize, depth: u64) {
    let gpa = disk.mem().alloc(bytes, 4096);
    let begin = |queue: &mut Queue, token| {
        let whole = [Seg::writable(gpa, bytes)];
        queue.push(token, kind::IN, 0, 0, &whole).expect("room");
        queue.publish();
    };
    (0..depth).for_each(|token| begin(&mut disk.queues[0], token));
    while !over.load(Ordering::Relaxed) {
        let done = disk.queues[0].wait(DEADLINE).expect("it comes back");
        begin(&mut disk.queues[0], done.token);
    }
}

fn huge(disk: &mut Disk, over: &AtomicBool) {
    keep_busy(disk, over, 48 << 20, 16);
}

fn ordinary(disk: &mut Disk, over: &AtomicBool) {
    keep_busy(disk, over, 128 << 10, 16);
}

/// Makes extents of 4 KiB with holes between them, and discards them all, so many bytes at a time.
fn discard_extents(disk: &mut Disk, over: &AtomicBool, bytes: u64) {
    const EXTENTS: u64 = 2048;
    const STEP: u64 = 8192;
    let gpa = disk.mem().alloc(4096, 4096);
    while !over.load(Ordering::Relaxed) {
        let queue = &mut disk.queues[0];
        for extent in 0..EXTENTS {
            if queue.in_flight() == 32 {
                queue.wait(DEADLINE).expect("it comes back");
            }
            let data = [Seg::readable(gpa, 4096)];
            let sector = extent * STEP / SECTOR;
            queue
                .push(extent % 64, kind::OUT, 0, sector, &data)
                .expect("room");
            queue.publish();
        }
        while queue.in_flight() > 0 {
            queue.wait(DEADLINE).expect("it comes back");
        }
        for at in (0..EXTENTS * STEP).step_by(bytes as usize) {
            let range = Range::new(at / SECTOR, (bytes / SECTOR) as u32);
            disk.clear(0, kind::DISCARD, range);
        }
    }
}

fn long_discards(disk: &mut Disk, over: &AtomicBool) {
    discard_extents(disk, over, 16 << 20);
}

fn short_discards(disk: &mut Disk, over: &AtomicBool) {
    discard_extents(disk, over, 128 << 10);
}

/// Before and during, by its neighbour's deed. What misbehaves is switched on in between, and off at the end.
fn measure(image: &Path, more: &[&str], deed: Deed, mut switch: impl FnMut(bool)) -> Delays {
    let pair = Pair::start(image, more);
    let mut disk = pair.attach();
    let mut other = pair.attach_other();
    let before = delays(&mut other, SPAN);
    switch(true);
    let over = AtomicBool::new(false);
    let during = std::thread::scope(|scope| {
        scope.spawn(|| deed(&mut disk, &over));
        std::thread::sleep(Duration::from_millis(100));
        let during = delays(&mut other, SPAN);
        over.store(true, Ordering::Relaxed);
        during
    });
    switch(false);
    pair.end(disk, other);
    [before, during]
}

fn plain(bytes: u64) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().expect("a directory");
    let image = dir.path().join("disk.img");
    sparse(&image, bytes);
    (dir, image)
}

/// One run of each kind: its name and the delays before and during.
fn run_all() -> Vec<(&'static str, Delays)> {
    let mut rows = Vec::new();
    let (_dir, image) = plain(64 << 20);
    rows.push((
        "everything, on a disk that behaves",
        measure(&image, &[], everything, |_| ()),
    ));
    let frozen = Frozen::new(1).expect("root");
    let mut cold = None;
    let image = frozen.images()[0].clone();
    rows.push((
        "everything, on a frozen file system",
        measure(&image, &[], hang, |on| cold = on.then(|| frozen.freeze())),
    ));
    let mount = FuseMount::new(&[("disk.img", 16 << 20)]).expect("root");
    let image = mount.path("disk.img");
    rows.push((
        "everything, on a server that hangs",
        measure(&image, &[], hang, |on| {
            if on { mount.hang() } else { mount.release() }
        }),
    ));
    let slow = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let pause = || std::thread::sleep(Duration::from_millis(20));
            while !slow.load(Ordering::Relaxed) {
                mount.hang();
                pause();
                mount.release();
                std::thread::yield_now();
            }
        });
        rows.push((
            "everything, on a server that answers every 20 ms",
            measure(&image, &[], everything, |_| ()),
        ));
        slow.store(true, Ordering::Relaxed);
    });
    let cached = ["--cache", "writeback"];
    let (_dir, image) = plain(64 << 20);
    rows.push((
        "cached reads of 128 KiB, 16 at a time",
        measure(&image, &cached, ordinary, |_| ()),
    ));
    rows.push((
        "cached reads of 48 MiB, 16 at a time",
        measure(&image, &cached, huge, |_| ()),
    ));
    let (_dir, image) = plain(64 << 20);
    rows.push((
        "2048 extents discarded in pieces of 128 KiB",
        measure(&image, &[], short_discards, |_| ()),
    ));
    rows.push((
        "2048 extents discarded at once",
        measure(&image, &[], long_discards, |_| ()),
    ));
    rows
}

#[test]
#[ignore = "a measurement, for docs/SECURITY.md"]
fn what_the_neighbour_feels() {
    let runs: Vec<_> = (0..RUNS).map(|_| run_all()).collect();
    let median = |row: usize, when: usize, what: usize, pick: fn(Pace) -> u64| {
        let mut all: Vec<u64> = runs
            .iter()
            .map(|run| pick(run[row].1[when][what]))
            .collect();
        all.sort_unstable();
        all[all.len() / 2]
    };
    println!(
        "| the other disk | reads: p50, µs | p99 | flushes: p50 | p99 |\n|---|---|---|---|---|"
    );
    for (row, (name, _)) in runs[0].iter().enumerate() {
        print!("| {name}");
        for (what, pick) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            let pick: fn(Pace) -> u64 = match pick {
                0 => |pace| pace.0,
                _ => |pace| pace.1,
            };
            print!(
                " | {} → {}",
                median(row, 0, what, pick),
                median(row, 1, what, pick)
            );
        }
        println!(" |");
    }
}
