//! What the other disk's front end feels of each attack. Measurements, not tests: they assert nothing about time. They
//! check its data all the same, as every other test here does.

use crate::hoards::{self, Hoard};
use crate::stage::{Attack, Beside, DISK, Stage};
use crate::support::disk::kind;
use crate::support::{Seg, Spec, disk};
use std::time::{Duration, Instant};

/// How long there is peace, and then war, where a kind of attack is measured.
const LONG: Duration = Duration::from_secs(2);
/// The same for a single attack.
const SHORT: Duration = Duration::from_millis(400);

/// Whose name `BLKMQ_ATTACK` has; everything, without it.
fn is_wanted(name: &str) -> bool {
    std::env::var("BLKMQ_ATTACK").map_or(true, |only| only == name)
}

/// The worker that serves no queue of the attacked disk, where there are as many: queues go to workers in turn, the
/// second disk's beginning with the second worker, and the attacked disk has four.
const APART: Beside = Beside {
    workers: 5,
    queues: [3, 3],
    depth: 1,
};
const TOGETHER: Beside = Beside {
    workers: 1,
    queues: [0, 0],
    depth: 1,
};

/// For comparison: a front end that does nothing wrong, and reads at depth 32.
fn a_good_neighbour(stage: &Stage) {
    let mut disk = stage.attach(1);
    let gpa = disk.mem().alloc(32 * 4096, 4096);
    let queue = &mut disk.queues[0];
    let read = |queue: &mut crate::support::Queue, n: u64| {
        let data = [Seg::writable(gpa + n % 32 * 4096, 4096)];
        queue
            .push(n % 32, kind::IN, 0, n * 8 % (DISK / 512), &data)
            .expect("room");
        queue.publish();
    };
    (0..32).for_each(|n| read(queue, n));
    for n in 32..10_000 {
        assert_eq!(disk::finish(queue).status, 0);
        read(queue, n);
    }
    while queue.in_flight() > 0 {
        disk::finish(queue);
    }
}

fn every_attack() -> Vec<(&'static str, Attack)> {
    [
        crate::memory::ALL,
        crate::fds::ALL,
        crate::messages::ALL,
        crate::rings::ALL,
    ]
    .concat()
}

/// What is done beside the other disk.
enum War {
    /// Made in turn, again and again, each once at least.
    Attacks(Vec<Attack>),
    /// Taken once, and kept.
    Held(Hoard),
}

/// For at least `span`. The median and the 99th percentile of the other disk's delays, in microseconds: before, and
/// during.
fn pace(war: &War, beside: Beside, span: Duration) -> [(u64, u64); 2] {
    let spec = match war {
        War::Attacks(_) => Spec::image(DISK),
        War::Held(_) => hoards::slow_disk(),
    };
    let stage = Stage::beside(spec, beside);
    stage.other.beats(100);
    stage.other.take_delays();
    std::thread::sleep(span / 2);
    let (_, median, most) = stage.other.take_delays();
    let quiet = (median, most);
    let held = match war {
        War::Attacks(attacks) => {
            let begun = Instant::now();
            let mut done = 0;
            while done < attacks.len() || begun.elapsed() < span {
                attacks[done % attacks.len()](&stage);
                done += 1;
            }
            None
        }
        War::Held(hoard) => {
            let mut slow = stage.attach(4);
            hoard(&mut slow);
            std::thread::sleep(span);
            Some(slow)
        }
    };
    // An attack may be over before the other disk was served once.
    stage.other.beats(100);
    let (_, median, most) = stage.other.take_delays();
    match held {
        None => {
            stage.serves_again();
            stage.end();
        }
        // At one a second what is held would take an hour to end.
        Some(_) => stage.abandon(),
    }
    [quiet, (median, most)]
}

/// What is taken and kept, by name.
fn every_hoard() -> impl Iterator<Item = (&'static str, War)> {
    let all = hoards::ALL.iter();
    all.map(|(name, hoard)| (*name, War::Held(*hoard)))
}

/// The other disk beside each kind of attack: at depth 1 and 8, on the worker that is attacked and on another one.
#[test]
#[ignore = "measures for two minutes; run it alone, in the release profile, with --nocapture"]
fn the_other_disk_keeps_its_pace() {
    let named = |name: &str| {
        let mut all = every_attack().into_iter();
        let found = all.find(|(of, _)| *of == name);
        vec![found.expect("an attack of this name").1]
    };
    let all = |list: &[(&str, Attack)]| list.iter().map(|(_, attack)| *attack).collect();
    let kinds: [(&str, Vec<Attack>); 10] = [
        ("a good neighbour, depth 32", vec![a_good_neighbour]),
        ("guest memory", all(crate::memory::ALL)),
        (
            "… truncated under load",
            named("memory_truncated_under_load"),
        ),
        ("file descriptors", all(crate::fds::ALL)),
        (
            "… calls full, and block",
            named("a_call_eventfd_that_is_full_and_blocks"),
        ),
        ("messages", all(crate::messages::ALL)),
        (
            "… whose answers are not read",
            named("a_front_end_that_does_not_read"),
        ),
        ("… a thousand connections", named("a_thousand_connections")),
        ("rings and requests", all(crate::rings::ALL)),
        (
            "… descriptors changed while read",
            named("descriptors_changed_while_they_are_read"),
        ),
    ];
    println!("| attack | worker | depth | p50 before | during | p99 before | during (µs) |");
    println!("|---|---|---|---|---|---|---|");
    let kinds = kinds.map(|(name, attacks)| (name, War::Attacks(attacks)));
    for (name, war) in kinds.into_iter().chain(every_hoard()) {
        if !is_wanted(name) {
            continue;
        }
        for (worker, beside) in [("the same", TOGETHER), ("another", APART)] {
            for depth in [1, 8] {
                let [quiet, war] = pace(&war, Beside { depth, ..beside }, LONG);
                println!(
                    "| {name} | {worker} | {depth} | {} | {} | {} | {} |",
                    quiet.0, war.0, quiet.1, war.1
                );
            }
        }
    }
}

/// The other disk beside each attack by itself, on the same worker.
#[test]
#[ignore = "measures for a minute; run it alone, in the release profile, with --nocapture"]
fn the_other_disk_keeps_its_pace_in_each_attack() {
    println!("| attack | p50 before | during | p99 before | during (µs) |\n|---|---|---|---|---|");
    let good: (&str, Attack) = ("a_good_neighbour", a_good_neighbour);
    let attacks = std::iter::once(good).chain(every_attack());
    let attacks = attacks.map(|(name, attack)| (name, War::Attacks(vec![attack])));
    for (name, war) in attacks.chain(every_hoard()) {
        if !is_wanted(name) {
            continue;
        }
        let [quiet, war] = pace(&war, TOGETHER, SHORT);
        println!(
            "| `{name}` | {} | {} | {} | {} |",
            quiet.0, war.0, quiet.1, war.1
        );
    }
}
