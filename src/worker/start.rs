//! A ring comes to its worker.

use crate::mq::HctxConfig;
use crate::virtio::ring::{Ring, RingError};

use super::queue::{Gates, Port};
use super::{LOOK_FOR_LOSSES, Worker, open_disk};
use crate::worker::counts::RingStats;
use crate::worker::message::{FdRole, StartRing};

impl Worker {
    /// Begins to serve a ring, with everything it will need.
    pub(super) fn start(&mut self, start: StartRing) -> Result<(), RingError> {
        let StartRing {
            ring: id,
            setup,
            memory,
            memory_lost,
            kick,
            call,
            err,
            enabled,
            inflight,
            ctxs,
        } = start;
        assert!(self.find(id).is_none(), "{id} is started twice");
        if self.mq.is_full() {
            return Err(RingError::TooMany);
        }
        let mut ring = Ring::new(&setup, memory)?;
        if let Some(record) = inflight {
            ring.track(record)?;
        }
        if ring.to_resume() > 0 {
            log::info!(
                disk = id.disk.0; "{id}: goes on with {} requests that were in flight",
                ring.to_resume()
            );
        }
        open_disk(&mut self.disks, id.disk)
            .pool
            .get_or_insert_default();
        let hctx = self.mq.add_hctx(HctxConfig {
            disk: id.disk,
            queue: id.queue,
            ring_size: setup.size,
            ctxs,
        });
        if self.ports.len() <= hctx.index() {
            self.ports.resize_with(hctx.index() + 1, || None);
            // A port is on each list at most once.
            self.hot.reserve(self.ports.len());
            self.busy.reserve(self.ports.len());
            self.intake.reserve(self.ports.len());
            self.touched.reserve(self.ports.len());
            self.held_back.reserve(self.ports.len());
        }
        let frozen = self.is_freezing(id.disk);
        let next_avail = ring.next_avail();
        self.ports[hctx.index()] = Some(Port {
            id,
            ring,
            memory_lost,
            has_kick: false,
            call: None,
            err: None,
            gates: Gates {
                disabled: !enabled,
                frozen,
                ..Gates::default()
            },
            hot: false,
            touched: false,
            call_due_ns: None,
            no_room: false,
            inline: false,
            was_enabled: enabled,
            turn: 0,
            stats: RingStats::default(),
        });
        self.join_hold(hctx);
        self.pay_first(id.disk);
        self.log_ring(hctx);
        self.losses = LOOK_FOR_LOSSES;
        self.set_fd(hctx, FdRole::Kick, kick);
        self.set_fd(hctx, FdRole::Call, call);
        self.set_fd(hctx, FdRole::Err, err);
        log::debug!(
            disk = id.disk.0; "worker {}: {id} started: {} entries at {}, {ctxs} ctx",
            self.id,
            setup.size,
            next_avail
        );
        Ok(())
    }
}
