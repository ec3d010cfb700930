//! What the other disk's front end feels of attacks. Measurements, not tests: they assert nothing about time.

use crate::stage::{Attack, Stage};
use crate::support::Seg;
use crate::support::disk::{finish, kind};
use std::time::{Duration, Instant};

/// How long there is peace, and then war, for one attack.
const SPAN: Duration = Duration::from_millis(400);
/// How long one kind of attacks goes on.
const KIND: Duration = Duration::from_millis(2500);

fn all() -> Vec<(&'static str, Attack)> {
    [
        crate::memory::ALL,
        crate::fds::ALL,
        crate::messages::ALL,
        crate::rings::ALL,
    ]
    .concat()
}

#[test]
#[ignore = "measures for a minute; run it alone, in the release profile, with --nocapture"]
fn the_other_disk_keeps_its_pace() {
    let only = std::env::var("BLKMQ_ATTACK").ok();
    println!("| attack | times | p99 before (µs) | p99 during (µs) |\n|---|---|---|---|");
    for (name, attack) in all() {
        if only.as_deref().is_some_and(|only| only != name) {
            continue;
        }
        let stage = Stage::new();
        std::thread::sleep(SPAN / 4);
        stage.other.take_delays();
        std::thread::sleep(SPAN);
        let before = stage.other.take_delays().p99;
        let begun = Instant::now();
        let mut times = 0;
        while times == 0 || begun.elapsed() < SPAN {
            attack(&stage);
            times += 1;
        }
        let during = stage.other.take_delays().p99;
        println!("| `{name}` | {times} | {before} | {during} |");
        stage.serves_again();
        stage.end();
    }
}

/// What is done to the first disk meanwhile, again and again: its name, and the attacks that take turns.
const KINDS: &[(&str, &[&str])] = &[
    ("`memory`: truncated", &["memory_truncated_under_load"]),
    (
        "`memory`: regions come and go",
        &[
            "memory_changes_all_the_time",
            "the_rings_memory_is_removed_under_load",
        ],
    ),
    (
        "`memory`: regions that are refused",
        &[
            "a_region_longer_than_its_file",
            "overlapping_regions",
            "regions_that_wrap",
            "more_regions_than_slots",
            "memory_that_cannot_be_mapped",
        ],
    ),
    (
        "`fds`: calls that are full or fail",
        &[
            "a_call_eventfd_that_is_full",
            "a_call_eventfd_that_is_full_and_blocks",
            "a_call_eventfd_that_blocks_later",
            "a_call_pipe_that_is_full",
            "a_call_pipe_nobody_reads_any_more",
        ],
    ),
    ("`fds`: kicks without end", &["a_flood_of_kicks"]),
    (
        "`fds`: descriptors that are refused",
        &[
            "a_kick_that_is_no_eventfd",
            "a_call_or_an_error_that_cannot_be_written",
            "descriptors_that_nobody_asked_for",
            "its_own_connection_as_a_descriptor",
        ],
    ),
    (
        "`messages`: garbage and halves",
        &["garbage", "requests_there_are_not", "half_a_message"],
    ),
    (
        "`messages`: crowds",
        &["a_thousand_connections", "connections_that_come_and_go"],
    ),
    (
        "`messages`: a front end that does not read",
        &["a_front_end_that_does_not_read"],
    ),
    (
        "`messages`: resets, rings on and off",
        &["rings_switched_on_and_off_under_load", "resets_under_load"],
    ),
    (
        "`rings`: broken indices, heads and chains",
        &[
            "an_available_index_that_jumps",
            "a_head_that_does_not_exist",
            "a_chain_that_loops",
            "indirect_tables_that_are_wrong",
            "a_status_that_cannot_be_written",
        ],
    ),
    ("`rings`: bad requests", &["a_storm_of_bad_requests"]),
    (
        "`rings`: full of the longest chains",
        &["a_full_ring_of_the_longest_chains"],
    ),
];

/// Does nothing to anybody, but takes a CPU.
fn computes(_: &Stage) {
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_millis(1) {
        std::hint::spin_loop();
    }
}

/// What a disk is for: 4 KiB reads, 32 at once.
fn reads(stage: &Stage) {
    let mut disk = stage.attach(1);
    let gpa = disk.mem().alloc(4096, 4096);
    let queue = &mut disk.queues[0];
    for n in 0..1000 {
        while queue.in_flight() < 32 {
            let to = [Seg::writable(gpa, 4096)];
            queue.push(n, kind::IN, 0, n % 1024 * 8, &to).expect("room");
        }
        queue.publish();
        let mut next = Some(finish(queue));
        while let Some(done) = next {
            assert_eq!(done.status, 0);
            next = queue.reap();
        }
    }
    while queue.in_flight() > 0 {
        finish(queue);
    }
}

fn rests(_: &Stage) {
    std::thread::sleep(Duration::from_millis(10));
}

/// Each kind of attacks for a while, beside a front end with `depth` requests at once.
fn measure(depth: usize) {
    let only = std::env::var("BLKMQ_ATTACK").ok();
    let all = all();
    let mut rows: Vec<(&str, Vec<Attack>)> = vec![
        ("nothing", vec![rests]),
        ("a thread that computes", vec![computes]),
        ("ordinary reads, depth 32", vec![reads]),
    ];
    rows.extend(KINDS.iter().map(|(name, attacks)| {
        let find = |wanted: &&str| {
            let found = all.iter().find(|(name, _)| name == wanted);
            found.unwrap_or_else(|| panic!("there is no {wanted}")).1
        };
        (*name, attacks.iter().map(find).collect())
    }));
    println!(
        "depth {depth}\n| meanwhile, on the first disk | rounds | requests a second | p50 (µs) | p99 (µs) | max (µs) |\n|---|---|---|---|---|---|"
    );
    for (name, attacks) in rows {
        if only.as_deref().is_some_and(|only| !name.contains(only)) {
            continue;
        }
        let stage = Stage::reading(depth);
        stage.other.beats(2000);
        stage.other.take_delays();
        let begun = Instant::now();
        let mut times = 0;
        'war: loop {
            for attack in &attacks {
                if begun.elapsed() >= KIND {
                    break 'war;
                }
                attack(&stage);
                times += 1;
            }
        }
        let seen = stage.other.take_delays();
        let rate = seen.count as f64 / begun.elapsed().as_secs_f64();
        println!(
            "| {name} | {times} | {rate:.0} | {} | {} | {} |",
            seen.p50, seen.p99, seen.max
        );
        stage.serves_again();
        stage.end();
    }
}

#[test]
#[ignore = "measures for a minute; run it alone, in the release profile, with --nocapture"]
fn the_other_disk_never_misses_a_beat_at_depth_1() {
    measure(1);
}

#[test]
#[ignore = "measures for a minute; run it alone, in the release profile, with --nocapture"]
fn the_other_disk_never_misses_a_beat_at_depth_8() {
    measure(8);
}
