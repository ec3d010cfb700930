//! The vhost-user side of a session: what QEMU does with its socket.
//!
//! Negotiation, memory and rings go through `vhost`'s `Frontend`. Messages it cannot say (a call without an eventfd,
//! anything malformed) are written to the socket by hand.

use super::DEADLINE;
use super::config::BlkConfig;
use super::driver::{Queue, QueueSetup};
use super::event::Event;
use super::memory::GuestMemory;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use std::fmt;
use std::fs::File;
use std::io::{self, IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};

/// Feature bits of virtio (virtio 1.3, 6) and virtio-blk (5.2.3).
pub mod features {
    /// Longest segment is in `size_max`.
    pub const SIZE_MAX: u64 = 1 << 1;
    /// Most segments are in `seg_max`.
    pub const SEG_MAX: u64 = 1 << 2;
    /// The disk is read-only.
    pub const RO: u64 = 1 << 5;
    /// The logical block size is in `blk_size`.
    pub const BLK_SIZE: u64 = 1 << 6;
    /// The device flushes.
    pub const FLUSH: u64 = 1 << 9;
    /// The topology fields are valid.
    pub const TOPOLOGY: u64 = 1 << 10;
    /// The cache mode can be changed.
    pub const CONFIG_WCE: u64 = 1 << 11;
    /// More than one queue.
    pub const MQ: u64 = 1 << 12;
    /// The device discards.
    pub const DISCARD: u64 = 1 << 13;
    /// The device writes zeroes.
    pub const WRITE_ZEROES: u64 = 1 << 14;
    /// Indirect descriptor tables.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// used_event and avail_event.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// Not virtio's: vhost-user protocol features (VHOST_USER_F_PROTOCOL_FEATURES).
    pub const PROTOCOL_FEATURES: u64 = 1 << 30;
    /// Not a legacy device.
    pub const VERSION_1: u64 = 1 << 32;
    /// Packed rings, which this driver does not speak.
    pub const RING_PACKED: u64 = 1 << 34;

    /// All that this front end takes if it is offered.
    pub const KNOWN: u64 = SIZE_MAX
        | SEG_MAX
        | RO
        | BLK_SIZE
        | FLUSH
        | TOPOLOGY
        | CONFIG_WCE
        | MQ
        | DISCARD
        | WRITE_ZEROES
        | INDIRECT_DESC
        | EVENT_IDX
        | PROTOCOL_FEATURES
        | VERSION_1;
}

/// vhost-user protocol feature bits this front end takes if they are offered.
pub mod protocol {
    use vhost::vhost_user::message::VhostUserProtocolFeatures;

    /// All that this front end takes if it is offered.
    pub const KNOWN: VhostUserProtocolFeatures = VhostUserProtocolFeatures::MQ
        .union(VhostUserProtocolFeatures::REPLY_ACK)
        .union(VhostUserProtocolFeatures::CONFIG)
        .union(VhostUserProtocolFeatures::RESET_DEVICE)
        .union(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS);
}

/// Numbers of the vhost-user messages sent by hand.
pub mod request {
    /// Payload: queue index, bit 8 if no fd comes with it.
    pub const SET_VRING_KICK: u32 = 12;
    /// As for the kick.
    pub const SET_VRING_CALL: u32 = 13;
    /// As for the kick.
    pub const SET_VRING_ERR: u32 = 14;
}

/// A way a session failed; the test that meets it says what it did.
pub type Result<T> = std::result::Result<T, vhost::Error>;

/// An in-flight region, which outlives sessions.
pub struct Inflight {
    /// What the back end said of it.
    pub description: VhostUserInflight,
    /// Where it is.
    pub file: File,
}

impl Inflight {
    /// Where the records begin in a region that this version makes.
    pub fn records_at(&self) -> u64 {
        (u64::from(self.description.num_queues) * RECORD_BYTES).next_multiple_of(64 << 10)
    }

    /// Where the two slots for notes are.
    pub fn notes_at(&self) -> u64 {
        self.records_at() + u64::from(self.description.num_queues) * RECORD_BYTES + 64
    }

    /// Whether there are notes of the guest.
    pub fn has_notes(&self) -> bool {
        let mut slots = [0; 128];
        self.file
            .read_exact_at(&mut slots, self.notes_at())
            .expect("there is room for notes");
        slots.chunks(64).any(|slot| slot[..8] == *b"\x01\0\0QMKLB")
    }
}

/// Bytes of a record of 1024 entries.
pub const RECORD_BYTES: u64 = 16448;

impl fmt::Debug for Inflight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inflight")
            .field("file", &self.file)
            .finish_non_exhaustive()
    }
}

/// How a session is set up.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Guest address and length in bytes of each memory region.
    pub memory: Vec<(u64, usize)>,
    /// The regions are pages of 2 MiB (hugetlbfs).
    pub huge_pages: bool,
    /// One ADD_MEM_REG a region instead of one SET_MEM_TABLE.
    pub add_regions: bool,
    /// Queues that get a call eventfd before there is memory, as QEMU does it.
    pub early_calls: usize,
    /// Features to take if offered.
    pub features: u64,
    /// Protocol features to take if offered.
    pub protocol: VhostUserProtocolFeatures,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            memory: vec![(0, 64 << 20)],
            huge_pages: false,
            add_regions: false,
            early_calls: 0,
            features: features::KNOWN,
            protocol: protocol::KNOWN,
        }
    }
}

/// One connection to a back end.
pub struct Front {
    /// `vhost`'s front end, for messages without a method here.
    pub vhost: Frontend,
    /// Guest memory, known to the back end.
    pub mem: Arc<GuestMemory>,
    /// Features the back end offers.
    pub offered: u64,
    /// Features in use.
    pub features: u64,
    /// Protocol features the back end offers.
    pub protocol_offered: VhostUserProtocolFeatures,
    /// Protocol features in use.
    pub protocol: VhostUserProtocolFeatures,
    /// Queues the back end offers.
    pub max_queues: u64,
    socket: UnixStream,
}

impl fmt::Debug for Front {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Front")
            .field("features", &format_args!("{:#x}", self.features))
            .field("protocol", &self.protocol)
            .field("mem", &self.mem)
            .finish_non_exhaustive()
    }
}

impl Front {
    /// Connects and negotiates in QEMU's order, up to and with the memory table.
    pub fn connect(socket: &Path, setup: &Setup) -> Result<Self> {
        let mem = match setup.huge_pages {
            true => GuestMemory::huge(&setup.memory),
            false => GuestMemory::new(&setup.memory),
        };
        let mem = Arc::new(mem.map_err(vhost::Error::IOError)?);
        Self::connect_with(socket, setup, mem)
    }

    /// The same with guest memory that exists already, as when a front end comes back.
    pub fn connect_with(socket: &Path, setup: &Setup, mem: Arc<GuestMemory>) -> Result<Self> {
        let socket = UnixStream::connect(socket).map_err(vhost::Error::IOError)?;
        Self::negotiate(socket, setup, mem)
    }

    /// The same on a socket that is connected already.
    pub fn negotiate(socket: UnixStream, setup: &Setup, mem: Arc<GuestMemory>) -> Result<Self> {
        // A back end that does not answer is a failure, not a hang.
        for set in [UnixStream::set_read_timeout, UnixStream::set_write_timeout] {
            set(&socket, Some(DEADLINE)).map_err(vhost::Error::IOError)?;
        }
        let copy = socket.try_clone().map_err(vhost::Error::IOError)?;
        let mut vhost = Frontend::from_stream(copy, 1);
        let offered = vhost.get_features()?;
        let features = offered & setup.features;
        let mut protocol_offered = VhostUserProtocolFeatures::empty();
        let mut protocol = VhostUserProtocolFeatures::empty();
        let mut max_queues = 1;
        if features & features::PROTOCOL_FEATURES != 0 {
            protocol_offered = vhost.get_protocol_features()?;
            protocol = protocol_offered & setup.protocol;
            vhost.set_protocol_features(protocol)?;
            if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
                vhost.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
            }
            if protocol.contains(VhostUserProtocolFeatures::MQ) {
                max_queues = vhost.get_queue_num()?;
            }
        }
        vhost.set_owner()?;
        vhost.set_features(features)?;
        let mut front = Self {
            vhost,
            mem,
            offered,
            features,
            protocol_offered,
            protocol,
            max_queues,
            socket,
        };
        for index in 0..setup.early_calls {
            let call = Event::new().map_err(vhost::Error::IOError)?;
            front.send_call(index, Some(&call))?;
        }
        front.send_memory(setup.add_regions)?;
        Ok(front)
    }

    /// Tells the back end of the memory again: a region at a time or in one table.
    pub fn send_memory(&mut self, add_regions: bool) -> Result<()> {
        let regions = self.region_infos();
        if add_regions {
            for region in &regions {
                self.vhost.add_mem_region(region)?;
            }
        } else {
            self.vhost.set_mem_table(&regions)?;
        }
        Ok(())
    }

    /// The memory's regions as the messages describe them.
    pub fn region_infos(&self) -> Vec<VhostUserMemoryRegionInfo> {
        self.mem
            .regions()
            .iter()
            .map(|region| VhostUserMemoryRegionInfo {
                guest_phys_addr: region.gpa,
                memory_size: region.len as u64,
                userspace_addr: region.user_address(),
                mmap_offset: 0,
                mmap_handle: region.fd().as_raw_fd(),
            })
            .collect()
    }

    /// Makes a queue as the negotiated features have it and starts it.
    pub fn queue(&mut self, index: usize, setup: QueueSetup) -> Result<Queue> {
        let queue = self.prepare_queue(index, setup)?;
        self.start(&queue)?;
        self.vhost.set_vring_enable(index, true)?;
        Ok(queue)
    }

    /// Makes a queue as the negotiated features have it, without telling the back end.
    pub fn prepare_queue(&self, index: usize, mut setup: QueueSetup) -> Result<Queue> {
        setup.event_idx &= self.features & features::EVENT_IDX != 0;
        setup.indirect &= self.features & features::INDIRECT_DESC != 0;
        Queue::new(&self.mem, index, setup).map_err(vhost::Error::IOError)
    }

    /// GET_INFLIGHT_FD: a new region for this many queues of this size.
    pub fn new_inflight(&mut self, queues: usize, size: u16) -> Result<Inflight> {
        let wanted = VhostUserInflight::new(0, 0, queues as u16, size);
        let (description, file) = self.vhost.get_inflight_fd(&wanted)?;
        Ok(Inflight { description, file })
    }

    /// SET_INFLIGHT_FD.
    pub fn set_inflight(&mut self, region: &Inflight) -> Result<()> {
        self.vhost
            .set_inflight_fd(&region.description, region.file.as_raw_fd())
    }

    /// NUM, BASE, ADDR, CALL and KICK for a queue; not ENABLE. The base is the used index, as QEMU has it: everything
    /// after it has yet to be answered.
    pub fn start(&mut self, queue: &Queue) -> Result<()> {
        self.set_ring(queue, queue.device_used_idx())?;
        self.send_call(queue.index, queue.call_fd())?;
        self.send_kick(queue)
    }

    /// NUM, BASE and ADDR for a queue.
    pub fn set_ring(&mut self, queue: &Queue, base: u16) -> Result<()> {
        let [desc, avail, used] = queue.ring_addresses().map(|gpa| self.mem.user_address(gpa));
        self.vhost.set_vring_num(queue.index, queue.size())?;
        self.vhost.set_vring_base(queue.index, base)?;
        self.vhost.set_vring_addr(
            queue.index,
            &VringConfigData {
                queue_max_size: queue.size(),
                queue_size: queue.size(),
                flags: 0,
                desc_table_addr: desc,
                used_ring_addr: used,
                avail_ring_addr: avail,
                log_addr: None,
            },
        )
    }

    /// SET_VRING_KICK with the queue's kick eventfd.
    pub fn send_kick(&mut self, queue: &Queue) -> Result<()> {
        self.send_vring_fd(
            request::SET_VRING_KICK,
            queue.index,
            Some(queue.kick_fd().as_fd()),
        )
    }

    /// SET_VRING_CALL; `None`: the driver polls.
    pub fn send_call(&mut self, index: usize, call: Option<&Event>) -> Result<()> {
        self.send_vring_fd(request::SET_VRING_CALL, index, call.map(AsFd::as_fd))
    }

    /// Gives a running queue another call eventfd, or none.
    pub fn set_call(&mut self, queue: &mut Queue, call: Option<Event>) -> Result<()> {
        self.send_call(queue.index, call.as_ref())?;
        queue.replace_call(call);
        Ok(())
    }

    /// A kick, call or err message with an eventfd, or with bit 8 saying that there is none.
    pub fn send_vring_fd(
        &mut self,
        request: u32,
        index: usize,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<()> {
        let payload = index as u64 | if fd.is_none() { 1 << 8 } else { 0 };
        let acked = self.acks();
        self.send_raw(
            request,
            if acked { 0b1001 } else { 1 },
            &payload.to_ne_bytes(),
            fd.as_slice(),
        )
        .map_err(vhost::Error::IOError)?;
        if acked {
            let (_, reply) = self.receive_raw().map_err(vhost::Error::IOError)?;
            if reply != [0; 8] {
                let said = format!("message {request} was answered with {reply:?}");
                return Err(vhost::Error::IOError(io::Error::other(said)));
            }
        }
        Ok(())
    }

    /// True if messages are acknowledged (REPLY_ACK).
    pub fn acks(&self) -> bool {
        self.protocol.contains(VhostUserProtocolFeatures::REPLY_ACK)
    }

    /// Writes a message of any kind: number, flags (version 1 is 1, please-reply is 8), payload, fds.
    pub fn send_raw(
        &self,
        request: u32,
        flags: u32,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> io::Result<()> {
        let mut message = Vec::with_capacity(12 + payload.len());
        for word in [request, flags, payload.len() as u32] {
            message.extend_from_slice(&word.to_ne_bytes());
        }
        message.extend_from_slice(payload);
        self.send_bytes(&message, fds)
    }

    /// Writes any bytes to the socket, with fds beside them.
    pub fn send_bytes(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let sent = send_with_fds(&self.socket, bytes, fds)?;
        if sent != bytes.len() {
            return Err(io::Error::other("the message was sent in part"));
        }
        Ok(())
    }

    /// Reads one message: its number and its payload.
    pub fn receive_raw(&self) -> io::Result<(u32, Vec<u8>)> {
        let mut header = [0; 12];
        (&self.socket).read_exact(&mut header)?;
        let word = |at: usize| {
            u32::from_ne_bytes(*header[at..].first_chunk().expect("12 bytes of header"))
        };
        let len = word(8) as usize;
        if len > 4096 {
            return Err(io::Error::other(format!("a reply of {len} bytes")));
        }
        let mut payload = vec![0; len];
        (&self.socket).read_exact(&mut payload)?;
        Ok((word(0), payload))
    }

    /// True if the back end closed the connection; waits for that up to the deadline, discarding what comes.
    pub fn is_closed(&self) -> bool {
        let mut bytes = [0; 256];
        loop {
            match (&self.socket).read(&mut bytes) {
                Ok(0) => return true,
                Ok(_) => {}
                Err(error) => {
                    return matches!(
                        error.kind(),
                        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
                    );
                }
            }
        }
    }

    /// The socket, for what has no method here.
    pub fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// SET_VRING_ENABLE.
    pub fn enable(&mut self, index: usize, enabled: bool) -> Result<()> {
        self.vhost.set_vring_enable(index, enabled)
    }

    /// GET_VRING_BASE: stops the ring and returns the next avail index the back end would read.
    pub fn stop(&mut self, index: usize) -> Result<u16> {
        let base = self.vhost.get_vring_base(index)?;
        Ok(u16::try_from(base).expect("a split ring's index has 16 bits"))
    }

    /// RESET_DEVICE.
    pub fn reset_device(&mut self) -> Result<()> {
        self.vhost.reset_device()
    }

    /// SET_FEATURES with the features in use, as after a reset.
    pub fn send_features(&mut self) -> Result<()> {
        self.vhost.set_features(self.features)
    }

    /// `len` bytes of configuration space from `offset`.
    pub fn config_bytes(&mut self, offset: u32, len: u32) -> Result<Vec<u8>> {
        let space = vec![0; len as usize];
        let (_, bytes) =
            self.vhost
                .get_config(offset, len, VhostUserConfigFlags::empty(), &space)?;
        Ok(bytes)
    }

    /// The configuration space as Cloud Hypervisor asks for it.
    pub fn config(&mut self) -> Result<BlkConfig> {
        let bytes = self.config_bytes(0, BlkConfig::LEN_PADDED as u32)?;
        Ok(BlkConfig::parse(&bytes))
    }

    /// Writes to the configuration space.
    pub fn set_config(&mut self, offset: u32, bytes: &[u8]) -> Result<()> {
        self.vhost
            .set_config(offset, VhostUserConfigFlags::WRITABLE, bytes)
    }
}

/// Sends bytes with fds beside them, 64 at most; how many bytes were sent. Allocates nothing.
pub fn send_with_fds(
    socket: &UnixStream,
    bytes: &[u8],
    fds: &[BorrowedFd<'_>],
) -> rustix::io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        let fits = control.push(SendAncillaryMessage::ScmRights(fds));
        assert!(fits, "64 fds at most");
    }
    sendmsg(
        socket,
        &[IoSlice::new(bytes)],
        &mut control,
        SendFlags::NOSIGNAL,
    )
}
