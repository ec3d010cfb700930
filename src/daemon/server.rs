//! The process: opens the images, starts the workers, serves one session after another on each
//! disk's socket, and takes everything down in order.

use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{self, Sender};
use std::thread::{self, JoinHandle};

use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;

use crate::config::{Config, DiskConfig, SocketSource, SummaryFormat};
use crate::control;
use crate::engine::disk::Image;
use crate::error::StartError;
use crate::mq::ids::DiskId;
use crate::mq::limits::MAX_HCTXS;
use crate::sigbus;

use super::clock::Clock;
use super::disk::{Disk, worker_id};
use super::files;
use super::growth::GrowthWatch;
use super::message::WorkerHandle;
use super::placement::{self, Nodes, Seat};
use super::report::Summary;
use super::roster::{Groups, Roster};
use super::serve::DiskServer;
use super::session::open_fd_table;
use super::socket::{Door, Junction, Stop, listen_privately};
use super::takeover::rest::RestPlace;
use super::takeover::{Beginning, ControlSocket, Giver, Predecessor};
use super::worker::{self, WorkerOptions};

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
    files::allow(&config.disks);
    // Images and sockets first: they are what a user gets wrong.
    let predecessor = match &config.take_over {
        Some(path) => Predecessor::find(path, &config)?,
        None => None,
    };
    let inherits = |disk: &DiskConfig| predecessor.as_ref().is_some_and(|p| p.serves(disk));
    let images = config
        .disks
        .iter()
        .map(|disk| match inherits(disk) {
            true => Image::open_beside(disk),
            false => Image::open(disk),
        })
        .collect::<Result<Vec<_>, _>>()?;
    if let Some(predecessor) = &predecessor {
        predecessor.check(&config.disks, &images)?;
    }
    let doors = config
        .disks
        .iter()
        .map(|disk| match &disk.socket {
            _ if inherits(disk) => Ok(None),
            SocketSource::Path(path) => Door::bind(path).map(Some),
            SocketSource::Fd(fd) => Door::inherit(*fd).map(Some),
        })
        .collect::<Result<Vec<_>, _>>()?;
    let inherits_control = predecessor
        .as_ref()
        .is_some_and(Predecessor::has_our_control_socket);
    let control_path = config.control_path.as_deref();
    let mut control_door = control_path
        .filter(|_| !inherits_control)
        .map(|path| listen_privately(path, "--control-path"))
        .transpose()?;
    sigbus::install().map_err(|source| system("handle SIGBUS", source))?;
    open_fd_table().map_err(|source| system("look into /proc/self/fd", source))?;
    let junction =
        Arc::new(Junction::new().map_err(|source| system("create an internal socket", source))?);
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
    let rest = RestPlace::new(roster.disks().len())
        .map_err(|source| system("create an eventfd", source))?;
    let rest = Arc::new(rest);
    let servers: Vec<DiskServer> = roster
        .disks()
        .iter()
        .map(|disk| DiskServer {
            disk: Arc::clone(disk),
            junction: Arc::clone(&junction),
            stop: Arc::clone(&stop),
            rest: Arc::clone(&rest),
        })
        .collect();
    let growth = GrowthWatch::new(roster.disks(), Arc::clone(&stop))
        .map_err(|source| system("watch the images' sizes", source))?;
    let mut inherited = Vec::new();
    if let Some(predecessor) = predecessor {
        let mut inheritance = predecessor.inherit(&roster, &servers, clock)?;
        if let Some(path) = control_path
            && let Some(control) = inheritance.control(path)
        {
            control_door = Some(control);
        }
        inherited = inheritance.take(roster.disks())?;
    }

    let growth_thread = growth
        .spawn()
        .map_err(|source| system("watch the images' sizes", source))?;
    let control = match (control_path, control_door) {
        (Some(path), Some((listener, file))) => {
            let control = ControlSocket::new(path, &listener, file);
            let control =
                Arc::new(control.map_err(|source| system("keep the control socket", source))?);
            let left = events.clone();
            let giver = Giver::new(
                Arc::clone(&roster),
                Arc::clone(&rest),
                Arc::clone(&control),
                move || drop(left.send(Happened::TakenOver)),
            );
            let thread = control::serve(listener, Arc::clone(&roster), Arc::clone(&stop), giver)
                .map_err(|source| system("start the control socket's thread", source))?;
            Some((thread, control))
        }
        _ => None,
    };
    let mut disk_threads = Vec::new();
    inherited.resize_with(servers.len(), || None);
    for ((server, door), inherited) in servers.into_iter().zip(doors).zip(inherited) {
        let events = events.clone();
        let beginning = inherited.unwrap_or(Beginning {
            door,
            session: None,
        });
        let thread = server
            .spawn(beginning, move || drop(events.send(Happened::DiskDone)))
            .map_err(|source| system("start a disk's thread", source))?;
        disk_threads.push(thread);
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
            Ok(Happened::TakenOver) => {
                log::info!("another daemon has the disks");
                break;
            }
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
    if let Some((thread, control)) = control {
        let _ = thread.join();
        drop(control);
    }
    let reports = roster.shut_down();
    for thread in worker_threads {
        let _ = thread.join();
    }
    signals.close();
    print(&config, &roster.summarize(&reports));
    Ok(())
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
    let seats = seats(config, count)?;
    let several = seats.iter().any(|seat| seat.node != seats[0].node);
    // Each disk begins with another worker, so one may get a queue of each disk more than its share.
    // On several nodes the memory of the guests may bring all queues to the workers of one.
    let share = if several { queues } else { queues / count };
    let rings = u16::try_from(share + config.disks.len())
        .unwrap_or(MAX_HCTXS)
        .min(MAX_HCTXS);
    let options = WorkerOptions {
        rings,
        poll_us: config.poll_us,
        timeout_s: config.timeout_s,
        on_timeout: config.on_timeout,
        clock,
    };
    for (index, seat) in seats.into_iter().enumerate() {
        if let Some(cpus) = &seat.cpus {
            let node = seat.node.map(|node| format!(", node {node}"));
            log::info!("worker {index}: CPU {cpus}{}", node.unwrap_or_default());
        }
        let spawned = worker::spawn(worker_id(index), options, seat);
        let (handle, thread) = spawned.map_err(|source| StartError::System {
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

/// Where the workers are to live.
fn seats(config: &Config, count: usize) -> Result<Vec<Seat>, StartError> {
    let allowed =
        placement::allowed_cpus().map_err(|source| system("ask which CPUs may be used", source))?;
    if let Some(list) = &config.worker_cpus {
        placement::check(list, &placement::online_cpus(&allowed), &allowed)
            .map_err(StartError::Usage)?;
    }
    let nodes = Nodes::discover(Path::new(placement::NODES));
    Ok(placement::seats(
        count,
        config.worker_cpus.as_ref(),
        &allowed,
        &nodes,
    ))
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
