//! Upgrades from the last release, and back to it.
//!
//! The last release is built once, into the user's cache folder:
//!
//! ```sh
//! cargo nextest run --test upgrade --run-ignored only -E 'test(last_release)'
//! ```

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::json;

use rustix::process::Signal;

use super::support::disk::{kind, status};
use super::support::front::Inflight;
use super::support::*;
use super::{Lineage, MIB, region, under_load};

/// The commit of the last release.
const COMMIT: &str = "bb5a7f7";

/// Where its program is, if it can be built.
fn last_release() -> Option<PathBuf> {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let home = || Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache"));
    let dir = cache.or_else(home)?.join("vhost-user-blkmq").join(COMMIT);
    let program = dir.join("vhost-user-blkmq");
    if !program.exists() {
        build(&dir, &program)?;
    }
    Some(program)
}

fn build(dir: &Path, program: &Path) -> Option<()> {
    let source = dir.join("source");
    std::fs::create_dir_all(&source).ok()?;
    let mut archive = Command::new("git")
        .args(["-C", env!("CARGO_MANIFEST_DIR"), "archive", COMMIT])
        .stdout(Stdio::piped())
        .spawn()
        .ok()?;
    let unpacked = Command::new("tar")
        .args(["-x", "-C"])
        .arg(&source)
        .stdin(archive.stdout.take()?)
        .status()
        .ok()?;
    if !(archive.wait().ok()?.success() && unpacked.success()) {
        println!("skipped: the history has no commit {COMMIT}");
        return None;
    }
    let built = Command::new(env!("CARGO"))
        .args([
            "build",
            "--locked",
            "--bin",
            "vhost-user-blkmq",
            "--target-dir",
        ])
        .arg(dir.join("target"))
        .current_dir(&source)
        .env("CARGO_PROFILE_DEV_DEBUG", "0")
        .status();
    assert!(built.ok()?.success(), "the last release cannot be built");
    std::fs::copy(dir.join("target/debug/vhost-user-blkmq"), program).ok()?;
    Some(())
}

#[test]
#[ignore = "builds the last release, once"]
fn upgrades_from_the_last_release_and_back_under_load_lose_nothing() {
    let Some(last) = last_release() else {
        println!("skipped: there is no last release");
        return;
    };
    let last = Some(&*last);
    let spec = Spec::image(64 * MIB)
        .program(last)
        .lifetime(Duration::from_secs(600));
    let mut lineage = Lineage::start(spec, &["--serial", "s"]);
    let mut disk = Disk::attach(lineage.daemon.socket(), 4);
    let mut served = 0;
    // What a guest chose and what was changed travels both ways.
    region::choose(&mut disk.front, 0);
    let change = json!({ "scheduler": "kyber", "limits": { "iops": 900_000 } });
    lineage.ask("PATCH", "/v1/disks/s", Some(&change));
    let before = lineage.ask("GET", "/v1/disks/s", None);
    let (requests, longest) = under_load(&mut disk, |progress| {
        for round in 0..9 {
            // To this build, within it, and back.
            let program = last.filter(|_| round % 3 == 2);
            lineage.spec = lineage.spec.clone().program(program);
            served += lineage
                .upgrade(&["--serial", "s"])
                .total(|queue| queue.requests);
            progress();
            let now = lineage.ask("GET", "/v1/disks/s", None);
            for what in ["scheduler", "limits"] {
                assert_eq!(now[what], before[what], "{what} in round {round}");
            }
        }
    });
    println!("{requests} requests, no queue stood still for longer than {longest:?}");
    assert_eq!(disk.front.config().expect("a config").writeback, 0);
    drop(disk);
    served += lineage.daemon.stop().total(|queue| queue.requests);
    assert_eq!(served, requests, "each was served by exactly one daemon");
}

/// Most of what is asked stays in flight.
const SLOW: [&str; 4] = ["--limit", "iops=1/1", "--serial", "s"];
const QUEUES: u64 = 4;
/// Requests of a queue.
const EACH: u64 = 60;

/// A front end that survives its daemons, with four rings of 128.
struct Guest {
    front: Option<Front>,
    region: Inflight,
    queues: Vec<Queue>,
    gpa: u64,
    /// What was answered, by queue.
    answered: Vec<Vec<u64>>,
}

impl Guest {
    fn attach(daemon: &Daemon) -> Guest {
        let (front, region, queues) = region::attach(daemon, QUEUES as usize);
        let gpa = front.mem.alloc(4096, 4096);
        Guest {
            front: Some(front),
            region,
            answered: vec![Vec::new(); queues.len()],
            queues,
            gpa,
        }
    }

    /// Its front end goes to this daemon.
    fn come_back(&mut self, daemon: &Daemon) {
        let front = self.front.take().expect("a front end");
        self.front = Some(region::come_back(front, daemon, &self.region, &self.queues));
    }

    /// Writes that cannot be merged, on all queues.
    fn ask(&mut self, from: u64, to: u64) {
        for queue in &mut self.queues {
            for token in from..to {
                let data = [Seg::readable(self.gpa, 512)];
                let sector = 4096 * queue.index as u64 + 2 * token;
                queue
                    .push(token, kind::OUT, 0, sector, &data)
                    .expect("room");
            }
            queue.publish();
        }
    }

    fn reap(&mut self) {
        for (queue, answered) in self.queues.iter_mut().zip(&mut self.answered) {
            while let Some(done) = queue.reap() {
                assert_eq!(done.status, status::OK);
                answered.push(done.token);
            }
        }
    }

    /// Waits for what is left, and counts: each exactly once.
    fn finish(&mut self) {
        for (queue, answered) in self.queues.iter_mut().zip(&mut self.answered) {
            while queue.in_flight() > 0 {
                let done = disk::finish(queue);
                assert_eq!(done.status, status::OK);
                answered.push(done.token);
            }
            answered.sort_unstable();
            assert_eq!(*answered, (0..EACH).collect::<Vec<_>>(), "{}", queue.index);
        }
    }
}

/// Ends the daemon and starts another one in its place, with this program.
fn replace(lineage: &mut Lineage, signal: Signal, program: Option<&Path>, args: &[&str]) {
    lineage.daemon.signal(signal);
    lineage.daemon.wait_exit();
    lineage.spec = lineage.spec.clone().program(program);
    let spec = lineage.spec.clone().args(args.iter().copied());
    lineage.daemon = lineage.daemon.beside(&spec);
}

/// The last release starts no ring, so that nothing is answered twice and nothing wrong; this build goes on.
fn starts_no_ring(lineage: &Lineage, guest: &mut Guest) {
    for queue in 0..QUEUES {
        let line = format!("queue {queue}: not started: the in-flight region has version 2");
        assert!(
            lineage.daemon.wait_for_message(&line),
            "{}",
            lineage.daemon.stderr()
        );
    }
    let before = guest.answered.clone();
    guest.reap();
    assert_eq!(guest.answered, before);
}

#[test]
#[ignore = "builds the last release, once"]
fn a_restart_with_the_last_release_starts_no_ring_and_loses_nothing() {
    let Some(last) = last_release() else {
        println!("skipped: there is no last release");
        return;
    };
    for signal in [Signal::KILL, Signal::TERM] {
        let spec = Spec::image(64 * MIB).lifetime(Duration::from_secs(600));
        let mut lineage = Lineage::start(spec, &SLOW);
        let mut guest = Guest::attach(&lineage.daemon);
        guest.ask(0, EACH);
        guest.answered = vec![Vec::new(); guest.queues.len()];
        replace(&mut lineage, signal, Some(&last), &["--serial", "s"]);
        guest.reap();
        for _ in 0..2 {
            guest.come_back(&lineage.daemon);
            starts_no_ring(&lineage, &mut guest);
            replace(&mut lineage, Signal::KILL, Some(&last), &["--serial", "s"]);
        }
        replace(&mut lineage, Signal::TERM, None, &["--serial", "s"]);
        guest.come_back(&lineage.daemon);
        guest.finish();
    }
}

/// The last release has the records that it is handed. Started again it does not find them, and this build does.
#[test]
#[ignore = "builds the last release, once"]
fn a_take_over_by_the_last_release_that_crashes_then_loses_nothing() {
    let Some(last) = last_release() else {
        println!("skipped: there is no last release");
        return;
    };
    let spec = Spec::image(64 * MIB).lifetime(Duration::from_secs(600));
    let mut lineage = Lineage::start(spec, &["--serial", "s"]);
    let mut guest = Guest::attach(&lineage.daemon);
    lineage.spec = lineage.spec.clone().program(Some(&last));
    lineage.upgrade(&SLOW);
    for queue in &mut guest.queues {
        Request::flush().run(queue);
    }
    guest.ask(0, EACH);
    replace(&mut lineage, Signal::KILL, Some(&last), &SLOW);
    guest.reap();
    guest.come_back(&lineage.daemon);
    starts_no_ring(&lineage, &mut guest);
    // Back by a take-over as well: the rings that it did not start are started.
    lineage.spec = lineage.spec.clone().program(None);
    lineage.upgrade(&["--serial", "s"]);
    guest.finish();
}

/// A guest that chooses write-through while the last release serves it has it from the next daemon of this build.
#[test]
#[ignore = "builds the last release, once"]
fn write_through_that_a_guest_chose_with_the_last_release_is_not_forgotten() {
    let Some(last) = last_release() else {
        println!("skipped: there is no last release");
        return;
    };
    let args = ["--cache", "writeback", "--serial", "s"];
    let mut lineage = Lineage::start(Spec::image(64 * MIB), &args);
    let mut guest = Guest::attach(&lineage.daemon);
    for queue in &mut guest.queues {
        Request::flush().run(queue);
    }
    lineage.spec = lineage.spec.clone().program(Some(&last));
    lineage.upgrade(&args);
    region::choose(guest.front.as_mut().expect("a front end"), 0);
    replace(&mut lineage, Signal::KILL, None, &args);
    guest.come_back(&lineage.daemon);
    let unknown = "whether it chose write-through is not known";
    assert!(lineage.daemon.wait_for_message(unknown));
    assert!(region::is_write_through(&lineage));
}

/// The last release is started again and starts no ring, so it does not know what the guest chose, and says nothing of
/// that to a daemon of this build that takes over.
#[test]
#[ignore = "builds the last release, once"]
fn write_through_is_not_forgotten_where_the_last_release_has_started_no_ring() {
    let Some(last) = last_release() else {
        println!("skipped: there is no last release");
        return;
    };
    for is_connected in [true, false] {
        let args = ["--cache", "writeback", "--serial", "s"];
        let mut lineage = Lineage::start(Spec::image(64 * MIB), &args);
        let mut guest = Guest::attach(&lineage.daemon);
        for queue in &mut guest.queues {
            Request::flush().run(queue);
        }
        let front = guest.front.as_mut().expect("a front end");
        let written = front.set_config(BlkConfig::WRITEBACK_AT, &[0]);
        written.expect("the guest chooses");
        lineage.spec = lineage.spec.clone().program(Some(&last));
        lineage.upgrade(&args);
        replace(&mut lineage, Signal::KILL, Some(&last), &args);
        assert!(lineage.daemon.wait_for_message("listening on"));
        if is_connected {
            guest.come_back(&lineage.daemon);
            starts_no_ring(&lineage, &mut guest);
        }
        lineage.spec = lineage.spec.clone().program(None);
        lineage.upgrade(&args);
        if !is_connected {
            guest.come_back(&lineage.daemon);
        }
        let unknown = "whether it chose write-through is not known";
        assert!(lineage.daemon.wait_for_message(unknown));
        let shown = lineage.ask("GET", "/v1/disks/s", None);
        assert_eq!(shown["write_through"], json!(true));
        for queue in &mut guest.queues {
            Request::flush().run(queue);
        }
        // What the note says of it holds for the next one.
        replace(&mut lineage, Signal::KILL, None, &args);
        guest.come_back(&lineage.daemon);
        let shown = lineage.ask("GET", "/v1/disks/s", None);
        assert_eq!(shown["write_through"], json!(true));
    }
}
