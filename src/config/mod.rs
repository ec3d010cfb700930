//! The configuration: what the arguments mean once they have been checked against each other.
//!
//! Nothing here opens a file or a socket: a [`Config`] can be right while its image is missing. What
//! the image says is checked where it is opened ([`crate::image`]).

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::thread::available_parallelism;

use log::LevelFilter;

use crate::cli::{Arguments, Discard, DiskArguments, LogLevel, SERIAL_MAX_BYTES, Switch};
use crate::error::StartError;
use crate::mq::cpumap::MapKind;
use crate::mq::throttle::Limits;
use crate::sys::cpu_list::CpuList;

use self::whole::{check_control_path, check_groups, check_on_error, no_socket_twice};
pub use crate::cli::tuning::{Group, Scheduler};
pub use crate::cli::{
    CacheMode, Coalesce, EngineKind, LockWhen, OnError, OnTimeout, PollDevice, SandboxLayers,
    SummaryFormat, UserName,
};

mod whole;

/// Virtqueues offered when nothing is said: more than a usual guest has vCPUs, because QEMU refuses a
/// backend with fewer queues than it wants.
pub const DEFAULT_NUM_QUEUES: u16 = 64;

/// Ring size that a front end is expected to use when nothing is said: QEMU's default.
pub const DEFAULT_QUEUE_SIZE: u16 = 128;

/// Most workers.
const MAX_WORKERS: usize = 256;

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

impl Config {
    /// Checks the arguments against each other and fills in what was not said.
    ///
    /// # Errors
    ///
    /// [`StartError::Usage`] names the first contradiction found and what to do about it.
    pub fn from_arguments(arguments: Arguments) -> Result<Config, StartError> {
        let Arguments {
            disk,
            disks: others,
            groups,
            control_path,
            take_over,
            workers,
            worker_cpus,
            poll_us,
            timeout,
            on_timeout,
            log,
            summary,
            safety,
            ..
        } = arguments;
        let mut disks = Vec::with_capacity(1 + others.len());
        // With --disk the flags outside it may be silent about a disk; then there is none of theirs.
        if others.is_empty() || disk != DiskArguments::default() {
            disks.push(DiskConfig::from_arguments(disk, &|option| {
                format!("--{option}")
            })?);
        }
        for (index, disk) in others.into_iter().enumerate() {
            let place = |option: &str| format!("{option} (in --disk number {})", index + 1);
            disks.push(DiskConfig::from_arguments(disk, &place)?);
        }
        no_socket_twice(&disks)?;
        check_groups(&groups, &disks)?;
        check_control_path(control_path.as_deref(), &disks)?;
        check_on_error(control_path.as_deref(), &disks)?;
        let workers = match workers {
            Some(workers) => usize::from(workers),
            None => match &worker_cpus {
                Some(list) => list.cpus().len().min(MAX_WORKERS),
                None => available_parallelism().map_or(1, NonZeroUsize::get),
            },
        };
        Ok(Config {
            disks,
            groups,
            control_path,
            take_over,
            close_unready: safety.close_unready,
            workers,
            worker_cpus,
            poll_us,
            timeout_s: timeout,
            on_timeout,
            log: log.into(),
            summary,
            user: safety.user,
            sandbox: safety.sandbox.unwrap_or_default(),
        })
    }
}

impl DiskConfig {
    /// `name` says an option's name the way the user wrote it.
    fn from_arguments(
        disk: DiskArguments,
        name: &dyn Fn(&str) -> String,
    ) -> Result<DiskConfig, StartError> {
        let logical_block_size = disk
            .logical_block_size
            .unwrap_or(DEFAULT_LOGICAL_BLOCK_SIZE);
        let num_queues = disk.num_queues.unwrap_or(DEFAULT_NUM_QUEUES);
        let image = image_source(&disk, logical_block_size, name)?;
        let socket = socket_source(&disk, name)?;
        let queue_map = disk.queue_map.unwrap_or_default();
        let vcpus = checked_vcpus(&queue_map, disk.vcpus, num_queues, name)?;
        Ok(DiskConfig {
            socket,
            read_only: disk.read_only == Some(Switch::On),
            engine: disk.engine.unwrap_or_default(),
            lock: disk.safety.lock.unwrap_or_default(),
            force_share: disk.safety.force_share == Some(Switch::On),
            socket_mode: disk.safety.socket_mode,
            socket_group: disk.safety.socket_group,
            on_error: disk.safety.on_error.unwrap_or_default(),
            io_poll: disk.safety.io_poll.unwrap_or_default(),
            cache: disk.cache.unwrap_or_default(),
            discard: disk.discard != Some(Discard::Off),
            serial: disk.serial.unwrap_or_else(|| default_serial(&image)),
            image,
            logical_block_size,
            num_queues,
            queue_size: disk.queue_size.unwrap_or(DEFAULT_QUEUE_SIZE),
            vcpus,
            queue_map,
            coalesce: disk.coalesce.filter(|coalesce| coalesce.delay_us != 0),
            scheduler: disk.scheduler.unwrap_or_default(),
            limits: disk.limit.unwrap_or_default(),
            group: disk.group,
        })
    }
}

fn usage<T>(text: String) -> Result<T, StartError> {
    Err(StartError::Usage(format!("{text} (see --help)")))
}

fn socket_source(
    disk: &DiskArguments,
    name: &dyn Fn(&str) -> String,
) -> Result<SocketSource, StartError> {
    match (&disk.socket_path, disk.fd) {
        (Some(path), None) if path.as_os_str().is_empty() => usage(format!(
            "{} is empty; give the path of the socket to create",
            name("socket-path")
        )),
        (Some(path), None) => Ok(SocketSource::Path(path.clone())),
        (None, Some(fd)) => Ok(SocketSource::Fd(fd)),
        (Some(_), Some(_)) => usage(format!(
            "{} and {} exclude each other; give one",
            name("socket-path"),
            name("fd")
        )),
        (None, None) => usage(format!(
            "there is no socket for the front end to connect to; give {} PATH or {} N",
            name("socket-path"),
            name("fd")
        )),
    }
}

fn image_source(
    disk: &DiskArguments,
    logical_block_size: u32,
    name: &dyn Fn(&str) -> String,
) -> Result<ImageSource, StartError> {
    match (disk.engine.unwrap_or_default(), &disk.blk_file, disk.size) {
        (EngineKind::Null, Some(path), _) => usage(format!(
            "the null engine has no image, but {} is {path:?}; leave one of them out",
            name("blk-file")
        )),
        (EngineKind::Null, None, None) => usage(format!(
            "the null engine needs to know how large the disk is; give {} 100G",
            name("size")
        )),
        (EngineKind::Null, None, Some(size_bytes)) => {
            if size_bytes == 0 || size_bytes % u64::from(logical_block_size) != 0 {
                return usage(format!(
                    "{} is {size_bytes} bytes; give a multiple of the logical block size \
                     {logical_block_size}, and not 0",
                    name("size")
                ));
            }
            Ok(ImageSource::Null { size_bytes })
        }
        (_, Some(_), Some(size)) => usage(format!(
            "{} is {size}, but an image has its own size; leave it out",
            name("size")
        )),
        (_, None, Some(_)) => usage(format!(
            "{} is only for the null engine; give {} PATH instead, or {} null as well",
            name("size"),
            name("blk-file"),
            name("engine")
        )),
        (_, Some(path), None) if path.as_os_str().is_empty() => usage(format!(
            "{} is empty; give a regular file or a block device",
            name("blk-file")
        )),
        (_, Some(path), None) => Ok(ImageSource::File { path: path.clone() }),
        (_, None, None) => usage(format!(
            "there is no image to serve; give {} PATH, and {} PATH for the front end to connect to",
            name("blk-file"),
            name("socket-path")
        )),
    }
}

/// The number of vCPUs, if anything says it.
fn checked_vcpus(
    map: &MapKind,
    vcpus: Option<u16>,
    num_queues: u16,
    name: &dyn Fn(&str) -> String,
) -> Result<Option<u16>, StartError> {
    let MapKind::Explicit(queues) = map else {
        return Ok(vcpus);
    };
    if let Some(queue) = queues.iter().find(|&&queue| queue >= num_queues) {
        return usage(format!(
            "{} names queue {queue}, but the {num_queues} queues offered are 0 to {}; \
             correct it or raise {}",
            name("queue-map"),
            num_queues - 1,
            name("num-queues")
        ));
    }
    let Ok(listed @ 1..=4096) = u16::try_from(queues.len()) else {
        return usage(format!(
            "{} lists {} vCPUs; 4096 is the most",
            name("queue-map"),
            queues.len()
        ));
    };
    match vcpus {
        Some(vcpus) if vcpus != listed => usage(format!(
            "{} is {vcpus}, but {} lists {listed} vCPUs; make them agree, or leave {} out",
            name("vcpus"),
            name("queue-map"),
            name("vcpus")
        )),
        _ => Ok(Some(listed)),
    }
}

/// A serial that tells a user which image a guest's disk is: the file name's first 20 bytes, with what
/// cannot stand in a serial (and would be awkward in /dev/disk/by-id) replaced.
fn default_serial(image: &ImageSource) -> String {
    let name = match image {
        ImageSource::File { path } => path
            .file_name()
            .unwrap_or(path.as_os_str())
            .to_string_lossy(),
        ImageSource::Null { .. } => "null".into(),
    };
    name.chars()
        .map(|c| {
            if c.is_ascii_graphic() && c != '/' {
                c
            } else {
                '_'
            }
        })
        .take(SERIAL_MAX_BYTES)
        .collect()
}

#[cfg(test)]
mod tests;
