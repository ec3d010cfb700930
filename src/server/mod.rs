//! The process: opens the images, starts the workers, serves one session after another on each
//! disk's socket, and takes everything down in order.

pub mod fd_limit;
mod locked_memory;
mod parked;
pub mod placement;
pub mod signals;
mod startup;
mod workers;

use std::io;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGHUP, SIGUSR1};

use crate::config::{Config, SummaryFormat};
use crate::control;
use crate::error::StartError;
use crate::image::Image;
use crate::logging;
use crate::mq::ids::DiskId;
use crate::sys::sigbus;

use self::parked::{Parked, Threads};
use self::startup::{Doors, Opening, Passed};
use self::workers::Crew;
use crate::disk::Disk;
use crate::disk::registry::{Groups, Roster};
use crate::disk::size_watch::GrowthWatch;
use crate::disk::summary::Summary;
use crate::sandbox;
use crate::sys::clock::Clock;
use crate::sys::fds::{self, TurnAway, open_fd_table};
use crate::sys::listener::{Door, Stop};
use crate::takeover::{ControlSocket, Giver, Inheritance, Predecessor};
use crate::vhost_user::handover::RestPlace;
use crate::vhost_user::loopback::Junction;
use crate::vhost_user::session::DiskServer;
use crate::vhost_user::session::StartWith;
use crate::worker::dedicated::DedicatedWorkers;

/// How long requests in flight may take to end when the process is to end. Front ends connect again for a
/// minute, some of them no longer.
const FINISH: Duration = Duration::from_secs(20);

/// A signal that comes so soon after the first one to end the process was sent together with it, and does not mean
/// that what is in flight is to be left.
const SAME_SIGNAL: Duration = Duration::from_secs(1);

/// What the main thread waits for.
enum Happened {
    Signal(i32),
    /// A disk has no front end any more and will have none: its socket was handed over connected.
    DiskDone,
    /// Another process has the disks, and their sockets.
    TakenOver,
}

/// Serves until SIGTERM or SIGINT, or until the last handed-over connection ends. Then what is in
/// flight ends, and the summary is printed.
///
/// # Errors
///
/// Something is missing or wrong before the first front end could be served. Nothing is left
/// behind.
pub fn run(config: Config) -> Result<(), StartError> {
    // Before any other descriptor is opened.
    let passed = Passed::claim(&config.disks)?;
    let inherited = signals::prepare();
    let listeners_from = fd_limit::allow(&config.disks);
    fd_limit::allow_large(&config.disks);
    // What needs names and rights, in the order in which a user gets it wrong.
    let Opening {
        identity,
        predecessor,
        images,
        growth,
        doors,
    } = Opening::new(&config, passed)?;
    // There are sockets now, which are removed however the process ends.
    let signals = signals::Watch::new(inherited)
        .map_err(|source| system("install signal handlers", source))?;
    let affinities = workers::affinities(&config)?;
    sigbus::install().map_err(|source| system("handle SIGBUS", source))?;
    open_fd_table().map_err(|source| system("look into /proc/self/fd", source))?;
    let owner = identity.as_ref().map(sandbox::Identity::ids);
    let junction =
        Junction::new(owner, &startup::directories(&config)).map_err(|source| StartError::System {
            what: "create an internal socket".to_owned(),
            source,
            advice: "set TMPDIR to a directory that can be written to; the file there is removed at once",
        })?;

    // From here on there are no files to be opened, and no rights.
    sandbox::enter(config.sandbox, identity.as_ref(), &startup::paths(&config))?;
    let stop = Arc::new(Stop::new().map_err(|source| system("create an eventfd", source))?);
    let (events, happened) = mpsc::channel();
    logging::start().map_err(|source| system("start the log's thread", source))?;
    let signals = signals
        .start(events.clone(), Happened::Signal)
        .map_err(|source| system("start the thread for signals", source))?;
    let clock = Clock::start();
    let crew = Crew::start(&config, affinities, clock)?;
    let roster = enlist(&config, images, &crew, clock)?;

    // Now there is no ring to be set up either. Nobody who is not trusted has been heard so far.
    sandbox::seal(config.sandbox)?;
    let rest = RestPlace::new(roster.disks().len())
        .map_err(|source| system("create an eventfd", source))?;
    let service = Service {
        roster,
        stop,
        rest: Arc::new(rest),
        events,
    };
    let servers = service.servers(&Arc::new(junction), listeners_from);
    fds::settle(service.roster.disks().len());
    let Doors { disks, control } = doors;
    let (inheritance, control) = service.inherit(&config, predecessor, &servers, control, clock)?;
    // All that can fail is done before the disks are ours: a take-over that fails leaves them to the other daemon.
    let parked = service.start(&config, servers, growth, control)?;
    let beginnings = service.beginnings(inheritance, disks)?;
    let threads = parked.begin(beginnings);

    let serving = service.wait(&happened);

    // Sessions end first, and with them their rings; then the workers have nothing left.
    service.stop.signal();
    threads.close_control();
    let finished = service.finish(&happened, serving);
    let (reports, ended) = match finished {
        Ok(()) => {
            threads.join();
            let (reports, ended) = service.roster.shut_down(FINISH);
            if ended {
                crew.join();
            }
            (reports, ended)
        }
        Err(_) => (service.roster.reports(), false),
    };
    signals.close();
    let summary = text_of(&service.roster.summarize(&reports), config.summary);
    if ended {
        // Another daemon may have the images before what is left has been written.
        service.roster.unlock_images();
    } else {
        service.roster.unlock_images_at_rest();
    }
    drop(service);
    if let Some(text) = summary {
        logging::print_out(text);
    }
    finished
}

/// The disks, added to their workers.
fn enlist(
    config: &Config,
    images: Vec<Image>,
    crew: &Crew,
    clock: Clock,
) -> Result<Arc<Roster>, StartError> {
    let dedicated = DedicatedWorkers::new(crew.dedicated().to_vec(), config.disks.len());
    let dedicated = Arc::new(dedicated);
    let groups = Groups::new(&config.groups);
    let mut disks = Vec::new();
    for (index, (disk_config, image)) in config.disks.iter().zip(images).enumerate() {
        let id = DiskId(u16::try_from(index).expect("disks are bounded by the configuration"));
        let group = disk_config
            .group
            .as_ref()
            .and_then(|name| groups.find(name));
        let (shared, dedicated) = (crew.shared().to_vec(), Arc::clone(&dedicated));
        let disk = Disk::new(id, disk_config.clone(), image, shared, dedicated, group)
            .map_err(|source| system("add the disk to a worker", source))?;
        disks.push(disk);
    }
    Ok(Arc::new(Roster::new(
        disks,
        [crew.shared(), crew.dedicated()].concat(),
        groups,
        clock,
    )))
}

/// What all of the daemon's threads share, but for the workers.
struct Service {
    roster: Arc<Roster>,
    stop: Arc<Stop>,
    rest: Arc<RestPlace>,
    events: Sender<Happened>,
}

impl Service {
    fn servers(&self, junction: &Arc<Junction>, listeners_from: i32) -> Vec<DiskServer> {
        let disks = self.roster.disks().iter();
        disks
            .map(|disk| DiskServer {
                disk: Arc::clone(disk),
                junction: Arc::clone(junction),
                stop: Arc::clone(&self.stop),
                rest: Arc::clone(&self.rest),
                listeners_from,
            })
            .collect()
    }

    /// What the predecessor has, if there is one, and the control socket: our own, or the predecessor's.
    fn inherit(
        &self,
        config: &Config,
        predecessor: Option<Predecessor>,
        servers: &[DiskServer],
        mut control: Option<startup::ControlDoor>,
        clock: Clock,
    ) -> Result<(Option<Inheritance>, Option<startup::ControlDoor>), StartError> {
        let Some(predecessor) = predecessor else {
            return Ok((None, control));
        };
        let mut inheritance = predecessor.inherit(&self.roster, servers, clock)?;
        if let Some(path) = &config.control_path
            && let Some(theirs) = inheritance.control(path)
        {
            control = Some(theirs);
        }
        Ok((Some(inheritance), control))
    }

    /// What each disk's thread begins with. With an inheritance, its disks are this process's from here on.
    fn beginnings(
        &self,
        inheritance: Option<Inheritance>,
        doors: Vec<Option<Door>>,
    ) -> Result<Vec<StartWith>, StartError> {
        let mut inherited = match inheritance {
            Some(inheritance) => inheritance.take(self.roster.disks())?,
            None => Vec::new(),
        };
        inherited.resize_with(doors.len(), || None);
        let beginnings = inherited.into_iter().zip(doors).map(|(theirs, door)| {
            theirs.unwrap_or(StartWith {
                door,
                session: None,
            })
        });
        Ok(beginnings.collect())
    }

    /// Starts all threads that serve. They do nothing before [`Parked::begin`].
    fn start(
        &self,
        config: &Config,
        servers: Vec<DiskServer>,
        growth: GrowthWatch,
        control: Option<startup::ControlDoor>,
    ) -> Result<Parked, StartError> {
        let (begin_growth, begin) = mpsc::channel();
        let growth = growth
            .spawn(self.roster.disks(), &self.stop, begin)
            .map_err(|source| system("watch the images' sizes", source))?;
        let (begin_control, begin) = mpsc::channel();
        let control = match (&config.control_path, control) {
            (Some(path), Some((listener, file))) => {
                let socket = ControlSocket::new(path, &listener, file)
                    .map_err(|source| system("keep the control socket", source))?;
                let socket = Arc::new(socket);
                let thread = self
                    .start_control(listener, &socket, begin, spare()?)
                    .map_err(|source| system("start the control socket's thread", source))?;
                Some((thread, socket))
            }
            _ => None,
        };
        let (mut disks, mut begin_disks) = (Vec::new(), Vec::new());
        for server in servers {
            let events = self.events.clone();
            let (begin, beginning) = mpsc::channel();
            let away = spare()?;
            let thread = server
                .spawn(beginning, away, move || {
                    drop(events.send(Happened::DiskDone))
                })
                .map_err(|source| system("start a disk's thread", source))?;
            disks.push(thread);
            begin_disks.push(begin);
        }
        Ok(Parked {
            threads: Threads {
                disks,
                growth,
                control,
            },
            begin_disks,
            begin_others: [begin_growth, begin_control],
        })
    }

    fn start_control(
        &self,
        listener: UnixListener,
        socket: &Arc<ControlSocket>,
        begin: Receiver<()>,
        away: TurnAway,
    ) -> io::Result<JoinHandle<()>> {
        let events = self.events.clone();
        let giver = Giver::new(
            Arc::clone(&self.roster),
            Arc::clone(&self.rest),
            Arc::clone(socket),
            move || drop(events.send(Happened::TakenOver)),
        );
        control::serve(
            listener,
            Arc::clone(&self.roster),
            Arc::clone(&self.stop),
            giver,
            begin,
            away,
        )
    }

    /// Waits for the end; how many disks are served then.
    fn wait(&self, happened: &Receiver<Happened>) -> usize {
        let mut serving = self.roster.disks().len();
        while serving > 0 {
            match happened.recv() {
                Ok(Happened::Signal(SIGUSR1)) => {
                    let summary = self.roster.summarize(&self.roster.reports());
                    logging::print(&summary.text());
                }
                Ok(Happened::Signal(signal)) => {
                    log::info!("signal {signal}: finishing what is in flight");
                    break;
                }
                Ok(Happened::DiskDone) => serving -= 1,
                Ok(Happened::TakenOver) => {
                    log::info!("another daemon has the disks");
                    break;
                }
                Err(mpsc::RecvError) => break,
            }
        }
        serving
    }

    /// Waits until the sessions of so many disks have ended, each with what it had in flight.
    ///
    /// # Errors
    ///
    /// Some have not after [`FINISH`], or at a second SIGTERM or SIGINT that comes [`SAME_SIGNAL`] later. What they have in flight stays in the in-flight
    /// record, as after a crash, and the process can end.
    fn finish(&self, happened: &Receiver<Happened>, mut serving: usize) -> Result<(), StartError> {
        let begun = Instant::now();
        while serving > 0 {
            let left = (begun + FINISH).saturating_duration_since(Instant::now());
            match happened.recv_timeout(left) {
                Ok(Happened::DiskDone) => serving -= 1,
                Ok(Happened::TakenOver | Happened::Signal(SIGUSR1 | SIGHUP)) => {}
                // Sent with the first one: by timeout(1) to the process and to its group, by a shell to all of its jobs.
                Ok(Happened::Signal(_)) if begun.elapsed() < SAME_SIGNAL => {}
                Ok(Happened::Signal(_)) | Err(RecvTimeoutError::Timeout) => {
                    let disks = self.roster.disks().iter();
                    let unfinished = disks.filter(|disk| disk.is_connected());
                    return Err(StartError::Unfinished {
                        disks: unfinished.map(|disk| disk.config.serial.clone()).collect(),
                    });
                }
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        Ok(())
    }
}

fn spare() -> Result<TurnAway, StartError> {
    TurnAway::new().map_err(|source| {
        system(
            "keep a file descriptor for front ends that are turned away",
            source,
        )
    })
}

fn system(what: &str, source: io::Error) -> StartError {
    StartError::System {
        what: what.to_owned(),
        source,
        advice: "check the limits of the process (ulimit -a) and the kernel's log",
    }
}

/// The summary as it is printed at the end, if it is to be.
fn text_of(summary: &Summary, format: SummaryFormat) -> Option<String> {
    match format {
        SummaryFormat::None => None,
        SummaryFormat::Text => Some(summary.text()),
        SummaryFormat::Json => Some(summary.json() + "\n"),
    }
}
