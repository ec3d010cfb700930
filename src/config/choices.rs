//! Options that have a few values with names.

use clap::ValueEnum;

/// `on` or `off`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Switch {
    /// Yes.
    On,
    /// No.
    Off,
}

/// What happens to the guest's discards, in our words and in QEMU's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Discard {
    /// They free space in the image.
    #[value(alias = "unmap")]
    On,
    /// They are not offered to the guest.
    #[value(alias = "ignore")]
    Off,
}

/// How the host caches the image; QEMU's names and meanings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum CacheMode {
    /// Host page cache; stable after a flush.
    Writeback,
    /// O_DIRECT, past the host page cache; stable after a flush.
    #[default]
    None,
    /// Host page cache; every write is stable when it completes.
    Writethrough,
    /// O_DIRECT; every write is stable when it completes.
    Directsync,
    /// Host page cache; a flush is acknowledged and not carried out.
    Unsafe,
}

/// When an image is locked against other writers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum LockWhen {
    /// From the start to the end of the process.
    #[default]
    Always,
    /// While a queue runs.
    InUse,
}

/// What becomes of a request that fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum OnError {
    /// The guest is told.
    #[default]
    Report,
    /// The disk is held, and the request tried again when somebody resumes it.
    Stop,
    /// The same, but only where there is no space left; other errors are reported.
    Enospc,
}

/// Who does the I/O.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum EngineKind {
    /// The best there is for the image.
    #[default]
    Auto,
    /// io_uring.
    #[value(name = "io_uring", alias = "io-uring")]
    IoUring,
    /// The image lies in memory: it is mapped, and copied.
    Mmap,
    /// No image: writes are forgotten, reads leave the guest's memory as it is.
    Null,
}

/// Whether the image's device is polled for completions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum PollDevice {
    /// For the guest's poll queues, if it can be.
    #[default]
    Auto,
    /// For all queues.
    On,
    /// Never.
    Off,
}

/// How much the log tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[expect(missing_docs, reason = "the log crate's levels, by their names")]
pub enum LogLevel {
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

/// What happens to a request the host does not finish, beside a line in the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OnTimeout {
    /// Nothing: the guest goes on waiting.
    Report,
    /// The kernel is asked to give it up; if it does, the request fails.
    Cancel,
}

/// What is printed on stdout when the daemon ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum SummaryFormat {
    /// A table for a person.
    Text,
    /// One JSON document.
    Json,
    /// Nothing.
    None,
}
