//! As many queues and requests as a front end can set up, with elevators and limits: a worker that counts them in too
//! small a number ends, and all disks with it.

use crate::support::disk::{finish_all, kind};
use crate::support::*;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::json;
use tempfile::TempDir;
use vhost_user_blkmq::control::client;

const ENTRIES: u64 = 1024;

/// A daemon with one worker, whose disk has an elevator.
struct Served {
    daemon: Daemon,
    dir: TempDir,
}

impl Served {
    fn start(queues: usize, scheduler: &str, more: &[&str]) -> Served {
        let dir = tempfile::tempdir().expect("a directory");
        let control = dir.path().join("control.sock").display().to_string();
        let args = ["--workers", "1", "--scheduler", scheduler];
        let spec = Spec::null(1 << 30)
            .queues(queues)
            .args(args)
            .args(["--control-path", &control])
            .args(more.iter().copied());
        let daemon = Daemon::start_ours(&spec);
        Served { daemon, dir }
    }

    fn attach(&self, queues: usize) -> Disk {
        let queue = QueueSetup {
            size: 1024,
            indirect_len: 4,
            ..QueueSetup::default()
        };
        Disk::attach_with(self.daemon.socket(), &Setup::default(), queues, queue)
            .expect("a session")
    }

    fn ask(&self, method: &str, path: &str, body: Option<&serde_json::Value>) -> String {
        let control = self.dir.path().join("control.sock");
        client::ask(&control, method, path, body).unwrap_or_else(|error| {
            panic!("{error:?}:\n{}", self.daemon.stderr());
        })
    }

    /// Fills all rings of a disk that may do one request a second, has the limit lifted, and sees all of them end.
    fn fill_and_let_go(&self, queues: usize) {
        let mut disk = self.attach(queues);
        let gpa = disk.mem().alloc(512, 512);
        let push = |queue: &mut Queue, n: u64| {
            let sector = (queue.index as u64 * ENTRIES + n) * 16;
            let segs = [Seg::writable(gpa, 512)];
            queue.push(n, kind::IN, 0, sector, &segs).expect("room");
        };
        for queue in &mut disk.queues {
            for n in 0..ENTRIES {
                push(queue, n);
            }
            queue.publish();
        }
        let all = json!(queues as u64 * ENTRIES);
        let deadline = std::time::Instant::now() + DEADLINE;
        loop {
            let shown: serde_json::Value =
                serde_json::from_str(&self.ask("GET", "/v1/disks/@0", None)).expect("JSON");
            let now = &shown["stats"]["in_flight"];
            if *now == all {
                break;
            }
            // In the place of those that the limit has let pass.
            for queue in &mut disk.queues {
                while let Some(done) = queue.reap() {
                    push(queue, done.token);
                    queue.publish();
                }
            }
            assert!(
                std::time::Instant::now() < deadline,
                "{now} are taken:\n{}",
                self.daemon.stderr()
            );
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        let unlimited = json!({ "limits": { "iops": null } });
        self.ask("PATCH", "/v1/disks/@0", Some(&unlimited));
        for queue in &mut disk.queues {
            finish_all(queue, ENTRIES as usize);
        }
    }
}

#[test]
fn full_rings_of_66_queues_have_room_in_an_elevator() {
    let served = Served::start(66, "mq-deadline", &["--limit", "iops=1"]);
    served.fill_and_let_go(66);
    served.daemon.stop();
}

#[test]
fn full_rings_of_the_64_default_queues_have_room_in_an_elevator() {
    let served = Served::start(64, "mq-deadline", &["--limit", "iops=1"]);
    served.fill_and_let_go(64);
    served.daemon.stop();
}

#[test]
fn one_queue_that_is_left_of_66_is_served_with_an_elevator() {
    // Those that the limit does not let pass at once wait in the elevator.
    let served = Served::start(66, "none", &["--limit", "iops=20"]);
    let mut disk = served.attach(66);
    for queue in 0..65 {
        disk.front.stop(queue).expect("it stops");
    }
    served.ask(
        "PATCH",
        "/v1/disks/@0",
        Some(&json!({ "scheduler": "kyber" })),
    );
    let gpa = disk.mem().alloc(512, 512);
    let last = &mut disk.queues[65];
    for n in 0..10 {
        let segs = [Seg::writable(gpa, 512)];
        last.push(n, kind::IN, 0, n * 16, &segs).expect("room");
    }
    last.publish();
    finish_all(last, 10);
    drop(disk);
    served.daemon.stop();
}

#[test]
fn disks_with_256_queues_each_are_served_by_one_worker_or_refused() {
    const DISKS: usize = 17;
    const QUEUES: usize = 256;
    let limit = getrlimit(Resource::Nofile);
    let raised = [Some(1 << 16), limit.maximum].map(|most| Rlimit {
        current: most,
        maximum: limit.maximum.map(|old| old.max(most.unwrap_or(old))),
    });
    if raised
        .into_iter()
        .all(|limit| setrlimit(Resource::Nofile, limit).is_err())
        || getrlimit(Resource::Nofile)
            .current
            .is_some_and(|most| most < 16_000)
    {
        eprintln!("skipped: so many queues need more open files than this user may have");
        return;
    }
    let dir = tempfile::tempdir().expect("a directory");
    let sockets: Vec<_> = (1..DISKS).map(|n| dir.path().join(n.to_string())).collect();
    let disks = sockets.iter().flat_map(|socket| {
        let keys = format!(
            "socket-path={},engine=null,size=1M,num-queues={QUEUES}",
            socket.display()
        );
        ["--disk".to_owned(), keys]
    });
    let spec = Spec::null(1 << 20)
        .queues(QUEUES)
        .args(["--workers", "1"])
        .args(disks);
    let daemon = Daemon::start_ours(&spec);
    let queue = QueueSetup {
        size: 2,
        indirect_len: 4,
        call: false,
        ..QueueSetup::default()
    };
    let mut served = Vec::new();
    for socket in std::iter::once(daemon.socket()).chain(sockets.iter().map(|path| &**path)) {
        let mut disk = Disk::attach_with(socket, &Setup::default(), QUEUES, queue)
            .unwrap_or_else(|error| panic!("{error}:\n{}", daemon.stderr()));
        let gpa = disk.mem().alloc(512, 512);
        let last = &mut disk.queues[QUEUES - 1];
        last.push(0, kind::IN, 0, 0, &[Seg::writable(gpa, 512)])
            .expect("room");
        last.publish();
        assert!(last.spin(DEADLINE).is_some(), "{}", daemon.stderr());
        served.push(disk);
    }
    drop(served);
    daemon.stop();
}
