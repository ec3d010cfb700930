//! Any chain, however the guest cut it up: a walk that lays its host buffers out one after the
//! other. The common shapes do not come here, see [`super::parse`].

use std::ptr::NonNull;

use super::abi::{DESC_INDIRECT, DESC_NEXT, DESC_WRITE, DESCRIPTOR_BYTES, Descriptor};
use super::pool::Segment;
use super::ring::{Ring, RingError};

/// A chain laid out: its readable buffers, then its writable ones, without the empty ones.
#[derive(Debug)]
pub(super) struct Layout {
    /// The status byte: the last writable byte of the chain.
    pub(super) status: NonNull<u8>,
    /// Part of it is outside guest memory, or it has a readable buffer after a writable one, or
    /// too many buffers. What follows is not complete then.
    pub(super) fault: bool,
    /// How many descriptors were looked at.
    pub(super) descriptors: u32,
    /// How many of the host buffers are readable.
    pub(super) readable: usize,
    /// How many host buffers there are.
    pub(super) pieces: usize,
    /// Readable bytes.
    pub(super) readable_bytes: u64,
    /// Writable bytes, the status among them.
    pub(super) writable_bytes: u64,
}

/// Where in a chain the walk is.
enum Table {
    /// In the ring's own descriptors.
    Ring,
    /// In an indirect table.
    Indirect { address: u64, len: u16 },
}

/// Lays out the chain at `head` in `pieces`. An error means that the chain cannot be answered.
pub(super) fn walk(ring: &Ring, head: u16, pieces: &mut [Segment]) -> Result<Layout, RingError> {
    let mut collector = Collector::new(pieces);
    let mut table = Table::Ring;
    let mut index = head;
    let mut visited: u16 = 0;
    let mut descriptors = 0;
    loop {
        let (descriptor, len) = match table {
            Table::Ring => (ring.descriptor(index), ring.size()),
            Table::Indirect { address, len } => {
                (indirect_descriptor(ring, head, address, index)?, len)
            }
        };
        visited += 1;
        descriptors += 1;
        if descriptor.flags & DESC_INDIRECT != 0 {
            // DESC_WRITE means nothing here (section 2.7.5.3.2).
            if let Table::Indirect { .. } = table {
                return Err(RingError::NestedIndirect { head });
            }
            if descriptor.flags & DESC_NEXT != 0 {
                return Err(RingError::IndirectAndNext { head });
            }
            let limit = ring.chain_limit();
            let len = table_len(descriptor.len, limit).ok_or(RingError::IndirectLength {
                head,
                len: descriptor.len,
                limit,
            })?;
            table = Table::Indirect {
                address: descriptor.addr,
                len,
            };
            (index, visited) = (0, 0);
            continue;
        }
        collector.add(ring, &descriptor);
        if descriptor.flags & DESC_NEXT == 0 {
            break;
        }
        if descriptor.next >= len {
            return Err(RingError::NextOutOfRange {
                head,
                next: descriptor.next,
                len,
            });
        }
        if visited >= len {
            return Err(RingError::Loop { head, len });
        }
        index = descriptor.next;
    }
    Ok(Layout {
        descriptors,
        ..collector.finish(ring, head)?
    })
}

/// Descriptors in an indirect table of so many bytes, if that can be.
#[inline]
pub(super) fn table_len(bytes: u32, limit: u16) -> Option<u16> {
    let len = bytes / DESCRIPTOR_BYTES;
    let whole = bytes.is_multiple_of(DESCRIPTOR_BYTES);
    u16::try_from(len)
        .ok()
        .filter(|len| whole && (1..=limit).contains(len))
}

/// Copies a descriptor out of an indirect table, which may lie anywhere in guest memory.
fn indirect_descriptor(
    ring: &Ring,
    head: u16,
    table: u64,
    index: u16,
) -> Result<Descriptor, RingError> {
    let address = table.wrapping_add(u64::from(index) * u64::from(DESCRIPTOR_BYTES));
    let mut bytes = [0; 16];
    if address < table || !ring.memory.read(address, &mut bytes) {
        return Err(RingError::IndirectOutside { head, address });
    }
    let (low, high) = bytes.split_at(8);
    Ok(Descriptor::from_words([low, high].map(|half| {
        u64::from_ne_bytes(half.try_into().expect("half of sixteen"))
    })))
}

/// What the walk has gathered so far.
struct Collector<'a> {
    pieces: &'a mut [Segment],
    count: usize,
    readable: usize,
    readable_bytes: u64,
    writable_bytes: u64,
    /// A writable descriptor has come, even if an empty one.
    writable_seen: bool,
    /// Guest-physical address of the last writable byte; `Some(None)` if that would wrap.
    last_writable: Option<Option<u64>>,
    fault: bool,
}

impl<'a> Collector<'a> {
    fn new(pieces: &'a mut [Segment]) -> Self {
        Collector {
            pieces,
            count: 0,
            readable: 0,
            readable_bytes: 0,
            writable_bytes: 0,
            writable_seen: false,
            last_writable: None,
            fault: false,
        }
    }

    fn add(&mut self, ring: &Ring, descriptor: &Descriptor) {
        let bytes = u64::from(descriptor.len);
        let writable = descriptor.flags & DESC_WRITE != 0;
        if writable {
            self.writable_seen = true;
            self.writable_bytes += bytes;
            if bytes > 0 {
                self.last_writable = Some(descriptor.addr.checked_add(bytes - 1));
            }
        } else {
            // Section 2.7.4.2: readable buffers come first.
            self.fault |= self.writable_seen;
            self.readable_bytes += bytes;
        }
        if self.fault {
            // It will be rejected whatever follows; only the status byte still matters.
            return;
        }
        let (pieces, count) = (&mut *self.pieces, &mut self.count);
        let complete = ring
            .memory
            .host_segments(descriptor.addr, bytes, |host, bytes| {
                let Some(piece) = pieces.get_mut(*count) else {
                    return false;
                };
                *piece = Segment::buffer(host, bytes);
                *count += 1;
                true
            });
        self.fault = !complete;
        if !writable {
            self.readable = self.count;
        }
    }

    fn finish(self, ring: &Ring, head: u16) -> Result<Layout, RingError> {
        let address = self
            .last_writable
            .ok_or(RingError::NoStatus { head })?
            .ok_or(RingError::StatusOutside {
                head,
                address: u64::MAX,
            })?;
        let status = ring
            .memory
            .host(address, 1)
            .ok_or(RingError::StatusOutside { head, address })?;
        Ok(Layout {
            status,
            fault: self.fault,
            descriptors: 0,
            readable: self.readable,
            pieces: self.count,
            readable_bytes: self.readable_bytes,
            writable_bytes: self.writable_bytes,
        })
    }
}
