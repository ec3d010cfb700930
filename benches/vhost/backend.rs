//! The back ends: started, found, and stopped again.

use crate::cli::Pin;
use rustix::process::{Pid, Signal, kill_process};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

const OURS: &str = env!("CARGO_BIN_EXE_vhost-user-blkmq");
const QSD: &str = "qemu-storage-daemon";
const START: Duration = Duration::from_secs(20);
const END: Duration = Duration::from_secs(20);

/// What the disk is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Image {
    /// The back end's null engine, so many bytes.
    Null(u64),
    /// A file.
    File(PathBuf),
}

/// Who serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Who {
    /// Our daemon, with these arguments besides.
    Ours(Vec<String>),
    /// Another build of our daemon, with these arguments besides.
    Build(PathBuf, Vec<String>),
    /// QEMU's storage daemon.
    Qsd,
    /// Whoever listens on the socket.
    Socket(PathBuf),
}

/// A back end that listens.
pub struct Backend {
    child: Option<Child>,
    pid: u32,
    socket: PathBuf,
    dir: Option<TempDir>,
}

/// True if QEMU's storage daemon is installed.
pub fn has_qsd() -> bool {
    runs(QSD)
}

/// True if `program --version` works.
pub fn runs(program: &str) -> bool {
    Command::new(program)
        .arg("--version")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

impl Backend {
    /// Starts `who` with a disk of `queues` queues, or finds it.
    ///
    /// # Errors
    ///
    /// It does not start, or does not listen soon enough; what it said is in the message.
    pub fn start(
        who: &Who,
        image: &Image,
        queues: usize,
        pin: Option<&Pin>,
    ) -> Result<Self, String> {
        let dir = TempDir::new().map_err(|error| format!("a temporary directory: {error}"))?;
        let socket = dir.path().join("blk.sock");
        let command = match who {
            Who::Ours(args) => ours(Path::new(OURS), &socket, image, queues, args),
            Who::Build(program, args) => ours(program, &socket, image, queues, args),
            Who::Qsd => qsd(&socket, image, queues),
            Who::Socket(path) => return Self::find(path),
        };
        Self::spawn(command, socket, dir, pin)
    }

    /// Our daemon with these arguments and nothing else; it listens on `socket` among others.
    ///
    /// # Errors
    ///
    /// As for [`Backend::start`].
    pub fn start_ours_with(args: &[String], socket: PathBuf, dir: TempDir) -> Result<Self, String> {
        let mut command = Command::new(OURS);
        command.args(args);
        Self::spawn(command, socket, dir, None)
    }

    fn spawn(
        mut command: Command,
        socket: PathBuf,
        dir: TempDir,
        pin: Option<&Pin>,
    ) -> Result<Self, String> {
        let messages = dir.path().join("messages");
        let stderr = File::create(&messages).map_err(|error| format!("{messages:?}: {error}"))?;
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr)
            .spawn()
            .map_err(|error| format!("{}: {error}", command.get_program().to_string_lossy()))?;
        let mut backend = Self {
            pid: child.id(),
            child: Some(child),
            socket,
            dir: Some(dir),
        };
        let deadline = Instant::now() + START;
        // A back end takes one front end at a time, but one that leaves at once does no harm.
        while UnixStream::connect(&backend.socket).is_err() {
            let child = backend.child.as_mut().expect("just started");
            let ended = child.try_wait().map_err(|error| error.to_string())?;
            if ended.is_some() || Instant::now() > deadline {
                let said = fs::read_to_string(&messages).unwrap_or_default();
                let name = command.get_program().to_string_lossy().into_owned();
                return Err(format!("{name} does not listen: {}", said.trim()));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        if let Some(pin) = pin {
            backend.pin(&pin.back)?;
        }
        Ok(backend)
    }

    fn find(socket: &Path) -> Result<Self, String> {
        let stream = UnixStream::connect(socket).map_err(|error| format!("{socket:?}: {error}"))?;
        let peer = rustix::net::sockopt::socket_peercred(&stream)
            .map_err(|error| format!("{socket:?}: who listens there? {error}"))?;
        Ok(Self {
            child: None,
            pid: u32::try_from(peer.pid.as_raw_nonzero().get()).expect("a pid is positive"),
            socket: socket.to_path_buf(),
            dir: None,
        })
    }

    fn pin(&self, cpus: &[usize]) -> Result<(), String> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.pid)).map_err(|e| e.to_string())?;
        for task in tasks.flatten() {
            let tid = task.file_name().to_string_lossy().parse().ok();
            pin(tid.and_then(Pid::from_raw), cpus)?;
        }
        Ok(())
    }

    /// Its socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// A name for its process in /proc.
    pub fn pid_text(&self) -> String {
        self.pid.to_string()
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        let Some(mut child) = self.child.take() else {
            return;
        };
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        if let Some(pid) = pid {
            // It may have ended by itself; then there is nothing to ask for.
            let _ = kill_process(pid, Signal::TERM);
        }
        let deadline = Instant::now() + END;
        while matches!(child.try_wait(), Ok(None)) {
            if Instant::now() > deadline {
                eprintln!("process {} does not end when asked to: killed", child.id());
                let _ = child.kill();
                let _ = child.wait();
                break;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        self.dir = None;
    }
}

/// Keeps thread `tid` (this one if `None`), and those it starts, on `cpus`.
///
/// # Errors
///
/// There are no such CPUs.
pub fn pin(tid: Option<Pid>, cpus: &[usize]) -> Result<(), String> {
    let mut set = CpuSet::new();
    for &cpu in cpus {
        if cpu >= CpuSet::MAX_CPU {
            return Err(format!("--pin: there is no CPU {cpu}"));
        }
        set.set(cpu);
    }
    sched_setaffinity(tid, &set).map_err(|error| format!("--pin: CPUs {cpus:?}: {error}"))
}

/// The CPUs that this thread may use.
pub fn allowed() -> Vec<usize> {
    let set = sched_getaffinity(None).unwrap_or_else(|_| CpuSet::new());
    (0..CpuSet::MAX_CPU)
        .filter(|cpu| set.is_set(*cpu))
        .collect()
}

fn ours(program: &Path, socket: &Path, image: &Image, queues: usize, args: &[String]) -> Command {
    let mut command = Command::new(program);
    command.arg("--socket-path").arg(socket);
    command.args(["--summary", "none"]);
    // As with the default, which offers many queues: nobody else has a scheduler either.
    command.args(["--scheduler", "none", "--num-queues", &queues.to_string()]);
    match image {
        Image::Null(bytes) => command.args(["--engine", "null", "--size", &bytes.to_string()]),
        Image::File(path) => command
            .args(["--cache", "none"])
            .arg("--blk-file")
            .arg(path),
    };
    command.args(args);
    command
}

fn qsd(socket: &Path, image: &Image, queues: usize) -> Command {
    let node = match image {
        Image::Null(bytes) => {
            format!("driver=null-co,node-name=disk,read-zeroes=off,size={bytes}")
        }
        Image::File(path) => format!(
            "driver=file,node-name=disk,aio=io_uring,cache.direct=on,discard=unmap,filename={}",
            path.display()
        ),
    };
    let mut command = Command::new(QSD);
    command.args(["--blockdev", &node, "--export"]);
    command.arg(format!(
        "vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={},writable=on,num-queues={queues}",
        socket.display()
    ));
    command
}
