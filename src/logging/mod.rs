//! The log: lines for standard error.
//!
//! A write to standard error can block for any time: a pipe is full, a terminal is paused (Ctrl-S), the disk under a
//! log file is slow. A thread that serves disks never makes it. It puts the finished line into a bounded queue, and a
//! thread of its own writes (`queue`). What does not fit is counted, and the count is a line as soon as
//! there is room. Each disk may have lines written at a bounded rate (`limit`), because a front end can cause as many
//! as it likes.
//!
//! A line that is about a disk names its number as the key-value `disk`: `log::warn!(disk = id.0; "…")`.

pub mod fatal;
mod limit;
mod queue;
mod stream;

use std::io::{self, Write};
use std::sync::{Arc, LazyLock};
use std::thread;
use std::time::{Duration, Instant};

use log::kv::Key;
use log::{Level, LevelFilter, Log, Metadata, Record};

use self::limit::{Limits, Source};
use self::queue::Queue;

/// How long the end of the process waits for a reader of standard error or output that takes nothing.
pub const PATIENCE: Duration = Duration::from_secs(1);

/// How many bytes of a longer text go to a stream at once, so that a slow reader is told from none.
const PIECE_BYTES: usize = 4096;

static QUEUE: LazyLock<Queue> = LazyLock::new(|| Queue::new(io::stderr(), Arc::clone(&LIMITS)));

static LIMITS: LazyLock<Arc<Limits>> = LazyLock::new(Arc::default);

/// Makes log lines of `level` and above be written to standard error, from [`start`] on.
pub fn init(level: LevelFilter) {
    let limits = Arc::clone(&LIMITS);
    let lines = env_logger::Builder::new()
        .filter_level(level)
        .format_target(false)
        .target(env_logger::Target::Pipe(Box::new(Sink)))
        .build();
    let logger = Logger { lines, limits };
    // Only the second logger of a process would be refused.
    if log::set_boxed_logger(Box::new(logger)).is_ok() {
        log::set_max_level(level);
    }
}

/// Starts the thread that writes. Before that lines wait, because some of what a process gives up at its start is
/// given up by each thread.
///
/// # Errors
///
/// The thread cannot be started.
pub fn start() -> io::Result<()> {
    QUEUE.start()
}

/// Writes the lines that wait for [`start`], as far as standard error takes them at once: for a step of the start that
/// takes long.
pub fn show_early() {
    QUEUE.write_early();
}

/// Writes a text that is no log line to standard error.
pub fn print(text: &str) {
    QUEUE.put(text.as_bytes());
}

/// Waits until all lines so far are written, or a reader has taken none for `patience`. Starts the thread that writes, if
/// the process ends before it was.
pub fn settle(patience: Duration) {
    QUEUE.settle(patience);
}

/// Writes a text to standard output, as far as a reader takes it; see [`PATIENCE`].
pub fn print_out(text: String) {
    stream::write_patiently(text, PIECE_BYTES, PATIENCE);
}

/// Where the formatted lines go, one in each call.
struct Sink;

impl Write for Sink {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        QUEUE.put(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What a line is about, by its key-value `disk`, or else by the thread: one that serves a single disk is named after it
/// (`vhost_user/session.rs`).
fn source_of(record: &Record<'_>) -> Source {
    let disk = record.key_values().get(Key::from_str("disk"));
    let disk = disk.and_then(|disk| u16::try_from(disk.to_u64()?).ok());
    let of_thread = || {
        let current = thread::current();
        let name = current.name()?;
        let number = name
            .strip_prefix("disk-")
            .or_else(|| name.strip_prefix("session-"))?;
        number.parse().ok()
    };
    disk.or_else(of_thread)
        .map_or(Source::Process, Source::Disk)
}

struct Logger {
    lines: env_logger::Logger,
    limits: Arc<Limits>,
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        self.lines.enabled(metadata)
    }

    fn log(&self, record: &Record<'_>) {
        if !self.lines.matches(record) {
            return;
        }
        // What was asked for to look for a fault is not limited.
        if record.level() <= Level::Info {
            match self.limits.admit(source_of(record), Instant::now()) {
                limit::Verdict::Write => {}
                limit::Verdict::LeaveOut { first } => {
                    if first {
                        // So that the count is written though there may be no other line.
                        QUEUE.put(b"");
                    }
                    return;
                }
            }
        }
        self.lines.log(record);
    }

    fn flush(&self) {}
}
