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
        Stage::beside(spec, run)
    }

    /// The same with another well-behaved front end: it reads, always this many requests at once.
    pub fn reading(depth: usize) -> Stage {
        Stage::beside(Spec::image(DISK), move |socket, shared| {
            read(socket, shared, depth);
        })
    }

    fn beside(spec: Spec, other: impl FnOnce(&Path, &Shared) + Send + 'static) -> Stage {
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
            "1",
            "--serial",
            "attacked",
            "--disk",
            &disk,
        ]);
        let daemon = Daemon::start_ours(&spec);
        let other = Other::attach(socket, other);
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

    /// Ends the process in good order.
    pub fn end(self) {
        self.other.leave();
        let summary = self.daemon.stop();
        assert!(!summary.disks.is_empty(), "the last words are whole");
        drop(self.dir);
    }
}

/// The well-behaved front end: writes and reads on two queues and checks what it reads.
pub struct Other {
    shared: Arc<Shared>,
    thread: JoinHandle<()>,
}

/// Delays of many requests, in microseconds.
#[derive(Clone, Copy, Debug)]
pub struct Delays {
    /// How many requests.
    pub count: u64,
    /// The median.
    pub p50: u64,
    /// The 99th percentile.
    pub p99: u64,
    /// The longest.
    pub max: u64,
}

#[derive(Default)]
struct Shared {
    leave: AtomicBool,
    done: AtomicU64,
    /// How often each delay was seen, in microseconds.
    delays: Mutex<BTreeMap<u64, u64>>,
}

impl Shared {
    /// One more request is done, after so many microseconds.
    fn saw(&self, delay: u64) {
        let mut delays = self.delays.lock().expect("not poisoned");
        *delays.entry(delay).or_default() += 1;
        self.done.fetch_add(1, Ordering::Relaxed);
    }
}

impl Other {
    fn attach(socket: PathBuf, run: impl FnOnce(&Path, &Shared) + Send + 'static) -> Other {
        let shared = Arc::new(Shared::default());
        let of_thread = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("other".to_owned())
            .spawn(move || run(&socket, &of_thread))
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

    /// The delays seen since the last time.
    pub fn take_delays(&self) -> Delays {
        let seen = std::mem::take(&mut *self.shared.delays.lock().expect("not poisoned"));
        let count: u64 = seen.values().sum();
        let at = |share: u64| {
            let mut passed = 0;
            seen.iter()
                .find(|(_, times)| {
                    passed += **times;
                    passed * 100 >= count * share
                })
                .map_or(0, |(delay, _)| *delay)
        };
        Delays {
            count,
            p50: at(50),
            p99: at(99),
            max: seen.keys().last().copied().unwrap_or(0),
        }
    }

    fn leave(self) {
        self.shared.leave.store(true, Ordering::Relaxed);
        self.thread
            .join()
            .expect("the other disk was well all the time");
    }
}

/// Reads blocks that say which they are, `depth` at once, asleep while there is nothing to do.
fn read(socket: &Path, shared: &Shared, depth: usize) {
    const BLOCK: usize = 4096;
    let mut disk = Disk::attach(socket, 1);
    let blocks = OTHER_DISK / BLOCK as u64;
    for block in 0..blocks {
        let bytes = block.to_ne_bytes().repeat(BLOCK / 8);
        disk.write(0, block * (BLOCK as u64 / SECTOR), &bytes);
    }
    let buffers = disk.mem().alloc(depth * BLOCK, BLOCK);
    let mem = Arc::clone(&disk.front.mem);
    let queue = &mut disk.queues[0];
    let mut rng = Rng::new(7);
    // For each that may be in flight: its block, and since when.
    let mut sent = vec![(0, Instant::now()); depth];
    let mut free: Vec<usize> = (0..depth).collect();
    while !shared.leave.load(Ordering::Relaxed) {
        while let Some(at) = free.pop() {
            let block = rng.below(blocks);
            let gpa = buffers + (at * BLOCK) as u64;
            let sector = block * (BLOCK as u64 / SECTOR);
            queue
                .push(at as u64, kind::IN, 0, sector, &[Seg::writable(gpa, BLOCK)])
                .expect("room");
            sent[at] = (block, Instant::now());
        }
        queue.publish();
        let mut next = Some(finish(queue));
        while let Some(done) = next {
            let at = done.token as usize;
            let (block, begun) = sent[at];
            shared.saw(begun.elapsed().as_micros() as u64);
            assert_eq!(done.status, status::OK, "the other disk is not served");
            let bytes = mem.read_vec(buffers + (at * BLOCK) as u64, BLOCK);
            assert!(
                bytes == block.to_ne_bytes().repeat(BLOCK / 8),
                "the other disk's block {block} is another"
            );
            free.push(at);
            next = queue.reap();
        }
    }
}

/// Writes a block, reads the one written the last time round, on each queue in turn.
fn run(socket: &Path, shared: &Shared) {
    const BLOCK: usize = 4096;
    let blocks = OTHER_DISK / BLOCK as u64;
    let mut disk = Disk::attach(socket, 2);
    let (out, back) = (
        disk.mem().alloc(BLOCK, BLOCK),
        disk.mem().alloc(BLOCK, BLOCK),
    );
    // What each block holds: the seed of its bytes.
    let mut holds = vec![None; blocks as usize];
    let mut rng = Rng::new(7);
    let mut round = 0;
    while !shared.leave.load(Ordering::Relaxed) {
        round += 1;
        let block = rng.below(blocks);
        let mem = Arc::clone(&disk.front.mem);
        let mut io = |queue: usize, op: u32, seg: Seg| {
            let queue = &mut disk.queues[queue];
            let sector = block * (BLOCK as u64 / SECTOR);
            queue.push(round, op, 0, sector, &[seg]).expect("room");
            let begun = Instant::now();
            queue.publish();
            let done = finish(queue);
            let delay = begun.elapsed().as_micros() as u64;
            assert_eq!(
                (done.token, done.status),
                (round, status::OK),
                "the other disk is not served"
            );
            shared.saw(delay);
        };
        if let Some(seed) = holds[block as usize] {
            mem.fill(back, BLOCK, 0xee);
            io(0, kind::IN, Seg::writable(back, BLOCK));
            assert!(
                mem.read_vec(back, BLOCK) == Rng::new(seed).bytes(BLOCK),
                "the other disk's block {block} is not what was written"
            );
        }
        mem.write(out, &Rng::new(round).bytes(BLOCK));
        io(1, kind::OUT, Seg::readable(out, BLOCK));
        holds[block as usize] = Some(round);
    }
}
