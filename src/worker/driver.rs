//! Between blk-mq and the engine: turns a request's payloads into a command.

use crate::engine::{self, Command, DiskSlot, Engine, Extent, Payload};
use crate::mq::ids::{DiskId, DriverTag, HctxId};
use crate::mq::request::{Op, Request};
use crate::mq::{Busy, Driver, Parts};
use crate::virtio::guest_io::GuestIo;

/// The worker's engine, seen from blk-mq.
pub(super) struct EngineDriver<'a> {
    pub engine: &'a mut Engine,
    /// The engine's number for each disk.
    pub slots: &'a [Option<DiskSlot>],
    /// By hctx: its guest polls for completions (HCTX_TYPE_POLL).
    pub polled: &'a [bool],
}

impl Driver<GuestIo> for EngineDriver<'_> {
    #[inline]
    fn queue_rq(
        &mut self,
        disk: DiskId,
        hctx: HctxId,
        tag: DriverTag,
        request: &Request,
        parts: Parts<'_, GuestIo>,
    ) -> Result<(), Busy> {
        let slot = self.slots[disk.index()].expect("requests come from disks that were added");
        let mut rest = parts.clone();
        let first = rest.next().expect("a request has at least one part");
        let mut merged;
        let mut extents;
        let payload = match request.op {
            Op::Flush => Payload::None,
            Op::Discard | Op::WriteZeroes => {
                extents = parts.flat_map(GuestIo::ranges).map(|range| Extent {
                    offset: range.offset_bytes,
                    len: range.len_bytes,
                });
                Payload::Extents(&mut extents)
            }
            Op::Read | Op::Write if rest.next().is_none() => Payload::Buffers(first.iovecs()),
            Op::Read | Op::Write => {
                merged = parts.map(GuestIo::iovecs);
                Payload::Merged(&mut merged)
            }
        };
        let command = Command {
            op: request.op,
            offset: request.sector.bytes(),
            bytes: request.bytes,
            fua: request.fua,
            unmap: request.unmap,
            polled: self.polled.get(hctx.index()) == Some(&true),
            payload,
        };
        // SAFETY: queue_rq wants the buffers to stay valid until the command is done. They lie in
        // guest memory, whose mapping the port's ring holds, and a port's ring is neither dropped
        // nor given other memory while its hctx has requests; the request stays in the hctx's table
        // until the engine has reported this tag. Unsafe, because the guest writes to the same
        // memory at any time and so no borrow can stand for it.
        unsafe { self.engine.queue_rq(slot, tag, command) }.map_err(|busy| match busy {
            engine::Busy::WakesOnCompletion => Busy::UntilCompletion,
            engine::Busy::RetryLater => Busy::RetryLater,
        })
    }
}
