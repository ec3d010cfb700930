//! Live upgrade: one daemon takes the disks over from another, with the front end connected and requests in flight.

#![allow(
    clippy::cast_possible_truncation,
    reason = "test code: sizes and offsets are small and known"
)]

#[path = "upgrade/carried.rs"]
mod carried;
#[path = "upgrade/held.rs"]
mod held;
#[path = "upgrade/impostor.rs"]
mod impostor;
#[path = "upgrade/last_release.rs"]
mod last_release;
#[path = "upgrade/notes.rs"]
mod notes;
#[path = "upgrade/promises.rs"]
mod promises;
#[path = "upgrade/refused.rs"]
mod refused;
#[path = "upgrade/region.rs"]
mod region;
#[path = "upgrade/short.rs"]
mod short;
#[path = "upgrade/stuck.rs"]
mod stuck;
mod support;
#[path = "upgrade/unheard.rs"]
mod unheard;
#[path = "upgrade/unready.rs"]
mod unready;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::Value;
use support::disk::{kind, status};
use support::*;
use tempfile::TempDir;
use vhost_user_blkmq::control::client;
use vhost_user_blkmq::error::Held;
use vhost_user_blkmq::image::lock::{Access, LockError, lock};

const MIB: u64 = 1 << 20;

/// A disk that goes from daemon to daemon.
struct Lineage {
    /// The one that serves.
    daemon: Daemon,
    spec: Spec,
    dir: TempDir,
    /// How long the guests waited at each upgrade so far, in milliseconds, as the daemons say.
    waits_ms: Vec<u64>,
}

impl Lineage {
    /// Starts the first daemon.
    fn start(spec: Spec, args: &[&str]) -> Lineage {
        let dir = TempDir::new().expect("a directory");
        let control = dir.path().join("control.sock");
        let control = control.to_str().expect("a plain name");
        let spec = spec.args(["--control-path", control, "--take-over", control]);
        let daemon = Daemon::start_ours(&spec.clone().args(args.iter().copied()));
        Lineage {
            daemon,
            spec,
            dir,
            waits_ms: Vec::new(),
        }
    }

    fn control(&self) -> PathBuf {
        self.dir.path().join("control.sock")
    }

    /// Has a new daemon take over, and returns the old one's summary when it has ended.
    fn upgrade(&mut self, args: &[&str]) -> Summary {
        let new = self
            .daemon
            .beside(&self.spec.clone().args(args.iter().copied()));
        assert!(
            new.wait_for_message("took over; the guests go on"),
            "{}\nthe old one:\n{}",
            new.stderr(),
            self.daemon.stderr()
        );
        let mut old = std::mem::replace(&mut self.daemon, new);
        let status = old.wait_exit();
        let (_, stdout, stderr) = old.terminate();
        assert!(status.success(), "{status}: {stderr}");
        let wait = stderr.split_once("handed over 1 disks; the guests waited for ");
        let wait = wait.and_then(|(_, rest)| rest.split_once(" ms")?.0.parse().ok());
        self.waits_ms
            .push(wait.unwrap_or_else(|| panic!("{stderr}")));
        serde_json::from_str(&stdout).expect("a summary")
    }

    fn ask(&self, method: &str, path: &str, body: Option<&Value>) -> Value {
        ask(&self.control(), method, path, body)
    }
}

fn ask(control: &Path, method: &str, path: &str, body: Option<&Value>) -> Value {
    let text = client::ask(control, method, path, body).expect("an answer");
    serde_json::from_str(&text).expect("JSON")
}

const BLOCK: usize = 4096;
const DEPTH: u64 = 32;

/// What a block holds: itself and its version, all over.
fn content(block: u64, version: u64) -> Vec<u8> {
    let mut bytes = vec![0; BLOCK];
    for (at, chunk) in bytes.chunks_exact_mut(8).enumerate() {
        chunk.copy_from_slice(&(block << 40 | version << 12 | at as u64).to_le_bytes());
    }
    bytes
}

/// Keeps 32 requests in flight on a queue until told to stop, and one more round: each of 32 places is written,
/// read back and compared, and written again. Each request comes back exactly once, or this panics. Returns the
/// number of requests, and the longest time without any completion.
fn load(queue: &mut Queue, gpa: u64, stop: &AtomicBool, done: &AtomicU64) -> (u64, Duration) {
    let mem = Arc::clone(&queue.mem);
    let mut rng = Rng::new(queue.index as u64 + 1);
    let first = queue.index as u64 * 2048;
    // Of each place: its block and version, and whether it is being written.
    let mut places: Vec<(u64, u64, bool)> = vec![(0, 0, false); DEPTH as usize];
    let mut outstanding = vec![false; DEPTH as usize];
    let (mut requests, mut longest) = (0, Duration::ZERO);
    let mut submit = |queue: &mut Queue,
                      outstanding: &mut Vec<bool>,
                      places: &mut Vec<(u64, u64, bool)>,
                      place: usize| {
        let at = gpa + (place * BLOCK) as u64;
        let (block, version, writing) = &mut places[place];
        *writing = !*writing;
        let (operation, data) = if *writing {
            // A place has blocks of its own.
            *block = first + rng.below(2048 / DEPTH) * DEPTH + place as u64;
            *version += 1;
            mem.write(at, &content(*block, *version));
            (kind::OUT, Seg::readable(at, BLOCK))
        } else {
            mem.fill(at, BLOCK, 0);
            (kind::IN, Seg::writable(at, BLOCK))
        };
        let sector = *block * (BLOCK as u64 / SECTOR);
        queue
            .push(place as u64, operation, 0, sector, &[data])
            .expect("room");
        assert!(!outstanding[place]);
        outstanding[place] = true;
    };
    for place in 0..DEPTH as usize {
        submit(queue, &mut outstanding, &mut places, place);
    }
    queue.publish();
    let mut last = Instant::now();
    while queue.in_flight() > 0 {
        let mut next = queue.wait(DEADLINE);
        assert!(next.is_some(), "queue {} stands still", queue.index);
        longest = longest.max(last.elapsed());
        while let Some(completion) = next {
            let place = completion.token as usize;
            assert_eq!(completion.status, status::OK);
            assert!(
                std::mem::take(&mut outstanding[place]),
                "it came back twice"
            );
            requests += 1;
            let (block, version, written) = places[place];
            if !written {
                let got = queue.mem.read_vec(gpa + (place * BLOCK) as u64, BLOCK);
                assert!(got == content(block, version), "block {block} differs");
            }
            if !stop.load(Ordering::Relaxed) || written {
                submit(queue, &mut outstanding, &mut places, place);
            }
            next = queue.reap();
        }
        queue.publish();
        done.store(requests, Ordering::Relaxed);
        last = Instant::now();
    }
    assert!(queue.reap().is_none(), "more came back than was sent");
    (requests, longest)
}

/// Runs `what` while all queues of the disk are under load, with progress on each of them before and after each
/// `step` that `what` calls. Returns the number of requests, and the longest time any queue stood still.
fn under_load(disk: &mut Disk, what: impl FnOnce(&mut dyn FnMut())) -> (u64, Duration) {
    let gpas: Vec<u64> = disk
        .queues
        .iter()
        .map(|queue| queue.mem.alloc(DEPTH as usize * BLOCK, 4096))
        .collect();
    let stop = &AtomicBool::new(false);
    let done: Vec<AtomicU64> = gpas.iter().map(|_| AtomicU64::new(0)).collect();
    std::thread::scope(|scope| {
        let threads: Vec<_> = disk
            .queues
            .iter_mut()
            .zip(gpas)
            .zip(&done)
            .map(|((queue, gpa), done)| scope.spawn(move || load(queue, gpa, stop, done)))
            .collect();
        // However it ends, the load does.
        let stopping = Stopping(stop);
        let mut progress = || {
            let before: Vec<u64> = done.iter().map(|d| d.load(Ordering::Relaxed)).collect();
            let deadline = Instant::now() + DEADLINE;
            while done
                .iter()
                .zip(&before)
                .any(|(now, before)| now.load(Ordering::Relaxed) < before + DEPTH)
            {
                assert!(Instant::now() < deadline, "a queue stands still");
                assert!(!threads.iter().any(|thread| thread.is_finished()));
                std::thread::sleep(Duration::from_millis(1));
            }
        };
        progress();
        what(&mut progress);
        drop(stopping);
        threads
            .into_iter()
            .map(|thread| thread.join().expect("its data is right"))
            .fold((0, Duration::ZERO), |sum, one| {
                (sum.0 + one.0, sum.1.max(one.1))
            })
    })
}

struct Stopping<'a>(&'a AtomicBool);

impl Drop for Stopping<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Somebody who tries to get at the image all the time, and must not.
struct Rival {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<u64>,
}

impl Rival {
    fn start(image: &Path) -> Rival {
        let open = File::options().read(true).write(true).open(image);
        let file = open.expect("it can be opened");
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut tries = 0;
            while !stopped.load(Ordering::Relaxed) {
                for access in [Access::Read, Access::Write] {
                    let outcome = lock(&file, access, Duration::ZERO);
                    assert!(
                        matches!(outcome, Err(LockError::Held(Held::Writing))),
                        "{access:?} was possible: {outcome:?}"
                    );
                }
                tries += 1;
            }
            tries
        });
        Rival { stop, thread }
    }

    fn finish(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread
            .join()
            .expect("the image was locked at all times")
    }
}

#[test]
fn twenty_upgrades_under_load_lose_nothing() {
    let rounds: usize =
        std::env::var("BLKMQ_ROUNDS").map_or(20, |text| text.parse().expect("a number"));
    let spec = Spec::image(64 * MIB).lifetime(Duration::from_secs(3600));
    let mut lineage = Lineage::start(spec, &[]);
    let mut disk = Disk::attach(lineage.daemon.socket(), 4);
    let mut served = 0;
    let rival = Rival::start(lineage.daemon.image());
    let (requests, longest) = under_load(&mut disk, |progress| {
        for round in 0..rounds {
            let args: &[&str] = match round % 4 {
                0 => &["--workers", "1"],
                1 => &["--workers", "4", "--cache", "writeback"],
                2 => &["--scheduler", "mq-deadline"],
                _ => &["--workers", "2", "--poll-us", "0"],
            };
            if round == 3 {
                // Queues may become more.
                lineage.spec = lineage.spec.clone().queues(8);
            }
            let summary = lineage.upgrade(args);
            assert_eq!(summary.total(|queue| queue.errors), 0);
            served += summary.total(|queue| queue.requests);
            progress();
        }
    });
    println!(
        "{rounds} upgrades under {requests} requests: no queue stood still for longer than {longest:?}; the daemons say {:?} ms",
        lineage.waits_ms
    );
    assert!(rival.finish() > 0, "the image's lock was tried");
    drop(disk);
    served += lineage.daemon.stop().total(|queue| queue.requests);
    assert_eq!(
        served, requests,
        "each request was served by exactly one daemon"
    );
}
