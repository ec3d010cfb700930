//! One process, two disks, one worker: one disk to attack, the other to be served meanwhile.

use crate::support::disk::{finish, kind, status};
use crate::support::*;
use std::collections::BTreeMap;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Bytes of the disk that is attacked.
pub const DISK: u64 = 8 << 20;
/// Bytes of the other disk.
const OTHER_DISK: u64 = 4 << 20;
/// Bytes of each of its requests.
const BLOCK: usize = 4096;
/// Requests the other disk must complete while one attack goes on.
const BEATS: u64 = 64;

/// An attack: does what it does, and checks who is told.
pub type Attack = fn(&Stage);

/// Makes a test of each attack, and a list of all for the measurement.
macro_rules! attacks {
    ($($(#[$about:meta])* fn $name:ident($stage:ident) $body:block)*) => {
        $($(#[$about])* fn $name($stage: &Stage) $body)*

        /// All attacks of this file.
        pub const ALL: &[(&str, $crate::stage::Attack)] = &[$((stringify!($name), $name)),*];

        mod is_survived {
            $(#[test]
            fn $name() {
                $crate::stage::survive(super::$name);
            })*
        }
    };
}

/// Makes the attack, and checks that nobody else noticed.
pub fn survive(attack: Attack) {
    let stage = Stage::new();
    stage.other.beats(BEATS);
    let before = stage.other.count();
    attack(&stage);
    // Where the attack was over at once, these come after it; the request that was in flight then is among them.
    stage
        .other
        .beats(BEATS.saturating_sub(stage.other.count() - before));
    stage.serves_again();
    stage.end();
}

/// The process with its two disks.
pub struct Stage {
    /// The process.
    pub daemon: Daemon,
    /// The front end of the other disk.
    pub other: Other,
    dir: TempDir,
}

impl Stage {
    /// Starts it and attaches the well-behaved front end.
    pub fn new() -> Stage {
        Stage::with(Spec::image(DISK))
    }

    /// The same with another disk to attack.
    pub fn with(spec: Spec) -> Stage {
        Stage::beside(spec, Beside::default())
    }

    /// The same with another load on the other disk.
    pub fn beside(spec: Spec, beside: Beside) -> Stage {
        let dir = TempDir::new().expect("a directory");
        let image = dir.path().join("other.img");
        let file = std::fs::File::create(&image).expect("an image");
        file.set_len(OTHER_DISK).expect("a sparse image");
        let socket = dir.path().join("other.sock");
        let disk = format!(
            "socket-path={},blk-file={},serial=other",
            socket.display(),
            image.display()
        );
        let spec = spec.lifetime(Duration::from_secs(300)).args([
            "--workers",
            &beside.workers.to_string(),
            "--serial",
            "attacked",
            "--disk",
            &disk,
        ]);
        let daemon = Daemon::start_ours(&spec);
        let other = Other::attach(socket, beside);
        Stage { daemon, other, dir }
    }

    /// The socket of the disk to attack.
    pub fn socket(&self) -> &Path {
        self.daemon.socket()
    }

    /// A plain connection to it.
    pub fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.socket()).expect("it listens");
        stream.set_read_timeout(Some(DEADLINE)).expect("a timeout");
        stream
    }

    /// A session as far as and with its memory.
    pub fn front(&self) -> Front {
        Front::connect(self.socket(), &Setup::default()).expect("a session")
    }

    /// A session with `queues` queues.
    pub fn attach(&self, queues: usize) -> Disk {
        Disk::attach(self.socket(), queues)
    }

    /// Whoever reads the log is told this.
    pub fn told(&self, text: &str) {
        assert!(
            self.daemon.wait_for_message(text),
            "nobody was told {text:?}:\n{}",
            self.daemon.stderr()
        );
    }

    /// The disk that was attacked serves a front end that comes now.
    pub fn serves_again(&self) {
        let mut disk = self.attach(2);
        let data = Rng::new(1).bytes(8192);
        disk.write(0, 64, &data);
        assert!(disk.read(1, 64, data.len()) == data, "the disk is well");
        disk.flush(0);
    }

    /// Ends the process as it is, where good order would take too long.
    pub fn abandon(self) {
        self.other.leave();
    }

    /// Ends the process in good order.
    pub fn end(self) {
        self.other.leave();
        let summary = self.daemon.stop();
        assert!(!summary.disks.is_empty(), "the last words are whole");
        drop(self.dir);
    }
}

/// How the other disk is served and used.
#[derive(Clone, Copy)]
pub struct Beside {
    /// Threads that serve both disks.
    pub workers: usize,
    /// The queue it reads on, and the one it writes on.
    pub queues: [usize; 2],
    /// Requests in flight.
    pub depth: usize,
}

impl Default for Beside {
    /// One worker for both disks, one request at a time.
    fn default() -> Beside {
        Beside {
            workers: 1,
            queues: [0, 1],
            depth: 1,
        }
    }
}

/// The well-behaved front end: writes, reads and checks what it reads.
pub struct Other {
    shared: Arc<Shared>,
    thread: JoinHandle<()>,
}

#[derive(Default)]
struct Shared {
    leave: AtomicBool,
    done: AtomicU64,
    /// How often each delay was seen, in microseconds.
    delays: Mutex<BTreeMap<u64, u64>>,
}

impl Other {
    fn attach(socket: PathBuf, beside: Beside) -> Other {
        let shared = Arc::new(Shared::default());
        let of_thread = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("other".to_owned())
            .spawn(move || run(&socket, beside, &of_thread))
            .expect("a thread");
        Other { shared, thread }
    }

    /// Requests completed and found right so far.
    pub fn count(&self) -> u64 {
        self.shared.done.load(Ordering::Relaxed)
    }

    /// Waits until `count` more are done.
    pub fn beats(&self, count: u64) {
        let goal = self.count() + count;
        let deadline = Instant::now() + DEADLINE;
        while self.count() < goal {
            assert!(!self.thread.is_finished(), "the other disk has failed");
            assert!(
                Instant::now() < deadline,
                "the other disk stands still at {} of {goal}",
                self.count()
            );
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// The delays seen since the last time: how many, the median and the 99th percentile, in microseconds.
    pub fn take_delays(&self) -> (u64, u64, u64) {
        let seen = std::mem::take(&mut *self.shared.delays.lock().expect("not poisoned"));
        let total: u64 = seen.values().sum();
        let at = |share: u64| {
            let mut passed = 0;
            seen.iter()
                .find(|(_, count)| {
                    passed += **count;
                    passed * 100 >= total * share
                })
                .map_or(0, |(delay, _)| *delay)
        };
        (total, at(50), at(99))
    }

    fn leave(self) {
        self.shared.leave.store(true, Ordering::Relaxed);
        self.thread
            .join()
            .expect("the other disk was well all the time");
    }
}

/// One of the requests in flight, and the blocks that are its own: those whose number is its place plus a multiple
/// of the depth.
struct Place {
    /// Where its data is in guest memory.
    buffer: u64,
    block: u64,
    reads: bool,
    /// The seed of what it writes.
    seed: u64,
    begun: Instant,
}

/// Reads a block, checks it, writes it anew, and goes on with another one, in `depth` places at once.
fn run(socket: &Path, beside: Beside, shared: &Shared) {
    let Beside { queues, depth, .. } = beside;
    let mut front = Front::connect(socket, &Setup::default()).expect("a session");
    let mem = Arc::clone(&front.mem);
    let mut rings: Vec<Queue> = Vec::new();
    let mut at = [0; 2];
    for (at, number) in at.iter_mut().zip(queues) {
        let known = rings.iter().position(|ring| ring.index == number);
        *at = known.unwrap_or_else(|| {
            let ring = front.queue(number, QueueSetup::default());
            rings.push(ring.expect("a queue"));
            rings.len() - 1
        });
    }
    let own = OTHER_DISK / BLOCK as u64 / depth as u64;
    // What each block holds: the seed of its bytes.
    let mut holds = vec![None; (own * depth as u64) as usize];
    let mut rng = Rng::new(7);
    let mut writes = 0;
    let mut places: Vec<Place> = Vec::new();
    let begin = |place: &mut Place, number: usize, reads: bool, rings: &mut [Queue]| {
        let (op, seg) = match reads {
            true => (kind::IN, Seg::writable(place.buffer, BLOCK)),
            false => (kind::OUT, Seg::readable(place.buffer, BLOCK)),
        };
        place.reads = reads;
        let sector = place.block * (BLOCK as u64 / SECTOR);
        let ring = &mut rings[at[usize::from(!reads)]];
        ring.push(number as u64, op, 0, sector, &[seg])
            .expect("room");
        place.begun = Instant::now();
        ring.publish();
    };
    let mut next = |place: &mut Place,
                    number: usize,
                    rings: &mut [Queue],
                    holds: &[Option<u64>],
                    write: bool| {
        if !write {
            place.block = rng.below(own) * depth as u64 + number as u64;
        }
        let reads = !write && holds[place.block as usize].is_some();
        if reads {
            mem.fill(place.buffer, BLOCK, 0xee);
        } else {
            writes += 1;
            place.seed = writes;
            mem.write(place.buffer, &Rng::new(writes).bytes(BLOCK));
        }
        begin(place, number, reads, rings);
    };
    for number in 0..depth {
        places.push(Place {
            buffer: mem.alloc(BLOCK, BLOCK),
            block: 0,
            reads: false,
            seed: 0,
            begun: Instant::now(),
        });
        next(&mut places[number], number, &mut rings, &holds, false);
    }
    loop {
        let leave = shared.leave.load(Ordering::Relaxed);
        let Some(ring) = rings.iter_mut().find(|ring| ring.in_flight() > 0) else {
            break;
        };
        let done = finish(ring);
        let number = done.token as usize;
        let place = &mut places[number];
        let delay = place.begun.elapsed().as_micros() as u64;
        assert_eq!(done.status, status::OK, "the other disk is not served");
        let block = place.block as usize;
        if place.reads {
            let seed = holds[block].expect("only what was written is read");
            assert!(
                mem.read_vec(place.buffer, BLOCK) == Rng::new(seed).bytes(BLOCK),
                "the other disk's block {block} is not what was written"
            );
        } else {
            holds[block] = Some(place.seed);
        }
        let mut delays = shared.delays.lock().expect("not poisoned");
        *delays.entry(delay).or_default() += 1;
        drop(delays);
        shared.done.fetch_add(1, Ordering::Relaxed);
        if !leave {
            let write = place.reads;
            next(place, number, &mut rings, &holds, write);
        }
    }
}
