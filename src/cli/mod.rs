//! The command line: words a person types, turned into raw arguments.
//!
//! Nothing here opens a file, creates a socket or compares one flag with another; that begins in
//! [`crate::config`]. The flags follow the conventions for vhost-user backend programs (QEMU,
//! docs/interop/vhost-user), and the cache modes have QEMU's names and meanings.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

use clap::error::ErrorKind;
use clap::{Args, CommandFactory, Parser};

use crate::error::StartError;
use crate::mq::cpumap::MapKind;
use crate::mq::limits::MAX_QUEUES;
use crate::mq::throttle::Limits;

pub use self::safety::{DiskSafety, ProcessSafety};
pub use self::values::parse_size;
use self::values::{
    parse_block_size, parse_queue_map, parse_queue_size, parse_serial, split_pairs,
};
use crate::config::choices::{
    CacheMode, Discard, EngineKind, LogLevel, OnTimeout, SummaryFormat, Switch,
};
use crate::config::coalesce::Coalesce;
use crate::config::coalesce::parse_coalesce;
use crate::config::tuning::{
    Group, Scheduler, parse_group, parse_group_name, parse_limits, parse_scheduler,
};
use crate::sys::cpu_list::CpuList;

mod resolve;
mod safety;
mod values;

/// What `--print-capabilities` prints, as the conventions for vhost-user backend programs define it
/// for a block backend.
pub const CAPABILITIES: &str = r#"{"type":"block","features":["read-only","blk-file"]}"#;

const DISK: &str = "What to serve, and where";
const GUEST: &str = "What the guest sees";
const QUEUES: &str = "Queues";
const IO: &str = "How the image is read and written";
const SHARE: &str = "Who goes first, and how fast";
const PROCESS: &str = "The process";

const EXAMPLES: &str = "\
Examples:
  Serve disk.img to the virtual machine that connects to the socket:
    vhost-user-blkmq --socket-path /run/vm1.sock --blk-file disk.img

  Two disks for two virtual machines, served by the same four workers:
    vhost-user-blkmq --workers 4 \\
      --disk socket-path=/run/vm1.sock,blk-file=/dev/vg0/vm1 \\
      --disk socket-path=/run/vm2.sock,blk-file=vm2.img,read-only=on

  A disk without an image, to measure everything but the image:
    vhost-user-blkmq --socket-path /run/null.sock --engine null --size 100G

Send SIGTERM, SIGINT or SIGHUP to stop: requests in flight are finished first.
docs/ATTACH.md says how to start QEMU, libvirt and Cloud Hypervisor.
Every option is described in docs/OPTIONS.md.";

/// Serve disks to virtual machines over vhost-user, with one hardware queue for each vCPU.
#[derive(Debug, Clone, Parser)]
#[command(name = "vhost-user-blkmq", version, after_help = EXAMPLES, next_line_help = true)]
pub struct Arguments {
    /// The disk that the flags outside `--disk` describe, if any.
    #[command(flatten)]
    pub disk: DiskArguments,

    /// One more disk, served by the same workers: the options above, without dashes,
    /// and not inherited from there [may be repeated; a comma within a value is written
    /// twice]
    #[arg(
        verbatim_doc_comment, long = "disk", value_name = "KEY=VALUE,...",
        value_parser = parse_disk, help_heading = DISK
    )]
    pub disks: Vec<DiskArguments>,

    /// What the disks of a group may do together: the group's name, then limits as for
    /// `--limit` [may be repeated]
    #[arg(
        verbatim_doc_comment, long = "group-limit", value_name = "NAME,KEY=RATE[/BURST],...",
        value_parser = parse_group, help_heading = SHARE
    )]
    pub groups: Vec<Group>,

    /// Threads that serve all disks; never more than there are queues [default: one for
    /// each CPU this process may use]
    #[arg(
        verbatim_doc_comment, long, value_name = "N", allow_negative_numbers = true,
        value_parser = clap::value_parser!(u16).range(1..=256), help_heading = PROCESS
    )]
    pub workers: Option<u16>,

    /// CPUs the workers run on, one each in turn, such as 0-3,8; without --workers there are
    /// as many workers as CPUs [default: where the kernel puts them, on several NUMA nodes
    /// near the guest's memory]
    #[arg(
        verbatim_doc_comment, long, value_name = "LIST", value_parser = CpuList::parse,
        help_heading = PROCESS
    )]
    pub worker_cpus: Option<CpuList>,

    /// Longest time a worker looks for new requests before it sleeps, in microseconds;
    /// 0 never looks. More is a shorter wait for the guest and more CPU time on the
    /// host [default: 50]
    #[arg(
        verbatim_doc_comment, long, value_name = "N", allow_negative_numbers = true,
        default_value_t = 50, hide_default_value = true,
        value_parser = clap::value_parser!(u32).range(0..=1_000_000), help_heading = PROCESS
    )]
    pub poll_us: u32,

    /// Seconds after which a request the host has not finished is reported in the log;
    /// 0 never looks [default: 30]
    #[arg(
        verbatim_doc_comment, long, value_name = "SECONDS", allow_negative_numbers = true,
        default_value_t = 30, hide_default_value = true,
        value_parser = clap::value_parser!(u32).range(0..=86_400), help_heading = PROCESS
    )]
    pub timeout: u32,

    /// What else to do about it: report (nothing), or cancel (ask the kernel to give it up,
    /// and if it does tell the guest that the request failed) [default: report]
    #[arg(
        verbatim_doc_comment, long, value_name = "POLICY", value_enum, hide_possible_values = true,
        hide_default_value = true, default_value_t = OnTimeout::Report, help_heading = PROCESS
    )]
    pub on_timeout: OnTimeout,

    /// Listen on this UNIX socket for `blkmqctl` and other programs that look at the
    /// disks or change how they are served [default: no such socket]
    #[arg(verbatim_doc_comment, long, value_name = "PATH", help_heading = PROCESS)]
    pub control_path: Option<PathBuf>,

    /// Take all disks over from the daemon with this control socket, while the guests run;
    /// without a daemon there, start as usual [default: start as usual]
    #[arg(verbatim_doc_comment, long, value_name = "PATH", help_heading = PROCESS)]
    pub take_over: Option<PathBuf>,

    /// What the process may do.
    #[command(flatten)]
    pub safety: ProcessSafety,

    /// How much to tell on stderr: error, warn, info, debug or trace [default: info]
    #[arg(
        verbatim_doc_comment, long, value_name = "LEVEL", value_enum, hide_possible_values = true,
        hide_default_value = true, default_value_t = LogLevel::Info, help_heading = PROCESS
    )]
    pub log: LogLevel,

    /// What to print on stdout at exit about the work of each queue: text, json or none
    /// [default: text]
    #[arg(
        verbatim_doc_comment, long, value_name = "FORMAT", value_enum, hide_possible_values = true,
        hide_default_value = true, default_value_t = SummaryFormat::Text, help_heading = PROCESS
    )]
    pub summary: SummaryFormat,

    /// Print what this program can do, as JSON, and exit, whatever else is given
    #[arg(verbatim_doc_comment, long, help_heading = PROCESS)]
    pub print_capabilities: bool,
}

/// The flags that describe one disk. All are optional here: which of them are needed, and which
/// exclude each other, is for [`crate::config`] to say.
#[derive(Debug, Clone, Default, PartialEq, Eq, Args)]
pub struct DiskArguments {
    /// Listen on this UNIX socket for the virtual machine monitor
    #[arg(verbatim_doc_comment, long, value_name = "PATH", help_heading = DISK)]
    pub socket_path: Option<PathBuf>,

    /// Serve this open socket, listening or connected, that the parent process passes
    /// on
    #[arg(
        verbatim_doc_comment, long, value_name = "N", allow_negative_numbers = true,
        conflicts_with = "socket_path", value_parser = clap::value_parser!(i32).range(0..),
        help_heading = DISK
    )]
    pub fd: Option<i32>,

    /// The image: a regular file or a block device, in raw format
    #[arg(verbatim_doc_comment, long, value_name = "PATH", help_heading = DISK)]
    pub blk_file: Option<PathBuf>,

    /// Never write to the image, and tell the guest so
    #[arg(
        verbatim_doc_comment, long, value_name = "on|off", value_enum, hide_possible_values = true,
        num_args = 0..=1, require_equals = true, default_missing_value = "on", help_heading = DISK
    )]
    pub read_only: Option<Switch>,

    /// What keeps the image, the host and the guest from harm.
    #[command(flatten)]
    pub safety: DiskSafety,

    /// Serial number of the disk, at most 20 ASCII characters [default: from the
    /// image's file name]
    #[arg(
        verbatim_doc_comment, long, value_name = "TEXT", value_parser = parse_serial,
        help_heading = GUEST
    )]
    pub serial: Option<String>,

    /// Smallest unit the guest reads and writes, in bytes: 512, 1024, 2048 or 4096
    /// [default: 512]
    #[arg(
        verbatim_doc_comment, long, value_name = "BYTES", value_parser = parse_block_size,
        help_heading = GUEST
    )]
    pub logical_block_size: Option<u32>,

    /// Let the guest give space back, so that the image shrinks [default: on]
    #[arg(
        verbatim_doc_comment, long, value_name = "on|off", value_enum, hide_possible_values = true,
        help_heading = GUEST
    )]
    pub discard: Option<Discard>,

    /// Most virtqueues offered; the virtual machine monitor takes as many as it likes,
    /// usually one for each vCPU [default: 64]
    #[arg(
        verbatim_doc_comment, long, value_name = "N", allow_negative_numbers = true,
        value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_QUEUES)),
        help_heading = QUEUES
    )]
    pub num_queues: Option<u16>,

    /// Size the rings are expected to have, a power of two from 4 to 1024: it decides
    /// how many buffers a request may have. Any ring up to 1024 works [default: 128]
    #[arg(
        verbatim_doc_comment, long, value_name = "N", allow_negative_numbers = true,
        value_parser = parse_queue_size, help_heading = QUEUES
    )]
    pub queue_size: Option<u16>,

    /// vCPUs of the guest, if they are more than its queues [default: one for each
    /// queue in use]
    #[arg(
        verbatim_doc_comment, long, value_name = "N", allow_negative_numbers = true,
        value_parser = clap::value_parser!(u16).range(1..=4096), help_heading = QUEUES
    )]
    pub vcpus: Option<u16>,

    /// Which vCPU uses which queue: grouping (Linux 6.6 and later), modulo (before), or
    /// a list with the queue of each vCPU, such as 0,0,1,1 or 0:0:1:1 [default:
    /// grouping]
    #[arg(
        verbatim_doc_comment, long, value_name = "SPEC", value_parser = parse_queue_map,
        help_heading = QUEUES
    )]
    pub queue_map: Option<MapKind>,

    /// Interrupt coalescing: while a queue has more in flight, tell the guest of what is
    /// done only after US microseconds, or when COUNT requests are done; 0 for at once
    /// [default: 0; COUNT 32]
    #[arg(
        verbatim_doc_comment, long, value_name = "US[:COUNT]", value_parser = parse_coalesce,
        help_heading = QUEUES
    )]
    pub coalesce: Option<Coalesce>,

    /// Who reads and writes the image: io_uring; mmap, for images in memory (tmpfs,
    /// memfd, hugetlbfs, DAX); auto, the better one; null has no image: it forgets what
    /// is written, and reads bring nothing [default: auto]
    #[arg(
        verbatim_doc_comment, long, value_name = "ENGINE", value_enum, hide_possible_values = true,
        help_heading = IO
    )]
    pub engine: Option<EngineKind>,

    /// Size of the disk in bytes, or with K, M, G or T behind it; only with the null
    /// engine
    #[arg(
        verbatim_doc_comment, long, value_name = "SIZE", value_parser = parse_size,
        help_heading = IO
    )]
    pub size: Option<u64>,

    /// Cache mode, as in QEMU: writeback, none (past the host's page cache),
    /// writethrough, directsync, unsafe (a flush does nothing: data is lost if the host
    /// stops) [default: none]
    #[arg(
        verbatim_doc_comment, long, value_name = "MODE", value_enum, hide_possible_values = true,
        help_heading = IO
    )]
    pub cache: Option<CacheMode>,

    /// Which requests go first: none (as they come), mq-deadline, kyber, or auto; with
    /// parameters behind it as in /sys/block/*/queue/iosched [default: auto, which is
    /// mq-deadline for one queue, else none]
    #[arg(
        verbatim_doc_comment, long, value_name = "NAME[,PARAM=VALUE...]",
        value_parser = parse_scheduler, help_heading = SHARE
    )]
    pub scheduler: Option<Scheduler>,

    /// At most so much a second, and so much at once: iops, iops-rd, iops-wr (operations),
    /// bps, bps-rd, bps-wr (bytes), with K, M or G; a burst is a tenth of the rate unless
    /// given [default: no limit]
    #[arg(
        verbatim_doc_comment, long, value_name = "KEY=RATE[/BURST],...",
        value_parser = parse_limits, help_heading = SHARE
    )]
    pub limit: Option<Limits>,

    /// The group whose limits the disk shares; see `--group-limit` [default: none]
    #[arg(
        verbatim_doc_comment, long, value_name = "NAME", value_parser = parse_group_name,
        help_heading = SHARE
    )]
    pub group: Option<String>,
}

/// What the command line asks for.
#[derive(Debug)]
pub enum Invocation {
    /// Print this text on stdout and exit 0: capabilities, help or version.
    Print(String),
    /// Serve disks.
    Serve(Box<Arguments>),
}

/// Reads a command line, the program's name first.
///
/// `--print-capabilities` wins over everything, even over arguments that make no sense: management
/// software calls it before it knows anything about the program.
///
/// # Errors
///
/// [`StartError::Usage`], in one line, when the arguments cannot be understood.
pub fn parse<I>(argv: I) -> Result<Invocation, StartError>
where
    I: IntoIterator<Item = OsString>,
{
    let argv: Vec<OsString> = argv.into_iter().collect();
    if argv
        .iter()
        .skip(1)
        .any(|arg| arg == OsStr::new("--print-capabilities"))
    {
        return Ok(Invocation::Print(format!("{CAPABILITIES}\n")));
    }
    match Arguments::try_parse_from(argv) {
        Ok(arguments) => Ok(Invocation::Serve(Box::new(arguments))),
        Err(error) => match error.kind() {
            ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
                Ok(Invocation::Print(error.to_string()))
            }
            _ => Err(StartError::Usage(format!(
                "{} (see --help)",
                one_line(&error)
            ))),
        },
    }
}

/// clap's message without its headings and usage lines, in one line.
fn one_line(error: &clap::Error) -> String {
    let text = error.to_string();
    let parts: Vec<&str> = text
        .lines()
        .map(str::trim)
        .take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more information"))
        .filter(|line| !line.is_empty())
        .collect();
    let joined = parts.join("; ");
    // Without control characters: an argument may hold a newline, and clap prints it as it is.
    let joined: String = joined
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    joined.strip_prefix("error: ").unwrap_or(&joined).to_owned()
}

/// A command of the disk flags alone, so that a `--disk` has their names, checks and messages.
#[derive(Debug, Parser)]
#[command(name = "--disk", disable_help_flag = true)]
struct DiskOnly {
    #[command(flatten)]
    disk: DiskArguments,
}

/// Reads the value of `--disk`: `KEY=VALUE` pairs with commas between them. A doubled comma stands for
/// one within a value, as in QEMU's options.
fn parse_disk(text: &str) -> Result<DiskArguments, String> {
    let command = DiskOnly::command();
    let known: Vec<&str> = command
        .get_arguments()
        .filter_map(|arg| arg.get_long())
        .collect();
    let mut argv = vec!["--disk".to_owned()];
    for pair in split_pairs(text) {
        let key = pair.split_once('=').map_or(pair.as_str(), |(key, _)| key);
        if !known.contains(&key) {
            return Err(format!(
                "there is no key '{key}'; the keys are {}",
                known.join(", ")
            ));
        }
        if key == pair && key != "read-only" && key != "force-share" {
            return Err(format!("the key '{key}' has no value; write {key}=VALUE"));
        }
        argv.push(format!("--{pair}"));
    }
    DiskOnly::try_parse_from(argv)
        .map(|only| only.disk)
        .map_err(|error| one_line(&error))
}

#[cfg(test)]
mod tests;
