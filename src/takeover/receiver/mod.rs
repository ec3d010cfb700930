//! The new process's side: asks, prepares, sets up what it gets, and takes it.

mod begin;
mod compatibility;
mod received;

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use crate::config::{Config, DiskConfig, SocketSource};
use crate::error::StartError;
use crate::image::Image;

use super::state::{
    CarriedDisk, Common, DiskFacts, Facts, Plan, plain, read_plain, read_refusal, refusal,
};
use super::trust::{Trusted, check_listener, printable};
use super::wire::{Frame, Frames, Kind};
use super::{CLOSING, PATIENCE, socket_name};
use crate::disk::registry::Roster;
use crate::disk::{Disk, Keeping};
use crate::sys::clock::Clock;
use crate::sys::listener::{Door, SocketFile, listen_ourselves};
use crate::vhost_user::handover::CarriedListener;
use crate::vhost_user::session::{DiskServer, StartWith};
use begin::begin;
use compatibility::{answers, ask, compatible};
use received::check_listening;

/// Why the disks stay where they are. One line; the other daemon serves on.
#[derive(Debug)]
pub struct TakeOverError {
    path: PathBuf,
    why: String,
}

impl From<TakeOverError> for StartError {
    fn from(error: TakeOverError) -> Self {
        StartError::TakeOver {
            path: error.path,
            why: error.why,
        }
    }
}

/// The daemon that serves the disks so far, waiting until this one is ready.
#[derive(Debug)]
pub struct Predecessor {
    path: PathBuf,
    frames: Frames,
    facts: Facts,
}

/// Everything is set up; nothing is taken yet.
#[derive(Debug)]
pub struct Inheritance {
    path: PathBuf,
    frames: Frames,
    /// By disk; `None` for those that the other did not have.
    beginnings: Vec<Option<StartWith>>,
    /// Disks that have grown meanwhile.
    grown: Vec<bool>,
    control: Option<CarriedListener>,
}

impl Predecessor {
    /// Asks the daemon whose control socket is at `path` for the disks of `config`, if it is one of `trusted`. `None`:
    /// nobody is there.
    ///
    /// # Errors
    ///
    /// It refuses, is not trusted, or is no such daemon.
    pub fn find(
        path: &Path,
        config: &Config,
        trusted: Trusted,
    ) -> Result<Option<Predecessor>, TakeOverError> {
        let fail = |why: String| TakeOverError {
            path: path.to_owned(),
            why,
        };
        let stream = match UnixStream::connect(path) {
            Ok(stream) => stream,
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
                ) =>
            {
                log::info!("no daemon to take over from at {path:?}: starting afresh");
                return Ok(None);
            }
            Err(error) => return Err(fail(format!("it cannot be reached: {error}"))),
        };
        check_listener(&stream, &trusted).map_err(fail)?;
        ask(&stream).map_err(fail)?;
        let frames = Frames::of(stream, trusted);
        let plan = Plan {
            disks: config
                .disks
                .iter()
                .map(|disk| socket_name(&disk.socket))
                .collect(),
            control: config
                .control_path
                .as_ref()
                .map(|path| socket_name(&SocketSource::Path(path.clone()))),
            close_unready: config.close_unready,
            keeps_notes: true,
        };
        let deadline = Instant::now() + PATIENCE;
        send(&frames, &plain(Kind::Plan, &plan), deadline).map_err(fail)?;
        let frame = expect(&frames, Kind::Facts, deadline).map_err(fail)?;
        let facts: Facts = read_plain(&frame).map_err(|error| fail(error.to_string()))?;
        answers(&facts, &plan).map_err(fail)?;
        log::info!(
            "taking over {} disks from version {}",
            facts.disks.len(),
            printable(&facts.version)
        );
        Ok(Some(Predecessor {
            path: path.to_owned(),
            frames,
            facts,
        }))
    }

    /// Whether it serves this disk.
    pub fn serves(&self, disk: &DiskConfig) -> bool {
        self.facts_of(disk).is_some()
    }

    /// Whether its control socket is where ours is to be.
    pub fn has_our_control_socket(&self) -> bool {
        self.facts.control
    }

    fn facts_of(&self, disk: &DiskConfig) -> Option<&DiskFacts> {
        let name = socket_name(&disk.socket);
        self.facts.disks.iter().find(|facts| facts.socket == name)
    }

    /// Checks that the guests can go on with `images`, opened as the configuration says.
    ///
    /// # Errors
    ///
    /// The first thing that a guest knows and that would not be so any more.
    pub fn check(&self, disks: &[DiskConfig], images: &[Image]) -> Result<(), TakeOverError> {
        for (disk, image) in disks.iter().zip(images) {
            if let Some(facts) = self.facts_of(disk) {
                compatible(facts, disk, image)
                    .map_err(|why| self.fail(format!("the disk on {}: {why}", facts.socket)))?;
            }
        }
        Ok(())
    }

    /// Says that all is prepared, and sets up what comes: the guests wait from here on. The disks of
    /// `servers` are held until [`Inheritance::take`].
    ///
    /// # Errors
    ///
    /// The other gives up; what it has cannot be gone on with here.
    pub fn inherit(
        self,
        roster: &Roster,
        servers: &[DiskServer],
        clock: Clock,
    ) -> Result<Inheritance, TakeOverError> {
        match self.set_up(roster, servers, clock) {
            Ok((beginnings, grown, control)) => Ok(Inheritance {
                path: self.path,
                frames: self.frames,
                beginnings,
                grown,
                control,
            }),
            Err(why) => {
                // It may have gone itself.
                let _ = self.frames.send(&refusal(&why), Instant::now() + PATIENCE);
                Err(self.fail(why))
            }
        }
    }

    #[allow(
        clippy::type_complexity,
        reason = "the parts of an inheritance, taken apart at once"
    )]
    fn set_up(
        &self,
        roster: &Roster,
        servers: &[DiskServer],
        clock: Clock,
    ) -> Result<(Vec<Option<StartWith>>, Vec<bool>, Option<CarriedListener>), String> {
        let ready = Frame {
            kind: Kind::Ready,
            json: Vec::new(),
            fds: Vec::new(),
        };
        send(&self.frames, &ready, Instant::now() + PATIENCE)?;
        // As long as the other waits for requests in flight, and then as long as it waits for us.
        let deadline = Instant::now() + 2 * PATIENCE + CLOSING;
        let text = |error: io::Error| error.to_string();
        let frame = expect(&self.frames, Kind::State, deadline)?;
        let common = Common::read(frame).map_err(text)?;
        // The facts were checked against the images, so all is as they say, and each disk comes once.
        if common.disks != self.facts.disks.len() {
            return Err(format!(
                "it announced {} disks and has {}",
                self.facts.disks.len(),
                common.disks
            ));
        }
        if common.control.is_some() != self.facts.control {
            return Err("it has another control socket than it announced".to_owned());
        }
        if let Some(control) = &common.control {
            check_listening(control).map_err(|why| format!("the control socket {why}"))?;
        }
        for (name, limits) in &common.groups {
            roster.set_group_limits(name, *limits);
        }
        let mut beginnings: Vec<Option<StartWith>> = servers.iter().map(|_| None).collect();
        let mut grown = vec![false; servers.len()];
        for _ in 0..common.disks {
            let frame = expect(&self.frames, Kind::Disk, deadline)?;
            let carried = CarriedDisk::read(frame).map_err(text)?;
            let place = self.place_of(&carried, servers, &beginnings)?;
            let server = &servers[place];
            let serial = &server.disk.config.serial;
            let promised = carried.size_bytes;
            let beginning = begin(server, carried, roster, clock, deadline)
                .map_err(|why| format!("disk {serial}: {why}"))?;
            grown[place] = server.disk.size_bytes() > promised;
            beginnings[place] = Some(beginning);
        }
        Ok((beginnings, grown, common.control))
    }

    /// Which of our disks it is. Only one that was announced may come, because the others are served as their image's
    /// only user, and only once.
    fn place_of(
        &self,
        carried: &CarriedDisk,
        servers: &[DiskServer],
        beginnings: &[Option<StartWith>],
    ) -> Result<usize, String> {
        let name = &carried.socket;
        let announced = self.facts.disks.iter().any(|facts| facts.socket == *name);
        servers
            .iter()
            .position(|server| socket_name(&server.disk.config.socket) == *name)
            .filter(|place| announced && beginnings[*place].is_none())
            .ok_or_else(|| {
                let name = printable(name);
                format!("it hands over a disk on {name}, which it did not announce, or twice")
            })
    }

    fn fail(&self, why: String) -> TakeOverError {
        TakeOverError {
            path: self.path.clone(),
            why,
        }
    }
}

impl Inheritance {
    /// The control socket, if the other's is ours now: its listener and its file at `path`.
    pub fn control(
        &mut self,
        path: &Path,
    ) -> Option<(std::os::unix::net::UnixListener, SocketFile)> {
        let control = self.control.take()?;
        let file = SocketFile::inherited(path, control.file.unwrap_or_default());
        Some((control.socket.into(), file))
    }

    /// Takes the disks: the guests go on. What each disk's thread begins with; `None` for the disks
    /// that the other did not have.
    ///
    /// # Errors
    ///
    /// The other gave up waiting, or is gone. The disks are not ours.
    pub fn take(mut self, disks: &[Arc<Disk>]) -> Result<Vec<Option<StartWith>>, TakeOverError> {
        let taken = Frame {
            kind: Kind::Taken,
            json: Vec::new(),
            fds: Vec::new(),
        };
        // After this they are, or never will be.
        send(&self.frames, &taken, Instant::now() + PATIENCE).map_err(|why| TakeOverError {
            path: self.path.clone(),
            why,
        })?;
        for (disk, beginning) in disks.iter().zip(&self.beginnings) {
            if beginning.is_some() {
                disk.set_beside(false);
                disk.set_keeping(Keeping::Here);
                disk.note_change();
                disk.release();
            }
        }
        let doors = self.beginnings.iter_mut().flatten();
        for door in doors.filter_map(|beginning| beginning.door.as_mut()) {
            let Door::Listening(listener, file) = door else {
                continue;
            };
            if let Some(file) = file {
                file.adopt();
            }
            listen_anew(listener);
        }
        for (disk, beginning) in disks.iter().zip(&self.beginnings) {
            let session = beginning.as_ref().and_then(|b| b.session.as_ref());
            if let Some(session) = session {
                disk.set_connected(true);
                disk.set_notifier(Some(Arc::new(session.notifier())));
            }
        }
        for (disk, grown) in disks.iter().zip(&self.grown) {
            if *grown {
                disk.tell_front_end();
            }
        }
        log::info!("took over; the guests go on");
        Ok(self.beginnings)
    }
}

/// Listens on a socket that was taken over, so that the kernel does not name the process that had it, which ends now. A
/// third one would take the socket for that one's and replace it.
pub(super) fn listen_anew(listener: &impl AsFd) {
    if let Err(error) = listen_ourselves(listener) {
        log::warn!("a socket that was taken over cannot be listened on anew: {error}");
    }
}

fn send(frames: &Frames, frame: &Frame, deadline: Instant) -> Result<(), String> {
    frames
        .send(frame, deadline)
        .map_err(|error| format!("it does not listen any more: {error}"))
}

/// The next frame, if it is of this kind.
fn expect(frames: &Frames, kind: Kind, deadline: Instant) -> Result<Frame, String> {
    match frames.receive(deadline) {
        Ok(Some(frame)) if frame.kind == kind => Ok(frame),
        Ok(Some(frame)) if frame.kind == Kind::Refused => Err(read_refusal(&frame)),
        Ok(Some(frame)) => Err(format!("it said {:?}", frame.kind)),
        Ok(None) => Err("it ended".to_owned()),
        Err(error) if error.kind() == io::ErrorKind::TimedOut => {
            Err("it does not answer".to_owned())
        }
        Err(error) => Err(format!("it cannot be heard: {error}")),
    }
}
