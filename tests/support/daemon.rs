//! Starts and stops the program under test, and reads what it and the kernel say about it.

use super::DEADLINE;
use super::enter::Gate;
use super::proc_stats::ProcStats;
use super::summary::Summary;
use rustix::process::{
    Pid, PidfdFlags, Signal, geteuid, kill_process, pidfd_open, pidfd_send_signal,
};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tempfile::TempDir;

const QSD: &str = "qemu-storage-daemon";

/// Which disk to serve, and how.
#[derive(Clone, Debug)]
pub struct Spec {
    image: Image,
    queues: usize,
    queue_size: u16,
    read_only: bool,
    lifetime: Duration,
    args: Vec<String>,
    /// Another build of our program.
    program: Option<PathBuf>,
}

#[derive(Clone, Debug)]
enum Image {
    Null(u64),
    Sparse(u64),
    Bytes(Vec<u8>),
    Path(PathBuf),
}

impl Spec {
    /// The null engine, `bytes` long: writes go nowhere, reads give anything.
    pub fn null(bytes: u64) -> Self {
        Self::with(Image::Null(bytes))
    }

    /// A sparse image file of zeroes.
    pub fn image(bytes: u64) -> Self {
        Self::with(Image::Sparse(bytes))
    }

    /// An image file with this content.
    pub fn image_of(content: &[u8]) -> Self {
        Self::with(Image::Bytes(content.to_vec()))
    }

    /// A file or block device that exists already.
    pub fn path(path: &Path) -> Self {
        Self::with(Image::Path(path.to_path_buf()))
    }

    fn with(image: Image) -> Self {
        Self {
            image,
            queues: 4,
            queue_size: 1024,
            read_only: false,
            lifetime: Duration::from_secs(120),
            args: Vec::new(),
            program: None,
        }
    }

    /// Another build of our program, instead of the one that the tests are about.
    pub fn program(mut self, program: Option<&Path>) -> Self {
        self.program = program.map(Path::to_owned);
        self
    }

    /// Queues to offer (default 4).
    pub fn queues(mut self, queues: usize) -> Self {
        self.queues = queues;
        self
    }

    /// Largest queue to offer (default 1024).
    pub fn queue_size(mut self, size: u16) -> Self {
        self.queue_size = size;
        self
    }

    /// Serves the disk read-only.
    pub fn read_only(mut self) -> Self {
        self.read_only = true;
        self
    }

    /// How long the program may run before it is taken for hung and killed (default two minutes). `vhost`'s front end
    /// has no time limit of its own, and a killed back end turns its waiting into an error.
    pub fn lifetime(mut self, lifetime: Duration) -> Self {
        self.lifetime = lifetime;
        self
    }

    /// More arguments, for our own program only.
    pub fn args<S: Into<String>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }
}

/// The program, running.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    dir: Arc<TempDir>,
    socket: PathBuf,
    image: Option<PathBuf>,
    stderr: Arc<Lines>,
    readers: Vec<JoinHandle<()>>,
    watchdog: mpsc::Sender<()>,
    stdout: Arc<Lines>,
    ours: bool,
}

/// Lines a thread collects from a pipe.
#[derive(Debug, Default)]
struct Lines {
    state: Mutex<(Vec<String>, bool)>,
    changed: Condvar,
    held: Mutex<bool>,
    released: Condvar,
}

impl Lines {
    fn collect(self: &Arc<Self>, pipe: impl Read + Send + 'static) -> JoinHandle<()> {
        let lines = Arc::clone(self);
        std::thread::spawn(move || {
            for line in BufReader::new(pipe).lines().map_while(Result::ok) {
                lines.state.lock().expect("no holder panics").0.push(line);
                lines.changed.notify_all();
                let held = lines.held.lock().expect("no holder panics");
                let released = lines.released.wait_while(held, |held| *held);
                drop(released.expect("no holder panics"));
            }
            lines.state.lock().expect("no holder panics").1 = true;
            lines.changed.notify_all();
        })
    }

    /// Reads no more of the pipe, or goes on.
    fn hold(&self, held: bool) {
        *self.held.lock().expect("no holder panics") = held;
        self.released.notify_all();
    }

    /// Waits for a line with `text` in it; false if the pipe closed or the deadline passed without one.
    fn wait_for(&self, text: &str) -> bool {
        let state = self.state.lock().expect("no holder panics");
        let found = |state: &(Vec<String>, bool)| state.0.iter().any(|line| line.contains(text));
        let (state, _) = self
            .changed
            .wait_timeout_while(state, DEADLINE, |state| !found(state) && !state.1)
            .expect("no holder panics");
        found(&state)
    }

    fn text(&self) -> String {
        self.state.lock().expect("no holder panics").0.join("\n")
    }
}

impl Daemon {
    /// True if the tests run against QEMU's storage daemon instead of ours.
    pub fn is_peer() -> bool {
        std::env::var("BLKMQ_TEST_BACKEND").is_ok_and(|name| name == QSD)
    }

    /// Starts the program the tests are about and waits until it listens. Panics with its messages if it does not.
    pub fn start(spec: &Spec) -> Self {
        if Self::is_peer() {
            Self::start_qsd(spec)
        } else {
            Self::start_ours(spec)
        }
    }

    /// Starts our program.
    pub fn start_ours(spec: &Spec) -> Self {
        Self::start_with(spec, |_| ()).0
    }

    /// Starts our program behind a gate that can have its `io_uring_enter` fail.
    pub fn start_gated(spec: &Spec) -> (Self, Gate) {
        Self::start_with(spec, Gate::put_on)
    }

    /// Starts our program, with something done to its command before; and what came of that.
    fn start_with<T>(spec: &Spec, prepare: impl FnOnce(&mut Command) -> T) -> (Self, T) {
        let dir = Arc::new(TempDir::new().expect("a temporary directory can be made"));
        let image = spec.make_image(dir.path());
        let socket = dir.path().join("blk.sock");
        let mut command = Self::our_command(spec, &socket, image.as_deref());
        let prepared = prepare(&mut command);
        let daemon = Self::spawn(command, dir, socket, image, spec.lifetime);
        if !daemon.stderr.wait_for("listening on") {
            panic!("the daemon does not listen:\n{}", daemon.stderr());
        }
        (daemon, prepared)
    }

    /// Starts our program once more, for the same socket and image, and does not wait for anything.
    pub fn beside(&self, spec: &Spec) -> Self {
        let command = Self::our_command(spec, &self.socket, self.image.as_deref());
        let dir = Arc::clone(&self.dir);
        Self::spawn(
            command,
            dir,
            self.socket.clone(),
            self.image.clone(),
            spec.lifetime,
        )
    }

    fn our_command(spec: &Spec, socket: &Path, image: Option<&Path>) -> Command {
        let ours = Path::new(env!("CARGO_BIN_EXE_vhost-user-blkmq"));
        let mut command = Command::new(spec.program.as_deref().unwrap_or(ours));
        command
            .arg("--socket-path")
            .arg(socket)
            .args(["--summary", "json"])
            .args(["--num-queues", &spec.queues.to_string()])
            .args(["--queue-size", &spec.queue_size.to_string()]);
        match (image, &spec.image) {
            (Some(path), _) => command.arg("--blk-file").arg(path),
            (None, Image::Null(bytes)) => {
                command.args(["--engine", "null", "--size", &bytes.to_string()])
            }
            (None, _) => unreachable!("only the null engine has no image"),
        };
        if spec.read_only {
            command.arg("--read-only");
        }
        // So that a test that is not root's may look at what the daemon has open.
        if !geteuid().is_root() && !spec.args.iter().any(|arg| arg == "--sandbox") {
            command.args(["--sandbox", "dumps=off"]);
        }
        command.args(&spec.args);
        command
    }

    /// Starts QEMU's storage daemon with the same disk, to try the front end or to compare.
    pub fn start_qsd(spec: &Spec) -> Self {
        let dir = Arc::new(TempDir::new().expect("a temporary directory can be made"));
        let image = spec.make_image(dir.path());
        let socket = dir.path().join("blk.sock");
        let ready = dir.path().join("ready");
        let node = match (&image, &spec.image) {
            (Some(path), _) => format!(
                "driver=file,node-name=n,discard=unmap,read-only={},filename={}",
                if spec.read_only { "on" } else { "off" },
                path.display()
            ),
            (None, Image::Null(bytes)) => {
                format!("driver=null-co,node-name=n,read-zeroes=on,size={bytes}")
            }
            (None, _) => unreachable!("only the null engine has no image"),
        };
        let mut command = Command::new(QSD);
        command
            .arg("--blockdev")
            .arg(node)
            .arg("--export")
            .arg(format!(
                "vhost-user-blk,id=e,node-name=n,addr.type=unix,addr.path={},writable={},num-queues={}",
                socket.display(),
                if spec.read_only { "off" } else { "on" },
                spec.queues
            ))
            .arg("--pidfile")
            .arg(&ready);
        let daemon = Self::spawn(command, dir, socket, image, spec.lifetime);
        let deadline = Instant::now() + DEADLINE;
        while !ready.exists() {
            assert!(
                Instant::now() < deadline && !daemon.stderr.state.lock().expect("not poisoned").1,
                "qemu-storage-daemon does not listen:\n{}",
                daemon.stderr()
            );
            std::thread::sleep(Duration::from_millis(2));
        }
        daemon
    }

    fn spawn(
        mut command: Command,
        dir: Arc<TempDir>,
        socket: PathBuf,
        image: Option<PathBuf>,
        lifetime: Duration,
    ) -> Self {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let ours = command.get_program() != QSD;
        let stdout = Arc::new(Lines::default());
        let stderr = Arc::new(Lines::default());
        let readers = vec![
            stdout.collect(child.stdout.take().expect("stdout is a pipe")),
            stderr.collect(child.stderr.take().expect("stderr is a pipe")),
        ];
        Self {
            watchdog: watch(child.id(), lifetime),
            child,
            dir,
            socket,
            image,
            stderr,
            readers,
            stdout,
            ours,
        }
    }

    /// Path of the socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Path of the image; the null engine has none.
    pub fn image(&self) -> &Path {
        self.image.as_deref().expect("the disk has an image")
    }

    /// The temporary directory that socket and image are in.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Process number.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What the program wrote to its standard error so far.
    pub fn stderr(&self) -> String {
        self.stderr.text()
    }

    /// Leaves the program's standard error unread, so that its pipe fills up, or reads on.
    pub fn hold_log(&self, held: bool) {
        self.stderr.hold(held);
    }

    /// Waits until the program writes a line with `text` in it; false if it never does.
    pub fn wait_for_message(&self, text: &str) -> bool {
        self.stderr.wait_for(text)
    }

    /// True as long as the program runs.
    pub fn is_running(&mut self) -> bool {
        self.child
            .try_wait()
            .expect("a child can be waited for")
            .is_none()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        kill_process(pid_of(self.pid()), signal).expect("a child takes signals");
    }

    /// Asks the program to end, waits for it, and takes its summary apart.
    pub fn stop(self) -> Summary {
        let ours = self.ours;
        let (status, stdout, stderr) = self.terminate();
        if !ours {
            return Summary::default();
        }
        assert!(
            status.success(),
            "SIGTERM made the daemon exit with {status}:\n{stderr}"
        );
        serde_json::from_str(&stdout)
            .unwrap_or_else(|error| panic!("the summary is no summary: {error}\n{stdout}"))
    }

    /// Asks the program to end and returns its exit status, standard output and standard error.
    pub fn terminate(mut self) -> (ExitStatus, String, String) {
        if self.is_running() {
            self.signal(Signal::TERM);
        }
        let status = self.wait_exit();
        for reader in self.readers.drain(..) {
            reader.join().expect("pipe readers do not panic");
        }
        (status, self.stdout.text(), self.stderr.text())
    }

    /// Waits until the program ended by itself or by a signal.
    pub fn wait_exit(&mut self) -> ExitStatus {
        let deadline = Instant::now() + DEADLINE;
        loop {
            if let Some(status) = self.child.try_wait().expect("a child can be waited for") {
                return status;
            }
            assert!(
                Instant::now() < deadline,
                "the daemon does not end:\n{}",
                self.stderr()
            );
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// What the kernel says about the process now.
    pub fn stats(&self) -> ProcStats {
        ProcStats::of(self.pid())
    }

    /// Waits until `settled` holds for what the kernel says; panics with the last word after the deadline.
    pub fn wait_stats(&self, mut settled: impl FnMut(&ProcStats) -> bool) -> ProcStats {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let stats = self.stats();
            if settled(&stats) {
                return stats;
            }
            assert!(
                Instant::now() < deadline,
                "the daemon does not settle: {stats:?}"
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Kills process `pid` unless the sender it returns is dropped within `lifetime`.
fn watch(pid: u32, lifetime: Duration) -> mpsc::Sender<()> {
    let (alive, gone) = mpsc::channel();
    let process = pidfd_open(pid_of(pid), PidfdFlags::empty()).expect("a child has a pidfd");
    std::thread::spawn(move || {
        if gone.recv_timeout(lifetime) == Err(mpsc::RecvTimeoutError::Timeout) {
            // Already ended is as good.
            let _ = pidfd_send_signal(&process, Signal::KILL);
        }
    });
    alive
}

fn pid_of(pid: u32) -> Pid {
    let pid = i32::try_from(pid).expect("process numbers have 31 bits");
    Pid::from_raw(pid).expect("a child's number is not 0")
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if self.is_running() {
            // It may have ended in between; then there is nothing left to do.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        if std::thread::panicking() {
            // The messages of the program belong to the failed test.
            let _ = writeln!(std::io::stderr(), "its messages:\n{}", self.stderr.text());
        }
    }
}

impl Spec {
    fn make_image(&self, dir: &Path) -> Option<PathBuf> {
        let path = dir.join("disk.img");
        let made = match &self.image {
            Image::Null(_) => return None,
            Image::Path(path) => return Some(path.clone()),
            Image::Sparse(bytes) => File::create(&path).and_then(|file| file.set_len(*bytes)),
            Image::Bytes(content) => fs::write(&path, content),
        };
        made.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        Some(path)
    }
}
