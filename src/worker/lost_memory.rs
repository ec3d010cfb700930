//! Rings whose memory was taken away.

use crate::mq::ids::HctxId;
use crate::sys::sigbus;
use crate::virtio::ring::RingError;

use super::Worker;

impl Worker {
    /// Some memory of the process was lost since we looked last: stops the rings that used it. Their
    /// requests end, with errors perhaps, and so do their sessions; other rings go on.
    #[cold]
    pub(super) fn find_lost_memory(&mut self) {
        self.losses = sigbus::losses();
        for index in 0..self.ports.len() {
            let error = match &self.ports[index] {
                Some(port) if port.ring.is_memory_lost() => RingError::MemoryLost,
                Some(port) if port.ring.is_log_lost() => RingError::LogLost,
                _ => continue,
            };
            let hctx = HctxId(u16::try_from(index).expect("fewer ports than MAX_HCTXS"));
            self.break_ring(hctx, &error);
        }
    }
}
