//! The device, as vhost-user-backend sees it: features, configuration space, memory. Rings are
//! [`super::session_state::vring`]'s.

use std::fmt;
use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{FileType, fstat};
use vhost::vhost_user::Backend as BackendChannel;
use vhost::vhost_user::message::{
    VhostTransferStateDirection as Direction, VhostTransferStatePhase, VhostUserProtocolFeatures,
};
use vhost_user_backend::VhostUserBackend;
use vm_memory::{GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};
use vmm_sys_util::epoll::EventSet;

use crate::mq::limits::MAX_RING_SIZE;
use crate::sys::filesystem::FileSystem;
use crate::virtio::features;
use crate::virtio::inflight::region_bytes;
use crate::virtio::memory::MemoryTable;

use super::noop_bitmap::NoopBitmap;
use super::session_state::SessionState;
use super::session_state::vring::{GuestMemory, Vring};
use crate::disk::CacheError;
use crate::disk::device_state::DeviceState;
use crate::sys::fds;
use crate::vhost_user::guard::config_read_from;

/// One session's device.
pub struct DeviceBackend {
    session: Arc<SessionState>,
    /// Kept open: the front end takes its closing for the device's end.
    channel: Mutex<Option<BackendChannel>>,
    /// What is to be heard of the last transfer of the device's state.
    transfer: Mutex<Transfer>,
}

/// A transfer of the device's state.
#[derive(Debug, Default)]
enum Transfer {
    #[default]
    None,
    /// It was given to the front end.
    Saved,
    /// The front end writes it here, and will say when it has.
    Loading(File),
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
            transfer: Mutex::default(),
        }
    }
}

impl DeviceBackend {
    /// Whether the device's state is being saved or loaded.
    pub fn is_transferring(&self) -> bool {
        !matches!(*self.lock_transfer(), Transfer::None)
    }

    fn lock_transfer(&self) -> MutexGuard<'_, Transfer> {
        self.transfer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl VhostUserBackend for DeviceBackend {
    type Bitmap = NoopBitmap;
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
        self.session.is_set_up();
        // A front end that only negotiates for itself acknowledges no device features yet.
        if acked & features::VERSION_1 != 0 {
            self.session.disk().driver_acknowledged(acked);
        }
        self.session.set_logging(acked & features::LOG_ALL != 0);
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        // The guard answers its messages.
        let inflight = match fds::may_be_made(region_bytes(self.session.disk().config.num_queues)) {
            true => VhostUserProtocolFeatures::INFLIGHT_SHMFD,
            // It could not keep what was offered. This was said at the start.
            false => VhostUserProtocolFeatures::empty(),
        };
        inflight
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::RESET_DEVICE
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::LOG_SHMFD
            | VhostUserProtocolFeatures::DEVICE_STATE
    }

    fn reset_device(&self) {
        self.session.is_set_up();
        self.session.reset();
        self.session.set_logging(false);
    }

    fn set_event_idx(&self, _enabled: bool) {
        // Each ring is told by the crate itself.
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        self.session
            .disk()
            .read_config(config_read_from(offset, size), size)
    }

    fn set_config(&self, offset: u32, bytes: &[u8]) -> io::Result<()> {
        let disk = self.session.disk();
        match disk.write_config(offset, bytes) {
            Ok(()) => Ok(()),
            // An error would close the session for something a guest's driver wrote. The write is
            // ignored, as real hardware does.
            Err(error @ CacheError::Write(_)) => {
                log::warn!(disk = disk.id.0; "disk {}: {error}", disk.config.serial);
                Ok(())
            }
            // The guest must not believe in a promise that cannot be kept, and this is the only way
            // to tell: a front end that is refused, or has to connect again, shows the old mode.
            Err(error @ CacheError::Sync(_)) => {
                log::error!(disk = disk.id.0; "disk {}: {error}", disk.config.serial);
                Err(io::Error::other(error))
            }
        }
    }

    fn set_device_state_fd(
        &self,
        direction: Direction,
        _phase: VhostTransferStatePhase,
        file: File,
    ) -> io::Result<Option<File>> {
        let disk = self.session.disk();
        let mut transfer = self.lock_transfer();
        *transfer = Transfer::None;
        *transfer = match direction {
            Direction::SAVE => {
                let state = disk.device_state();
                state.save(&file).inspect_err(|error| {
                    log::warn!(
                        disk = disk.id.0; "disk {}: its state is not saved: {error}",
                        disk.config.serial
                    );
                })?;
                self.session.is_saved();
                Transfer::Saved
            }
            Direction::LOAD => Transfer::Loading(file),
        };
        Ok(None)
    }

    fn check_device_state(&self) -> io::Result<()> {
        let disk = self.session.disk();
        match std::mem::take(&mut *self.lock_transfer()) {
            Transfer::None => Err(io::Error::other("no state was transferred")),
            Transfer::Saved => Ok(()),
            Transfer::Loading(file) => {
                let state = DeviceState::load(&file).inspect_err(|error| {
                    log::warn!(
                        disk = disk.id.0; "disk {}: a state is not restored: {error}",
                        disk.config.serial
                    );
                })?;
                match state {
                    Some(state) => disk.restore_state(state),
                    None => Ok(()),
                }
            }
        }
    }

    fn update_memory(&self, memory: GuestMemory) -> io::Result<()> {
        self.session.is_set_up();
        let before = self.session.memory();
        let may_wait = memory.memory().iter().any(may_wait);
        let table = MemoryTable::from_guest_memory(memory.memory().into_inner(), before.as_deref())
            .map_err(io::Error::other)?;
        let set = self.session.set_memory(Arc::new(table), may_wait);
        set.map_err(|error| {
            let disk = self.session.disk();
            log::warn!(
                disk = disk.id.0;
                "disk {}: its guest's memory is a file on a disk: {error}",
                disk.config.serial
            );
            io::Error::other(error)
        })
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

/// Whether a page fault in a region may wait for a disk's file system: while that is frozen, or slow, the
/// worker that touches the page waits as well. The session guard lets no memory pass for which another
/// program or another machine answers.
fn may_wait(region: &GuestRegionMmap<NoopBitmap>) -> bool {
    let Some(file) = region.file_offset() else {
        return false;
    };
    // A character device (device DAX) is memory, whatever its node lies on.
    let is_device = |mode| FileType::from_raw_mode(mode) == FileType::CharacterDevice;
    let device = fstat(file.file()).is_ok_and(|stat| is_device(stat.st_mode));
    !device && !FileSystem::of(file.file()).is_ok_and(FileSystem::is_memory)
}
