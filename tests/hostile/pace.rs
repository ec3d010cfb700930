//! What the other disk's front end feels of each attack. A measurement, not a test: it asserts nothing about time.

use crate::stage::{Attack, Stage};
use std::time::{Duration, Instant};

/// How long there is peace, and then war.
const SPAN: Duration = Duration::from_millis(400);

#[test]
#[ignore = "measures for a minute; run it alone, in the release profile, with --nocapture"]
fn the_other_disk_keeps_its_pace() {
    let only = std::env::var("BLKMQ_ATTACK").ok();
    let all: Vec<(&str, Attack)> = [
        crate::memory::ALL,
        crate::fds::ALL,
        crate::messages::ALL,
        crate::rings::ALL,
    ]
    .concat();
    println!("| attack | times | p99 before (µs) | p99 during (µs) |\n|---|---|---|---|");
    for (name, attack) in all {
        if only.as_deref().is_some_and(|only| only != name) {
            continue;
        }
        let stage = Stage::new();
        std::thread::sleep(SPAN / 4);
        stage.other.take_delays();
        std::thread::sleep(SPAN);
        let (_, _, before) = stage.other.take_delays();
        let begun = Instant::now();
        let mut times = 0;
        while times == 0 || begun.elapsed() < SPAN {
            attack(&stage);
            times += 1;
        }
        let (_, _, during) = stage.other.take_delays();
        println!("| `{name}` | {times} | {before} | {during} |");
        stage.serves_again();
        stage.end();
    }
}
