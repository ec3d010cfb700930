//! One disk's thread: it takes front ends as they come, serves one session after another, and rests
//! while another process may take the disk over.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use vhost_user_backend::VhostUserDaemon;
use vm_memory::{
    GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap,
    GuestMemoryRegion,
};

use crate::config::SocketSource;
use crate::mq::limits::MAX_RING_SIZE;

use super::device::backend::DeviceBackend;
use super::device::noop_bitmap::NoopBitmap;
use super::device::session_state::SessionState;
use super::device::session_state::vring::{GuestMemory, bind};
use super::guard::{
    CarriedSession, ConfigNotifier, FDS_TO_BEGIN, Guard, LogKeeper, PrimeError, Reason, Served,
    SessionEnd, SessionLimits,
};
use super::handover::{AtRest, CarriedListener, RestPlace, RestingSession, Verdict, Woken};
use crate::disk::Disk;
use crate::sys::fds::{self, Share, TurnAway, UsedUp};
use crate::sys::listener::{Door, SocketFile, Stop, pass_descriptors};
use crate::vhost_user::loopback::Junction;

/// What a disk's thread starts with: where front ends connect, and the session that it continues.
#[derive(Debug, Default)]
pub struct StartWith {
    /// Where front ends connect.
    pub door: Option<Door>,
    /// The session.
    pub session: Option<Session>,
}

/// What one disk's thread needs.
#[derive(Clone, Debug)]
pub struct DiskServer {
    /// The disk.
    pub disk: Arc<Disk>,
    /// Where guards meet devices.
    pub junction: Arc<Junction>,
    /// The end of the process.
    pub stop: Arc<Stop>,
    /// Where it rests.
    pub rest: Arc<RestPlace>,
    /// The listener's descriptor has this number or a higher one; see [`fds::number_from`].
    pub listeners_from: i32,
}

/// Where front ends connect.
struct Listening {
    listener: UnixListener,
    file: Option<SocketFile>,
}

impl Listening {
    /// Says whether descriptors can be sent on a connection that waits for its turn. They cannot while this process
    /// listens: nothing would judge them, and one of them may be the other end of the session that is being served,
    /// which would never end. A front end sends none before it was answered.
    ///
    /// Another process may take the listener over that does not know of it, and a descriptor of the command line may be
    /// used by one after us.
    fn pass_descriptors(&self, pass: bool) {
        if self.file.is_some() {
            pass_descriptors(&self.listener, pass);
        }
    }
}

impl DiskServer {
    /// Starts the disk's thread. It waits for what it begins with, serves that, and calls `done` at the end. If
    /// nothing comes, it does nothing. `away` closes connections that cannot be served.
    ///
    /// # Errors
    ///
    /// The thread cannot be started.
    pub fn spawn(
        self,
        beginning: Receiver<StartWith>,
        mut away: TurnAway,
        done: impl FnOnce() + Send + 'static,
    ) -> io::Result<JoinHandle<()>> {
        let name = format!("disk-{}", self.disk.id);
        thread::Builder::new().name(name).spawn(move || {
            let Ok(beginning) = beginning.recv() else {
                return;
            };
            self.run(beginning, &mut away);
            self.rest.gone(self.disk.id);
            done();
        })
    }

    fn run(&self, beginning: StartWith, away: &mut TurnAway) {
        let StartWith { door, session } = beginning;
        let (mut door, connected) = match door {
            Some(Door::Listening(listener, file)) => {
                let listener = fds::number_from(listener.into(), self.listeners_from).into();
                (Some(Listening { listener, file }), None)
            }
            Some(Door::Connected(stream)) => (None, Some(stream)),
            None => (None, None),
        };
        match &self.disk.config.socket {
            _ if door.is_none() => {}
            SocketSource::Path(path) => {
                log::info!(disk = self.disk.id.0; "listening on {}", path.display())
            }
            SocketSource::Fd(fd) => {
                log::info!(disk = self.disk.id.0; "listening on file descriptor {fd}")
            }
        }
        if let Some(door) = &door {
            door.pass_descriptors(false);
        }
        let mut verdict = Verdict::GoOn;
        if let Some(session) = session {
            verdict = self.carry_on(session, &mut door);
        } else if let Some(stream) = connected {
            match Share::take(FDS_TO_BEGIN) {
                Ok(share) => verdict = self.serve(stream, share, &mut None),
                Err(UsedUp) => self.say_turned_away(away),
            }
        }
        if verdict == Verdict::GoOn {
            verdict = self.listen(&mut door, away);
        }
        if let (Verdict::Leave, Some(file)) = (verdict, door.and_then(|door| door.file)) {
            file.leave();
        }
    }

    /// One session at a time: a front end that connects meanwhile waits until it is its turn.
    fn listen(&self, door: &mut Option<Listening>, away: &mut TurnAway) -> Verdict {
        while let Some(open) = door {
            let verdict = match self.rest.wait(&self.stop, &open.listener) {
                Woken::Stopped => return Verdict::GoOn,
                Woken::Wished => {
                    let with = Self::at_rest(Some(open), None);
                    let verdict = self.rest.rest(self.disk.id, with);
                    if verdict != Verdict::Leave {
                        open.pass_descriptors(false);
                    }
                    verdict
                }
                Woken::Readable => match open.listener.accept() {
                    Ok((stream, _)) => match Share::take(FDS_TO_BEGIN) {
                        Ok(share) => {
                            pass_descriptors(&stream, true);
                            self.serve(stream, share, door)
                        }
                        Err(UsedUp) => {
                            drop(stream);
                            self.say_turned_away(away);
                            Verdict::GoOn
                        }
                    },
                    Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => Verdict::GoOn,
                    Err(error) => {
                        if away.close_one(&error, &open.listener) {
                            self.say_turned_away(away);
                        } else if let Some(line) = away.line(format_args!("cannot accept: {error}"))
                        {
                            log::error!(disk = self.disk.id.0; "disk {}: {line}", self.disk.config.serial);
                        }
                        // Out of descriptors or memory: that passes, but not by trying at once.
                        thread::sleep(Duration::from_millis(100));
                        Verdict::GoOn
                    }
                },
            };
            if verdict == Verdict::Leave {
                return verdict;
            }
        }
        Verdict::GoOn
    }

    fn say_turned_away(&self, away: &mut TurnAway) {
        let what = format_args!("a front end was turned away: {}", Reason::NoFds);
        if let Some(line) = away.line(what) {
            log::warn!(disk = self.disk.id.0; "disk {}: {line}", self.disk.config.serial);
        }
    }

    fn serve(&self, stream: UnixStream, share: Share, door: &mut Option<Listening>) -> Verdict {
        let serial = &self.disk.config.serial;
        log::info!(disk = self.disk.id.0; "disk {serial}: a front end connected");
        match Session::open(self, stream, share) {
            Ok(session) => self.carry_on(session, door),
            Err(error) => {
                log::error!(disk = self.disk.id.0; "disk {serial}: the session could not begin: {error}");
                Verdict::GoOn
            }
        }
    }

    /// Serves a session to its end, or until another process has it.
    ///
    /// When the process ends, `door` is closed and its file removed before the front end can notice: one that
    /// connects again the moment it sees the hang-up finds nobody, and tries again. In the queue of a listener
    /// that is about to close it would be reset, after which some front ends (Cloud Hypervisor up to v53.0)
    /// give the disk up.
    fn carry_on(&self, mut session: Session, door: &mut Option<Listening>) -> Verdict {
        let serial = &self.disk.config.serial;
        self.disk.set_connected(true);
        self.disk.set_notifier(Some(Arc::new(session.notifier())));
        let verdict = loop {
            match session.guard.serve() {
                Served::AtRest => {
                    let with = Self::at_rest(door.as_ref(), Some(&session));
                    let verdict = self.rest.rest(self.disk.id, with);
                    if let (Some(door), false) = (&door, verdict == Verdict::Leave) {
                        door.pass_descriptors(false);
                    }
                    match verdict {
                        Verdict::GoOn => {}
                        Verdict::Leave => {
                            // The other process keeps the notes of the guest from now on.
                            self.disk.session_ended();
                            break Verdict::Leave;
                        }
                        Verdict::MakeWay => {
                            session.guard.close();
                            let end = SessionEnd::MadeWay;
                            log::warn!(disk = self.disk.id.0; "disk {serial}: the session was closed: {end}");
                            break Verdict::GoOn;
                        }
                    }
                }
                Served::Over(end) => {
                    if self.stop.is_signalled() {
                        *door = None;
                    }
                    session.guard.close();
                    match end {
                        SessionEnd::FrontEndLeft | SessionEnd::Stopped => {
                            log::info!(disk = self.disk.id.0; "disk {serial}: the session ended");
                        }
                        end => match session.state.gave_up() {
                            Some(reason) => {
                                log::warn!(disk = self.disk.id.0; "disk {serial}: the session was closed: {reason}");
                            }
                            None => {
                                log::warn!(disk = self.disk.id.0; "disk {serial}: the session was closed: {end}");
                            }
                        },
                    }
                    break Verdict::GoOn;
                }
            }
        };
        self.disk.set_notifier(None);
        drop(session);
        self.disk.set_connected(false);
        verdict
    }

    fn at_rest(door: Option<&Listening>, session: Option<&Session>) -> io::Result<AtRest> {
        let carry = |door: &Listening| {
            door.pass_descriptors(true);
            Ok::<_, io::Error>(CarriedListener {
                socket: door.listener.as_fd().try_clone_to_owned()?,
                file: door.file.as_ref().map(SocketFile::identity),
            })
        };
        Ok(AtRest {
            listener: door.map(carry).transpose()?,
            session: session.map(Session::at_rest).transpose()?,
        })
    }
}

/// A front end's connection, the guard, and the device behind it.
pub struct Session {
    disk: Arc<Disk>,
    state: Arc<SessionState>,
    memory: GuestMemory,
    backend: Arc<DeviceBackend>,
    daemon: VhostUserDaemon<Arc<DeviceBackend>>,
    guard: Guard,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session")
            .field("guard", &self.guard)
            .finish_non_exhaustive()
    }
}

impl Session {
    /// Puts a guard and a device behind `stream`, with descriptors of `share`. Nothing of it is read before
    /// [`Guard::serve`].
    ///
    /// # Errors
    ///
    /// The process is out of descriptors, memory or threads.
    pub fn open(server: &DiskServer, stream: UnixStream, share: Share) -> io::Result<Session> {
        let state = SessionState::new(Arc::clone(&server.disk))?;
        let opened = Session::with(server, stream, share, &state);
        if opened.is_err() {
            // Its rings refer to it.
            state.end();
        }
        opened
    }

    fn with(
        server: &DiskServer,
        stream: UnixStream,
        share: Share,
        state: &Arc<SessionState>,
    ) -> io::Result<Session> {
        let disk = Arc::clone(&server.disk);
        let backend = Arc::new(DeviceBackend::new(Arc::clone(state)));
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::<NoopBitmap>::new());
        let name = format!("session-{}", disk.id);
        let mut daemon = bind(state, || {
            VhostUserDaemon::new(name, Arc::clone(&backend), memory.clone())
        })
        .map_err(|error| io::Error::other(error.to_string()))?;
        let device = server.junction.join(|listener| {
            daemon
                .start(listener)
                .map_err(|error| io::Error::other(error.to_string()))
        })?;
        state.can_give_up(&device)?;
        let limits = SessionLimits::new(disk.config.num_queues, MAX_RING_SIZE);
        let guard = Guard::new(stream, device, limits, server.stop.watch()?)?
            .with_share(share)
            .heed(server.rest.wish()?, server.rest.make_way()?)
            .watch_memory(state.watch_memory()?)
            .with_inflight(Arc::clone(state.inflight()))
            .with_log(Arc::clone(state) as Arc<dyn LogKeeper>);
        Ok(Session {
            disk,
            state: Arc::clone(state),
            memory,
            backend,
            daemon,
            guard,
        })
    }

    /// Brings guard and device to where `carried` was; see [`Guard::prime`].
    ///
    /// # Errors
    ///
    /// As there.
    pub fn prime(&mut self, carried: CarriedSession, deadline: Instant) -> Result<(), PrimeError> {
        self.guard.prime(carried, deadline)
    }

    /// Whether a worker has the ring.
    pub fn is_running(&self, index: u16) -> bool {
        self.state.is_running(index)
    }

    /// How its front end is told of changes.
    pub fn notifier(&self) -> ConfigNotifier {
        self.guard.notifier()
    }

    /// What another process needs to go on with it, but for the rings.
    fn at_rest(&self) -> io::Result<RestingSession> {
        if self.state.is_logging() {
            // Its log would have to travel too, for a guest that is about to leave anyway.
            return Err(io::Error::other("its guest is being migrated"));
        }
        if self.backend.is_transferring() {
            // So would what was promised about it, for a moment.
            return Err(io::Error::other("its state is being saved or loaded"));
        }
        let (front_end, channel) = self.guard.connections()?;
        let memory = self.memory.memory();
        let file_of = |guest: u64| {
            let region = memory.find_region(GuestAddress(guest));
            let file = region.and_then(|region| region.file_offset());
            let file = file.ok_or_else(|| io::Error::other("memory without a file"))?;
            file.file().as_fd().try_clone_to_owned()
        };
        Ok(RestingSession {
            front_end,
            channel,
            negotiated: self.guard.negotiated(),
            regions: self.guard.regions(file_of)?,
            inflight: self.state.inflight().carry()?,
            state: Arc::clone(&self.state),
        })
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.guard.part();
        self.daemon.request_shutdown();
        if let Err(error) = self.daemon.wait() {
            log::debug!(disk = self.disk.id.0; "disk {}: {error}", self.disk.config.serial);
        }
        // Last: its rings stop when nobody can start one any more.
        self.state.end();
    }
}
