//! Requests that are held and will not be sent: by this process, not at all, or not as they came.

use super::Mq;
use super::elevator::Times;
use super::ids::{DiskId, HctxId};
use super::request::Op;

impl<P> Mq<P> {
    /// Whether the engine has something of an hctx.
    pub fn is_issued(&self, id: HctxId) -> bool {
        let hctx = self.hctx(id);
        hctx.held > 0 || hctx.flush.running
    }

    /// The disk is in write-through mode from now on: writes that wait, also those that failed and are to be sent
    /// again, are to be durable when they complete. The engine has none of the disk's.
    pub fn make_durable(&mut self, disk: DiskId) {
        for member in self.hctxs.iter_mut().flatten() {
            let hctx = &mut member.hctx;
            if hctx.config.disk == disk {
                hctx.table.each_request(|request| {
                    request.fua |= !matches!(request.op, Op::Read | Op::Flush);
                });
            }
        }
    }

    /// Forgets what waits in an hctx of which the engine has nothing: it will be taken from the guest again. `each` gets
    /// the payloads.
    pub fn abandon(&mut self, id: HctxId, mut each: impl FnMut(P)) {
        // What is in the elevator comes out of it.
        self.set_ending(id, true);
        self.fold();
        let mut nobody = ();
        let (hctx, mut below) = self.split(id, &mut nobody);
        let mut waiting = hctx.ctxs.take_all(&mut hctx.table);
        hctx.leftovers.append(&mut hctx.table, &mut waiting);
        while let Some(tag) = hctx.leftovers.pop_front(&mut hctx.table) {
            let entry = hctx.table.get_mut(tag);
            let (request, elevated) = (entry.request, std::mem::take(&mut entry.elevated));
            let times = Times {
                queued_ns: entry.queued_ns,
                started_ns: entry.issued_ns,
                completed_ns: below.now_ns,
            };
            if elevated {
                below.queue.elevated_ended(&request, times);
            }
            let now_ns = below.now_ns;
            hctx.account(&mut below).abandoned(now_ns, request.op);
            hctx.table.remove_parts(tag, |_, _, payload| each(payload));
        }
    }
}
