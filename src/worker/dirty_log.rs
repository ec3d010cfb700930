//! Which rings mark what they write, while a guest migrates.

use std::sync::Arc;

use super::Worker;
use crate::mq::ids::{DiskId, HctxId};
use crate::virtio::dirty_log::DiskLog;
use crate::worker::message::Reply;

impl Worker {
    #[cold]
    pub(super) fn set_log(&mut self, disk: DiskId, log: Option<&Arc<DiskLog>>, done: Reply<()>) {
        if let Some(known) = self.disks.get_mut(disk.index()).and_then(Option::as_mut) {
            known.log = log.cloned();
        }
        self.losses = super::LOOK_FOR_LOSSES;
        let rings: Vec<HctxId> = self
            .ports()
            .filter(|(_, port)| port.id.disk == disk)
            .map(|(hctx, _)| hctx)
            .collect();
        for hctx in rings {
            self.log_ring(hctx);
        }
        done.send(());
    }

    /// Gives a ring the log of its disk.
    pub(super) fn log_ring(&mut self, hctx: HctxId) {
        let port = super::open_port(&mut self.ports, hctx);
        let disk = self.disks[port.id.disk.index()].as_ref();
        let log = disk.and_then(|disk| disk.log.as_deref());
        let used = log.and_then(|log| log.used_at(port.id.queue));
        let outcome = port.ring.set_log(log.map(|log| Arc::clone(&log.log)), used);
        if let Err(error) = outcome {
            self.break_ring(hctx, &error);
        }
    }
}
