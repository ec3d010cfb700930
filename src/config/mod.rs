//! The configuration: what is to be served, checked.
//!
//! Nothing here opens a file or a socket: a [`Config`] can be right while its image is missing. What
//! the image says is checked where it is opened ([`crate::image`]). `cli::resolve` makes it of the arguments.

use std::path::PathBuf;

use log::LevelFilter;

use crate::mq::cpumap::MapKind;
use crate::mq::throttle::Limits;
use crate::sys::cpu_list::CpuList;

pub mod choices;
pub mod coalesce;
pub mod safety;
pub mod tuning;

use choices::LogLevel;
pub use choices::{CacheMode, EngineKind, LockWhen, OnError, OnTimeout, PollDevice, SummaryFormat};
pub use coalesce::Coalesce;
pub use safety::{SandboxLayers, UserName};
pub use tuning::{Group, Scheduler};

/// Most bytes of a serial number: VIRTIO_BLK_T_GET_ID fills a field of this size (virtio 1.3, section 5.2.6).
pub const SERIAL_MAX_BYTES: usize = 20;

/// Virtqueues offered when nothing is said: more than a usual guest has vCPUs, because QEMU refuses a
/// backend with fewer queues than it wants.
pub const DEFAULT_NUM_QUEUES: u16 = 64;

/// Ring size that a front end is expected to use when nothing is said: QEMU's default.
pub const DEFAULT_QUEUE_SIZE: u16 = 128;

/// Most workers of a process.
pub const MAX_WORKERS: usize = 256;

/// Logical block size in bytes when nothing is said: what every guest and boot loader can use.
pub const DEFAULT_LOGICAL_BLOCK_SIZE: u32 = 512;

/// Everything the daemon is told from outside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The disks to serve; at least one, no two on one socket.
    pub disks: Vec<DiskConfig>,
    /// The groups of disks that share limits; no two with one name.
    pub groups: Vec<Group>,
    /// Where the control socket is, if there is to be one; no disk's socket.
    pub control_path: Option<PathBuf>,
    /// The control socket of the daemon to take the disks over from, if there is one.
    pub take_over: Option<PathBuf>,
    /// Whether a take-over closes sessions that are not ready in time.
    pub close_unready: bool,
    /// Most worker threads; at least one. There are never more than queues.
    pub workers: usize,
    /// The CPUs they run on, one each in turn.
    pub worker_cpus: Option<CpuList>,
    /// Upper bound of the time a worker polls before it sleeps, in microseconds; 0 never polls.
    pub poll_us: u32,
    /// After how many seconds a request counts as stuck; 0 never.
    pub timeout_s: u32,
    /// What is done about it.
    pub on_timeout: OnTimeout,
    /// How much the log tells.
    pub log: LevelFilter,
    /// What is printed on stdout at exit.
    pub summary: SummaryFormat,
    /// The user to become once all is open.
    pub user: Option<UserName>,
    /// What the process gives up.
    pub sandbox: SandboxLayers,
}

/// One disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskConfig {
    /// Where its front end connects.
    pub socket: SocketSource,
    /// What is behind it.
    pub image: ImageSource,
    /// Whether the guest may only read (VIRTIO_BLK_F_RO).
    pub read_only: bool,
    /// Who does the I/O.
    pub engine: EngineKind,
    /// When the image is locked.
    pub lock: LockWhen,
    /// Whether others may write to the image, and locks of theirs be overlooked.
    pub force_share: bool,
    /// The mode of the socket's file; as the umask says if it is `None`.
    pub socket_mode: Option<u32>,
    /// The group of the socket's file, by name or number.
    pub socket_group: Option<String>,
    /// What becomes of requests that fail.
    pub on_error: OnError,
    /// Whether its device is polled for completions.
    pub io_poll: PollDevice,
    /// How the host caches the image.
    pub cache: CacheMode,
    /// Whether discards are offered and free space.
    pub discard: bool,
    /// The answer to VIRTIO_BLK_T_GET_ID: at most [`SERIAL_MAX_BYTES`] bytes of printable ASCII.
    pub serial: String,
    /// The guest's smallest unit of I/O in bytes: a power of two, 512 to 4096.
    pub logical_block_size: u32,
    /// Most virtqueues offered: 1 to 256.
    pub num_queues: u16,
    /// Ring size the front end is expected to use: a power of two, 4 to 1024. Decides seg_max.
    pub queue_size: u16,
    /// vCPUs of the guest; as many as there are queues in use where it is `None`.
    pub vcpus: Option<u16>,
    /// Which vCPU uses which queue. An explicit map names queues below `num_queues` only, and then
    /// `vcpus` is its length.
    pub queue_map: MapKind,
    /// How late the guest may be told that requests are done; at once where it is `None`.
    pub coalesce: Option<Coalesce>,
    /// Its elevator.
    pub scheduler: Scheduler,
    /// What it may do in a second.
    pub limits: Limits,
    /// The group whose limits it shares: one of [`Config::groups`].
    pub group: Option<String>,
}

/// Where a front end comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SocketSource {
    /// It connects to this path.
    Path(PathBuf),
    /// A file descriptor, inherited from the parent: a socket that is listening or connected.
    Fd(i32),
}

/// What is behind a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImageSource {
    /// A regular file or a block device.
    File {
        /// As the user named it.
        path: PathBuf,
    },
    /// Nothing: writes are forgotten, and reads leave the guest's memory as it is.
    Null {
        /// The size the disk pretends to have, in bytes; a multiple of the logical block size, not 0.
        size_bytes: u64,
    },
}

impl CacheMode {
    /// Whether the image is to be used past the host's page cache (O_DIRECT), where it can be.
    pub fn is_direct(self) -> bool {
        matches!(self, CacheMode::None | CacheMode::Directsync)
    }

    /// Whether a write has to be stable before it is acknowledged, whatever the guest asked for.
    pub fn is_write_through(self) -> bool {
        matches!(self, CacheMode::Writethrough | CacheMode::Directsync)
    }

    /// Whether a flush is acknowledged without being carried out.
    pub fn ignores_flush(self) -> bool {
        self == CacheMode::Unsafe
    }
}

impl From<LogLevel> for LevelFilter {
    fn from(level: LogLevel) -> Self {
        match level {
            LogLevel::Error => LevelFilter::Error,
            LogLevel::Warn => LevelFilter::Warn,
            LogLevel::Info => LevelFilter::Info,
            LogLevel::Debug => LevelFilter::Debug,
            LogLevel::Trace => LevelFilter::Trace,
        }
    }
}
