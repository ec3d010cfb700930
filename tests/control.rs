//! The control socket against the running daemon: schedulers, limits and groups changed while requests run, traces,
//! metrics, and clients that are wrong or slow.

#![allow(
    clippy::cast_possible_truncation,
    reason = "test code: sizes and offsets are small and known"
)]

#[path = "control/extremes.rs"]
mod extremes;
#[path = "control/limits.rs"]
mod limits;
#[path = "control/resize.rs"]
mod resize;
mod support;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::disk::{finish_all, kind, status};
use support::*;
use tempfile::TempDir;
use vhost_user_blkmq::control::client;

/// A daemon with a control socket.
struct Served {
    daemon: Daemon,
    dir: TempDir,
}

impl Served {
    /// Starts it; `more` are arguments that may name files in the directory as `{dir}`.
    fn start(spec: Spec, more: &[&str]) -> Served {
        let dir = TempDir::new().expect("a directory");
        let name = dir.path().to_str().expect("a plain name").to_owned();
        let control = format!("{name}/control.sock");
        let more = more.iter().map(|arg| arg.replace("{dir}", &name));
        let args = ["--control-path".to_owned(), control]
            .into_iter()
            .chain(more);
        Served {
            daemon: Daemon::start_ours(&spec.args(args)),
            dir,
        }
    }

    fn control(&self) -> PathBuf {
        self.dir.path().join("control.sock")
    }

    fn ask(&self, method: &str, path: &str, body: &Value) -> Result<String, String> {
        let body = (!body.is_null()).then_some(body);
        client::ask(&self.control(), method, path, body).map_err(|error| error.to_string())
    }

    fn get(&self, path: &str) -> Value {
        let text = self.ask("GET", path, &Value::Null).expect("an answer");
        serde_json::from_str(&text).expect("JSON")
    }

    fn patch(&self, disk: &str, change: Value) -> Value {
        let path = format!("/v1/disks/{disk}");
        let text = self.ask("PATCH", &path, &change).expect("a good change");
        serde_json::from_str(&text).expect("JSON")
    }

    /// The body a request on a raw connection is answered with, and its head.
    fn raw(&self, request: &str) -> (String, String) {
        let mut stream = self.connect();
        // An error is the daemon's closing without having read everything; its answer is there all the same.
        let _ = stream.write_all(request.as_bytes());
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer);
        let (head, body) = answer.split_once("\r\n\r\n").expect("an answer");
        (head.to_owned(), body.to_owned())
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.control()).expect("it listens");
        stream.set_read_timeout(Some(DEADLINE)).expect("a timeout");
        stream
    }

    fn ctl(&self, words: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_blkmqctl"))
            .arg("--control-path")
            .arg(self.control())
            .args(words)
            .output()
            .expect("blkmqctl runs")
    }
}

/// Keeps `depth` reads of 4 KiB in flight on each of the queues; counts what comes back.
struct Flood {
    queues: Vec<Queue>,
    gpa: u64,
    depth: u16,
    done: u64,
}

impl Flood {
    fn new(disk: &mut Disk, depth: u16) -> Flood {
        let mut flood = Flood {
            gpa: disk.mem().alloc(4096, 4096),
            queues: std::mem::take(&mut disk.queues),
            depth,
            done: 0,
        };
        flood.refill();
        flood
    }

    fn refill(&mut self) {
        for queue in &mut self.queues {
            while queue.in_flight() < self.depth {
                let data = [Seg::writable(self.gpa, 4096)];
                let sector = (self.done * 7919 % 1000) * 8;
                queue
                    .push(self.done, kind::IN, 0, sector, &data)
                    .expect("the ring has room");
            }
            queue.publish();
        }
    }

    /// Takes what has come back.
    fn take(&mut self) {
        for queue in &mut self.queues {
            while let Some(completion) = queue.reap() {
                assert_eq!((completion.status, completion.len), (status::OK, 4097));
                self.done += 1;
            }
        }
    }

    /// Runs for at least `time`; how many came back.
    fn run(&mut self, time: Duration) -> u64 {
        let (before, begin) = (self.done, Instant::now());
        while begin.elapsed() < time {
            self.take();
            self.refill();
            std::thread::sleep(Duration::from_millis(1));
        }
        self.take();
        self.done - before
    }

    /// Waits for all that is in flight.
    fn finish(&mut self) {
        let deadline = Instant::now() + DEADLINE;
        while self.queues.iter().any(|queue| queue.in_flight() > 0) {
            self.take();
            assert!(Instant::now() < deadline, "requests do not come back");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

const BLOCK: usize = 4096;

/// Writes and verifies random blocks of this queue's own 8 MiB until told to stop; returns how many requests it made.
fn verify(queue: &mut Queue, gpa: u64, stop: &AtomicBool) -> u64 {
    const BATCH: usize = 8;
    const BLOCKS: u64 = 2048;
    let mem = std::sync::Arc::clone(&queue.mem);
    let mut rng = Rng::new(queue.index as u64 + 1);
    let mut written: BTreeMap<u64, u64> = BTreeMap::new();
    let mut requests = 0;
    let first = queue.index as u64 * BLOCKS;
    let content = |block: u64, version: u64| {
        let mut bytes = vec![0; BLOCK];
        for (at, chunk) in bytes.chunks_exact_mut(8).enumerate() {
            chunk.copy_from_slice(&(block << 40 | version << 12 | at as u64).to_le_bytes());
        }
        bytes
    };
    while !stop.load(Ordering::Relaxed) {
        for operation in [kind::OUT, kind::IN] {
            let mut blocks = Vec::new();
            while blocks.len() < BATCH {
                let block = match operation {
                    kind::OUT => rng.below(BLOCKS),
                    _ => *written
                        .keys()
                        .nth(rng.below(written.len() as u64) as usize)
                        .expect("one"),
                };
                // Two requests for one block at a time would have no order.
                if !blocks.contains(&block) {
                    blocks.push(block);
                } else if written.len() < BATCH && operation == kind::IN {
                    break;
                }
            }
            for (at, block) in blocks.iter().enumerate() {
                let place = gpa + (at * BLOCK) as u64;
                let data = if operation == kind::OUT {
                    let version = written.entry(*block).or_default();
                    *version += 1;
                    mem.write(place, &content(first + block, *version));
                    Seg::readable(place, BLOCK)
                } else {
                    mem.fill(place, BLOCK, 0);
                    Seg::writable(place, BLOCK)
                };
                let sector = (first + block) * (BLOCK as u64 / SECTOR);
                queue
                    .push(at as u64, operation, 0, sector, &[data])
                    .expect("room");
            }
            queue.publish();
            let mut seen = [false; BATCH];
            for completion in finish_all(queue, blocks.len()) {
                assert_eq!(completion.status, status::OK);
                let seen = &mut seen[completion.token as usize];
                assert!(!*seen, "a request came back twice");
                *seen = true;
            }
            assert!(queue.reap().is_none(), "more came back than was sent");
            requests += blocks.len() as u64;
            if operation == kind::IN {
                for (at, block) in blocks.iter().enumerate() {
                    let got = mem.read_vec(gpa + (at * BLOCK) as u64, BLOCK);
                    assert!(
                        got == content(first + block, written[block]),
                        "block {block} differs"
                    );
                }
            }
        }
    }
    requests
}

#[test]
fn schedulers_change_while_requests_run_and_nothing_is_lost() {
    let served = Served::start(Spec::image(64 << 20), &["--workers", "2", "--serial", "s"]);
    let mut disk = Disk::attach(served.daemon.socket(), 4);
    let queues: Vec<(Queue, u64)> = std::mem::take(&mut disk.queues)
        .into_iter()
        .map(|queue| (queue, disk.mem().alloc(8 * BLOCK, 4096)))
        .collect();
    let stop = AtomicBool::new(false);
    let requests: u64 = std::thread::scope(|scope| {
        let stop = &stop;
        let threads: Vec<_> = queues
            .into_iter()
            .map(|(mut queue, gpa)| scope.spawn(move || verify(&mut queue, gpa, stop)))
            .collect();
        // Whatever happens here, the threads end.
        let switched = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for round in 0..50 {
                for name in ["mq-deadline", "kyber", "none"] {
                    let disk = served.patch("s", json!({ "scheduler": name }));
                    assert_eq!(disk["scheduler"], name, "round {round}");
                }
            }
        }));
        stop.store(true, Ordering::Relaxed);
        let requests = threads
            .into_iter()
            .map(|thread| thread.join().expect("the data is right"))
            .sum();
        switched.expect("all switches went well");
        requests
    });
    let view = served.get("/v1/disks/s");
    let stats = &view["stats"];
    let count = |path: &str| {
        stats
            .pointer(path)
            .and_then(Value::as_u64)
            .expect("a number")
    };
    let ended = [
        "/reads/ios",
        "/reads/merges",
        "/writes/ios",
        "/writes/merges",
    ];
    assert_eq!(ended.iter().map(|path| count(path)).sum::<u64>(), requests);
    assert_eq!(count("/in_flight"), 0);
    let queues = view["queues"].as_array().expect("queues");
    let sum: u64 = queues.iter().filter_map(|q| q["requests"].as_u64()).sum();
    assert_eq!((queues.len(), sum), (4, requests));
    assert!(requests > 1000, "there was I/O meanwhile: {requests}");
}

#[test]
fn parameters_are_set_without_a_switch_and_stay_through_one_of_limits() {
    let served = Served::start(
        Spec::null(1 << 30),
        &["--serial", "s", "--scheduler", "mq-deadline,fifo_batch=3"],
    );
    assert_eq!(
        served.get("/v1/disks/s")["scheduler_params"]["fifo_batch"],
        3
    );
    let disk = served.patch("s", json!({ "scheduler_params": { "read_expire": 7 } }));
    assert_eq!(disk["scheduler_params"]["read_expire"], 7);
    assert_eq!(disk["scheduler_params"]["fifo_batch"], 3);
    let disk = served.patch(
        "s",
        json!({ "scheduler": "mq-deadline", "limits": { "iops": 5 } }),
    );
    assert_eq!(
        disk["scheduler_params"]["fifo_batch"], 3,
        "the same scheduler goes on"
    );
    let disk = served.patch("s", json!({ "scheduler": "kyber" }));
    assert_eq!(disk["scheduler_params"]["read_lat_nsec"], 2_000_000);
    let disk = served.patch("s", json!({ "scheduler": "mq-deadline" }));
    assert_eq!(
        disk["scheduler_params"]["fifo_batch"], 16,
        "a new one begins with its defaults"
    );
    assert_eq!(disk["limits"], json!({ "iops": { "rate": 5, "burst": 1 } }));
}

#[test]
fn auto_is_a_scheduler_for_one_queue() {
    let one = Served::start(Spec::null(1 << 30).queues(1), &[]);
    assert_eq!(one.get("/v1/disks/0")["scheduler"], "mq-deadline");
    let many = Served::start(Spec::null(1 << 30).queues(2), &[]);
    assert_eq!(many.get("/v1/disks/0")["scheduler"], "none");
    many.patch("0", json!({ "scheduler": "kyber" }));
    assert_eq!(
        many.patch("0", json!({ "scheduler": "auto" }))["scheduler"],
        "none"
    );
}

/// `done` of a flood in `time` seconds is what `rate` and `burst` allow: never more, and most of it.
fn check_rate(done: f64, time: f64, rate: f64, burst: f64) {
    // One request may be let through for each bucket that is not quite empty.
    let most = rate * time + burst + 1.0;
    assert!(done <= most, "{done} in {time} s, {most} at most");
    // Generous, as whoever waits may be woken late on a busy machine.
    let least = rate * time * 0.6;
    assert!(done >= least, "{done} in {time} s, {least} at least");
}

#[test]
fn a_limit_is_the_disks_however_many_workers_serve_it() {
    let served = Served::start(
        Spec::null(1 << 30),
        &["--workers", "2", "--limit", "iops=200/20", "--serial", "s"],
    );
    let mut disk = Disk::attach(served.daemon.socket(), 4);
    let begin = Instant::now();
    let mut flood = Flood::new(&mut disk, 16);
    flood.run(Duration::from_secs(2));
    check_rate(
        flood.done as f64,
        begin.elapsed().as_secs_f64(),
        200.0,
        20.0,
    );
    let workers: std::collections::BTreeSet<_> = served.get("/v1/disks/s")["queues"]
        .as_array()
        .expect("queues")
        .iter()
        .map(|queue| queue["worker"].as_u64())
        .collect();
    assert_eq!(workers.len(), 2, "both workers took part");

    // Changed while requests wait: the old one's tokens do not add to the new one's.
    let changed = Instant::now();
    served.patch("s", json!({ "limits": { "iops": "1000/10" } }));
    let before = flood.done;
    flood.run(Duration::from_secs(1));
    let time = changed.elapsed().as_secs_f64();
    // What the old limit let through before it was changed may be counted here.
    check_rate((flood.done - before) as f64, time, 1000.0, 10.0 + 64.0);

    // Taken away: whoever waits goes at once.
    served.patch("s", json!({ "limits": { "iops": null } }));
    flood.finish();
    let done = flood.run(Duration::from_millis(500));
    assert!(done > 1000, "{done} requests without a limit");
    flood.finish();
    let throttled: u64 = served.get("/v1/disks/s")["queues"]
        .as_array()
        .expect("queues")
        .iter()
        .filter_map(|queue| queue["throttled"].as_u64())
        .sum();
    assert!(throttled > 0, "and it was counted");
}

const SECOND_DISK: [&str; 2] = [
    "--disk",
    "socket-path={dir}/second.sock,engine=null,size=1G,serial=second",
];

fn second(served: &Served, queues: usize) -> Disk {
    Disk::attach(&served.dir.path().join("second.sock"), queues)
}

#[test]
fn a_limited_disk_does_not_hold_up_another_on_the_same_worker() {
    let args = [&["--workers", "1", "--limit", "iops=1/1"][..], &SECOND_DISK].concat();
    let served = Served::start(Spec::null(1 << 30), &args);
    let mut slow = Disk::attach(served.daemon.socket(), 2);
    let begin = Instant::now();
    let mut slow = Flood::new(&mut slow, 64);
    let mut quick = second(&served, 1);
    for _ in 0..2000 {
        quick.read(0, 0, 4096);
    }
    slow.take();
    let most = begin.elapsed().as_secs_f64() + 3.0;
    assert!(
        (slow.done as f64) <= most,
        "{} of the limited disk came back",
        slow.done
    );
    assert!(
        slow.queues.iter().all(|queue| queue.in_flight() > 0),
        "and both its queues wait"
    );
    served.patch("0", json!({ "limits": { "iops": 0 } }));
    slow.finish();
}

#[test]
fn a_group_is_shared_by_disks_and_workers() {
    let args = [
        &[
            "--workers",
            "2",
            "--group-limit",
            "g,iops=200/20",
            "--group",
            "g",
        ][..],
        &SECOND_DISK,
    ]
    .concat();
    let served = Served::start(Spec::null(1 << 30), &args);
    served.patch("second", json!({ "group": "g" }));
    assert_eq!(served.get("/v1/groups/g")["disks"], json!([0, 1]));
    let begin = Instant::now();
    let (mut one, mut two) = (Disk::attach(served.daemon.socket(), 2), second(&served, 2));
    let (mut one, mut two) = (Flood::new(&mut one, 8), Flood::new(&mut two, 8));
    while begin.elapsed() < Duration::from_secs(2) {
        one.run(Duration::from_millis(5));
        two.run(Duration::from_millis(5));
    }
    one.take();
    two.take();
    let done = (one.done + two.done) as f64;
    check_rate(done, begin.elapsed().as_secs_f64(), 200.0, 20.0);
    assert!(
        one.done > 20 && two.done > 20,
        "both have a share: {} and {}",
        one.done,
        two.done
    );

    // Out of the group, a disk has only its own limits, of which there are none.
    served.patch("second", json!({ "group": null }));
    two.finish();
    let free = two.run(Duration::from_millis(500));
    assert!(free > 300, "{free} requests outside the group");
    two.finish();
    let text = served
        .ask("PUT", "/v1/groups/g", &json!({ "limits": {} }))
        .expect("a change");
    assert!(text.contains("\"limits\":{}"), "{text}");
    one.finish();
}

#[test]
fn what_is_wrong_is_refused_as_a_whole() {
    let served = Served::start(
        Spec::null(1 << 30),
        &["--serial", "a b", "--limit", "bps=1M"],
    );
    let path = "/v1/disks/a%20b";
    let before = served.get(path);
    for (method, path, body, part) in [
        (
            "PATCH",
            path,
            json!({ "limits": { "iops": 5 }, "scheduler": "bfq" }),
            "no scheduler 'bfq'",
        ),
        (
            "PATCH",
            path,
            json!({ "limits": { "iops": 5 }, "group": "g" }),
            "no group 'g'",
        ),
        (
            "PATCH",
            path,
            json!({ "scheduler": "kyber", "limits": { "iops": 1, "speed": 5 } }),
            "no limit 'speed'",
        ),
        (
            "PATCH",
            path,
            json!({ "scheduler": "kyber", "limits": { "iops": -5 } }),
            "iops is -5",
        ),
        (
            "PATCH",
            path,
            json!({ "scheduler": "kyber", "scheduler_params": { "fifo_batch": 1 } }),
            "no parameter 'fifo_batch'",
        ),
        (
            "PATCH",
            path,
            json!({ "speed": 5 }),
            "unknown field `speed`",
        ),
        ("PATCH", path, json!([1]), "the body is not understood"),
        (
            "PATCH",
            "/v1/disks/b",
            json!({}),
            "no disk has the serial or the index 'b'",
        ),
        (
            "GET",
            "/v1/disks/1",
            Value::Null,
            "no disk has the serial or the index '1'",
        ),
        ("PUT", path, json!({}), "use GET, PATCH here"),
        ("GET", "/v1/groups/g", Value::Null, "there is no group 'g'"),
        ("PUT", "/v1/groups/a%2Fb", json!({}), "the name of a group"),
        (
            "PUT",
            "/v1/groups/g",
            json!({ "limits": { "iops": "x" } }),
            "iops is 'x'",
        ),
        (
            "POST",
            "/v1/trace",
            json!({ "actions": "Z" }),
            "there is no action 'Z'",
        ),
        ("POST", "/metrics", Value::Null, "use GET here"),
        ("GET", "/", Value::Null, "there is no /"),
    ] {
        let error = served.ask(method, path, &body).expect_err("it is wrong");
        assert!(error.contains(part), "{method} {path} {body}: {error}");
        assert!(!error.contains('\n'), "one line: {error}");
    }
    assert_eq!(served.get(path), before, "nothing of it was done");
    assert_eq!(served.get("/v1/groups"), json!({ "groups": [] }));
    for (request, status) in [
        ("GET /v1/disks/0 HTTP/1.1\r\n\r\n", "HTTP/1.1 200 "),
        ("GET /v1/disks/@0?x=y HTTP/1.0\r\n\r\n", "HTTP/1.1 200 "),
        ("GET /v1/disks/5 HTTP/1.1\r\n\r\n", "HTTP/1.1 404 "),
        ("DELETE /v1/disks/0 HTTP/1.1\r\n\r\n", "HTTP/1.1 405 "),
        (
            "PATCH /v1/disks/0 HTTP/1.1\r\nContent-Length: 1\r\n\r\n{",
            "HTTP/1.1 400 ",
        ),
        (
            "PATCH /v1/disks/0 HTTP/1.1\r\nContent-Length: 99999\r\n\r\n{",
            "HTTP/1.1 413 ",
        ),
        ("what is this\r\n\r\n", "HTTP/1.1 400 "),
    ] {
        let (head, _) = served.raw(request);
        assert!(head.starts_with(status), "{request}: {head}");
    }
}

#[test]
fn two_disks_with_one_serial_are_told_apart_by_index() {
    let twin = [
        "--serial",
        "twin",
        "--disk",
        "socket-path={dir}/second.sock,engine=null,size=1G,serial=twin",
    ];
    let served = Served::start(Spec::null(2 << 30), &twin);
    let error = served
        .ask("GET", "/v1/disks/twin", &Value::Null)
        .expect_err("ambiguous");
    assert!(error.contains("use the index: @0 or @1"), "{error}");
    assert_eq!(served.get("/v1/disks/1")["size_bytes"], 1u64 << 30);
    assert_eq!(served.get("/v1/disks/@0")["size_bytes"], 2u64 << 30);
}

#[test]
fn clients_that_stall_hold_up_nobody_for_ever() {
    let served = Served::start(Spec::null(1 << 30), &["--serial", "s"]);
    let mut stalled: Vec<UnixStream> = (0..3).map(|_| served.connect()).collect();
    stalled[0]
        .write_all(b"GET /v1/disks HTTP/1.1\r\nX: ")
        .expect("it listens");
    assert_eq!(served.get("/v1/disks/s")["index"], 0);
    // As many as there may be, and one more.
    stalled.extend((3..8).map(|_| served.connect()));
    let (head, body) = served.raw("GET /v1/disks HTTP/1.1\r\n\r\n");
    assert!(head.starts_with("HTTP/1.1 503 "), "{head}");
    assert!(body.contains("too many connections"), "{body}");
    // The disks do not notice.
    let mut disk = Disk::attach(served.daemon.socket(), 1);
    disk.read(0, 0, 4096);
    // They are given up one after another, without any hint from them.
    for mut stream in stalled {
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("it is told");
        assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
    }
    assert_eq!(served.get("/v1/disks/s")["connected"], true);
}

#[test]
fn a_trace_shows_the_way_of_a_request() {
    let served = Served::start(
        Spec::image(16 << 20),
        &["--workers", "2", "--scheduler", "mq-deadline"],
    );
    let mut disk = Disk::attach(served.daemon.socket(), 3);
    disk.write(2, 800, &[1; 4096]);
    served
        .ask("POST", "/v1/trace", &json!({ "events": 100 }))
        .expect("a trace");
    disk.write(2, 80, &[7; 4096]);
    disk.read(1, 160, 512);
    let text = served
        .ask("GET", "/v1/trace", &Value::Null)
        .expect("a trace");
    // disk worker queue seconds tag action operation sector + sectors
    let rows: Vec<Vec<&str>> = text
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    let actions = |queue: &str, sector: &str, op: &str| -> String {
        rows.iter()
            .filter(|row| row.len() >= 10 && row[2] == queue && row[6] == op && row[7] == sector)
            .map(|row| row[5])
            .collect()
    };
    assert_eq!(actions("2", "80", "W"), "QGIDC", "{text}");
    assert_eq!(actions("1", "160", "R"), "QGIDC", "{text}");
    assert_eq!(
        actions("2", "800", "W"),
        "",
        "it was before the trace:\n{text}"
    );
    let times: Vec<f64> = rows
        .iter()
        .skip(1)
        .map(|row| row[3].parse().expect("a time"))
        .collect();
    assert!(times.is_sorted(), "merged by time:\n{text}");

    // A ring that has ended keeps its name; what was taken is not told again.
    served
        .ask("POST", "/v1/trace", &json!({ "actions": "QC" }))
        .expect("a trace");
    disk.write(0, 240, &[7; 512]);
    drop(disk);
    let deadline = Instant::now() + DEADLINE;
    while served.get("/v1/disks/0")["connected"] == true {
        assert!(Instant::now() < deadline, "the session ends");
        std::thread::sleep(Duration::from_millis(5));
    }
    served
        .ask("DELETE", "/v1/trace", &Value::Null)
        .expect("it stops");
    let text = served
        .ask("GET", "/v1/trace", &Value::Null)
        .expect("a trace");
    let lines: Vec<&str> = text
        .lines()
        .skip(1)
        .filter(|line| line.contains(" 240 + 1"))
        .collect();
    assert_eq!((text.lines().count(), lines.len()), (3, 2), "{text}");
    assert!(!text.contains("160 + 1"), "{text}");

    // Nothing more is recorded.
    let mut disk = Disk::attach(served.daemon.socket(), 1);
    disk.read(0, 0, 512);
    let text = served
        .ask("GET", "/v1/trace", &Value::Null)
        .expect("a trace");
    assert_eq!(text.lines().count(), 1, "{text}");
}

/// A line of a metric: name, labels as they stand there, value.
fn parse_sample(line: &str) -> Option<(&str, &str, f64)> {
    let (series, value) = line.rsplit_once(' ')?;
    let (name, labels) = match series.split_once('{') {
        Some((name, labels)) => (name, labels.strip_suffix('}')?),
        None => (series, ""),
    };
    let word = |text: &str| {
        !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
    };
    // No label of these tests has a comma or a quote in it.
    let well_formed = labels.is_empty()
        || labels.split(',').all(|label| {
            label.split_once('=').is_some_and(|(key, value)| {
                word(key) && value.len() >= 2 && value.starts_with('"') && value.ends_with('"')
            })
        });
    (word(name) && well_formed).then_some(())?;
    Some((name, labels, value.parse().ok()?))
}

#[test]
fn metrics_are_well_formed_and_right() {
    let served = Served::start(Spec::image(16 << 20), &["--workers", "2", "--serial", "s"]);
    let mut disk = Disk::attach(served.daemon.socket(), 2);
    for at in 0..10 {
        disk.write(1, at * 8, &[3; 4096]);
        disk.read(1, at * 8, 4096);
    }
    disk.flush(0);
    let text = served
        .ask("GET", "/metrics", &Value::Null)
        .expect("metrics");
    let mut types: BTreeMap<&str, &str> = BTreeMap::new();
    let mut samples: BTreeMap<String, f64> = BTreeMap::new();
    let mut last_bucket: Option<(String, f64)> = None;
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').expect("a type");
            assert!(["counter", "gauge", "histogram"].contains(&kind), "{line}");
            assert!(types.insert(name, kind).is_none(), "two types: {line}");
            continue;
        }
        if line.starts_with("# HELP ") {
            continue;
        }
        let (name, labels, value) = parse_sample(line).unwrap_or_else(|| panic!("{line}"));
        let family = ["_bucket", "_sum", "_count"]
            .iter()
            .filter_map(|suffix| name.strip_suffix(suffix))
            .find(|family| types.get(family) == Some(&"histogram"))
            .unwrap_or(name);
        assert!(types.contains_key(family), "{name} has no type");
        let series = format!("{name}{{{labels}}}");
        assert!(samples.insert(series, value).is_none(), "twice: {line}");
        if name.ends_with("_bucket") {
            let key = format!("{name}{}", labels.rsplit_once(",le=").expect("a bound").0);
            if let Some((last, count)) = &last_bucket
                && *last == key
            {
                assert!(*count <= value, "not cumulative: {line}");
            }
            last_bucket = Some((key, value));
        } else if name.ends_with("_count") {
            assert_eq!(
                last_bucket.take().map(|(_, count)| count),
                Some(value),
                "{line}"
            );
        }
    }
    let worker = served.get("/v1/disks/s")["queues"][1]["worker"].clone();
    let queue = format!("disk=\"s\",index=\"0\",queue=\"1\",worker=\"{worker}\"");
    let of = |series: String| {
        *samples
            .get(&series)
            .unwrap_or_else(|| panic!("{series}:\n{text}"))
    };
    assert_eq!(
        of(format!("blkmq_queue_requests_total{{{queue},op=\"read\"}}")),
        10.0
    );
    assert_eq!(
        of(format!(
            "blkmq_queue_requests_total{{{queue},op=\"write\"}}"
        )),
        10.0
    );
    assert_eq!(
        of(format!("blkmq_queue_read_bytes_total{{{queue}}}")),
        40960.0
    );
    assert_eq!(
        of(format!("blkmq_queue_device_read_seconds_count{{{queue}}}")),
        10.0
    );
    assert_eq!(
        of("blkmq_disk_reads_completed_total{disk=\"s\",index=\"0\"}".to_owned()),
        10.0
    );
    assert_eq!(
        of("blkmq_disk_flush_requests_total{disk=\"s\",index=\"0\"}".to_owned()),
        1.0
    );
    assert_eq!(
        of("blkmq_disk_connected{disk=\"s\",index=\"0\"}".to_owned()),
        1.0
    );
    assert!(of("blkmq_worker_enters_total{worker=\"0\"}".to_owned()) > 0.0);
}

fn text(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout.clone()).expect("text")
}

#[test]
fn blkmqctl_does_what_the_socket_can() {
    let served = Served::start(
        Spec::image(16 << 20),
        &["--serial", "vm1", "--scheduler", "none"],
    );
    let mut disk = Disk::attach(served.daemon.socket(), 1);
    disk.write(0, 0, &[1; 512]);
    let status = text(&served.ctl(&["status"]));
    assert!(status.contains("disk vm1 (@0): 16 MiB"), "{status}");
    let all: Value = serde_json::from_str(&text(&served.ctl(&["status", "--json"]))).expect("JSON");
    assert_eq!(all["disks"][0]["queues"][0]["write"], 1);
    let out = text(&served.ctl(&["scheduler", "vm1", "mq-deadline", "read_expire=9"]));
    assert!(
        out.contains("scheduler mq-deadline") && out.contains("read_expire=9"),
        "{out}"
    );
    let out = text(&served.ctl(&["limit", "@0", "iops=5K/7", "bps=1M"]));
    assert!(out.contains("bps=1048576/104857, iops=5000/7"), "{out}");
    let out = text(&served.ctl(&["limit", "vm1", "iops=0"]));
    assert!(
        out.contains("limits    bps=1048576/104857\n"),
        "what is not named stays: {out}"
    );
    let out = text(&served.ctl(&["group", "set", "t7", "iops-rd=3"]));
    assert_eq!(out, "group t7: limits iops-rd=3/1; disks none\n");
    assert!(text(&served.ctl(&["group", "join", "t7", "vm1"])).contains("group     t7"));
    assert!(text(&served.ctl(&["group", "list"])).ends_with("disks @0\n"));
    assert!(!text(&served.ctl(&["group", "leave", "vm1"])).contains("group"));
    assert!(text(&served.ctl(&["metrics"])).contains("blkmq_build_info"));

    let traced = std::thread::scope(|scope| {
        let tracing =
            scope.spawn(|| text(&served.ctl(&["trace", "--seconds", "1", "--actions", "C"])));
        while !tracing.is_finished() {
            disk.read(0, 64, 512);
            std::thread::sleep(Duration::from_millis(5));
        }
        tracing.join().expect("it ends")
    });
    assert!(traced.starts_with("# disk worker queue"), "{traced}");
    assert!(traced.contains("  C  R  64 + 1 [ok]"), "{traced}");

    for (words, part) in [
        (
            &["scheduler", "vm1", "bfq"][..],
            "blkmqctl: there is no scheduler 'bfq'",
        ),
        (
            &["limit", "vm2", "iops=1"],
            "blkmqctl: no disk has the serial or the index 'vm2'",
        ),
    ] {
        let output = served.ctl(words);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            !output.status.success() && error.starts_with(part),
            "{error}"
        );
        assert_eq!(error.lines().count(), 1, "{error}");
    }
}

#[test]
fn the_socket_is_the_users_own_and_goes_with_the_daemon() {
    let served = Served::start(Spec::null(1 << 30), &[]);
    let mode = std::fs::metadata(served.control())
        .expect("it is there")
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    let control = served.control();
    let control = control.to_str().expect("a plain name");
    // A second daemon does not take it away from the first.
    let output = Command::new(env!("CARGO_BIN_EXE_vhost-user-blkmq"))
        .args([
            "--engine",
            "null",
            "--size",
            "1M",
            "--control-path",
            control,
            "--socket-path",
        ])
        .arg(served.dir.path().join("other.sock"))
        .output()
        .expect("it runs");
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        error.contains("is in use") && error.contains("--control-path"),
        "{error}"
    );
    assert!(
        !served.dir.path().join("other.sock").exists(),
        "nothing is left behind"
    );
    let Served { daemon, dir } = served;
    daemon.stop();
    assert!(!Path::new(control).exists(), "it is removed at the end");
    let gone = client::ask(Path::new(control), "GET", "/v1/disks", None).expect_err("nobody there");
    assert!(
        gone.to_string()
            .contains("cannot connect to the control socket"),
        "{gone}"
    );
    drop(dir);
}
