//! What the guest tests share: a disk and the daemon that serves it, and a guest that runs a script on it.
//!
//! The guests are real kernels, booted by `qemu/guest`; its exit status is the script's. A test fails, rather
//! than passes over, where the guests cannot be prepared.

// Each test program uses a part of this.
#![allow(dead_code)]

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

/// One mebibyte.
pub const MIB: u64 = 1 << 20;

/// The scripts' common beginning: fio with every written block read back and its checksum compared.
///
/// `verify NAME KIB OPTIONS...` fails unless fio wrote KIB kibibytes, read as many back and found no error.
const PRELUDE: &str = r#"
set -eu
verify() {
    name=$1 kib=$2
    shift 2
    fio --name="$name" --filename=/dev/vda --direct=1 --iodepth=32 --verify=crc32c --verify_fatal=1 \
        --group_reporting --minimal --terse-version=3 "$@" >"/tmp/fio-$name" 2>&1 || { cat "/tmp/fio-$name"; return 1; }
    awk -F';' -v kib="$kib" -v name="$name" '
        $1 == 3 { seen = 1; print "fio", name, "wrote", $47, "verified", $6, "errors", $5; good = $5 == 0 && $6 == kib && $47 == kib }
        END { if (!seen || !good) { print "fio", name, "was to write and verify", kib; exit 1 } }' "/tmp/fio-$name"
}
same() {
    [ "$2" = "$3" ] || { echo "$1: '$2', expected '$3'"; return 1; }
}
# Blocks that the guest's page cache does not know.
sha256() {
    dd if="$1" bs=1M iflag=direct 2>/dev/null | sha256sum | cut -d' ' -f1
}
"#;

/// A raw image and the place of its socket. Removed with everything in it when dropped.
#[derive(Debug)]
pub struct Disk {
    dir: TempDir,
}

impl Disk {
    /// A sparse image of `bytes` bytes.
    pub fn new(bytes: u64) -> Self {
        Self::new_in(std::env::temp_dir(), bytes)
    }

    /// The same below another directory.
    pub fn new_in(parent: impl AsRef<Path>, bytes: u64) -> Self {
        let dir = tempfile::Builder::new()
            .prefix("blkmq-test.")
            .tempdir_in(parent)
            .expect("a temporary directory");
        let disk = Self { dir };
        File::create(disk.image())
            .and_then(|f| f.set_len(bytes))
            .expect("a sparse image");
        disk
    }

    /// The path of the image.
    pub fn image(&self) -> PathBuf {
        self.dir.path().join("disk.img")
    }

    /// The path of the daemon's socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("disk.sock")
    }

    /// The path of the daemon's control socket, where a test asks for one.
    pub fn control(&self) -> PathBuf {
        self.dir.path().join("control.sock")
    }

    /// The disk as the control API of its daemon shows it, which was started with this disk's
    /// [`Disk::control`].
    ///
    /// # Panics
    ///
    /// When the daemon does not answer, or with something else than a disk.
    pub fn shown(&self) -> Value {
        let mut stream = UnixStream::connect(self.control()).expect("the control socket is there");
        stream
            .write_all(b"GET /v1/disks/0 HTTP/1.1\r\nConnection: close\r\n\r\n")
            .expect("a request");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        let body = answer.split("\r\n\r\n").nth(1).expect("a body");
        serde_json::from_str(body).expect("JSON")
    }

    /// The SHA-256 of the whole image as the host reads it, in hexadecimal digits.
    pub fn sha256(&self) -> String {
        let out = Command::new("sha256sum")
            .arg(self.image())
            .output()
            .expect("sha256sum runs");
        assert!(
            out.status.success(),
            "sha256sum: {}",
            String::from_utf8_lossy(&out.stderr)
        );
        String::from_utf8_lossy(&out.stdout)
            .split(' ')
            .next()
            .expect("a digest")
            .to_owned()
    }

    /// The bytes the host's file system has allocated for the image.
    pub fn allocated(&self) -> u64 {
        fs::metadata(self.image())
            .expect("the image is there")
            .blocks()
            * 512
    }

    /// Fills the image with bytes that differ from sector to sector.
    pub fn fill(&self) {
        let len = fs::metadata(self.image())
            .expect("the image is there")
            .len();
        let words = 0..len / 8;
        let bytes: Vec<u8> = words
            .flat_map(|w| w.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes())
            .collect();
        fs::write(self.image(), bytes).expect("the image can be written");
    }
}

/// The daemon: the one that was built with the tests, or another build of it.
fn program() -> PathBuf {
    std::env::var_os("BLKMQ_DAEMON")
        .map_or(env!("CARGO_BIN_EXE_vhost-user-blkmq").into(), PathBuf::from)
}

/// A running daemon. Killed when dropped; a test that ends well stops it and looks at its summary.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    log: PathBuf,
}

impl Daemon {
    /// Starts the daemon on `disk`, with `args` after the usual ones, and waits until it listens.
    ///
    /// # Panics
    ///
    /// With the daemon's own words, when it ends or has not said that it listens within 90 seconds: one that
    /// follows a killed one waits for its last write.
    pub fn start(disk: &Disk, args: &[&str]) -> Self {
        Self::start_at(disk, &disk.socket(), args)
    }

    /// The same at another socket, in the same way: two daemons can serve one disk.
    pub fn start_at(disk: &Disk, socket: &Path, args: &[&str]) -> Self {
        // Several daemons may serve a disk, one after another.
        static DAEMONS: AtomicU32 = AtomicU32::new(0);
        let name = format!("daemon.{}.log", DAEMONS.fetch_add(1, Ordering::Relaxed));
        let log = disk.dir.path().join(name);
        let child = Command::new(program())
            .arg("--socket-path")
            .arg(socket)
            .arg("--blk-file")
            .arg(disk.image())
            .args(["--serial", "guest-test", "--summary", "json"])
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(File::create(&log).expect("a log"))
            .spawn()
            .expect("the daemon starts");
        let mut daemon = Self { child, log };
        daemon.await_that("it listens", Duration::from_secs(90), |d| {
            d.said().contains("listening on")
        });
        daemon
    }

    /// What the daemon has written to its standard error so far.
    pub fn said(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Waits until `holds`, while the daemon lives.
    ///
    /// # Panics
    ///
    /// With the daemon's own words, when it ends or `within` has passed.
    pub fn await_that(
        &mut self,
        what: &str,
        within: Duration,
        mut holds: impl FnMut(&Self) -> bool,
    ) {
        let deadline = Instant::now() + within;
        while !holds(self) {
            if let Some(status) = self.child.try_wait().expect("the daemon can be waited for") {
                panic!(
                    "the daemon ended ({status}) before {what}:\n{}",
                    self.said()
                );
            }
            assert!(
                Instant::now() < deadline,
                "not within {within:?}: {what}. The daemon:\n{}",
                self.said()
            );
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Stops the daemon with SIGTERM and returns the summary it prints.
    ///
    /// # Panics
    ///
    /// When it has not ended within 30 seconds, ends with another status than 0, or prints no JSON.
    pub fn stop(self) -> Summary {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, Signal::TERM).expect("the daemon lives");
        self.await_exit()
    }

    /// Waits for the daemon's end and returns the summary it prints.
    ///
    /// # Panics
    ///
    /// As [`Daemon::stop`].
    pub fn await_exit(mut self) -> Summary {
        let deadline = Instant::now() + Duration::from_secs(30);
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("the daemon can be waited for") {
                break status;
            }
            assert!(
                Instant::now() < deadline,
                "not ended after 30 s. The daemon:\n{}",
                self.said()
            );
            thread::sleep(Duration::from_millis(10));
        };
        assert!(
            status.success(),
            "the daemon ended with {status}:\n{}",
            self.said()
        );
        let mut out = String::new();
        let stdout = self.child.stdout.as_mut().expect("a pipe was asked for");
        stdout
            .read_to_string(&mut out)
            .expect("the summary is text");
        let json = serde_json::from_str(&out)
            .unwrap_or_else(|e| panic!("no JSON ({e}) in the summary: {out:?}"));
        println!("the daemon's summary: {out}");
        Summary { json }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended; then there is nothing to kill.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() {
            eprintln!("the daemon's log:\n{}", self.said());
        }
    }
}

/// What the daemon says of its queues when it ends (`--summary json`).
#[derive(Debug)]
pub struct Summary {
    json: Value,
}

impl Summary {
    /// How many queues the first disk has in the summary.
    pub fn queues(&self) -> usize {
        self.json["disks"][0]["queues"]
            .as_array()
            .map_or(0, Vec::len)
    }

    /// A counter of one queue of the first disk.
    pub fn of(&self, queue: usize, counter: &str) -> u64 {
        let value = &self.json["disks"][0]["queues"][queue][counter];
        value
            .as_u64()
            .unwrap_or_else(|| panic!("queue {queue} has no counter {counter:?} in {}", self.json))
    }

    /// A counter summed over all queues of the first disk.
    pub fn sum(&self, counter: &str) -> u64 {
        (0..self.queues())
            .map(|queue| self.of(queue, counter))
            .sum()
    }

    /// The vCPUs that the queue map gives to a queue.
    pub fn cpus(&self, queue: usize) -> Vec<u64> {
        let cpus = self.json["disks"][0]["queues"][queue]["cpus"].as_array();
        cpus.into_iter()
            .flatten()
            .map(|cpu| cpu.as_u64().expect("a number"))
            .collect()
    }

    /// Fails when some queue counted an error.
    pub fn assert_no_errors(&self) {
        assert_eq!(self.sum("errors"), 0, "errors in {}", self.json);
    }
}

/// A guest to be booted: a front end, its shape, and the disks.
#[derive(Debug)]
pub struct Guest {
    command: Command,
    dir: TempDir,
}

impl Guest {
    /// QEMU with an emulated processor, `vcpus` of them and `queues` virtqueues.
    pub fn qemu(vcpus: u32, queues: u32) -> Self {
        let mut guest = Self::with("tcg");
        guest.command.args([
            "--vcpus",
            &vcpus.to_string(),
            "--queues",
            &queues.to_string(),
        ]);
        guest
    }

    /// User-Mode Linux: one processor, one virtqueue, and a vhost-user front end that is not QEMU's.
    pub fn uml() -> Self {
        Self::with("uml")
    }

    fn with(front: &str) -> Self {
        let mut command = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("qemu/guest"));
        command.args(["--front", front, "--timeout", "240"]);
        let dir = tempfile::Builder::new()
            .prefix("blkmq-test.")
            .tempdir()
            .expect("a temporary directory");
        Self { command, dir }
    }

    /// QEMU that listens for its machine protocol at `path`.
    pub fn qmp(mut self, path: &Path) -> Self {
        self.command.arg("--qmp").arg(path);
        self
    }

    /// One more disk: /dev/vda is the first, /dev/vdb the second.
    pub fn disk(self, disk: &Disk) -> Self {
        self.socket(&disk.socket())
    }

    /// The same, by the socket where the disk is served.
    pub fn socket(mut self, socket: &Path) -> Self {
        self.command.arg("--socket").arg(socket);
        self
    }

    /// A guest without a disk of ours, but with an emulated NVMe disk that has `image` behind it.
    pub fn nvme(mut self, image: &Path) -> Self {
        self.command.arg("--nvme").arg(image);
        self
    }

    /// A program that the guest finds as /programs/NAME.
    pub fn program(mut self, path: &Path) -> Self {
        self.command.arg("--program").arg(path);
        self
    }

    /// An option of `qemu/guest` with its value.
    pub fn option(mut self, name: &str, value: &str) -> Self {
        self.command.args([name, value]);
        self
    }

    /// Boots and runs `script` to its end; returns what it printed.
    ///
    /// # Panics
    ///
    /// When the script or the guest fails.
    pub fn run(self, script: &str) -> Output {
        self.start(script).finish()
    }

    /// Boots and starts `script`.
    pub fn start(mut self, script: &str) -> Running {
        let path = self.dir.path().join("script");
        fs::write(&path, format!("{PRELUDE}\n{script}\n")).expect("the script can be written");
        self.command
            .arg("--script")
            .arg(&path)
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        let mut child = self.command.spawn().expect("qemu/guest starts");
        let lines = BufReader::new(child.stdout.take().expect("a pipe was asked for"));
        Running {
            child,
            lines,
            seen: String::new(),
            _dir: self.dir,
        }
    }
}

/// A guest that runs. Ended when dropped.
#[derive(Debug)]
pub struct Running {
    child: Child,
    // Ends in time, because qemu/guest does.
    lines: BufReader<ChildStdout>,
    seen: String,
    _dir: TempDir,
}

impl Running {
    fn next_line(&mut self) -> Option<String> {
        let mut bytes = Vec::new();
        let read = self
            .lines
            .read_until(b'\n', &mut bytes)
            .expect("the pipe can be read");
        let line = String::from_utf8_lossy(&bytes).trim_end().to_owned();
        (read > 0).then(|| {
            println!("guest: {line}");
            self.seen.push_str(&line);
            self.seen.push('\n');
            line
        })
    }

    /// Reads on until the script prints this line.
    ///
    /// # Panics
    ///
    /// When the guest ends before.
    pub fn await_line(&mut self, wanted: &str) {
        while let Some(line) = self.next_line() {
            if line == wanted {
                return;
            }
        }
        panic!(
            "the guest ended before it said {wanted:?}; it said:\n{}",
            self.seen
        );
    }

    /// Waits for the script's end.
    ///
    /// # Panics
    ///
    /// When it or the guest failed.
    pub fn finish(mut self) -> Output {
        while self.next_line().is_some() {}
        let status = self.child.wait().expect("qemu/guest can be waited for");
        assert!(
            status.success(),
            "the guest failed ({status}); it said:\n{}",
            self.seen
        );
        Output {
            text: std::mem::take(&mut self.seen),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            // SIGTERM, so that it takes the guest with it.
            let _ = kill_process(Pid::from_child(&self.child), Signal::TERM);
            let _ = self.child.wait();
        }
    }
}

/// What a script printed.
#[derive(Debug)]
pub struct Output {
    text: String,
}

impl Output {
    /// The rest of the line that starts with `key` and a space.
    pub fn value(&self, key: &str) -> &str {
        let mut lines = self.text.lines();
        lines
            .find_map(|line| line.strip_prefix(key)?.strip_prefix(' '))
            .unwrap_or_else(|| panic!("no line starts with {key:?} in:\n{}", self.text))
    }
}
