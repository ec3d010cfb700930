//! A front end that outlives its daemons.

use crate::support::front::Inflight;
use crate::support::*;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;
use tempfile::TempDir;
use vhost::VhostBackend;
use vhost::vhost_user::message::{VhostUserInflight, VhostUserProtocolFeatures};

/// What the next daemon is told of where to go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Base {
    /// QEMU: at the used index.
    Used,
    /// Cloud Hypervisor: at the available index.
    Avail,
}

/// Guest memory, queues and the in-flight region: what stays while daemons come and go.
pub struct World {
    pub image: PathBuf,
    pub mem: Arc<GuestMemory>,
    pub queues: Vec<Queue>,
    pub inflight: Option<Inflight>,
    /// The size of the queues that the front end says when it asks for the region.
    pub inflight_queue_size: u16,
    /// Of a region of the last release: bytes from the record of one queue to the next.
    stride: Option<u64>,
    /// Protocol features to take if offered.
    pub protocol: VhostUserProtocolFeatures,
    /// Features to take if offered.
    pub features: u64,
    /// Features that the guest has accepted: the next daemon hears of these, whatever it offers.
    accepted: Option<u64>,
    _dir: TempDir,
}

impl World {
    /// `count` queues and an image of `bytes` bytes.
    pub fn new(bytes: u64, count: usize, setup: QueueSetup) -> World {
        let dir = TempDir::new().expect("a temporary directory can be made");
        let image = dir.path().join("disk.img");
        std::fs::File::create(&image)
            .and_then(|file| file.set_len(bytes))
            .expect("an image can be made");
        let mem = Arc::new(GuestMemory::new(&[(0, 64 << 20)]).expect("memory"));
        let queues = (0..count)
            .map(|index| Queue::new(&mem, index, setup).expect("a queue"))
            .collect();
        World {
            image,
            mem,
            queues,
            inflight: None,
            inflight_queue_size: setup.size,
            stride: None,
            protocol: protocol::KNOWN | VhostUserProtocolFeatures::INFLIGHT_SHMFD,
            features: features::KNOWN,
            accepted: None,
            _dir: dir,
        }
    }

    /// A daemon on the image.
    pub fn daemon(&self, args: &[&str]) -> Daemon {
        let spec = Spec::path(&self.image).args(args.iter().copied());
        Daemon::start_ours(&spec.lifetime(Duration::from_secs(600)))
    }

    /// Connects as a front end does that wants to survive: a region of the first daemon, given to each.
    pub fn connect(&mut self, socket: &Path) -> front::Result<Front> {
        let setup = Setup {
            protocol: self.protocol,
            features: self.features,
            ..Setup::default()
        };
        let mut front = Front::connect_with(socket, &setup, Arc::clone(&self.mem))?;
        let accepted = *self.accepted.get_or_insert(front.features);
        front.vhost.set_features(accepted)?;
        if !front
            .protocol
            .contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD)
        {
            return Ok(front);
        }
        if self.inflight.is_none() {
            let size = self.inflight_queue_size;
            self.inflight = Some(front.new_inflight(self.queues.len(), size)?);
        }
        front.set_inflight(self.inflight.as_ref().expect("just made"))?;
        Ok(front)
    }

    /// Starts all queues and enables them.
    pub fn start(&self, front: &mut Front, base: Base) -> front::Result<()> {
        for queue in &self.queues {
            let base = match base {
                Base::Used => queue.device_used_idx(),
                Base::Avail => queue.avail_idx(),
            };
            front.set_ring(queue, base)?;
            front.send_call(queue.index, queue.call_fd())?;
            front.send_kick(queue)?;
            front.enable(queue.index, true)?;
        }
        Ok(())
    }

    /// Connects and starts all queues.
    pub fn attach(&mut self, daemon: &Daemon, base: Base) -> Front {
        let mut front = self.connect(daemon.socket()).expect("a daemon serves");
        self.start(&mut front, base).expect("queues start");
        front
    }

    /// Gives the next daemon a region as the last release left it: records with room for the size said, and nothing
    /// else.
    pub fn use_old_region(&mut self) {
        use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
        let size = self.inflight_queue_size;
        let stride = (16 + 16 * u64::from(size)).next_multiple_of(64);
        self.stride = Some(stride);
        let bytes = self.queues.len() as u64 * stride;
        let file = memfd_create("old region", MemfdFlags::CLOEXEC).expect("memory");
        ftruncate(&file, bytes).expect("memory");
        let queues = self.queues.len() as u16;
        self.inflight = Some(Inflight {
            description: VhostUserInflight::new(bytes, 0, queues, size),
            file: file.into(),
        });
    }

    /// How many heads of queue `index` the region has in flight.
    pub fn in_flight(&self, index: usize) -> usize {
        let Some(region) = &self.inflight else {
            return 0;
        };
        let size = usize::from(self.queues[0].size());
        let mut bytes = vec![0; 16 + 16 * size];
        let at = match self.stride {
            Some(stride) => index as u64 * stride,
            None => region.records_at() + index as u64 * front::RECORD_BYTES,
        };
        std::os::unix::fs::FileExt::read_exact_at(&region.file, &mut bytes, at)
            .expect("the region has a record for each queue");
        bytes[16..16 + 16 * size]
            .chunks(16)
            .filter(|entry| entry[0] != 0)
            .count()
    }
}

/// Kills a daemon after some time.
pub struct Killer {
    pub killed: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Killer {
    pub fn of(daemon: &Daemon, after: Duration) -> Killer {
        let pid = i32::try_from(daemon.pid()).expect("process numbers have 31 bits");
        let pid = Pid::from_raw(pid).expect("a child's number is not 0");
        let process = pidfd_open(pid, PidfdFlags::empty()).expect("a child has a pidfd");
        let killed = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&killed);
        let thread = std::thread::spawn(move || {
            std::thread::sleep(after);
            pidfd_send_signal(&process, Signal::KILL).expect("the daemon lives until it is killed");
            flag.store(true, Ordering::Release);
        });
        Killer { killed, thread }
    }

    pub fn join(self) {
        self.thread.join().expect("the killer lives on");
    }
}
