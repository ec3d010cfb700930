//! Daemons killed under a real guest: Linux under QEMU's emulation, with fio verifying on four queues at depth 32.
//!
//! `BLKMQ_ROUNDS=n` sets how many are killed, `BLKMQ_SEED=n` chooses the moments.

mod guest_support;

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, SystemTime};

use guest_support::{Daemon, Disk, Guest, MIB};

/// Daemons killed on one guest at most; the next ones get another.
const KILLS_A_GUEST: u64 = 25;
/// Queues of the disk, each with a fio job on the vCPU that has it.
const QUEUES: usize = 4;

fn number(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok()?;
    Some(value.parse().expect("a number"))
}

/// SplitMix64.
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// How many requests of each queue were taken up again.
type TakenUp = [u64; QUEUES];

/// Adds what a daemon said it went on with.
fn count_taken_up(said: &str, sums: &mut TakenUp) {
    for line in said.lines() {
        let Some((before, count)) = line.split_once(": goes on with ") else {
            continue;
        };
        let number = |text: Option<&str>| text.and_then(|text| text.parse().ok());
        let queue: Option<usize> = number(before.rsplit(' ').next());
        let count: Option<usize> = number(count.split(' ').next());
        sums[queue.expect("a queue's number")] += count.expect("a count") as u64;
    }
}

/// Boots a guest and kills up to `most` daemons while it writes and verifies; returns how many.
fn kill_under_a_guest(most: u64, random: &mut u64, resumed: &mut TakenUp) -> u64 {
    let disk = Disk::new(256 * MIB);
    // Slow enough that all requests fio keeps in flight are there at any moment.
    let control = disk.control();
    let control = control.to_str().expect("a plain name");
    let start = |random: &mut u64| {
        let limit = format!("iops={}", 100 + next(random) % 500);
        let args = ["--limit", &limit, "--log", "debug"];
        Daemon::start(&disk, &[&args[..], &["--control-path", control]].concat())
    };
    let mut daemon = Some(start(random));
    // About as many requests as are served while that many daemons live.
    let size_kib = 1024 + 640 * most;
    let guest = Guest::qemu(4, 4).disk(&disk).option("--timeout", "600");
    let mut guest = guest.start(&format!(
        r#"
        same queues "$(ls /sys/block/vda/mq | wc -l)" 4
        echo @@writing
        fio --name=killed --filename=/dev/vda --direct=1 --ioengine=libaio --iodepth=32 --rw=randwrite \
            --bsrange=4k-32k --size={size_kib}k --offset_increment=64m --numjobs=4 --cpus_allowed=0-3 \
            --cpus_allowed_policy=split --fsync=64 --verify=crc32c --verify_backlog=128 --verify_fatal=1 \
            --minimal >/tmp/out 2>&1 || {{ cat /tmp/out; exit 1; }}
        echo @@verified
        echo "@@sha256 $(sha256 /dev/vda)"
        "#
    ));
    guest.await_line("@@writing");
    // fio takes seconds to begin on a busy machine, and a daemon that is killed before leaves nothing in flight.
    let writing = |disk: &Disk| disk.shown()["stats"]["writes"]["ios"].as_u64() > Some(0);
    let first = daemon.as_mut().expect("there is one");
    first.await_that("fio writes", Duration::from_secs(120), |_| writing(&disk));
    let done = &AtomicBool::new(false);
    let mut kills = 0;
    thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            // However it ends, the daemons stop being killed.
            let _done = Done(done);
            guest.await_line("@@verified");
        });
        while kills < most {
            thread::sleep(Duration::from_millis(next(random) % 1500));
            if done.load(Ordering::Relaxed) {
                break;
            }
            count_taken_up(&daemon.as_ref().expect("there is one").said(), resumed);
            // SIGKILL.
            daemon = None;
            kills += 1;
            let daemon = daemon.insert(start(random));
            // A QEMU before 8.2 that loses its connection while it still negotiates does not come back: that moment
            // is left to the native front end.
            daemon.await_that("QEMU is back", Duration::from_secs(60), |daemon| {
                let started = daemon.said().matches(" started: ").count();
                done.load(Ordering::Relaxed) || started >= QUEUES
            });
        }
        watcher.join().expect("the guest verifies what it wrote");
    });
    let out = guest.finish();
    let daemon = daemon.expect("there is one");
    assert_eq!(out.value("@@sha256"), disk.sha256());
    count_taken_up(&daemon.said(), resumed);
    daemon.stop().assert_no_errors();
    kills
}

/// Says that it is done when it is dropped.
struct Done<'a>(&'a AtomicBool);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_guest_loses_nothing_when_its_daemon_is_killed() {
    let rounds = number("BLKMQ_ROUNDS").unwrap_or(3);
    let now = SystemTime::UNIX_EPOCH.elapsed().expect("a clock");
    let mut random = number("BLKMQ_SEED").unwrap_or(now.as_secs());
    println!("BLKMQ_SEED={random}");
    let (mut kills, mut resumed) = (0, TakenUp::default());
    while kills < rounds {
        let most = (rounds - kills).min(KILLS_A_GUEST);
        let more = kill_under_a_guest(most, &mut random, &mut resumed);
        assert!(more > 0, "the guest was done before a daemon was killed");
        kills += more;
        println!("{kills} daemons killed, {resumed:?} requests of each queue taken up again");
    }
    assert!(
        resumed.iter().sum::<u64>() > 0,
        "QEMU did not hand the in-flight region on"
    );
    // A few moments may all be before fio has begun on some queue; many are not.
    if kills >= KILLS_A_GUEST {
        assert!(
            resumed.iter().all(|&count| count >= kills),
            "each of the queues was at work"
        );
    }
}
