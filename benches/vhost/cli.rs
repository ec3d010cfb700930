//! The command line.

use crate::workload::{Pattern, Workload};
use clap::{Parser, ValueEnum};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

/// Measure a vhost-user-blk back end without a virtual machine: this program is the front end and the guest's driver.
#[derive(Clone, Debug, Parser)]
#[command(name = "cargo bench --bench vhost --", max_term_width = 100)]
pub struct Args {
    /// A whole set of measurements with the targets beside them; the options of the workload are ignored
    #[arg(long, value_name = "SUITE")]
    pub suite: Option<Suite>,
    /// With --suite: only the rows whose name contains this text [may be repeated]
    #[arg(long, value_name = "TEXT")]
    pub only: Vec<String>,
    /// Who is measured: ours, qsd (qemu-storage-daemon), both, or socket=PATH for one that runs already
    #[arg(long, default_value = "both", value_name = "WHO")]
    pub backend: Backend,
    /// The disk: null (the back end's own null engine), memory (a file in /dev/shm), disk (a file under --dir), or a
    /// path. Writes go to it!
    #[arg(long, default_value = "null")]
    pub image: String,
    /// Size of the disk for null, memory and disk, in MiB
    #[arg(long, default_value_t = 1024, value_name = "MIB")]
    pub size: u64,
    /// Directory of the file for --image disk; the file is kept for the next time
    #[arg(long, default_value = env!("CARGO_TARGET_TMPDIR"), hide_default_value = true)]
    pub dir: PathBuf,
    /// Run fio on the same image beside it, without a back end
    #[arg(long)]
    pub fio: bool,
    /// More arguments for our daemon, separated by blanks, such as "--poll-us 0 --workers 1" [may be repeated: then
    /// our daemon is measured once with each]
    #[arg(long, value_name = "ARGS", allow_hyphen_values = true)]
    pub args: Vec<String>,
    /// Measure this other build of our daemon too, with the first --args [may be repeated]
    #[arg(long, value_name = "PROGRAM")]
    pub build: Vec<PathBuf>,
    /// Virtqueues
    #[arg(long, default_value_t = 1)]
    pub queues: usize,
    /// Requests in flight on each queue
    #[arg(long, default_value_t = 32)]
    pub depth: usize,
    /// Bytes of a request
    #[arg(long, default_value_t = 4096, value_name = "BYTES")]
    pub bs: usize,
    /// Data descriptors of a request
    #[arg(long, default_value_t = 1)]
    pub segments: usize,
    /// Put chains into the ring's own table instead of indirect ones
    #[arg(long)]
    pub direct_descriptors: bool,
    /// randread, randwrite, read, write, or mix:PERCENT of reads
    #[arg(long, default_value = "randread")]
    pub rw: Pattern,
    /// The front end sleeps until it is called, as a guest does [this is the default]
    #[arg(long, conflicts_with = "spin")]
    pub wait: bool,
    /// The front end looks at the used ring all the time
    #[arg(long)]
    pub spin: bool,
    /// Threads of the front end [default: one for each queue, at most two for each CPU]
    #[arg(long)]
    pub threads: Option<usize>,
    /// CPUs, as FRONT:BACK, such as 0:1 or 0,1:2,3 [default: anywhere]
    #[arg(long, value_name = "CPUS")]
    pub pin: Option<Pin>,
    /// Seconds of one measurement
    #[arg(long, default_value_t = 2.0, value_name = "SECONDS")]
    pub runtime: f64,
    /// Seconds before each measurement
    #[arg(long, default_value_t = 0.5, value_name = "SECONDS")]
    pub warm_up: f64,
    /// How often everybody is measured, in turn
    #[arg(long, default_value_t = 5)]
    pub rounds: usize,
    /// For so long, each measurement waits until other processes are quiet, and is repeated if they did not stay so
    #[arg(long, default_value_t = 0.0, value_name = "SECONDS")]
    pub calm: f64,
    /// Count the back end's system calls too, in a run of their own (perf, or else strace)
    #[arg(long)]
    pub syscalls: bool,
    /// Instead of measuring: write data, read it back, compare it all
    #[arg(long, conflicts_with = "suite")]
    pub verify: bool,
    /// Write all results to this file too
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// What cargo says to every benchmark.
    #[arg(long, hide = true)]
    pub bench: bool,
}

/// A set of measurements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Suite {
    /// Every row of the target table, three short rounds
    Quick,
    /// Every row, with the rounds and the runtime given
    Full,
}

/// Who is measured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backend {
    /// Our daemon.
    Ours,
    /// QEMU's storage daemon.
    Qsd,
    /// Both in turn.
    Both,
    /// A back end that listens there already.
    Socket(PathBuf),
}

impl FromStr for Backend {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "ours" => Ok(Self::Ours),
            "qsd" => Ok(Self::Qsd),
            "both" => Ok(Self::Both),
            _ => match text.strip_prefix("socket=") {
                Some(path) => Ok(Self::Socket(path.into())),
                None => Err("ours, qsd, both or socket=PATH".to_owned()),
            },
        }
    }
}

/// Where threads may run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pin {
    /// CPUs of the front end.
    pub front: Vec<usize>,
    /// CPUs of the back end.
    pub back: Vec<usize>,
}

impl FromStr for Pin {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let list = |cpus: &str| -> Option<Vec<usize>> {
            cpus.split(',').map(|cpu| cpu.parse().ok()).collect()
        };
        text.split_once(':')
            .and_then(|(front, back)| {
                Some(Self {
                    front: list(front)?,
                    back: list(back)?,
                })
            })
            .ok_or_else(|| "FRONT:BACK with CPU numbers, such as 0:1".to_owned())
    }
}

impl Args {
    /// The workload the options describe.
    ///
    /// # Errors
    ///
    /// One line that says which option does not fit.
    pub fn workload(&self) -> Result<Workload, String> {
        for (name, value) in [
            ("queues", self.queues),
            ("depth", self.depth),
            ("segments", self.segments),
            ("rounds", self.rounds),
        ] {
            if value == 0 {
                return Err(format!("--{name} 0: must be at least 1"));
            }
        }
        let workload = Workload {
            queues: self.queues,
            depth: self.depth,
            block: self.bs,
            segments: self.segments,
            indirect: !self.direct_descriptors,
            pattern: self.rw,
            spin: self.spin,
            threads: self.threads(self.queues),
            warm_up: seconds("warm-up", self.warm_up)?,
            runtime: seconds("runtime", self.runtime)?,
        };
        workload.check()?;
        Ok(workload)
    }

    /// Threads of a front end with so many queues.
    pub fn threads(&self, queues: usize) -> usize {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        self.threads.unwrap_or(2 * cpus).clamp(1, queues)
    }
}

fn seconds(option: &str, value: f64) -> Result<Duration, String> {
    Duration::try_from_secs_f64(value)
        .ok()
        .filter(|time| *time < Duration::from_secs(24 * 3600))
        .ok_or_else(|| format!("--{option} {value}: not a time in seconds"))
}
