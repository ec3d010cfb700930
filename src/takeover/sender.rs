//! The old process's side: hands everything over, or goes on as before.

use std::fmt;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

use rustix::net::sockopt::socket_peercred;

use crate::config::SocketSource;
use crate::mq::ids::{DiskId, QueueId};

use super::control_socket::ControlSocket;
use super::freeze_order::{self, hold_still};
use super::state::{
    Ask, CarriedDisk, Common, DiskFacts, FORMAT, Facts, Plan, plain, read_plain, read_refusal,
    refusal,
};
use super::trust::printable;
use super::wire::{Frame, Frames, Kind};
use super::{CLOSING, PATIENCE, PREPARATION, file_of, socket_name};
use crate::disk::registry::{Restlessness, Roster};
use crate::disk::{Disk, Keeping, NotHeld};
use crate::vhost_user::guard::CarriedSession;
use crate::vhost_user::handover::{AtRest, RestPlace, RestingSession};

/// An offer that somebody asked for and may have.
#[derive(Debug)]
pub struct Offer {
    version: String,
}

/// Hands the disks over to a process that asks for them.
pub struct Giver {
    roster: Arc<Roster>,
    rest: Arc<RestPlace>,
    control: Arc<ControlSocket>,
    /// By disk: the name of its socket. Found out at the start, since it may need the working directory.
    names: Vec<String>,
    /// Called once the disks are another's, before their threads end.
    left: Box<dyn Fn() + Send + Sync>,
}

impl fmt::Debug for Giver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Giver")
            .field("control", &self.control)
            .finish_non_exhaustive()
    }
}

impl Giver {
    /// For the disks of `roster`, whose threads rest at `rest`. `left` is called once they are
    /// another process's.
    pub fn new(
        roster: Arc<Roster>,
        rest: Arc<RestPlace>,
        control: Arc<ControlSocket>,
        left: impl Fn() + Send + Sync + 'static,
    ) -> Giver {
        let disks = roster.disks().iter();
        Giver {
            names: disks.map(|disk| socket_name(&disk.config.socket)).collect(),
            roster,
            rest,
            control,
            left: Box::new(left),
        }
    }

    /// Judges who asks on `stream` with the body `ask`.
    ///
    /// # Errors
    ///
    /// Another user; a program that does not read what this one writes.
    pub fn consider(&self, stream: &UnixStream, ask: &[u8]) -> Result<Offer, String> {
        let peer = socket_peercred(stream).map_err(|errno| errno.to_string())?;
        if peer.uid != rustix::process::geteuid() && !peer.uid.is_root() {
            return Err(format!(
                "user {} may not take over from user {}",
                peer.uid.as_raw(),
                rustix::process::geteuid().as_raw()
            ));
        }
        let ask: Ask = serde_json::from_slice(ask)
            .map_err(|error| format!("the body is not understood: {error}"))?;
        self.can_rest(&self.roster.rest())?;
        let version = printable(&ask.version);
        if !ask.formats.contains(&FORMAT) {
            return Err(format!(
                "version {version} reads the state formats {:?}, and this daemon, version {}, writes {FORMAT}; \
                 restart instead",
                ask.formats,
                env!("CARGO_PKG_VERSION"),
            ));
        }
        Ok(Offer { version })
    }

    /// Hands over to the process at the other end of `stream`, or tells it why not; whether the disks
    /// are its own now.
    pub fn give(&self, offer: &Offer, stream: UnixStream) -> bool {
        let frames = Frames::new(stream);
        log::info!("version {} asks to take over", offer.version);
        match self.negotiate(&frames) {
            Ok(()) => true,
            Err(why) => {
                log::warn!("not taken over, this daemon serves on: {why}");
                // It may have gone, and may not listen.
                let _ = frames.send(&refusal(&why), Instant::now() + PATIENCE);
                false
            }
        }
    }

    /// Hands all over, or says why not.
    fn negotiate(&self, frames: &Frames) -> Result<(), String> {
        let frame = expect(frames, Kind::Plan, Instant::now() + PATIENCE)?;
        let plan: Plan = read_plain(&frame).map_err(|error| error.to_string())?;
        if let Some(name) = self.names.iter().find(|name| !plan.disks.contains(name)) {
            return Err(format!(
                "the new daemon has no disk on {name}; give it the same sockets"
            ));
        }
        let control = plan.control.as_ref() == Some(self.control.name());
        let facts = plain(Kind::Facts, &self.facts(control));
        send(frames, &facts, Instant::now() + PATIENCE)?;
        expect(frames, Kind::Ready, Instant::now() + PREPARATION)?;

        let holds = Holds(self);
        match self.hand_over(frames, control, &plan) {
            Ok(waited) => {
                // Leaving is all that is done with what is another's now.
                std::mem::forget(holds);
                self.set_keeping(Keeping::Elsewhere);
                if control {
                    self.control.leave();
                }
                log::info!(
                    "handed over {} disks; the guests waited for {waited}",
                    self.roster.disks().len(),
                );
                // Before the disks' threads end, which it is the reason of.
                (self.left)();
                self.rest.leave();
                Ok(())
            }
            Err(why) => Err(why),
        }
    }

    /// Whether all disks can be held still, as far as it shows before any guest waits for it.
    fn can_rest(&self, rest: &Restlessness) -> Result<(), String> {
        if let Some(disk) = rest.held {
            return Err(waits_after_error(self.serial(disk)));
        }
        if let Some(worker) = rest.stuck {
            return Err(format!(
                "worker {worker} does not answer, because it waits for the storage or the memory of a guest"
            ));
        }
        let mut aged = self.roster.disks().iter().zip(&rest.oldest);
        match aged.find(|(_, age)| **age >= PATIENCE) {
            None => Ok(()),
            Some((disk, age)) => Err(format!(
                "disk {} has had a request in flight for {} seconds: its storage does not answer",
                disk.config.serial,
                age.as_secs()
            )),
        }
    }

    /// From the moment the guests wait to the one that decides; for how long the guests waited.
    fn hand_over(&self, frames: &Frames, control: bool, plan: &Plan) -> Result<String, String> {
        let rest = self.roster.rest();
        self.can_rest(&rest)?;
        if !plan.keeps_notes {
            // From here on, for sessions that are closed and whose front ends go to the new process.
            self.set_keeping(Keeping::Nowhere);
        }
        let mut deadline = Instant::now() + PATIENCE;
        let close_until = plan.close_unready.then(|| deadline + CLOSING);
        let resting = self
            .rest
            .gather(deadline, close_until)
            .map_err(|(disk, why)| format!("the session of disk {} {why}", self.serial(disk)))?;
        if plan.close_unready {
            // Until here no guest has waited.
            deadline = Instant::now() + PATIENCE;
        }
        let disks: Vec<&Disk> = self.roster.disks().iter().map(|disk| &**disk).collect();
        let still = hold_still(&disks, &rest.oldest, deadline).map_err(|(at, why)| {
            let serial = &disks[at].config.serial;
            match why {
                NotHeld::Late => format!(
                    "disk {serial} has requests in flight after {} seconds",
                    PATIENCE.as_secs()
                ),
                NotHeld::AfterError => waits_after_error(serial),
            }
        })?;
        let since: Vec<Instant> = still.iter().map(|still| still.since).collect();
        let mut carried = Vec::new();
        for ((disk, rings), with) in disks
            .into_iter()
            .zip(freeze_order::rings(still))
            .zip(resting)
        {
            let base_of = |queue: QueueId| rings.get(&queue).copied();
            let name = self.names[disk.id.index()].clone();
            carried.push(carry(disk, name, with, base_of).map_err(|error| error.to_string())?);
        }
        // All sessions are at rest: no guest chooses any more. Where another process keeps the notes, they are right.
        if plan.keeps_notes {
            self.set_keeping(Keeping::Elsewhere);
        }
        for disk in self.roster.disks() {
            disk.note_change();
        }
        let common = Common {
            groups: self.roster.changed_groups(),
            disks: carried.len(),
            control: control
                .then(|| self.control.carry())
                .transpose()
                .map_err(|error| error.to_string())?,
        };
        send(frames, &common.write(), deadline)?;
        for disk in carried {
            send(frames, &disk.write(), deadline)?;
        }
        match expect(frames, Kind::Taken, deadline) {
            Ok(_) => Ok(self.longest_wait(&since)),
            Err(why) => {
                // It may be written in this moment. After this it is, or never will be.
                frames.close_ear();
                match frames.receive(Instant::now()) {
                    Ok(Some(frame)) if frame.kind == Kind::Taken => Ok(self.longest_wait(&since)),
                    _ => Err(why),
                }
            }
        }
    }

    /// How long the disk stood still that did so longest, of which nothing was taken `since` then. One that is slow stands
    /// still while the others go on.
    fn longest_wait(&self, since: &[Instant]) -> String {
        let first = since
            .iter()
            .zip(self.roster.disks())
            .min_by_key(|(at, _)| **at);
        first.map_or_else(
            || "0 ms".to_owned(),
            |(at, disk)| {
                let (ms, serial) = (at.elapsed().as_millis(), &disk.config.serial);
                match since.len() {
                    1 => format!("{ms} ms"),
                    _ => format!("{ms} ms at most, that of disk {serial} longest"),
                }
            },
        )
    }

    fn facts(&self, control: bool) -> Facts {
        let disks = self.roster.disks().iter();
        Facts {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            control,
            disks: disks
                .map(|disk| DiskFacts {
                    socket: self.names[disk.id.index()].clone(),
                    file: file_of(disk.image()),
                    size_bytes: disk.size_bytes(),
                    logical_block_size: disk.config.logical_block_size,
                    read_only: disk.config.read_only,
                    num_queues: disk.config.num_queues,
                    queue_size: disk.config.queue_size,
                })
                .collect(),
        }
    }

    fn set_keeping(&self, keeping: Keeping) {
        for disk in self.roster.disks() {
            disk.set_keeping(keeping);
        }
    }

    fn serial(&self, disk: DiskId) -> &str {
        &self.roster.disks()[disk.index()].config.serial
    }
}

/// Requests that failed wait for the disk's user. Another process could only have them answered with the errors that
/// their guest is to be spared.
fn waits_after_error(serial: &str) -> String {
    format!(
        "disk {serial} is held after an error; remove the cause, run blkmqctl resume, and take over then"
    )
}

/// Lets everything go on when it goes out of scope.
struct Holds<'a>(&'a Giver);

impl Drop for Holds<'_> {
    fn drop(&mut self) {
        self.0.set_keeping(Keeping::Here);
        for disk in self.0.roster.disks() {
            disk.note_unless_changing();
            disk.release();
        }
        self.0.rest.go_on();
    }
}

/// A disk that is held, with the session that rests.
fn carry(
    disk: &Disk,
    name: String,
    with: AtRest,
    base_of: impl Fn(QueueId) -> Option<u16>,
) -> io::Result<CarriedDisk> {
    if with.listener.is_none() && matches!(disk.config.socket, SocketSource::Path(_)) {
        // Its thread has ended: the process was told to.
        return Err(io::Error::other("this daemon is ending"));
    }
    let session = with
        .session
        .map(|resting| carry_session(resting, base_of))
        .transpose()?;
    Ok(CarriedDisk {
        socket: name,
        size_bytes: disk.size_bytes(),
        was_write_through: disk.is_write_through_promised(),
        changes: disk.changes(),
        listener: with.listener,
        session,
    })
}

fn carry_session(
    resting: RestingSession,
    base_of: impl Fn(QueueId) -> Option<u16>,
) -> io::Result<CarriedSession> {
    let RestingSession {
        front_end,
        channel,
        negotiated,
        regions,
        inflight,
        state,
    } = resting;
    let user_of = |guest: u64| {
        let mut regions = regions.iter();
        let region = regions.find(|r| guest >= r.guest && guest - r.guest < r.size)?;
        Some(guest - region.guest + region.user)
    };
    let rings = state.carry_rings(base_of, user_of)?;
    Ok(CarriedSession {
        front_end,
        channel,
        negotiated,
        regions,
        inflight,
        rings,
    })
}

fn send(frames: &Frames, frame: &Frame, deadline: Instant) -> Result<(), String> {
    frames
        .send(frame, deadline)
        .map_err(|error| format!("the new daemon takes nothing: {error}"))
}

/// The next frame, if it is of this kind.
fn expect(frames: &Frames, kind: Kind, deadline: Instant) -> Result<Frame, String> {
    match frames.receive(deadline) {
        Ok(Some(frame)) if frame.kind == kind => Ok(frame),
        Ok(Some(frame)) if frame.kind == Kind::Refused => {
            Err(format!("the new daemon gave up: {}", read_refusal(&frame)))
        }
        Ok(Some(frame)) => Err(format!("the new daemon said {:?}", frame.kind)),
        Ok(None) => Err("the new daemon ended".to_owned()),
        Err(error) if error.kind() == io::ErrorKind::TimedOut => {
            Err("the new daemon does not answer".to_owned())
        }
        Err(error) => Err(format!("the new daemon cannot be heard: {error}")),
    }
}
