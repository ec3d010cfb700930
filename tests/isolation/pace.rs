//! What the neighbour of a disk that misbehaves feels: delays of its requests, before and meanwhile, and beside a
//! disk that asks for the same and behaves.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tempfile::TempDir;

use super::deeds::{Cue, Flood, Order, READS, WRITES, discard_extents, everything, restart_ring};
use super::neighbours::{Cold, Frozen, Pair, sparse};
use super::scene::{Deed, Delays, Pace, Scene};
use crate::fuse::FuseMount;
use crate::support::disk::status;
use crate::support::*;

/// Medians of so many runs, unless `BLKMQ_ROUNDS` says something else.
const RUNS: usize = 5;

/// How many times the delays beside a disk that behaves those beside one that misbehaves may be.
const MOST: f64 = 10.0;

/// A row of the table.
struct Row {
    /// What the disks share; empty where the disk behaves.
    shared: &'static str,
    /// What the other disk does.
    name: String,
    delays: Delays,
}

/// One run of everything. Each disk that misbehaves comes after the one that it is compared with.
#[derive(Default)]
struct Rows(Vec<Row>);

impl Rows {
    /// A disk that behaves.
    fn good(&mut self, name: &str, scene: &Scene<'_>, deed: impl Deed) {
        self.bad("", name, scene, deed, |_, _| ());
    }

    fn bad(
        &mut self,
        shared: &'static str,
        name: &str,
        scene: &Scene<'_>,
        deed: impl Deed,
        switch: impl FnMut(&Pair, bool),
    ) -> u64 {
        eprintln!("{shared} {name}");
        let (delays, answered) = scene.measure(deed, switch);
        self.0.push(Row {
            shared,
            name: name.to_owned(),
            delays,
        });
        answered
    }

    /// The same deed while its file system is frozen.
    fn frozen(
        &mut self,
        shared: &'static str,
        frozen: &Frozen,
        scene: &Scene<'_>,
        deed: impl Deed,
    ) {
        let mut cold: Option<Cold> = None;
        self.bad(
            shared,
            "… on a frozen file system",
            scene,
            deed,
            |_, on| {
                cold = on.then(|| frozen.freeze());
            },
        );
    }
}

fn plain(bytes: u64) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().expect("a directory");
    let image = dir.path().join("disk.img");
    sparse(&image, bytes);
    (dir, image)
}

fn storage_that_fails(rows: &mut Rows) {
    let frozen = Frozen::of(1, 128 << 20, 64 << 20).expect("root");
    let one = Scene::of(&frozen.images()[0]);
    rows.good("writes, zeroes, discards, reads, flushes", &one, everything);
    rows.frozen("kernel threads", &frozen, &one, everything);
    let mount = FuseMount::new(&[("disk.img", 16 << 20)]).expect("root");
    let served = Scene::of(&mount.path("disk.img"));
    let hang = |on| if on { mount.hang() } else { mount.release() };
    let call = "the submitting call";
    rows.bad(
        call,
        "… on a FUSE server that hangs",
        &served,
        everything,
        |_, on| hang(on),
    );
    let slow = AtomicBool::new(true);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while slow.load(Ordering::Relaxed) {
                hang(true);
                std::thread::sleep(Duration::from_millis(20));
                hang(false);
                std::thread::yield_now();
            }
        });
        let name = "… on a FUSE server that answers every 20 ms";
        rows.bad(call, name, &served, everything, |_, _| ());
        slow.store(false, Ordering::Relaxed);
    });

    let many = Scene {
        queues: 64,
        ..one.clone()
    };
    let writes = |disk: &mut Disk, cue: &Cue| WRITES.run(disk, cue);
    rows.good("8 writes on each of 64 queues", &many, writes);
    rows.frozen("driver tags", &frozen, &many, writes);

    let odd = Scene { shift: 1, ..one };
    let copied = Flood {
        shift: 1,
        depth: 40,
        ..WRITES
    };
    let copied = |disk: &mut Disk, cue: &Cue| copied.run(disk, cue);
    rows.good("40 writes that are copied", &odd, copied);
    rows.frozen("bounce buffers", &frozen, &odd, copied);

    let (_dir, image) = plain(64 << 20);
    let in_file = Scene {
        file: Some(frozen.path().join("memory")),
        ..Scene::of(&image)
    };
    let reads = Flood {
        depth: 32,
        places: 128,
        ..READS
    };
    let reads = |disk: &mut Disk, cue: &Cue| reads.run(disk, cue);
    rows.good("32 reads into memory in a file", &in_file, reads);
    rows.frozen("page faults", &frozen, &in_file, reads);
}

fn much_at_once(rows: &mut Rows) {
    let (_dir, image) = plain(64 << 20);
    let cached = Scene {
        options: &["--cache", "writeback"],
        ..Scene::of(&image)
    };
    let reads = |bytes| Flood {
        bytes,
        depth: 16,
        ..READS
    };
    rows.good("16 cached reads of 128 KiB", &cached, |disk, cue| {
        reads(128 << 10).run(disk, cue);
    });
    rows.bad(
        "memory bandwidth",
        "… of 48 MiB",
        &cached,
        |disk, cue| {
            reads(48 << 20).run(disk, cue);
        },
        |_, _| (),
    );
    let (_dir, image) = plain(64 << 20);
    let one = Scene::of(&image);
    rows.good(
        "2048 extents, discarded in pieces of 128 KiB",
        &one,
        |disk, cue| {
            discard_extents(disk, cue, 128 << 10);
        },
    );
    rows.bad(
        "long calls",
        "… discarded at once",
        &one,
        |disk, cue| {
            discard_extents(disk, cue, 16 << 20);
        },
        |_, _| (),
    );
}

fn lines_of_the_log(rows: &mut Rows) {
    let (_dir, image) = plain(16 << 20);
    let traced = Scene {
        options: &["--log", "trace"],
        ..Scene::of(&image)
    };
    rows.good(
        "a ring that is started for each read, `--log trace`",
        &traced,
        |disk, cue| {
            restart_ring(disk, cue, false);
        },
    );
    let name = "… and broken, and the log is not read";
    rows.bad(
        "the log",
        name,
        &traced,
        |disk, cue| restart_ring(disk, cue, true),
        |pair, on| {
            pair.daemon.hold_log(on);
            assert!(on || pair.daemon.wait_for_message("log lines were lost"));
        },
    );
}

fn full_rings(rows: &mut Rows) {
    let (_dir, image) = plain(128 << 20);
    let none = Scene {
        queues: 64,
        ..Scene::of(&image)
    };
    let reads = |flood: Flood, order| {
        move |disk: &mut Disk, cue: &Cue| Flood { order, ..flood }.run(disk, cue)
    };
    // As much as the others come to when they are merged.
    let large = Flood {
        bytes: 512 << 10,
        depth: 1,
        ..READS
    };
    for elevator in ["mq-deadline", "kyber"] {
        let options = ["--scheduler", elevator];
        let scene = Scene {
            options: &options,
            ..none.clone()
        };
        let name = format!("8192 reads on 64 queues, {elevator}");
        rows.good(&name, &scene, reads(READS, Order::Random));
        let (shared, name) = ("the elevator", "… in the order of their sectors");
        rows.bad(shared, name, &scene, reads(READS, Order::Apart), |_, _| ());
        let name = format!("64 reads of 512 KiB on 64 queues, {elevator}");
        rows.good(&name, &scene, reads(large, Order::Random));
        let name = "… as 8192 of 4 KiB, to be merged";
        rows.bad(
            shared,
            name,
            &scene,
            reads(READS, Order::Adjacent),
            |_, _| (),
        );
    }

    rows.good(
        "8192 reads on 64 queues",
        &none,
        reads(READS, Order::Random),
    );
    // A request is whole sectors, so that each of these is refused when its chain has been looked at.
    let chains = Flood {
        bytes: 1,
        buffers: 124,
        status: status::IOERR,
        ..READS
    };
    let chains = |disk: &mut Disk, cue: &Cue| chains.run(disk, cue);
    rows.bad(
        "the turn",
        "… chains of 126 descriptors instead",
        &none,
        chains,
        |_, _| (),
    );
    let more = Scene {
        queues: 256,
        memory: 192 << 20,
        ..none
    };
    rows.bad("the turn", "… on 256 queues", &more, chains, |_, _| ());
}

fn run_all() -> Vec<Row> {
    let mut rows = Rows::default();
    for part in [
        storage_that_fails,
        much_at_once,
        lines_of_the_log,
        full_rings,
    ] {
        part(&mut rows);
    }
    rows.0
}

fn median(mut all: Vec<u64>) -> u64 {
    all.sort_unstable();
    all[all.len() / 2]
}

/// The medians of a row in each run.
fn medians(runs: &[Vec<Row>], row: usize) -> Delays {
    let of = |when: usize, what: usize, pick: fn(Pace) -> u64| {
        let all = runs.iter().map(|run| pick(run[row].delays[when][what]));
        median(all.collect())
    };
    [0, 1].map(|when| {
        [0, 1].map(|what| (of(when, what, |pace| pace.0), of(when, what, |pace| pace.1)))
    })
}

#[test]
#[ignore = "a measurement, for docs/SECURITY.md"]
fn what_the_neighbour_feels() {
    let wanted = std::env::var("BLKMQ_ROUNDS");
    let wanted = wanted.map_or(RUNS, |rounds| rounds.parse().expect("a number"));
    let runs: Vec<_> = (0..wanted).map(|_| run_all()).collect();
    println!(
        "| shared | the disk beside it | reads: p50, µs | p99 | flushes: p50 | p99 |\n\
         |---|---|---|---|---|---|"
    );
    let mut good = Delays::default();
    let (mut worst, mut bad) = ((0.0, ""), 0);
    for (nth, row) in runs[0].iter().enumerate() {
        let seen = medians(&runs, nth);
        print!("| {} | {} |", row.shared, row.name);
        for what in 0..2 {
            let [before, during] = seen.map(|paces| paces[what]);
            print!(
                " {} → {} | {} → {} |",
                before.0, during.0, before.1, during.1
            );
        }
        println!();
        if row.shared.is_empty() {
            good = seen;
            continue;
        }
        bad += 1;
        for what in 0..2 {
            let times = seen[1][what].1 as f64 / good[1][what].1 as f64;
            if times > worst.0 {
                worst = (times, &*row.name);
            }
        }
    }
    println!(
        "{bad} disks that misbehave; no 99th percentile is above {:.1} times that beside one that behaves ({})",
        worst.0, worst.1
    );
    assert!(worst.0 <= MOST, "{} times: {}", worst.0, worst.1);
}
