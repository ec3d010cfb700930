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

/// The delays of reads and flushes of a disk, in microseconds, until `until` is over: median and 99th percentile.
fn delays(disk: &mut Disk, until: Duration) -> (u64, u64) {
    let begun = Instant::now();
    let mut seen = Vec::new();
    for n in 0_u64.. {
        if begun.elapsed() > until {
            break;
        }
        let at = Instant::now();
        match n % 8 {
            0 => disk.flush(0),
            _ => drop(disk.read(0, n % 64 * 8, 4096)),
        }
        seen.push(at.elapsed().as_micros() as u64);
    }
    seen.sort_unstable();
    (seen[seen.len() / 2], seen[seen.len() * 99 / 100])
}

/// Median and 99th percentile, before and during.
type Delays = [(u64, u64); 2];

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

fn discards(disk: &mut Disk, over: &AtomicBool, sectors: u32) {
    while !over.load(Ordering::Relaxed) {
        disk.clear(0, kind::DISCARD, Range::new(0, sectors));
    }
}

fn long_discards(disk: &mut Disk, over: &AtomicBool) {
    discards(disk, over, (1 << 30) / 512);
}

fn short_discards(disk: &mut Disk, over: &AtomicBool) {
    discards(disk, over, (1 << 20) / 512);
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
    let (_dir, image) = plain(1 << 30);
    rows.push((
        "discards of 1 MiB",
        measure(&image, &[], short_discards, |_| ()),
    ));
    rows.push((
        "discards of 1 GiB",
        measure(&image, &[], long_discards, |_| ()),
    ));
    rows
}

#[test]
#[ignore = "a measurement, for docs/SECURITY.md"]
fn what_the_neighbour_feels() {
    let runs: Vec<_> = (0..RUNS).map(|_| run_all()).collect();
    let median = |row: usize, pick: fn(&Delays) -> u64| {
        let mut all: Vec<u64> = runs.iter().map(|run| pick(&run[row].1)).collect();
        all.sort_unstable();
        all[all.len() / 2]
    };
    println!("| the other disk | p50, µs | p99, µs |\n|---|---|---|");
    for (row, (name, _)) in runs[0].iter().enumerate() {
        println!(
            "| {name} | {} → {} | {} → {} |",
            median(row, |at| at[0].0),
            median(row, |at| at[1].0),
            median(row, |at| at[0].1),
            median(row, |at| at[1].1)
        );
    }
}
