//! What a disk does while the one beside it is measured.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::neighbours::push_everything_at;
use crate::support::disk::{Range, finish, kind, status};
use crate::support::front::request::SET_VRING_ERR;
use crate::support::*;

/// How long a completion is waited for before the end is looked for.
const MOMENT: Duration = Duration::from_millis(10);

/// When a deed is under way, and when it is over.
#[derive(Debug, Default)]
pub struct Cue {
    begun: AtomicBool,
    over: AtomicBool,
    answered: AtomicU64,
}

impl Cue {
    fn begin(&self) {
        self.begun.store(true, Ordering::Relaxed);
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    /// Counts a request that was answered.
    fn count(&self) {
        self.answered.fetch_add(1, Ordering::Relaxed);
    }

    /// How many were counted.
    pub fn answered(&self) -> u64 {
        self.answered.load(Ordering::Relaxed)
    }

    /// Waits until the deed is under way. It is over when what is returned is dropped.
    pub fn await_begin(&self) -> Over<'_> {
        let (over, begun) = (Over(self), Instant::now());
        while !self.begun.load(Ordering::Relaxed) {
            assert!(begun.elapsed() < DEADLINE, "it does not begin");
            std::thread::sleep(Duration::from_millis(1));
        }
        over
    }
}

/// Ends a deed.
#[derive(Debug)]
pub struct Over<'a>(&'a Cue);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.over.store(true, Ordering::Relaxed);
    }
}

/// Writes, zeroes, discards, reads and flushes, ten of each at a time.
pub fn everything(disk: &mut Disk, cue: &Cue) {
    let gpa = disk.mem().alloc(64 << 10, 4096);
    while !cue.is_over() {
        push_everything_at(disk, gpa, 10);
        cue.begin();
        while disk.queues[0].in_flight() > 0 && !cue.is_over() {
            disk.queues[0].wait(MOMENT);
        }
    }
}

/// Where requests are, one after the other.
#[derive(Clone, Copy, Debug)]
pub enum Order {
    /// Anywhere.
    Random,
    /// In the order of their sectors, with room between them.
    Apart,
    /// Each where the last one ended.
    Adjacent,
}

/// Requests of one kind, so many in flight at any time on each queue.
#[derive(Clone, Copy, Debug)]
pub struct Flood {
    pub kind: u32,
    pub depth: u16,
    pub order: Order,
    /// Bytes of each buffer, and how many a request has.
    pub bytes: usize,
    pub buffers: usize,
    /// Added to the buffers' address.
    pub shift: u64,
    /// How many places in memory there are for buffers.
    pub places: u64,
    /// How each ends.
    pub status: u8,
}

/// Reads of 4 KiB, as many as a ring has room for.
pub const READS: Flood = Flood {
    kind: kind::IN,
    depth: 128,
    order: Order::Random,
    bytes: 4096,
    buffers: 1,
    shift: 0,
    places: 1,
    status: status::OK,
};

/// Writes of 4 KiB, eight on each queue.
pub const WRITES: Flood = Flood {
    kind: kind::OUT,
    depth: 8,
    ..READS
};

impl Flood {
    /// Until it is over. The buffers lie in the last region of memory.
    pub fn run(&self, disk: &mut Disk, cue: &Cue) {
        let capacity = disk.front.config().expect("a config").capacity;
        let region = disk.mem().regions().len() - 1;
        let room = self.bytes.next_multiple_of(4096);
        let all = room * self.places as usize + 4096;
        let gpa = disk.mem().alloc_in(region, all, 4096) + self.shift;
        let mut sent = 0;
        let mut fill = |queue: &mut Queue| {
            while queue.in_flight() < self.depth {
                let gpa = gpa + sent % self.places * room as u64;
                let segs = vec![self.seg(gpa); self.buffers];
                let sector = self.sector(sent, capacity);
                let pushed = queue.push(sent, self.kind, 0, sector, &segs);
                pushed.expect("room");
                sent += 1;
            }
            queue.publish();
        };
        disk.queues.iter_mut().for_each(&mut fill);
        cue.begin();
        while !cue.is_over() {
            for queue in &mut disk.queues {
                let mut next = queue.wait(MOMENT);
                if cue.is_over() {
                    return;
                }
                while let Some(done) = next {
                    assert_eq!(done.status, self.status, "{self:?}");
                    cue.count();
                    next = queue.reap();
                }
                fill(queue);
            }
        }
    }

    fn seg(&self, gpa: u64) -> Seg {
        match self.kind {
            kind::IN => Seg::writable(gpa, self.bytes),
            _ => Seg::readable(gpa, self.bytes),
        }
    }

    fn sector(&self, nth: u64, capacity: u64) -> u64 {
        let sectors = (self.bytes * self.buffers).next_multiple_of(4096) as u64 / SECTOR;
        let (nth, step) = match self.order {
            // A prime that no number of places is a multiple of.
            Order::Random => (nth.wrapping_mul(0x9e37_79b1), sectors),
            Order::Apart => (nth, 2 * sectors),
            Order::Adjacent => (nth, sectors),
        };
        nth % (capacity / step) * step
    }
}

/// Makes extents of 4 KiB with holes between them, and discards them all, so many bytes at a time.
pub fn discard_extents(disk: &mut Disk, cue: &Cue, bytes: u64) {
    const EXTENTS: u64 = 2048;
    const STEP: u64 = 8192;
    let gpa = disk.mem().alloc(4096, 4096);
    while !cue.is_over() {
        let queue = &mut disk.queues[0];
        cue.begin();
        for extent in 0..EXTENTS {
            if queue.in_flight() == 32 {
                finish(queue);
            }
            let data = [Seg::readable(gpa, 4096)];
            let sector = extent * STEP / SECTOR;
            queue
                .push(extent % 64, kind::OUT, 0, sector, &data)
                .expect("room");
            queue.publish();
        }
        while queue.in_flight() > 0 {
            finish(queue);
        }
        for at in (0..EXTENTS * STEP).step_by(bytes as usize) {
            let range = Range::new(at / SECTOR, (bytes / SECTOR) as u32);
            disk.clear(0, kind::DISCARD, range);
        }
    }
}

/// Stops and starts its ring after each request, which is one that breaks it or one that does not.
pub fn restart_ring(disk: &mut Disk, cue: &Cue, breaks: bool) {
    /// Before it counts as begun: more lines than what a pipe and their queue take.
    const ROUNDS: u64 = 6000;
    let broken = Event::new().expect("an eventfd");
    disk.front
        .send_vring_fd(SET_VRING_ERR, 0, Some(broken.as_fd()))
        .expect("it is taken");
    let gpa = disk.mem().alloc(4096, 4096);
    for round in 0.. {
        if cue.is_over() {
            return;
        }
        let queue = &mut disk.queues[0];
        if breaks {
            // There is nowhere to write its status.
            let chain = [Seg::readable(gpa, 16)];
            queue.push_chain(round, &chain, gpa).expect("room");
            queue.publish();
            assert!(broken.wait(DEADLINE) > 0, "the ring breaks");
        } else {
            let data = [Seg::writable(gpa, 4096)];
            queue.push(round, kind::IN, 0, 0, &data).expect("room");
            queue.publish();
            assert_eq!(finish(queue).status, status::OK);
        }
        disk.front.stop(0).expect("the ring stops");
        disk.queues[0].reset(0);
        disk.front.start(&disk.queues[0]).expect("it starts");
        disk.front.enable(0, true).expect("it is enabled");
        if round == ROUNDS {
            cue.begin();
        }
    }
}
