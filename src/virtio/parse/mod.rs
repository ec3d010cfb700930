//! From a chain to a request: the header is copied once and checked, buffers become host buffers,
//! and what cannot be served is answered on the spot (virtio 1.3, section 5.2.6).
//!
//! How a chain is cut into buffers means nothing (section 2.7.4): the header is its first sixteen
//! readable bytes, the status its last writable byte, and the data what lies between.

use std::ptr::NonNull;

use super::abi::{self, DESC_INDIRECT, DESC_NEXT, DESC_WRITE, HEADER_BYTES, Header, request_type};
use super::chain::{self, Layout};
use super::geometry::DiskShape;
use super::guest_io::{self, GuestIo, Holds, Slot, Used};
use super::pool::{Segment, SegmentPool};
use super::ring::{Head, Ring, RingError};
use crate::mq::ids::Sector;
use crate::mq::limits::{INLINE_SEGMENTS, MAX_SEGMENTS};
use crate::mq::request::{IoPrio, Op, Request, Status};

mod id;
mod ranges;

pub use crate::virtio::odd_requests::Odd;

/// What became of a chain.
#[derive(Debug)]
#[must_use]
pub enum Parsed {
    /// To be done.
    Request(Request, GuestIo),
    /// Answered: rejected, or nothing left to do. Status and data are written; put it.
    Done(Used),
    /// It has more segments than fit inline, and the pool has no buffer: give the head back and
    /// try again when a request has been finished.
    NoRoom(Head),
}

/// Makes a request of the chain at `head`.
///
/// `write_through` marks writes as to be durable when completed. On an error the chain cannot even
/// be answered, so the ring is broken; the head has been given back to it, so that what counts as
/// in flight are only requests that will be finished.
#[inline]
pub fn parse(
    ring: &mut Ring,
    head: Head,
    shape: &DiskShape,
    write_through: bool,
    pool: &mut SegmentPool,
) -> Result<Parsed, RingError> {
    match plain(ring, &head, shape) {
        Some(plain) => Ok(plain.into_parsed(ring, head, write_through)),
        None => any(ring, head, shape, write_through, pool),
    }
}

/// A transfer or a flush that was found good.
struct Plain {
    op: Op,
    header: Header,
    bytes: u64,
    segments: u16,
    status: NonNull<u8>,
}

impl Plain {
    #[inline]
    fn into_parsed(self, ring: &mut Ring, head: Head, write_through: bool) -> Parsed {
        let slot = ring.slot(&head);
        let head = ring.commit(head);
        // SAFETY: `plain` found the status byte and filled that many inline segments of this head
        // with buffers. Unsafe because that is this module's logic.
        let io = unsafe {
            GuestIo::new(
                slot,
                head,
                self.status,
                Slot::inline(slot),
                self.segments,
                Holds::of(self.op),
            )
        };
        Parsed::Request(
            Request {
                op: self.op,
                sector: Sector(if self.op == Op::Flush {
                    0
                } else {
                    self.header.sector
                }),
                bytes: self.bytes,
                segments: self.segments,
                ioprio: ioprio(&self.header),
                fua: self.op == Op::Write && write_through,
                unmap: false,
            },
            io,
        )
    }
}

/// The chain as Linux and most others make it, `[header | data... | status]`, direct or indirect,
/// with few buffers, each within one region, and nothing wrong. Anything else is `None`: nothing
/// has happened then but that inline segments were overwritten.
#[inline]
fn plain(ring: &mut Ring, head: &Head, shape: &DiskShape) -> Option<Plain> {
    let mut first = ring.descriptor(head.index());
    let (mut table, mut len) = (ring.table(), ring.size());
    if first.flags & !DESC_WRITE == DESC_INDIRECT {
        len = chain::table_len(first.len, ring.chain_limit())?;
        let bytes = u64::from(first.len);
        table = ring
            .memory
            .host_near(&mut ring.meta_region, first.addr, bytes)?;
        // SAFETY: the table has at least one descriptor and all of it is mapped. Unsafe because it
        // is in the guest's memory.
        first = abi::Descriptor::from_words(unsafe { abi::read_words(table) });
    }
    if first.flags != DESC_NEXT || first.len != HEADER_BYTES {
        return None;
    }
    let bytes = u64::from(HEADER_BYTES);
    let header = ring
        .memory
        .host_near(&mut ring.meta_region, first.addr, bytes)?;
    // SAFETY: sixteen bytes there are mapped. Unsafe because they are in the guest's memory.
    let header = Header::from_words(unsafe { abi::read_words(header) });
    let (op, data_flags, most) = match header.kind {
        request_type::IN => (Op::Read, DESC_NEXT | DESC_WRITE, INLINE_SEGMENTS),
        request_type::OUT if !shape.read_only => (Op::Write, DESC_NEXT, INLINE_SEGMENTS),
        request_type::FLUSH => (Op::Flush, DESC_NEXT, 0),
        _ => return None,
    };

    // SAFETY: a slot of the ring's. Unsafe because of raw pointers.
    let inline = unsafe { Slot::inline(ring.slot(head)) };
    let (mut next, mut segments, mut total) = (first.next, 0, 0);
    let status = loop {
        if next >= len {
            return None;
        }
        // SAFETY: `len` descriptors from `table` are mapped: either the ring's, or an indirect
        // table that was found whole above. Unsafe because they are in the guest's memory.
        let descriptor = abi::Descriptor::from_words(unsafe {
            abi::read_words(table.add(usize::from(next) * size_of::<Segment>()))
        });
        if descriptor.flags == DESC_WRITE && descriptor.len == 1 {
            break ring
                .memory
                .host_near(&mut ring.meta_region, descriptor.addr, 1)?;
        }
        if descriptor.flags != data_flags || descriptor.len == 0 || segments == most {
            return None;
        }
        let bytes = u64::from(descriptor.len);
        let host = ring
            .memory
            .host_near(&mut ring.data_region, descriptor.addr, bytes)?;
        let segment = Segment::buffer(host, usize::try_from(bytes).ok()?);
        // SAFETY: `segments` is below INLINE_SEGMENTS, the room this head has, and nobody else
        // refers to it: the head was not in flight. Unsafe because of raw pointers.
        unsafe { inline.add(usize::from(segments)).write(segment) };
        segments += 1;
        total += bytes;
        next = descriptor.next;
    };
    let good = op == Op::Flush || (segments > 0 && transfer_fits(shape, header.sector, total));
    good.then_some(Plain {
        op,
        header,
        bytes: total,
        segments,
        status,
    })
}

/// Whether a read or a write can be served as far as its position and length go. The used length,
/// data and status, has to fit into 32 bits.
#[inline]
fn transfer_fits(shape: &DiskShape, sector: u64, bytes: u64) -> bool {
    bytes < u64::from(u32::MAX) && shape.holds(sector, bytes)
}

/// Linux puts ioprio, 16 bits wide, into 32 bits. What does not fit is no priority.
#[inline]
fn ioprio(header: &Header) -> IoPrio {
    IoPrio(u16::try_from(header.ioprio).unwrap_or_default())
}

/// What [`any`] makes of a chain it can answer.
enum Verdict {
    /// Answer it: status, and bytes of data written.
    Answer(Status, u32),
    /// Do it, with the segments that lie at this place in the scratch room.
    Request(Request, std::ops::Range<usize>),
}

/// Any chain, by way of a complete layout.
#[cold]
#[inline(never)]
fn any(
    ring: &mut Ring,
    head: Head,
    shape: &DiskShape,
    write_through: bool,
    pool: &mut SegmentPool,
) -> Result<Parsed, RingError> {
    let layout = match chain::walk(ring, head.index(), &mut pool.scratch) {
        Ok(layout) => layout,
        Err(error) => {
            ring.unpop(head);
            return Err(error);
        }
    };
    ring.count_walk(layout.descriptors);
    let header = take_header(&layout, pool);
    let verdict = match &header {
        Some(header) => judge(&layout, header, shape, write_through, &mut pool.scratch),
        None => Verdict::Answer(Status::IoErr, 0),
    };
    let (request, segments) = match verdict {
        Verdict::Answer(status, bytes) => {
            if status != Status::Ok {
                let bytes = (layout.readable_bytes, layout.writable_bytes);
                pool.odd.note(status, header.as_ref(), bytes, shape);
            }
            let head = ring.commit(head);
            // SAFETY: the walk found the status byte in the guest's memory, which the ring keeps.
            // Unsafe because the compiler does not see that.
            let used = unsafe { guest_io::answer(head, layout.status, status, bytes) };
            if ring.log.is_some() {
                let pieces = &pool.scratch[layout.readable..layout.pieces];
                ring.log_answer(layout.status, pieces, bytes);
            }
            return Ok(Parsed::Done(used));
        }
        Verdict::Request(request, segments) => (request, segments),
    };
    let slot = ring.slot(&head);
    let room = if request.segments <= INLINE_SEGMENTS {
        // SAFETY: a slot of the ring's. Unsafe because of raw pointers.
        unsafe { Slot::inline(slot) }
    } else if let Some(buffer) = pool.lend() {
        buffer
    } else {
        return Ok(Parsed::NoRoom(head));
    };
    for (i, segment) in pool.scratch[segments].iter().enumerate() {
        // SAFETY: the room was chosen for `request.segments`, which is how many these are, and
        // nobody else refers to it yet. Unsafe because of raw pointers.
        unsafe { room.add(i).write(*segment) };
    }
    let head = ring.commit(head);
    // SAFETY: the walk found the status byte; that many segments were just written, of the kind
    // its operation has, inline up to INLINE_SEGMENTS and from the pool for more.
    // Unsafe because that is this module's logic.
    let io = unsafe {
        GuestIo::new(
            slot,
            head,
            layout.status,
            room,
            request.segments,
            Holds::of(request.op),
        )
    };
    Ok(Parsed::Request(request, io))
}

/// Cuts the header off the front of the readable pieces and copies it. `None` if the chain is at
/// fault or has none.
fn take_header(layout: &Layout, pool: &mut SegmentPool) -> Option<Header> {
    if layout.fault || layout.readable_bytes < u64::from(HEADER_BYTES) {
        return None;
    }
    let mut bytes = [0; HEADER_BYTES as usize];
    take(&mut pool.scratch[..layout.readable], &mut bytes);
    let (low, high) = bytes.split_at(8);
    let words =
        [low, high].map(|half| u64::from_ne_bytes(half.try_into().expect("half of sixteen")));
    let mut header = Header::from_words(words);
    header.kind &= !request_type::BARRIER;
    Some(header)
}

/// Moves bytes out of the front of `pieces`, which have to hold that many.
fn take(pieces: &mut [Segment], into: &mut [u8]) {
    let mut done = 0;
    for piece in pieces {
        // SAFETY: pieces of a layout are buffers. Unsafe because a segment can also be an extent.
        let iovec = unsafe { &mut piece.iovec };
        let bytes = iovec.iov_len.min(into.len() - done);
        if bytes == 0 {
            continue;
        }
        let base = NonNull::new(iovec.iov_base.cast::<u8>()).expect("made of a NonNull");
        // SAFETY: the walk found the piece's `iov_len` bytes in guest memory. Unsafe because the
        // guest may write them meanwhile.
        unsafe { abi::read_bytes(base, &mut into[done..done + bytes]) };
        iovec.iov_base = iovec.iov_base.wrapping_byte_add(bytes);
        iovec.iov_len -= bytes;
        done += bytes;
    }
    assert_eq!(
        done,
        into.len(),
        "the layout counted more readable bytes than it has"
    );
}

/// Decides on a chain without fault, whose header has been cut off. The segments of a request are
/// left in `pieces`.
fn judge(
    layout: &Layout,
    header: &Header,
    shape: &DiskShape,
    write_through: bool,
    pieces: &mut [Segment],
) -> Verdict {
    let readable = layout.readable_bytes - u64::from(HEADER_BYTES);
    let writable = layout.writable_bytes - 1;
    let reject = Verdict::Answer(Status::IoErr, 0);
    let mut request = Request {
        op: Op::Flush,
        sector: Sector(0),
        bytes: 0,
        segments: 0,
        ioprio: ioprio(header),
        fua: false,
        unmap: false,
    };
    match header.kind {
        request_type::IN | request_type::OUT => {
            let write = header.kind == request_type::OUT;
            let (bytes, other) = if write {
                (readable, writable)
            } else {
                (writable, readable)
            };
            if other > 0 || (write && shape.read_only) {
                return reject;
            }
            if !transfer_fits(shape, header.sector, bytes) {
                return reject;
            }
            if bytes == 0 {
                return Verdict::Answer(Status::Ok, 0);
            }
            let data = data(layout, write, pieces);
            match u16::try_from(data.len()) {
                Ok(segments) if segments <= MAX_SEGMENTS => request.segments = segments,
                _ => return reject,
            }
            request.op = if write { Op::Write } else { Op::Read };
            request.sector = Sector(header.sector);
            request.bytes = bytes;
            request.fua = write && write_through;
            Verdict::Request(request, data)
        }
        request_type::FLUSH => Verdict::Request(request, 0..0),
        request_type::GET_ID if readable > 0 => reject,
        request_type::GET_ID => {
            let data = data(layout, false, pieces);
            Verdict::Answer(Status::Ok, id::write(&pieces[data], &shape.serial))
        }
        request_type::DISCARD | request_type::WRITE_ZEROES => {
            if writable > 0 || shape.read_only {
                return reject;
            }
            let (op, limits) = if header.kind == request_type::DISCARD {
                (Op::Discard, shape.discard)
            } else {
                (Op::WriteZeroes, shape.write_zeroes)
            };
            let Some(limits) = limits else {
                return Verdict::Answer(Status::Unsupp, 0);
            };
            match ranges::read(op, pieces, layout.readable, readable, limits, shape) {
                Ok(ranges) if ranges.count == 0 => Verdict::Answer(Status::Ok, 0),
                Ok(ranges) => {
                    request.op = op;
                    request.sector = ranges.first;
                    request.bytes = ranges.bytes;
                    request.segments = ranges.count;
                    request.unmap = ranges.unmap;
                    request.fua = write_through;
                    Verdict::Request(request, 0..usize::from(ranges.count))
                }
                Err(status) => Verdict::Answer(status, 0),
            }
        }
        _ => Verdict::Answer(Status::Unsupp, 0),
    }
}

/// The pieces that are data: what is left of the readable ones, or the writable ones without the
/// status byte, which is cut off here.
fn data(layout: &Layout, readable: bool, pieces: &mut [Segment]) -> std::ops::Range<usize> {
    // SAFETY: pieces of a layout are buffers. Unsafe because a segment can also be an extent.
    let len = |piece: &Segment| unsafe { piece.iovec.iov_len };
    if readable {
        // Those the header used up have come to nothing.
        let used_up = pieces[..layout.readable]
            .iter()
            .take_while(|piece| len(piece) == 0)
            .count();
        return used_up..layout.readable;
    }
    let last = layout.pieces - 1;
    // SAFETY: as above; a layout's last piece is the writable one that ends with the status byte.
    // Unsafe for the same reason.
    let left = unsafe {
        pieces[last].iovec.iov_len -= 1;
        pieces[last].iovec.iov_len
    };
    layout.readable..if left == 0 { last } else { layout.pieces }
}

#[cfg(test)]
mod tests;
