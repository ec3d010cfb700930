//! A disk in use: a session, its queues, and virtio-blk requests of every shape (virtio 1.3, 5.2.6).

use super::driver::{Completion, Queue, QueueSetup, Seg};
use super::front::{Front, Result, Setup};
use super::memory::GuestMemory;
use super::{DEADLINE, SECTOR};
use std::path::Path;

/// Request types.
pub mod kind {
    /// Read.
    pub const IN: u32 = 0;
    /// Write.
    pub const OUT: u32 = 1;
    /// Flush.
    pub const FLUSH: u32 = 4;
    /// Read the serial number.
    pub const GET_ID: u32 = 8;
    /// Discard.
    pub const DISCARD: u32 = 11;
    /// Write zeroes.
    pub const WRITE_ZEROES: u32 = 13;
    /// Secure erase.
    pub const SECURE_ERASE: u32 = 14;
}

/// Status bytes.
pub mod status {
    /// Done.
    pub const OK: u8 = 0;
    /// Failed.
    pub const IOERR: u8 = 1;
    /// No such request.
    pub const UNSUPP: u8 = 2;
}

/// One range of a discard or write-zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// First sector.
    pub sector: u64,
    /// Number of sectors.
    pub sectors: u32,
    /// Bit 0: unmap (write-zeroes only).
    pub flags: u32,
}

impl Range {
    /// A range without flags.
    pub fn new(sector: u64, sectors: u32) -> Self {
        Self {
            sector,
            sectors,
            flags: 0,
        }
    }

    /// The same with the unmap flag.
    pub fn unmap(self) -> Self {
        Self { flags: 1, ..self }
    }

    /// The range as it stands in a request (16 bytes).
    pub fn to_bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.sector.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.sectors.to_le_bytes());
        bytes[12..].copy_from_slice(&self.flags.to_le_bytes());
        bytes
    }
}

/// A request of any shape. It brings its own header and status byte in guest memory, so it can lay them out as it
/// likes; for speed use [`Queue::push`].
#[derive(Clone, Debug)]
pub struct Request {
    kind: u32,
    ioprio: u32,
    sector: u64,
    data: Vec<Seg>,
    header_parts: Vec<usize>,
    header_with_data: bool,
    status_with_data: bool,
    no_status: bool,
}

impl Request {
    /// A request of any type with `data` between header and status byte.
    pub fn new(kind: u32, sector: u64, data: &[Seg]) -> Self {
        Self {
            kind,
            ioprio: 0,
            sector,
            data: data.to_vec(),
            header_parts: vec![16],
            header_with_data: false,
            status_with_data: false,
            no_status: false,
        }
    }

    /// A read into `data`.
    pub fn read(sector: u64, data: &[Seg]) -> Self {
        Self::new(kind::IN, sector, data)
    }

    /// A write from `data`.
    pub fn write(sector: u64, data: &[Seg]) -> Self {
        Self::new(kind::OUT, sector, data)
    }

    /// A flush.
    pub fn flush() -> Self {
        Self::new(kind::FLUSH, 0, &[])
    }

    /// A read of the serial number into `data`, which should have 20 bytes.
    pub fn get_id(data: Seg) -> Self {
        Self::new(kind::GET_ID, 0, &[data])
    }

    /// A discard or write-zeroes; the ranges are put into guest memory.
    pub fn ranges(kind: u32, mem: &GuestMemory, ranges: &[Range]) -> Self {
        let bytes: Vec<u8> = ranges.iter().flat_map(|range| range.to_bytes()).collect();
        let gpa = mem.alloc(bytes.len().max(1), 16);
        mem.write(gpa, &bytes);
        Self::new(kind, 0, &[Seg::readable(gpa, bytes.len())])
    }

    /// Sets the header's ioprio field.
    pub fn ioprio(mut self, ioprio: u32) -> Self {
        self.ioprio = ioprio;
        self
    }

    /// Splits the header over descriptors of these lengths, 16 bytes together.
    pub fn split_header(mut self, parts: &[usize]) -> Self {
        self.header_parts = parts.to_vec();
        self
    }

    /// Puts the header and a copy of the first data buffer into one descriptor.
    pub fn header_with_data(mut self) -> Self {
        self.header_with_data = true;
        self
    }

    /// Puts the status byte behind the last data buffer, in the same descriptor: that buffer's memory must have room
    /// for one byte more.
    pub fn status_with_data(mut self) -> Self {
        self.status_with_data = true;
        self
    }

    /// Leaves the status byte away, which no device can answer well.
    pub fn no_status(mut self) -> Self {
        self.no_status = true;
        self
    }

    /// Lays the request out in guest memory: its chain and the guest address of its status byte.
    pub fn lay_out(&self, mem: &GuestMemory) -> (Vec<Seg>, u64) {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&self.kind.to_le_bytes());
        header[4..8].copy_from_slice(&self.ioprio.to_le_bytes());
        header[8..].copy_from_slice(&self.sector.to_le_bytes());
        let mut data = self.data.clone();
        let mut chain = Vec::with_capacity(data.len() + 4);
        if self.header_with_data {
            let first = data.remove(0);
            assert!(!first.writable, "one descriptor has one direction");
            let payload = mem.read_vec(first.gpa, first.len as usize);
            let gpa = mem.alloc(16 + payload.len(), 16);
            mem.write(gpa, &header);
            mem.write(gpa + 16, &payload);
            chain.push(Seg::readable(gpa, 16 + payload.len()));
        } else {
            let gpa = mem.alloc(16, 16);
            mem.write(gpa, &header);
            let mut at = gpa;
            for len in &self.header_parts {
                chain.push(Seg::readable(at, *len));
                at += *len as u64;
            }
        }
        chain.append(&mut data);
        let status = if self.status_with_data {
            let last = chain.last_mut().expect("there is a header at least");
            assert!(last.writable, "the status byte is written by the device");
            last.len += 1;
            last.gpa + u64::from(last.len) - 1
        } else {
            let gpa = mem.alloc(1, 1);
            if !self.no_status {
                chain.push(Seg::writable(gpa, 1));
            }
            gpa
        };
        (chain, status)
    }

    /// Pushes the request into `queue`; the device sees it after `publish`. Panics if the ring has no room.
    pub fn push(&self, queue: &mut Queue, token: u64) -> u16 {
        let (chain, status) = self.lay_out(&queue.mem.clone());
        queue
            .push_chain(token, &chain, status)
            .expect("the ring has room for the chain")
    }

    /// Pushes the request into an idle queue and waits for its completion.
    pub fn run(&self, queue: &mut Queue) -> Completion {
        self.push(queue, 0);
        queue.publish();
        finish(queue)
    }
}

/// Waits for the next completion; panics after the deadline.
pub fn finish(queue: &mut Queue) -> Completion {
    queue.wait(DEADLINE).unwrap_or_else(|| {
        panic!(
            "queue {}: no completion within {DEADLINE:?}, {} in flight",
            queue.index,
            queue.in_flight()
        )
    })
}

/// Waits for `count` completions, in the order they came.
pub fn finish_all(queue: &mut Queue, count: usize) -> Vec<Completion> {
    (0..count).map(|_| finish(queue)).collect()
}

/// A session and its queues, with plain synchronous requests for tests about something else.
#[derive(Debug)]
pub struct Disk {
    /// The session.
    pub front: Front,
    /// The queues, started and enabled.
    pub queues: Vec<Queue>,
    buffer: u64,
}

impl Disk {
    /// Longest synchronous request in bytes.
    pub const BUFFER: usize = 2 << 20;

    /// Connects with the usual set-up and starts `queues` queues.
    pub fn attach(socket: &Path, queues: usize) -> Self {
        Self::attach_with(socket, &Setup::default(), queues, QueueSetup::default())
            .expect("the back end serves a front end")
    }

    /// Connects and starts `queues` queues as told.
    pub fn attach_with(
        socket: &Path,
        setup: &Setup,
        queues: usize,
        queue: QueueSetup,
    ) -> Result<Self> {
        Self::of(Front::connect(socket, setup)?, queues, queue)
    }

    /// Starts `queues` queues of a session.
    pub fn of(mut front: Front, queues: usize, queue: QueueSetup) -> Result<Self> {
        let queues = (0..queues)
            .map(|index| front.queue(index, queue))
            .collect::<Result<Vec<_>>>()?;
        let buffer = front.mem.alloc(Self::BUFFER, 4096);
        Ok(Self {
            front,
            queues,
            buffer,
        })
    }

    /// Guest memory.
    pub fn mem(&self) -> &GuestMemory {
        &self.front.mem
    }

    /// Runs a request on queue `queue`, which must be idle.
    pub fn run(&mut self, queue: usize, request: &Request) -> Completion {
        request.run(&mut self.queues[queue])
    }

    /// Reads `len` bytes at `sector`; panics unless all of it went well.
    pub fn read(&mut self, queue: usize, sector: u64, len: usize) -> Vec<u8> {
        assert!(len <= Self::BUFFER, "read in smaller pieces");
        self.mem().fill(self.buffer, len, 0xa5);
        let data = [Seg::writable(self.buffer, len)];
        let done = self.io(queue, kind::IN, sector, &data);
        assert_eq!(done.status, status::OK, "read of {len} at sector {sector}");
        assert_eq!(done.len as usize, len + 1, "used length of a read");
        self.mem().read_vec(self.buffer, len)
    }

    /// Writes `bytes` at `sector`; panics unless all of it went well.
    pub fn write(&mut self, queue: usize, sector: u64, bytes: &[u8]) {
        assert!(bytes.len() <= Self::BUFFER, "write in smaller pieces");
        self.mem().write(self.buffer, bytes);
        let data = [Seg::readable(self.buffer, bytes.len())];
        let done = self.io(queue, kind::OUT, sector, &data);
        assert_eq!(done.status, status::OK, "write at sector {sector}");
        assert_eq!(done.len, 1, "used length of a write");
    }

    /// Flushes; panics unless it went well.
    pub fn flush(&mut self, queue: usize) {
        let done = self.io(queue, kind::FLUSH, 0, &[]);
        assert_eq!((done.status, done.len), (status::OK, 1), "flush");
    }

    /// Discards or writes zeroes.
    pub fn clear(&mut self, queue: usize, kind: u32, range: Range) -> Completion {
        self.mem().write(self.buffer, &range.to_bytes());
        let data = [Seg::readable(self.buffer, 16)];
        self.io(queue, kind, 0, &data)
    }

    /// Reads the whole disk.
    pub fn read_all(&mut self, queue: usize) -> Vec<u8> {
        let capacity = self
            .front
            .config()
            .expect("the device has a config")
            .capacity;
        let step = Self::BUFFER as u64 / 2 / SECTOR;
        (0..capacity)
            .step_by(step as usize)
            .flat_map(|sector| {
                let sectors = step.min(capacity - sector);
                self.read(queue, sector, (sectors * SECTOR) as usize)
            })
            .collect()
    }

    fn io(&mut self, queue: usize, kind: u32, sector: u64, data: &[Seg]) -> Completion {
        let queue = &mut self.queues[queue];
        queue
            .push(0, kind, 0, sector, data)
            .expect("an idle ring has room");
        queue.publish();
        finish(queue)
    }
}
