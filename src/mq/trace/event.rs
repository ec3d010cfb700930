//! One entry of the trace: what it says, and how it is shown.

use std::fmt;

use serde::ser::{Serialize, SerializeStruct, Serializer};

use super::super::ids::{HctxId, RequestTag, Sector};
use super::super::request::{IoPrio, Op, Status};

/// What happened, in the terms of blktrace (blkparse(1)).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Action {
    /// Q: the guest's request was found in the ring.
    Queued,
    /// G: it got its place in the request table.
    Got,
    /// M: it continues another, and was merged behind it.
    BackMerged,
    /// F: another continues it, and it was merged before that.
    FrontMerged,
    /// I: it was staged, in a ctx or an elevator.
    Inserted,
    /// D: it was given to the engine.
    Issued,
    /// R: the engine did not take it, and it waits to be issued again.
    Requeued,
    /// C: it ended, with the given status.
    Completed,
    /// P: a drain of the ring began to collect requests.
    Plugged,
    /// U: the drain ended, and what it collected, `count` requests, went on.
    Unplugged,
    /// X: it was cut into parts that are issued one by one.
    Split,
}

impl Action {
    /// All of them.
    pub const ALL: [Action; 11] = [
        Action::Queued,
        Action::Got,
        Action::BackMerged,
        Action::FrontMerged,
        Action::Inserted,
        Action::Issued,
        Action::Requeued,
        Action::Completed,
        Action::Plugged,
        Action::Unplugged,
        Action::Split,
    ];

    /// Its letter.
    pub fn letter(self) -> char {
        match self {
            Action::Queued => 'Q',
            Action::Got => 'G',
            Action::BackMerged => 'M',
            Action::FrontMerged => 'F',
            Action::Inserted => 'I',
            Action::Issued => 'D',
            Action::Requeued => 'R',
            Action::Completed => 'C',
            Action::Plugged => 'P',
            Action::Unplugged => 'U',
            Action::Split => 'X',
        }
    }

    /// The action of a letter.
    pub fn of_letter(letter: char) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|action| action.letter() == letter)
    }

    #[inline]
    pub(super) fn bit(self) -> u16 {
        1 << self as u8
    }
}

/// What an event is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subject {
    /// A request, or all that was merged into it.
    Request {
        /// Its tag in its hctx.
        tag: RequestTag,
        /// What it does.
        op: Op,
        /// Whether it is durable when it completes.
        fua: bool,
        /// The guest's priority hint.
        ioprio: IoPrio,
        /// How long it is, in sectors; the most that fits if it is longer.
        sectors: u32,
        /// How it ended, in a [`Action::Completed`].
        status: Option<Status>,
    },
    /// A plug of so many requests.
    Plug {
        /// Requests in it.
        count: u32,
    },
}

/// One entry of the trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// When: nanoseconds of the worker's monotonic clock, as of the turn in which it happened.
    pub time_ns: u64,
    /// The first sector of the request; 0 for a flush or a plug.
    pub sector: Sector,
    /// On which hctx of the worker.
    pub hctx: HctxId,
    /// What happened.
    pub action: Action,
    /// To what.
    pub subject: Subject,
}

/// The operation as blktrace spells it (blk_fill_rwbs, kernel/trace/blktrace.c): R, W, D, F, N for
/// write-zeroes, and a second F for FUA. A virtqueue does not carry what the kernel's other
/// letters say (read-ahead, sync, metadata).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rwbs {
    /// The operation.
    pub op: Op,
    /// Whether it is durable when it completes.
    pub fua: bool,
}

impl Rwbs {
    /// The letters.
    pub fn as_str(self) -> &'static str {
        match (self.op, self.fua) {
            (Op::Read, false) => "R",
            (Op::Read, true) => "RF",
            (Op::Write, false) => "W",
            (Op::Write, true) => "WF",
            (Op::Discard, false) => "D",
            (Op::Discard, true) => "DF",
            (Op::WriteZeroes, false) => "N",
            (Op::WriteZeroes, true) => "NF",
            (Op::Flush, false) => "F",
            (Op::Flush, true) => "FF",
        }
    }
}

impl fmt::Display for Rwbs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// Class and level as ionice(1) spells them; nothing if there is none.
pub(super) fn priority(ioprio: IoPrio) -> Option<String> {
    let level = ioprio.0 & 7;
    match ioprio.0 >> 13 {
        0 => None,
        1 => Some(format!("rt/{level}")),
        2 => Some(format!("be/{level}")),
        3 => Some("idle".to_owned()),
        class => Some(format!("class {class}/{level}")),
    }
}

fn status_name(status: Status) -> &'static str {
    match status {
        Status::Ok => "ok",
        Status::IoErr => "ioerr",
        Status::Unsupp => "unsupp",
    }
}

impl fmt::Display for Event {
    /// One line in blkparse's order of columns: hctx, time in seconds, tag, action, operation, first
    /// sector + sectors, and the priority or the status in brackets if there is one to tell.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:>4} {:>6}.{:09} ",
            self.hctx,
            self.time_ns / 1_000_000_000,
            self.time_ns % 1_000_000_000
        )?;
        let letter = self.action.letter();
        match self.subject {
            Subject::Plug { count } => {
                write!(f, "{:>5}  {letter}", "-")?;
                if self.action == Action::Unplugged {
                    write!(f, "    [{count}]")?;
                }
                Ok(())
            }
            Subject::Request {
                tag,
                op,
                fua,
                ioprio,
                sectors,
                status,
            } => {
                let rwbs = Rwbs { op, fua };
                let start = self.sector.0;
                write!(f, "{tag:>5}  {letter}  {rwbs:<2} {start} + {sectors}")?;
                if let Some(priority) = priority(ioprio) {
                    write!(f, " [{priority}]")?;
                }
                match status {
                    Some(status) => write!(f, " [{}]", status_name(status)),
                    None => Ok(()),
                }
            }
        }
    }
}

impl Serialize for Event {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut out = serializer.serialize_struct("Event", 9)?;
        out.serialize_field("time_ns", &self.time_ns)?;
        out.serialize_field("hctx", &self.hctx.0)?;
        out.serialize_field("action", &self.action.letter())?;
        match self.subject {
            Subject::Plug { count } => out.serialize_field("count", &count)?,
            Subject::Request {
                tag,
                op,
                fua,
                ioprio,
                sectors,
                status,
            } => {
                out.serialize_field("tag", &tag.0)?;
                out.serialize_field("rwbs", Rwbs { op, fua }.as_str())?;
                out.serialize_field("sector", &self.sector.0)?;
                out.serialize_field("sectors", &sectors)?;
                out.serialize_field("ioprio", &ioprio.0)?;
                match status {
                    Some(status) => out.serialize_field("status", status_name(status))?,
                    None => out.skip_field("status")?,
                }
            }
        }
        out.end()
    }
}
