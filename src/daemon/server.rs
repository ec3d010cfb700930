//! The process: opens the images, starts the workers, serves one session after another on each
//! disk's socket, and takes everything down in order.

use std::io::{self, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{self, Sender};
use std::thread::{self, JoinHandle};

use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;
use vhost_user_backend::VhostUserDaemon;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

use crate::config::{Config, DiskConfig, SocketSource, SummaryFormat};
use crate::control;
use crate::engine::disk::Image;
use crate::error::StartError;
use crate::mq::ids::DiskId;
use crate::mq::limits::{MAX_HCTXS, MAX_RING_SIZE};
use crate::sigbus;

use super::backend::DeviceBackend;
use super::clock::Clock;
use super::disk::{Disk, worker_id};
use super::growth::GrowthWatch;
use super::message::WorkerHandle;
use super::report::Summary;
use super::roster::{Groups, Roster};
use super::sandbox::{self, Identity, find_group};
use super::session::{Guard, SessionEnd, SessionLimits, open_fd_table};
use super::socket::{Access, Door, Junction, Stop, listen_privately};
use super::vring::{SessionState, bind};
use super::worker::{self, WorkerOptions};

/// What the main thread waits for.
enum Happened {
    Signal(i32),
    /// A disk has no front end any more and will have none: its socket was handed over connected.
    DiskDone,
}

/// Serves until SIGTERM or SIGINT, or until the last handed-over connection ends. Then what is in
/// flight ends, and the summary is printed.
///
/// # Errors
///
/// Something is missing or wrong before the first front end could be served. Nothing is left
/// behind.
pub fn run(config: Config) -> Result<(), StartError> {
    // Names while they can be looked up, then images and sockets: they are what a user gets wrong.
    let identity = config.user.as_ref().map(Identity::find).transpose()?;
    let images = config
        .disks
        .iter()
        .map(Image::open)
        .collect::<Result<Vec<_>, _>>()?;
    let doors = config
        .disks
        .iter()
        .map(|disk| match &disk.socket {
            SocketSource::Path(path) => Door::bind_for(path, access(disk, identity.as_ref())?),
            SocketSource::Fd(fd) => Door::inherit(*fd),
        })
        .collect::<Result<Vec<_>, _>>()?;
    let control_door = config
        .control_path
        .as_deref()
        .map(|path| {
            listen_privately(
                path,
                "--control-path",
                identity.as_ref().map(|user| user.ids().0),
            )
        })
        .transpose()?;
    sigbus::install().map_err(|source| system("handle SIGBUS", source))?;
    open_fd_table().map_err(|source| system("look into /proc/self/fd", source))?;
    let junction =
        Arc::new(Junction::new().map_err(|source| system("create an internal socket", source))?);
    sandbox::enter(config.sandbox, identity.as_ref(), &socket_paths(&config))?;
    let stop = Arc::new(Stop::new().map_err(|source| system("create an eventfd", source))?);
    let (events, happened) = mpsc::channel();
    let signals = watch_signals(events.clone())
        .map_err(|source| system("install signal handlers", source))?;

    let clock = Clock::start();
    let (workers, worker_threads) = start_workers(&config, clock)?;
    let groups = Groups::new(&config.groups);
    let mut disks = Vec::new();
    for (index, (disk_config, image)) in config.disks.iter().zip(images).enumerate() {
        let id = DiskId(u16::try_from(index).expect("disks are bounded by the configuration"));
        let group = disk_config
            .group
            .as_ref()
            .and_then(|name| groups.find(name));
        let disk = Disk::new(id, disk_config.clone(), image, workers.clone(), group)
            .map_err(|source| system("add the disk to a worker", source))?;
        disks.push(disk);
    }
    let roster = Arc::new(Roster::new(disks, workers, groups, clock));
    let growth_thread = GrowthWatch::new(roster.disks(), Arc::clone(&stop))
        .and_then(GrowthWatch::spawn)
        .map_err(|source| system("watch the images' sizes", source))?;
    let control_thread = control_door
        .map(|(listener, file)| {
            control::serve(listener, Arc::clone(&roster), Arc::clone(&stop))
                .map(|thread| (thread, file))
        })
        .transpose()
        .map_err(|source| system("start the control socket's thread", source))?;
    // The rings are set up; what comes now needs less.
    sandbox::seal(config.sandbox)?;
    let mut disk_threads = Vec::new();
    for (disk, door) in roster.disks().iter().zip(doors) {
        let server = DiskServer {
            disk: Arc::clone(disk),
            junction: Arc::clone(&junction),
            stop: Arc::clone(&stop),
        };
        disk_threads.push(server.spawn(door, events.clone())?);
    }

    let mut serving = roster.disks().len();
    while serving > 0 {
        match happened.recv() {
            Ok(Happened::Signal(SIGUSR1)) => {
                eprint!("{}", roster.summarize(&roster.reports()).text());
            }
            Ok(Happened::Signal(signal)) => {
                log::info!("signal {signal}: finishing what is in flight");
                break;
            }
            Ok(Happened::DiskDone) => serving -= 1,
            Err(mpsc::RecvError) => break,
        }
    }

    // Sessions end first, and with them their rings; then the workers have nothing left.
    stop.signal();
    for thread in disk_threads {
        let _ = thread.join();
    }
    if let Some(thread) = growth_thread {
        let _ = thread.join();
    }
    if let Some((thread, file)) = control_thread {
        let _ = thread.join();
        drop(file);
    }
    let reports = roster.shut_down();
    for thread in worker_threads {
        let _ = thread.join();
    }
    signals.close();
    print(&config, &roster.summarize(&reports));
    Ok(())
}

/// Who may connect to a disk's socket.
fn access(disk: &DiskConfig, user: Option<&Identity>) -> Result<Access, StartError> {
    let given = disk.socket_group.as_deref();
    let group = given.map(|name| {
        find_group(name).ok_or_else(|| {
            StartError::Usage(format!(
                "--socket-group: there is no group '{name}' on this machine; give a name or a number \
                 that exists (see --help)"
            ))
        })
    });
    Ok(Access {
        mode: disk.socket_mode,
        uid: user.map(|user| user.ids().0),
        gid: group.transpose()?.or(user.map(|user| user.ids().1)),
    })
}

/// The sockets whose files are removed at the end.
fn socket_paths(config: &Config) -> Vec<&Path> {
    let disks = config.disks.iter().filter_map(|disk| match &disk.socket {
        SocketSource::Path(path) => Some(path.as_path()),
        SocketSource::Fd(_) => None,
    });
    disks.chain(config.control_path.as_deref()).collect()
}

fn system(what: &str, source: io::Error) -> StartError {
    StartError::System {
        what: what.to_owned(),
        source,
        advice: "check the limits of the process (ulimit -a) and the kernel's log",
    }
}

fn watch_signals(events: Sender<Happened>) -> io::Result<signal_hook::iterator::Handle> {
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGUSR1])?;
    let handle = signals.handle();
    thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            for signal in signals.forever() {
                if events.send(Happened::Signal(signal)).is_err() {
                    return;
                }
            }
        })?;
    Ok(handle)
}

fn start_workers(
    config: &Config,
    clock: Clock,
) -> Result<(Vec<WorkerHandle>, Vec<JoinHandle<()>>), StartError> {
    let queues: usize = config
        .disks
        .iter()
        .map(|disk| usize::from(disk.num_queues))
        .sum();
    let mut handles = Vec::new();
    let mut threads = Vec::new();
    let count = config.workers.min(queues);
    // Each disk begins with another worker, so one may get a queue of each disk more than its share.
    let rings = u16::try_from(queues / count + config.disks.len())
        .unwrap_or(MAX_HCTXS)
        .min(MAX_HCTXS);
    let options = WorkerOptions {
        rings,
        poll_us: config.poll_us,
        timeout_s: config.timeout_s,
        on_timeout: config.on_timeout,
        clock,
    };
    for index in 0..count {
        let (handle, thread) =
            worker::spawn(worker_id(index), options).map_err(|source| StartError::System {
                what: format!("start worker {index}"),
                source,
                advice: "check that io_uring is allowed (sysctl kernel.io_uring_disabled) \
                         and that the limit of locked memory is not tiny (ulimit -l)",
            })?;
        handles.push(handle);
        threads.push(thread);
    }
    Ok((handles, threads))
}

fn print(config: &Config, summary: &Summary) {
    let text = match config.summary {
        SummaryFormat::None => return,
        SummaryFormat::Text => summary.text(),
        SummaryFormat::Json => summary.json() + "\n",
    };
    // Whoever was to read it may have gone.
    let _ = io::stdout().write_all(text.as_bytes());
}

/// What one disk's thread needs.
struct DiskServer {
    disk: Arc<Disk>,
    junction: Arc<Junction>,
    stop: Arc<Stop>,
}

impl DiskServer {
    fn spawn(self, door: Door, events: Sender<Happened>) -> Result<JoinHandle<()>, StartError> {
        let name = format!("disk-{}", self.disk.id);
        thread::Builder::new()
            .name(name)
            .spawn(move || {
                match door {
                    Door::Listening(listener, file) => {
                        self.listen(&listener);
                        drop(file);
                    }
                    Door::Connected(stream) => self.serve(stream),
                }
                let _ = events.send(Happened::DiskDone);
            })
            .map_err(|source| system("start a disk's thread", source))
    }

    /// One session at a time: a front end that connects meanwhile waits until it is its turn.
    fn listen(&self, listener: &UnixListener) {
        match &self.disk.config.socket {
            SocketSource::Path(path) => log::info!("listening on {}", path.display()),
            SocketSource::Fd(fd) => log::info!("listening on file descriptor {fd}"),
        }
        while self.stop.or_readable(listener) {
            match listener.accept() {
                Ok((stream, _)) => self.serve(stream),
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => {
                    log::error!("disk {}: cannot accept: {error}", self.disk.config.serial);
                    // Out of descriptors or memory: that passes, but not by trying at once.
                    thread::sleep(std::time::Duration::from_millis(100));
                }
            }
        }
    }

    fn serve(&self, stream: UnixStream) {
        let serial = &self.disk.config.serial;
        log::info!("disk {serial}: a front end connected");
        self.disk.set_connected(true);
        let outcome = self.session(stream);
        self.disk.set_connected(false);
        match outcome {
            Ok(SessionEnd::FrontEndLeft | SessionEnd::Stopped) => {
                log::info!("disk {serial}: the session ended");
            }
            Ok(end) => log::warn!("disk {serial}: the session was closed: {end}"),
            Err(error) => log::error!("disk {serial}: the session could not begin: {error}"),
        }
    }

    fn session(&self, stream: UnixStream) -> io::Result<SessionEnd> {
        let state = SessionState::new(Arc::clone(&self.disk))?;
        // Declared first, so that it comes last, however the session ends.
        let _ending = Ending(&state);
        let backend = Arc::new(DeviceBackend::new(Arc::clone(&state)));
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::<()>::new());
        let name = format!("session-{}", self.disk.id);
        let mut daemon = bind(&state, || VhostUserDaemon::new(name, backend, memory))
            .map_err(|error| io::Error::other(error.to_string()))?;
        let device = self.junction.join(|listener| {
            daemon
                .start(listener)
                .map_err(|error| io::Error::other(error.to_string()))
        })?;
        state.can_give_up(&device)?;
        let limits = SessionLimits::new(self.disk.config.num_queues, MAX_RING_SIZE);
        let guard = Guard::new(stream, device, limits, self.stop.watch()?)?
            .watch_memory(state.watch_memory()?)
            .with_inflight(Arc::clone(state.inflight()));
        self.disk.set_notifier(Some(guard.notifier()));
        let end = guard.run();
        self.disk.set_notifier(None);
        // The guard has closed both connections, so the crate's thread is on its way out.
        daemon.request_shutdown();
        if let Err(error) = daemon.wait() {
            log::debug!("disk {}: {error}", self.disk.config.serial);
        }
        Ok(end)
    }
}

/// Stops a session's rings however the session ends.
struct Ending<'a>(&'a Arc<SessionState>);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.end();
    }
}
