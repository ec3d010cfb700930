//! What the arguments mean once they have been checked against each other.

use std::num::NonZeroUsize;
use std::thread::available_parallelism;

use self::checks::{check_control_path, check_groups, check_on_error, no_socket_twice};
use super::{Arguments, DiskArguments};
use crate::config::choices::{Discard, Switch};
use crate::config::{
    Config, DEFAULT_LOGICAL_BLOCK_SIZE, DEFAULT_NUM_QUEUES, DEFAULT_QUEUE_SIZE, DiskConfig,
    EngineKind, ImageSource, MAX_WORKERS, SERIAL_MAX_BYTES, SocketSource,
};
use crate::error::StartError;
use crate::mq::cpumap::MapKind;

mod checks;

impl Arguments {
    /// Checks the arguments against each other and fills in what was not said.
    ///
    /// # Errors
    ///
    /// [`StartError::Usage`] names the first contradiction found and what to do about it.
    pub fn resolve(self) -> Result<Config, StartError> {
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
        } = self;
        let mut disks = Vec::with_capacity(1 + others.len());
        // With --disk the flags outside it may be silent about a disk; then there is none of theirs.
        if others.is_empty() || disk != DiskArguments::default() {
            disks.push(disk_config(disk, &|option| format!("--{option}"))?);
        }
        for (index, disk) in others.into_iter().enumerate() {
            let place = |option: &str| format!("{option} (in --disk number {})", index + 1);
            disks.push(disk_config(disk, &place)?);
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

/// `name` says an option's name the way the user wrote it.
fn disk_config(
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
