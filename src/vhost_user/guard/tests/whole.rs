//! The `vhost` crate's own front end, through the guard, to the crate's own daemon.

use std::os::unix::net::UnixListener;
use std::sync::Mutex;

use vhost::vhost_user::message::VhostUserConfigFlags;
use vhost::vhost_user::{
    Frontend, VhostUserFrontend, VhostUserProtocolFeatures as P, VhostUserVirtioFeatures,
};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vhost_user_backend::{VhostUserBackend, VhostUserDaemon, VringRwLock};
use vm_memory::{
    GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap,
};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::disk::resize::ConfigChanged;

const PAGE: u64 = 0x1000;
const USER: u64 = 0x7f00_0000_0000;

/// A disk with a config space and without a data path, as the daemon is used here: no workers.
#[derive(Default)]
struct Disk {
    config: Mutex<Vec<u8>>,
    channel: Mutex<Option<vhost::vhost_user::Backend>>,
    memory: Mutex<Option<GuestMemoryAtomic<GuestMemoryMmap>>>,
}

impl VhostUserBackend for Disk {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        4
    }

    fn max_queue_size(&self) -> usize {
        256
    }

    fn features(&self) -> u64 {
        VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() | 1 << 32
    }

    fn protocol_features(&self) -> P {
        P::from_bits(ALL_PROTOCOL).unwrap()
    }

    fn reset_device(&self) {}

    fn set_event_idx(&self, _enabled: bool) {}

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let config = self.config.lock().unwrap();
        config[offset as usize..][..size as usize].to_vec()
    }

    fn set_config(&self, offset: u32, bytes: &[u8]) -> io::Result<()> {
        let mut config = self.config.lock().unwrap();
        config[offset as usize..][..bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn update_memory(&self, memory: GuestMemoryAtomic<GuestMemoryMmap>) -> io::Result<()> {
        *self.memory.lock().unwrap() = Some(memory);
        Ok(())
    }

    fn set_backend_req_fd(&self, channel: vhost::vhost_user::Backend) {
        *self.channel.lock().unwrap() = Some(channel);
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        Vec::new()
    }

    fn handle_event(
        &self,
        _event: u16,
        _events: EventSet,
        _vrings: &[VringRwLock],
        _thread: usize,
    ) -> io::Result<()> {
        unreachable!("no workers")
    }
}

struct Whole {
    front_end: Frontend,
    disk: Arc<Disk>,
    daemon: VhostUserDaemon<Arc<Disk>>,
    notifier: ConfigNotifier,
    guard: Ending,
}

fn whole() -> Whole {
    let disk = Arc::new(Disk {
        config: Mutex::new((0..=255).collect()),
        ..Disk::default()
    });
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let mut daemon = VhostUserDaemon::new("disk".into(), Arc::clone(&disk), memory).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("device");
    let listener = UnixListener::bind(&path).unwrap();
    daemon.start_client(path.to_str().unwrap()).unwrap();
    let (backend, _) = listener.accept().unwrap();
    let (front_end, vmm) = UnixStream::pair().unwrap();
    front_end.set_read_timeout(Some(DEADLINE)).unwrap();
    let guard = Guard::new(vmm, backend, limits(), event()).unwrap();
    let notifier = guard.notifier();
    Whole {
        front_end: Frontend::from_stream(front_end, 4),
        disk,
        daemon,
        notifier,
        guard: Ending::of(guard),
    }
}

/// Regions of pages as given, all of one file, at `USER` and on.
fn regions(file: &File, pages: &[(u64, u64)]) -> Vec<VhostUserMemoryRegionInfo> {
    use std::os::fd::AsRawFd;
    pages
        .iter()
        .map(|&(first, count)| VhostUserMemoryRegionInfo {
            guest_phys_addr: first * PAGE,
            memory_size: count * PAGE,
            userspace_addr: USER + first * PAGE,
            mmap_offset: first * PAGE,
            mmap_handle: file.as_raw_fd(),
        })
        .collect()
}

#[test]
fn the_crates_front_end_and_daemon_talk_through_the_guard() {
    let Whole {
        mut front_end,
        disk,
        mut daemon,
        notifier,
        guard,
    } = whole();
    front_end.set_owner().unwrap();
    let features = front_end.get_features().unwrap();
    assert_eq!(features, 1 << 30 | 1 << 32);
    front_end.set_features(features).unwrap();
    let protocol = front_end.get_protocol_features().unwrap();
    front_end.set_protocol_features(protocol).unwrap();
    front_end.set_hdr_flags(vhost::vhost_user::message::VhostUserHeaderFlag::NEED_REPLY);
    assert_eq!(front_end.get_queue_num().unwrap(), 4);
    assert_eq!(front_end.get_max_mem_slots().unwrap(), MAX_REGIONS as u64);

    let space = [0; 60];
    let (_, config) = front_end
        .get_config(0, 60, VhostUserConfigFlags::WRITABLE, &space)
        .unwrap();
    assert_eq!(config, (0..60).collect::<Vec<u8>>());
    front_end
        .set_config(32, VhostUserConfigFlags::WRITABLE, &[7])
        .unwrap();
    assert_eq!(disk.config.lock().unwrap()[32], 7);

    // The crate's daemon drops a table that is not sorted; the guard sorts it.
    let file = file_of(64 * PAGE);
    let table = regions(&file, &[(40, 8), (0, 16), (32, 8)]);
    front_end.set_mem_table(&table).unwrap();
    let more = regions(&file, &[(16, 16)]);
    front_end.add_mem_region(&more[0]).unwrap();
    let seen = disk.memory.lock().unwrap().clone().unwrap().memory();
    assert_eq!(seen.num_regions(), 4);
    assert_eq!(seen.last_addr(), GuestAddress(48 * PAGE - 1));
    front_end.remove_mem_region(&table[0]).unwrap();
    drop(seen);

    for queue in 0..2 {
        front_end.set_vring_num(queue, 128).unwrap();
        front_end.set_vring_base(queue, 0).unwrap();
        let at = USER + queue as u64 * 4 * PAGE;
        front_end
            .set_vring_addr(
                queue,
                &VringConfigData {
                    queue_max_size: 256,
                    queue_size: 128,
                    flags: 0,
                    desc_table_addr: at,
                    used_ring_addr: at + 2 * PAGE,
                    avail_ring_addr: at + PAGE,
                    log_addr: None,
                },
            )
            .unwrap();
        let event = EventFd::new(0).unwrap();
        front_end.set_vring_kick(queue, &event).unwrap();
        front_end.set_vring_kick(queue, &event).unwrap();
        front_end.set_vring_call(queue, &event).unwrap();
        front_end.set_vring_err(queue, &event).unwrap();
        front_end.set_vring_enable(queue, true).unwrap();
    }
    assert_eq!(front_end.get_vring_base(1).unwrap(), 0);

    let (ours, theirs) = UnixStream::pair().unwrap();
    front_end.set_backend_request_fd(&theirs).unwrap();
    assert!(notifier.config_changed().unwrap());
    assert_eq!(find(&ours).unwrap().request, 2);
    assert!(disk.channel.lock().unwrap().is_some());

    front_end.reset_device().unwrap();
    drop(front_end);
    assert!(matches!(guard.join(), SessionEnd::FrontEndLeft));
    // The daemon's thread ends with the session.
    let _ = daemon.wait();
}

#[test]
fn a_request_that_fails_in_the_daemon_is_answered_and_ends_the_session() {
    let Whole {
        mut front_end,
        mut daemon,
        guard,
        ..
    } = whole();
    front_end.get_features().unwrap();
    let protocol = front_end.get_protocol_features().unwrap();
    front_end.set_protocol_features(protocol).unwrap();
    front_end.set_hdr_flags(vhost::vhost_user::message::VhostUserHeaderFlag::NEED_REPLY);
    // Sound to the guard, and not to be mapped: the offset is not a page's.
    let file = file_of(8 * PAGE);
    let mut region = regions(&file, &[(0, 1)]);
    region[0].mmap_offset = 1;
    let answer = front_end.add_mem_region(&region[0]).unwrap_err();
    assert!(matches!(
        answer,
        vhost::Error::VhostUserProtocol(vhost::vhost_user::Error::BackendInternalError)
    ));
    assert!(matches!(guard.join(), SessionEnd::BackendClosed));
    let _ = daemon.wait();
}

#[test]
fn a_refused_request_ends_the_daemons_session_too() {
    let Whole {
        front_end,
        mut daemon,
        guard,
        ..
    } = whole();
    front_end.set_vring_num(0, 100).unwrap();
    let end = guard.join();
    assert_eq!(
        end.to_string(),
        "the front end's message was refused: SET_VRING_NUM: queue 0: size 100 is no power of two \
         from 1 to 256"
    );
    let _ = daemon.wait();
}
