//! The device, as vhost-user-backend sees it: features, configuration space, memory. Rings are
//! [`super::vring`]'s.

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use vhost::vhost_user::Backend as BackendChannel;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::VhostUserBackend;
use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::EventSet;

use crate::mq::limits::MAX_RING_SIZE;
use crate::virtio::features;
use crate::virtio::memory::MemoryTable;

use super::disk::CacheError;
use super::vring::{GuestMemory, SessionState, Vring};

/// One session's device.
pub struct DeviceBackend {
    session: Arc<SessionState>,
    /// Kept open: the front end takes its closing for the device's end.
    channel: Mutex<Option<BackendChannel>>,
}

impl fmt::Debug for DeviceBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceBackend")
            .field("session", &self.session)
            .finish_non_exhaustive()
    }
}

impl DeviceBackend {
    /// The device of `session`.
    pub fn new(session: Arc<SessionState>) -> Self {
        DeviceBackend {
            session,
            channel: Mutex::new(None),
        }
    }
}

impl VhostUserBackend for DeviceBackend {
    type Bitmap = ();
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        usize::from(self.session.disk().config.num_queues)
    }

    fn max_queue_size(&self) -> usize {
        usize::from(MAX_RING_SIZE)
    }

    fn features(&self) -> u64 {
        self.session.disk().features()
    }

    fn acked_features(&self, acked: u64) {
        // A front end that only negotiates for itself acknowledges no device features yet.
        if acked & features::VERSION_1 != 0 {
            self.session.disk().driver_acknowledged(acked);
        }
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::RESET_DEVICE
            | VhostUserProtocolFeatures::BACKEND_REQ
            // The guard answers its messages.
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD
    }

    fn reset_device(&self) {
        self.session.reset();
    }

    fn set_event_idx(&self, _enabled: bool) {
        // Each ring is told by the crate itself.
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        self.session.disk().read_config(offset, size)
    }

    fn set_config(&self, offset: u32, bytes: &[u8]) -> io::Result<()> {
        let disk = self.session.disk();
        match disk.write_config(offset, bytes) {
            Ok(()) => Ok(()),
            // An error would close the session for something a guest's driver wrote. The write is
            // ignored, as real hardware does.
            Err(error @ CacheError::Write(_)) => {
                log::warn!("disk {}: {error}", disk.config.serial);
                Ok(())
            }
            // The guest must not believe in a promise that cannot be kept, and this is the only way
            // to tell: a front end that is refused, or has to connect again, shows the old mode.
            Err(error @ CacheError::Sync(_)) => {
                log::error!("disk {}: {error}", disk.config.serial);
                Err(io::Error::other(error))
            }
        }
    }

    fn update_memory(&self, memory: GuestMemory) -> io::Result<()> {
        let before = self.session.memory();
        let table = MemoryTable::from_guest_memory(memory.memory().into_inner(), before.as_deref())
            .map_err(io::Error::other)?;
        self.session.set_memory(Arc::new(table));
        Ok(())
    }

    fn set_backend_req_fd(&self, channel: BackendChannel) {
        *self.channel.lock().unwrap_or_else(PoisonError::into_inner) = Some(channel);
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        // No thread of the crate's: our workers do the data path.
        Vec::new()
    }

    fn handle_event(
        &self,
        _event: u16,
        _events: EventSet,
        _rings: &[Vring],
        _thread: usize,
    ) -> io::Result<()> {
        unreachable!("the crate has no thread that could have an event")
    }
}
