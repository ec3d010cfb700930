//! What travels from one process to the next: the one place that knows how it is written.
//!
//! JSON, in which a file descriptor is its index among those of its frame. Whoever adds a field gives
//! it a default, so that a state without it can still be read; fields that are not known are passed
//! over. What could be misunderstood that way needs another [`FORMAT`]: the new process says which
//! formats it reads, and the old one refuses before anything has changed if its own is not among them.

mod session;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::config::tuning::{Scheduler, list_limits, scheduler, set_limit};
use crate::mq::elevator::Params;
use crate::mq::throttle::{Limits, Rate};

use super::trust::printable;
use super::wire::{Frame, Kind};
use crate::disk::Changes;
use crate::vhost_user::guard::CarriedSession;
use crate::vhost_user::handover::CarriedListener;
use session::{SessionState, read_session, write_session};

/// The format this program writes.
pub const FORMAT: u32 = 1;

/// The formats it reads.
pub const READS: [u32; 1] = [1];

/// The body of `POST /v1/take-over`.
#[derive(Debug, Serialize, Deserialize)]
pub struct Ask {
    /// What the new process reads.
    pub formats: Vec<u32>,
    /// Its version, for the log.
    pub version: String,
}

/// Which disks the new process wants, by the names of their sockets; and its control socket.
#[derive(Debug, Serialize, Deserialize)]
pub struct Plan {
    pub disks: Vec<String>,
    pub control: Option<String>,
    /// Sessions that are not ready in time are closed (`--close-unready`). A process that does not know of it refuses.
    #[serde(default)]
    pub close_unready: bool,
    /// The new process keeps the notes of the guests up to date. One that does not know of them would have the process
    /// after it believe what is not so any more.
    #[serde(default)]
    pub keeps_notes: bool,
}

/// What each guest was promised.
#[derive(Debug, Serialize, Deserialize)]
pub struct Facts {
    pub version: String,
    /// Whether the control socket goes with the disks.
    pub control: bool,
    /// In the order of the old process.
    pub disks: Vec<DiskFacts>,
}

/// What a disk's guest knows and does not look at again.
#[derive(Debug, Serialize, Deserialize)]
pub struct DiskFacts {
    /// The name of its socket.
    pub socket: String,
    /// Device, inode and, of a device, its number; a null disk has no file.
    pub file: Option<[u64; 3]>,
    pub size_bytes: u64,
    pub logical_block_size: u32,
    pub read_only: bool,
    pub num_queues: u16,
    pub queue_size: u16,
}

/// What is common to all disks.
#[derive(Debug, Serialize, Deserialize)]
struct CommonState {
    /// Limits that differ from the configuration, by group.
    groups: BTreeMap<String, LimitsState>,
    /// How many disks follow.
    disks: usize,
    control: Option<ListenerState>,
}

/// A limit by its name on the command line: rate and burst.
type LimitsState = BTreeMap<String, (u64, u64)>;

#[derive(Debug, Serialize, Deserialize)]
struct ListenerState {
    socket: usize,
    file: Option<(u64, u64)>,
}

#[derive(Debug, Serialize, Deserialize)]
struct DiskState {
    socket: String,
    size_bytes: u64,
    was_write_through: bool,
    scheduler: Option<SchedulerState>,
    limits: Option<LimitsState>,
    /// `"group": null` in here is no group.
    group: Option<GroupState>,
    write_through: Option<bool>,
    #[serde(default)]
    cautious: bool,
    /// The last release does not say.
    #[serde(default)]
    known: Option<bool>,
    #[serde(default)]
    sync_fault: Option<i32>,
    listener: Option<ListenerState>,
    session: Option<SessionState>,
}

#[derive(Debug, Serialize, Deserialize)]
struct SchedulerState {
    name: String,
    params: BTreeMap<String, u64>,
}

#[derive(Debug, Serialize, Deserialize)]
struct GroupState {
    group: Option<String>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Refusal {
    error: String,
}

/// What is common to all disks, as the program uses it.
#[derive(Debug)]
pub struct Common {
    /// Limits that differ from the configuration, by group.
    pub groups: BTreeMap<String, Limits>,
    /// How many disks follow.
    pub disks: usize,
    /// The control socket, if the new process has it at the same place.
    pub control: Option<CarriedListener>,
}

/// A disk, as the program uses it.
#[derive(Debug)]
pub struct CarriedDisk {
    /// The name of its socket.
    pub socket: String,
    /// Its size.
    pub size_bytes: u64,
    /// Writes were durable when they completed, by the guest's choice or by configuration.
    pub was_write_through: bool,
    /// What differs from the configuration.
    pub changes: Changes,
    /// Where front ends connect.
    pub listener: Option<CarriedListener>,
    /// The session.
    pub session: Option<CarriedSession>,
}

/// A frame of plain values.
pub fn plain(kind: Kind, value: &impl Serialize) -> Frame {
    Frame {
        kind,
        json: serde_json::to_vec(value).expect("plain values always serialize"),
        fds: Vec::new(),
    }
}

/// What a frame of plain values says.
pub fn read_plain<T: DeserializeOwned>(frame: &Frame) -> io::Result<T> {
    serde_json::from_slice(&frame.json).map_err(|error| bad(&error.to_string()))
}

/// A frame that says why it does not go on.
pub fn refusal(error: &str) -> Frame {
    let error = error.to_owned();
    plain(Kind::Refused, &Refusal { error })
}

/// What it says, as it may be shown.
pub fn read_refusal(frame: &Frame) -> String {
    read_plain::<Refusal>(frame).map_or_else(
        |error| error.to_string(),
        |refusal| printable(&refusal.error),
    )
}

fn bad(what: &str) -> io::Error {
    let text = format!("the state is not understood: {}", printable(what));
    io::Error::new(io::ErrorKind::InvalidData, text)
}

/// The descriptors of a frame that is being written.
#[derive(Default)]
struct Out(Vec<OwnedFd>);

impl Out {
    fn put(&mut self, fd: OwnedFd) -> usize {
        self.0.push(fd);
        self.0.len() - 1
    }

    fn listener(&mut self, listener: CarriedListener) -> ListenerState {
        ListenerState {
            socket: self.put(listener.socket),
            file: listener.file,
        }
    }
}

/// The descriptors of a frame that is being read: each is used once.
struct In(Vec<Option<OwnedFd>>);

impl In {
    fn new(fds: Vec<OwnedFd>) -> In {
        In(fds.into_iter().map(Some).collect())
    }

    fn take(&mut self, index: usize) -> io::Result<OwnedFd> {
        let place = self.0.get_mut(index);
        place
            .and_then(Option::take)
            .ok_or_else(|| bad("a file descriptor is missing"))
    }

    fn optional(&mut self, index: Option<usize>) -> io::Result<Option<OwnedFd>> {
        index.map(|index| self.take(index)).transpose()
    }

    fn listener(&mut self, listener: ListenerState) -> io::Result<CarriedListener> {
        Ok(CarriedListener {
            socket: self.take(listener.socket)?,
            file: listener.file,
        })
    }
}

fn write_limits(limits: &Limits) -> LimitsState {
    list_limits(limits)
        .into_iter()
        .map(|(key, rate)| (key.to_owned(), (rate.per_second, rate.burst)))
        .collect()
}

fn read_limits(state: LimitsState) -> io::Result<Limits> {
    let mut limits = Limits::default();
    for (key, (per_second, burst)) in state {
        set_limit(&mut limits, &key, Rate { per_second, burst }).map_err(|error| bad(&error))?;
    }
    Ok(limits)
}

impl Common {
    /// As a frame.
    pub fn write(self) -> Frame {
        let mut out = Out::default();
        let state = CommonState {
            groups: self
                .groups
                .iter()
                .map(|(name, limits)| (name.clone(), write_limits(limits)))
                .collect(),
            disks: self.disks,
            control: self.control.map(|control| out.listener(control)),
        };
        Frame {
            fds: out.0,
            ..plain(Kind::State, &state)
        }
    }

    /// From a frame.
    ///
    /// # Errors
    ///
    /// It is not understood.
    pub fn read(frame: Frame) -> io::Result<Common> {
        let state: CommonState = read_plain(&frame)?;
        let mut fds = In::new(frame.fds);
        Ok(Common {
            groups: state
                .groups
                .into_iter()
                .map(|(name, limits)| Ok((name, read_limits(limits)?)))
                .collect::<io::Result<_>>()?,
            disks: state.disks,
            control: state
                .control
                .map(|control| fds.listener(control))
                .transpose()?,
        })
    }
}

impl CarriedDisk {
    /// As a frame.
    pub fn write(self) -> Frame {
        let mut out = Out::default();
        let Changes {
            scheduler,
            limits,
            group,
            write_through,
            cautious,
            known,
            sync_fault,
        } = self.changes;
        let state = DiskState {
            socket: self.socket,
            size_bytes: self.size_bytes,
            was_write_through: self.was_write_through,
            scheduler: scheduler.map(|params| SchedulerState {
                name: params.kind().to_string(),
                params: params
                    .list()
                    .into_iter()
                    .map(|param| (param.name.to_owned(), param.value))
                    .collect(),
            }),
            limits: limits.as_ref().map(write_limits),
            group: group.map(|group| GroupState { group }),
            write_through,
            cautious,
            known: Some(known),
            sync_fault,
            listener: self.listener.map(|listener| out.listener(listener)),
            session: self.session.map(|session| write_session(session, &mut out)),
        };
        Frame {
            fds: out.0,
            ..plain(Kind::Disk, &state)
        }
    }

    /// From a frame.
    ///
    /// # Errors
    ///
    /// It is not understood.
    pub fn read(frame: Frame) -> io::Result<CarriedDisk> {
        let state: DiskState = read_plain(&frame)?;
        let mut fds = In::new(frame.fds);
        let known = state.known.unwrap_or_else(|| serves(&state));
        Ok(CarriedDisk {
            socket: state.socket,
            size_bytes: state.size_bytes,
            was_write_through: state.was_write_through,
            changes: Changes {
                scheduler: state.scheduler.map(read_scheduler).transpose()?,
                limits: state.limits.map(read_limits).transpose()?,
                group: state.group.map(|state| state.group),
                write_through: state.write_through,
                cautious: state.cautious,
                known,
                sync_fault: state.sync_fault,
            },
            listener: state
                .listener
                .map(|listener| fds.listener(listener))
                .transpose()?,
            session: state
                .session
                .map(|session| read_session(session, &mut fds))
                .transpose()?,
        })
    }
}

/// Whether a ring runs. A guest whose rings ran nowhere may have chosen its cache mode with an earlier process: one
/// without a session has heard of no guest, and the last release starts no ring of a region that it does not know.
fn serves(state: &DiskState) -> bool {
    let session = state.session.as_ref();
    session.is_some_and(SessionState::has_running_ring)
}

fn read_scheduler(state: SchedulerState) -> io::Result<Params> {
    let params = state.params.iter();
    let params = params.map(|(name, value)| (name.as_str(), *value));
    match scheduler(&state.name, params).map_err(|error| bad(&error))? {
        Scheduler::Given(params) => Ok(params),
        Scheduler::Auto => Err(bad("a scheduler without a name")),
    }
}

#[cfg(test)]
mod tests;
