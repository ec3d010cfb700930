//! A disk and its surroundings, and what the disk beside it feels.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::deeds::Cue;
use super::neighbours::Pair;
use crate::support::disk::{finish, kind, status};
use crate::support::*;

/// How long each is measured.
const SPAN: Duration = Duration::from_secs(1);

/// A request that takes longer is told of: the storage below this test has stood still, or the worker.
const LONG: Duration = Duration::from_millis(200);

/// Where the buffers are if a file has them.
const IN_FILE: u64 = 1 << 30;

/// Delays of one kind of request in microseconds: median and 99th percentile.
pub type Pace = (u64, u64);

/// Of reads of 4 KiB, and of flushes.
pub type Paces = [Pace; 2];

/// Before and during.
pub type Delays = [Paces; 2];

/// The delays of a disk's reads and flushes until `until` is over: a flush after seven reads.
fn delays(disk: &mut Disk, shift: u64, until: Duration) -> Paces {
    let begun = Instant::now();
    let gpa = disk.mem().alloc(8192, 4096) + shift;
    let queue = &mut disk.queues[0];
    let mut seen = [Vec::new(), Vec::new()];
    for n in 0_u64.. {
        if begun.elapsed() > until && !seen.iter().any(Vec::is_empty) {
            break;
        }
        let at = Instant::now();
        let is_flush = n % 8 == 0;
        let data = [Seg::writable(gpa, 4096)];
        let pushed = match is_flush {
            true => queue.push(n, kind::FLUSH, 0, 0, &[]),
            false => queue.push(n, kind::IN, 0, n % 64 * 8, &data),
        };
        pushed.expect("room");
        queue.publish();
        assert_eq!(finish(queue).status, status::OK);
        let took = at.elapsed();
        if took > LONG {
            eprintln!(
                "{} of {took:?}",
                if is_flush { "a flush" } else { "a read" }
            );
        }
        seen[usize::from(is_flush)].push(took.as_micros() as u64);
    }
    seen.map(|mut times| {
        times.sort_unstable();
        (times[times.len() / 2], times[times.len() * 99 / 100])
    })
}

/// What a disk does until it is told that it is over.
pub trait Deed: Fn(&mut Disk, &Cue) + Sync {}

impl<T: Fn(&mut Disk, &Cue) + Sync> Deed for T {}

/// A disk and its surroundings.
#[derive(Clone, Debug)]
pub struct Scene<'a> {
    pub image: PathBuf,
    pub options: &'a [&'a str],
    pub queues: usize,
    /// Bytes of memory.
    pub memory: usize,
    /// A file that has the buffers.
    pub file: Option<PathBuf>,
    /// Added to the addresses of the neighbour's buffers.
    pub shift: u64,
}

impl Scene<'_> {
    pub fn of(image: &Path) -> Scene<'static> {
        Scene {
            image: image.to_path_buf(),
            options: &[],
            queues: 1,
            memory: 64 << 20,
            file: None,
            shift: 0,
        }
    }

    fn attach(&self, pair: &Pair) -> Disk {
        let setup = Setup {
            memory: vec![(0, self.memory)],
            ..Setup::default()
        };
        let memory = match &self.file {
            None => GuestMemory::new(&setup.memory),
            Some(path) => {
                let file = File::options()
                    .read(true)
                    .write(true)
                    .create(true)
                    .truncate(true)
                    .open(path);
                let file = file.expect("a file").into();
                GuestMemory::with_file(setup.memory[0], (IN_FILE, 1 << 20), file)
            }
        };
        let memory = Arc::new(memory.expect("memory"));
        let front = Front::connect_with(pair.daemon.socket(), &setup, memory);
        let queue = QueueSetup::default();
        Disk::of(front.expect("a session"), self.queues, queue).expect("it is served")
    }

    /// Before and during a deed. What misbehaves is switched on in between, and off at the end. And
    /// how many requests were answered to a disk that counts them.
    pub fn measure(&self, deed: impl Deed, mut switch: impl FnMut(&Pair, bool)) -> (Delays, u64) {
        let pair = Pair::with_queues(&self.image, self.queues, self.options);
        let mut disk = self.attach(&pair);
        let mut other = pair.attach_other();
        let before = delays(&mut other, self.shift, SPAN);
        switch(&pair, true);
        let cue = Cue::default();
        let during = std::thread::scope(|scope| {
            scope.spawn(|| deed(&mut disk, &cue));
            let _over = cue.await_begin();
            delays(&mut other, self.shift, SPAN)
        });
        switch(&pair, false);
        pair.end(disk, other);
        ([before, during], cue.answered())
    }
}
