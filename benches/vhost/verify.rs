//! The mode that compares data: what is read is what was written last, on every queue.

use crate::backend::Image;
use crate::load::connect_verified;
use crate::support::disk::{kind, status};
use crate::support::{Front, Queue, Rng, SECTOR, Seg};
use crate::workload::Workload;
use std::path::Path;
use std::time::{Duration, Instant};

/// A back end that answers nothing for so long has failed.
const HANG: Duration = Duration::from_secs(20);

/// One queue and the blocks only it writes to.
struct Lane {
    queue: Queue,
    first: u64,
    /// By block: how often it was written; 0 is unknown content.
    versions: Vec<u32>,
    /// By block: a request is under way.
    busy: Vec<bool>,
    slots: Vec<Slot>,
    free: Vec<usize>,
    rng: Rng,
    scratch: Vec<u8>,
    wanted: Vec<u8>,
    compared: u64,
}

struct Slot {
    buffer: u64,
    block: usize,
    write: bool,
}

/// Writes and reads for the workload's runtime, and then reads back all that was written.
///
/// # Errors
///
/// Data differ, or the session failed.
pub fn run(socket: &Path, image: &Image, workload: &Workload) -> Result<String, String> {
    if matches!(image, Image::Null(_)) {
        return Err(
            "--verify: the null engine keeps no data, use --image memory or disk".to_owned(),
        );
    }
    let (mut front, queues, blocks) = connect_verified(socket, workload)?;
    let mut lanes: Vec<Lane> = queues
        .into_iter()
        .enumerate()
        .map(|(index, queue)| Lane::new(queue, index, blocks, workload))
        .collect();
    let deadline = Instant::now() + workload.runtime;
    let outcomes: Vec<Result<u64, String>> = std::thread::scope(|scope| {
        let running: Vec<_> = lanes
            .iter_mut()
            .map(|lane| scope.spawn(move || lane.run(workload, deadline)))
            .collect();
        let joined = running.into_iter().map(|thread| {
            let panicked = |_| Err("a thread of the front end panicked".to_owned());
            thread.join().unwrap_or_else(panicked)
        });
        joined.collect()
    });
    let mut compared = 0;
    for outcome in outcomes {
        compared += outcome?;
    }
    stop(&mut front, &lanes);
    let mib = (compared * workload.block as u64) >> 20;
    Ok(format!(
        "{compared} reads compared ({mib} MiB), no difference"
    ))
}

fn stop(front: &mut Front, lanes: &[Lane]) {
    for lane in lanes {
        // A back end that fails here has nothing more to lose.
        let _ = front.stop(lane.queue.index);
    }
}

impl Lane {
    fn new(queue: Queue, index: usize, blocks: u64, workload: &Workload) -> Self {
        let count = usize::try_from(blocks).expect("the number of blocks was limited");
        let slots: Vec<Slot> = (0..workload.depth)
            .map(|_| Slot {
                buffer: queue.mem.alloc(workload.block, 4096),
                block: 0,
                write: false,
            })
            .collect();
        Self {
            queue,
            first: index as u64 * blocks,
            versions: vec![0; count],
            busy: vec![false; count],
            free: (0..slots.len()).collect(),
            slots,
            rng: Rng::new(index as u64 + 77),
            scratch: vec![0; workload.block],
            wanted: vec![0; workload.block],
            compared: 0,
        }
    }

    fn run(&mut self, workload: &Workload, deadline: Instant) -> Result<u64, String> {
        let mut final_pass = 0;
        loop {
            let over = Instant::now() >= deadline;
            while let Some(slot) = self.free.pop() {
                let next = if over {
                    self.next_written(&mut final_pass)
                        .map(|block| (block, false))
                } else {
                    self.choose()
                };
                let Some((block, write)) = next else {
                    self.free.push(slot);
                    break;
                };
                self.send(workload, slot, block, write);
            }
            self.queue.publish();
            if over && self.queue.in_flight() == 0 && final_pass >= self.versions.len() {
                return Ok(self.compared);
            }
            let mut next = self.queue.wait(HANG);
            if next.is_none() {
                return Err(format!("the back end answered nothing for {HANG:?}"));
            }
            while let Some(done) = next {
                if done.status != status::OK {
                    return Err(format!("a request ended with status {}", done.status));
                }
                let slot = usize::try_from(done.token).expect("a token is a slot's index");
                self.check(slot)?;
                self.busy[self.slots[slot].block] = false;
                self.free.push(slot);
                next = self.queue.reap();
            }
        }
    }

    /// A block without a request, to write it or, if its content is known, to read it.
    fn choose(&mut self) -> Option<(usize, bool)> {
        for _ in 0..8 {
            let block = self.rng.below(self.versions.len() as u64);
            let block = usize::try_from(block).expect("an index");
            if !self.busy[block] {
                let write = self.versions[block] == 0 || self.rng.one_in(2);
                return Some((block, write));
            }
        }
        None
    }

    /// The next written block at or after `from`.
    fn next_written(&self, from: &mut usize) -> Option<usize> {
        while *from < self.versions.len() {
            let block = *from;
            if self.busy[block] {
                return None;
            }
            *from += 1;
            if self.versions[block] > 0 {
                return Some(block);
            }
        }
        None
    }

    fn send(&mut self, workload: &Workload, index: usize, block: usize, write: bool) {
        self.busy[block] = true;
        let part = workload.block / workload.segments;
        let slot = &mut self.slots[index];
        (slot.block, slot.write) = (block, write);
        let buffer = slot.buffer;
        if write {
            self.versions[block] += 1;
            content(
                &mut self.scratch,
                self.first + block as u64,
                self.versions[block],
            );
            self.queue.mem.write(buffer, &self.scratch);
        } else {
            // What an answer without data would leave here is no block's content.
            self.queue.mem.fill(buffer, workload.block, 0xee);
        }
        let segments: Vec<Seg> = (0..workload.segments)
            .map(|n| buffer + (n * part) as u64)
            .map(|at| {
                if write {
                    Seg::readable(at, part)
                } else {
                    Seg::writable(at, part)
                }
            })
            .collect();
        let kind = if write { kind::OUT } else { kind::IN };
        let sector = (self.first + block as u64) * (workload.block as u64 / SECTOR);
        let pushed = self.queue.push(index as u64, kind, 0, sector, &segments);
        assert!(pushed.is_some(), "the ring has room for the whole depth");
    }

    fn check(&mut self, slot: usize) -> Result<(), String> {
        let slot = &self.slots[slot];
        if slot.write {
            return Ok(());
        }
        let block = self.first + slot.block as u64;
        let version = self.versions[slot.block];
        content(&mut self.wanted, block, version);
        self.queue.mem.read(slot.buffer, &mut self.scratch);
        self.compared += 1;
        match self
            .scratch
            .iter()
            .zip(&self.wanted)
            .position(|(is, want)| is != want)
        {
            None => Ok(()),
            Some(at) => Err(format!(
                "block {block} of {} bytes, written {version} times: byte {at} is {:#04x}, not {:#04x}",
                self.wanted.len(),
                self.scratch[at],
                self.wanted[at]
            )),
        }
    }
}

/// What block `block` holds after it was written `version` times: no two sectors alike.
fn content(bytes: &mut [u8], block: u64, version: u32) {
    let mut rng = Rng::new(block << 24 ^ u64::from(version));
    for word in bytes.chunks_exact_mut(8) {
        word.copy_from_slice(&rng.next().to_le_bytes());
    }
}
