//! What requests of real guests cost: kicks, calls and the daemon's CPU time for each. A measurement, not a test: it
//! asserts nothing about any of them.
//!
//! ```sh
//! BLKMQ_DAEMONS="$OLD/vhost-user-blkmq target/release/vhost-user-blkmq" \
//!     cargo test --release --test guest_costs -- --ignored --nocapture --test-threads 1
//! ```
//!
//! compares daemons; without the variable there is only the one that was built with the test.

// What the support has for other tests waits and checks more than is needed here.
#[path = "guest_support/mod.rs"]
mod guest_support;

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use guest_support::Guest;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

/// fio's options that differ from one job to the next.
type Job = (&'static str, &'static str);

const ONE: Job = ("QD1", "--iodepth=1 --cpus_allowed=0");
const DEEP: Job = ("QD32", "--iodepth=32 --cpus_allowed=0");
const FOUR: Job = (
    "4 jobs, QD8 each",
    "--iodepth=8 --numjobs=4 --cpus_allowed=0-3 --cpus_allowed_policy=split",
);

/// Bytes of each disk.
const DISK: usize = 64 << 20;

/// A daemon with one disk.
struct Served {
    child: Child,
    socket: PathBuf,
}

impl Served {
    fn start(program: &Path, dir: &Path, name: &str, disk: &[&str]) -> Self {
        let socket = dir.join(format!("{name}.sock"));
        let child = Command::new(program)
            .arg("--socket-path")
            .arg(&socket)
            .args(disk)
            .args(["--summary", "json"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("the daemon starts");
        let deadline = Instant::now() + Duration::from_secs(30);
        while !socket.exists() {
            assert!(
                Instant::now() < deadline,
                "{} does not listen",
                program.display()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
        Self { child, socket }
    }

    /// Nanoseconds that its threads have run so far.
    fn cpu_ns(&self) -> u64 {
        let tasks = format!("/proc/{}/task", self.child.id());
        fs::read_dir(tasks)
            .expect("it lives")
            .filter_map(|task| fs::read_to_string(task.ok()?.path().join("schedstat")).ok())
            .filter_map(|stat| stat.split(' ').next()?.parse::<u64>().ok())
            .sum()
    }

    /// Ends it: its first disk's requests, kicks and calls.
    fn stop(mut self) -> [u64; 3] {
        kill_process(Pid::from_child(&self.child), Signal::TERM).expect("it lives");
        let mut out = String::new();
        let stdout = self.child.stdout.as_mut().expect("a pipe was asked for");
        stdout.read_to_string(&mut out).expect("text");
        self.child.wait().expect("it ends");
        let summary: Value = serde_json::from_str(&out).expect("JSON");
        let queues = summary["disks"][0]["queues"].as_array().expect("queues");
        ["requests", "kicks", "calls"].map(|counter| {
            queues
                .iter()
                .map(|queue| queue[counter].as_u64().expect("a number"))
                .sum()
        })
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // Most often it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Boots a guest on a disk for each job, all served by `program`, and prints a line of figures for each.
fn measure(program: &Path, front: &str, guest: Guest, jobs: &[Job]) {
    // Memory, so that no disk has a part in it.
    let dir = TempDir::new_in("/dev/shm").expect("a directory in memory");
    let image = dir.path().join("disk.img");
    fs::write(&image, vec![0x5a; DISK]).expect("an image");
    let (image, size) = (image.to_str().expect("plain").to_owned(), DISK.to_string());
    let behind: [(&str, &[&str]); 2] = [
        ("null", &["--engine", "null", "--size", &size]),
        ("tmpfs", &["--blk-file", &image, "--read-only"]),
    ];
    let mut disks = Vec::new();
    let mut script = String::new();
    let mut guest = guest;
    for (back, args) in behind {
        for (job, options) in jobs {
            let letter = char::from(b'a' + u8::try_from(disks.len()).expect("few"));
            let served = Served::start(program, dir.path(), &letter.to_string(), args);
            guest = guest.socket(&served.socket);
            disks.push((back, *job, served));
            script += &format!(
                "fio --name=job --filename=/dev/vd{letter} --direct=1 --ioengine=libaio --rw=randread --bs=4k --norandommap \
                 --time_based --runtime=3 --group_reporting --minimal --terse-version=3 {options} >/tmp/fio\n\
                 awk -F';' '$1 == 3 {{ print \"@@iops-{letter}\", $8 }}' /tmp/fio\n"
            );
        }
    }
    let before: Vec<u64> = disks.iter().map(|(_, _, served)| served.cpu_ns()).collect();
    let out = guest.run(&script);
    for ((letter, before), (back, job, served)) in ('a'..).zip(before).zip(disks) {
        let iops = out.value(&format!("@@iops-{letter}")).to_owned();
        let cpu = served.cpu_ns() - before;
        let [requests, kicks, calls] = served.stop();
        let each = |count: u64| count as f64 / requests as f64;
        println!(
            "| {front} | {back} | {job} | {} | {requests} | {iops} | {:.3} | {:.3} | {:.2} |",
            program.display(),
            each(kicks),
            each(calls),
            each(cpu) / 1000.0
        );
    }
}

fn daemons() -> Vec<PathBuf> {
    let ours = env!("CARGO_BIN_EXE_vhost-user-blkmq").to_owned();
    let named = std::env::var("BLKMQ_DAEMONS").unwrap_or(ours);
    println!(
        "| guest | disk | job | daemon | requests | IOPS in the guest | kicks a request | calls a request | CPU µs a request |"
    );
    named.split_whitespace().map(PathBuf::from).collect()
}

#[test]
#[ignore = "measures for a minute; run it alone, in the release profile, with --nocapture"]
fn in_a_guest_of_qemu() {
    for daemon in daemons() {
        let guest = Guest::qemu(4, 4);
        measure(&daemon, "QEMU", guest, &[ONE, DEEP, FOUR]);
    }
}

#[test]
#[ignore = "measures for a minute; run it alone, in the release profile, with --nocapture"]
fn in_user_mode_linux() {
    for daemon in daemons() {
        measure(&daemon, "UML", Guest::uml(), &[ONE, DEEP]);
    }
}
