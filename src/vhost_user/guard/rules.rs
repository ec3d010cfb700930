//! What a front end may say, and when: the requests, their shapes, and what each must hold.
//!
//! The rules see a message after it is whole and before the device does. They keep no more of a
//! session than they need to judge the next message: what was negotiated and which memory there is.

use std::os::fd::AsFd;
use std::sync::Arc;

use vhost::vhost_user::message::{
    FrontendReq, VhostUserProtocolFeatures, VhostUserVirtioFeatures, VhostUserVringAddrFlags,
};

use super::SessionLimits;
use super::config_notifier::Channel;
use super::dirty_log::Log;
use super::fd_share::Promised;
use super::inflight::{self, InflightStore};
use super::memory_regions::{REGION_BYTES, Region, RegionTable};
use super::payload_checks;
use super::payload_sizes::{SINGLE_HEADER_BYTES, Shape, TABLE_HEADER_BYTES, U64_BYTES};
use super::received_fds::FdKind;
use super::refusal::Reason;
use super::stream_sockets;
use super::wire::{
    FLAG_NEED_REPLY, FLAG_REPLY, Header, MAX_FDS, Message, VERSION, VERSION_MASK, u32_at, u64_at,
};

/// Bits of the payload of SET_VRING_KICK, CALL and ERR that hold the queue index.
const VRING_INDEX_MASK: u64 = 0xff;
/// The bit that says that no descriptor is attached.
const VRING_NO_FD: u64 = 0x100;

/// What a call or an error may be written to.
const WRITTEN: &str = "an eventfd, a pipe to write or a Unix stream socket";

/// One session's rules and what they remember.
#[derive(Debug)]
pub(super) struct Rules {
    limits: SessionLimits,
    channel: Arc<Channel>,
    pub(super) owned: bool,
    /// What the device answered to GET_FEATURES, once it has.
    offered: Option<u64>,
    pub(super) acked: u64,
    /// What the device answered to GET_PROTOCOL_FEATURES, once it has.
    protocol_offered: Option<u64>,
    pub(super) protocol_acked: u64,
    pub(super) memory: RegionTable,
    pub(super) log: Log,
    pub(super) promised: Promised,
}

impl Rules {
    pub(super) fn new(limits: SessionLimits, channel: Arc<Channel>) -> Rules {
        Rules {
            limits,
            channel,
            owned: false,
            offered: None,
            acked: 0,
            protocol_offered: None,
            protocol_acked: 0,
            memory: RegionTable::default(),
            log: Log::default(),
            promised: Promised::default(),
        }
    }

    /// Judges a header of the front end, before a byte of payload is received.
    pub(super) fn check_header(&self, header: Header) -> Result<(), Reason> {
        let Header {
            request,
            flags,
            size,
        } = header;
        if flags & !FLAG_NEED_REPLY != VERSION {
            return Err(Reason::Flags(flags));
        }
        let shape = FrontendReq::try_from(request)
            .ok()
            .and_then(Shape::of)
            .ok_or(Reason::Unsupported)?;
        if let Some((feature, name)) = shape.needs
            && self.protocol_acked & feature.bits() == 0
        {
            return Err(Reason::ProtocolFeature(name));
        }
        let fits = |size: usize| (shape.least..=shape.most).contains(&size);
        if !usize::try_from(size).is_ok_and(fits) {
            return Err(Reason::PayloadSize {
                got: size,
                least: shape.least,
                most: shape.most,
            });
        }
        Ok(())
    }

    /// Whether the log has a bit for each page of the guest's memory, if pages are marked.
    fn check_log(&self) -> Result<(), Reason> {
        self.log.check(self.acked, self.memory.guest_end())
    }

    /// Judges a whole message whose header passed, and gives it back as the device shall see it.
    pub(super) fn admit(&mut self, mut message: Message) -> Result<Message, Reason> {
        use FrontendReq as R;
        let request = R::try_from(message.header.request).expect("the header was checked");
        let payload = message.payload.as_slice();
        self.promised.count(request, &message, self.memory.len())?;
        match request {
            R::SET_MEM_TABLE => {
                let message = self.set_mem_table(message)?;
                self.check_log()?;
                return Ok(message);
            }
            R::ADD_MEM_REG => {
                expect_fds(&message, 1)?;
                self.add_mem_region(&message)?;
                self.check_log()?;
            }
            R::REM_MEM_REG => {
                // The protocol wants none and allows for one that is closed unused.
                message.fds.pop();
                expect_fds(&message, 0)?;
                self.memory
                    .remove(&Region::decode(&message.payload[SINGLE_HEADER_BYTES..]))?;
            }
            R::SET_LOG_BASE => {
                expect_fds(&message, 1)?;
                self.log.set_base(&message, self.memory.guest_end())?;
            }
            R::SET_DEVICE_STATE_FD => {
                expect_fds(&message, 1)?;
                payload_checks::device_state(&message)?;
            }
            R::SET_BACKEND_REQ_FD => {
                expect_fds(&message, 1)?;
                self.set_channel(&message)?;
            }
            R::SET_VRING_KICK | R::SET_VRING_CALL | R::SET_VRING_ERR => {
                self.vring_fd(request, &message)?;
            }
            R::GET_INFLIGHT_FD | R::SET_INFLIGHT_FD => {
                expect_fds(&message, usize::from(request == R::SET_INFLIGHT_FD))?;
                inflight::check(&message, &self.limits)?;
            }
            _ => {
                expect_fds(&message, 0)?;
                match request {
                    R::SET_OWNER => self.set_owner()?,
                    R::RESET_OWNER => {
                        self.owned = false;
                        self.acked = 0;
                    }
                    R::RESET_DEVICE => self.acked = 0,
                    R::SET_FEATURES => {
                        self.acked = offered(u64_at(payload, 0), self.offered)?;
                        self.check_log()?;
                    }
                    R::SET_PROTOCOL_FEATURES => self.set_protocol_features(u64_at(payload, 0))?,
                    R::SET_VRING_NUM => self.vring_num(payload)?,
                    R::SET_VRING_BASE => self.vring_base(payload)?,
                    R::GET_VRING_BASE => self.queue_index(u32_at(payload, 0))?,
                    R::SET_VRING_ENABLE => self.vring_enable(payload)?,
                    R::SET_VRING_ADDR => self.vring_addr(payload)?,
                    R::GET_CONFIG | R::SET_CONFIG => payload_checks::config(request, payload)?,
                    // No payload and nothing to remember.
                    _ => {}
                }
            }
        }
        Ok(message)
    }

    /// Takes note of what the device tells the front end about its features.
    pub(super) fn observe_answer(&mut self, answer: &Message) {
        if answer.payload.len() != U64_BYTES {
            return;
        }
        let value = u64_at(&answer.payload, 0);
        match FrontendReq::try_from(answer.header.request) {
            Ok(FrontendReq::GET_FEATURES) => self.offered = Some(value),
            Ok(FrontendReq::GET_PROTOCOL_FEATURES) => self.protocol_offered = Some(value),
            _ => {}
        }
    }

    /// Carries out a request that the guard answers itself.
    pub(super) fn carry_out(
        &self,
        message: &Message,
        store: &InflightStore,
    ) -> Result<Option<Message>, Reason> {
        let acked = self.protocol_acked & VhostUserProtocolFeatures::REPLY_ACK.bits() != 0;
        inflight::carry_out(message, &self.limits, store, acked)
    }

    fn set_owner(&mut self) -> Result<(), Reason> {
        if self.owned {
            return Err(Reason::Owned);
        }
        self.owned = true;
        Ok(())
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<(), Reason> {
        self.protocol_acked = features;
        match features & !self.protocol_offered.unwrap_or(u64::MAX) {
            0 => {}
            extra => return Err(Reason::ProtocolNotOffered(extra)),
        }
        let both =
            (VhostUserProtocolFeatures::BACKEND_REQ | VhostUserProtocolFeatures::CONFIG).bits();
        self.channel.set_negotiated(features & both == both);
        Ok(())
    }

    fn set_channel(&self, message: &Message) -> Result<(), Reason> {
        let examine = |error: std::io::Error| Reason::Examine(error.to_string());
        let fd = &message.fds[0];
        match FdKind::of(fd).map_err(examine)? {
            FdKind::UnixStream => {}
            other => return Err(Reason::ChannelKind(other.describe())),
        }
        stream_sockets::written(fd, "back-end channel's")?;
        let duplicate = fd.as_fd().try_clone_to_owned().map_err(examine)?;
        self.channel.set_socket(duplicate);
        Ok(())
    }

    /// The table with its regions in the order of guest addresses, in which the device wants them,
    /// each with its descriptor.
    fn set_mem_table(&mut self, mut message: Message) -> Result<Message, Reason> {
        let count = u32_at(&message.payload, 0);
        let most = MAX_FDS.min(self.limits.max_regions);
        let regions = usize::try_from(count).unwrap_or(usize::MAX);
        if regions == 0 || regions > most {
            return Err(Reason::RegionCount {
                count: count.into(),
                max: most,
            });
        }
        let want = TABLE_HEADER_BYTES + regions * REGION_BYTES;
        // User-Mode Linux sends room for two regions and says that there is one. The crate behind
        // wants no more than the regions there are.
        if message.payload.len() < want {
            return Err(Reason::PayloadContents {
                got: message.payload.len(),
                want,
            });
        }
        expect_fds(&message, regions)?;
        let mut table: Vec<_> = message.payload[TABLE_HEADER_BYTES..want]
            .chunks_exact(REGION_BYTES)
            .map(|bytes| (Region::decode(bytes), bytes.to_vec()))
            .zip(message.fds.drain(..))
            .collect();
        for ((region, _), fd) in &table {
            region.check()?;
            region.check_file(fd)?;
        }
        table.sort_by_key(|((region, _), _)| region.guest);
        self.memory
            .replace(table.iter().map(|((region, _), _)| *region).collect())?;

        // The crate behind refuses padding that is not zero; the protocol does not say it is.
        message.payload[4..TABLE_HEADER_BYTES].fill(0);
        message.payload.truncate(TABLE_HEADER_BYTES);
        message.header.size = u32::try_from(want).expect("at most MAX_FDS regions");
        for ((_, bytes), fd) in table {
            message.payload.extend_from_slice(&bytes);
            message.fds.push(fd);
        }
        Ok(message)
    }

    fn add_mem_region(&mut self, message: &Message) -> Result<(), Reason> {
        let region = Region::decode(&message.payload[SINGLE_HEADER_BYTES..]);
        region.check()?;
        region.check_file(&message.fds[0])?;
        if self.memory.len() >= self.limits.max_regions {
            return Err(Reason::RegionCount {
                count: self.memory.len() as u64 + 1,
                max: self.limits.max_regions,
            });
        }
        self.memory.insert(region)
    }

    fn queue_index(&self, index: u32) -> Result<(), Reason> {
        let count = self.limits.max_queues;
        if index >= count.into() {
            return Err(Reason::QueueIndex { index, count });
        }
        Ok(())
    }

    fn vring_fd(&self, request: FrontendReq, message: &Message) -> Result<(), Reason> {
        let value = u64_at(&message.payload, 0);
        if value & !(VRING_INDEX_MASK | VRING_NO_FD) != 0 {
            return Err(Reason::QueueBits(value));
        }
        let queue = value & VRING_INDEX_MASK;
        self.queue_index(u32::try_from(queue).expect("eight bits"))?;
        // Without a descriptor a ring is polled: legal for each of the three.
        expect_fds(message, usize::from(value & VRING_NO_FD == 0))?;
        let Some(fd) = message.fds.first() else {
            return Ok(());
        };
        let kind = FdKind::of(fd).map_err(|error| Reason::Examine(error.to_string()))?;
        let (role, read, expected) = match request {
            // A kick is read, and a pipe at its end reads as an endless one.
            FrontendReq::SET_VRING_KICK => ("kick", true, "an eventfd"),
            // A call is written. User-Mode Linux, which gets no SIGIO from an eventfd, has its
            // pipes for this, and they are socket pairs.
            FrontendReq::SET_VRING_CALL => ("call", false, WRITTEN),
            _ => ("error", false, WRITTEN),
        };
        match kind {
            FdKind::Eventfd => Ok(()),
            FdKind::Pipe { writable: true } if !read => Ok(()),
            FdKind::UnixStream if !read => stream_sockets::written(fd, role),
            other => Err(Reason::FdKind {
                queue,
                role,
                found: other.describe(),
                expected,
            }),
        }
    }

    fn vring_num(&self, payload: &[u8]) -> Result<(), Reason> {
        let (queue, size) = (u32_at(payload, 0), u32_at(payload, 4));
        self.queue_index(queue)?;
        let max = self.limits.max_queue_size;
        if !size.is_power_of_two() || size > max.into() {
            return Err(Reason::QueueSize { queue, size, max });
        }
        Ok(())
    }

    fn vring_base(&self, payload: &[u8]) -> Result<(), Reason> {
        let (queue, base) = (u32_at(payload, 0), u32_at(payload, 4));
        self.queue_index(queue)?;
        if base > u16::MAX.into() {
            return Err(Reason::QueueBase { queue, base });
        }
        Ok(())
    }

    fn vring_enable(&self, payload: &[u8]) -> Result<(), Reason> {
        if self.acked & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
            return Err(Reason::NoProtocolFeatures);
        }
        let (queue, value) = (u32_at(payload, 0), u32_at(payload, 4));
        self.queue_index(queue)?;
        if value > 1 {
            return Err(Reason::QueueEnable { queue, value });
        }
        Ok(())
    }

    fn vring_addr(&self, payload: &[u8]) -> Result<(), Reason> {
        let (queue, flags) = (u32_at(payload, 0), u32_at(payload, 4));
        self.queue_index(queue)?;
        if flags & !VhostUserVringAddrFlags::all().bits() != 0 {
            return Err(Reason::AddressFlags { queue, flags });
        }
        // Alignments: virtio 1.3, 2.7 "Split Virtqueues".
        for (at, part, align) in [
            (8, "descriptor table", 16),
            (16, "used ring", 4),
            (24, "available ring", 2),
        ] {
            let address = u64_at(payload, at);
            if !address.is_multiple_of(align) {
                return Err(Reason::AddressAlign {
                    queue,
                    part,
                    address,
                    align,
                });
            }
            if !self.memory.contains_user(address) {
                return Err(Reason::AddressUnmapped {
                    queue,
                    part,
                    address,
                });
            }
        }
        self.log.set_ring(queue, flags, u64_at(payload, 32))
    }
}

/// Judges a header of the device, which may send answers only. What breaks this is our own bug.
pub(super) fn check_answer_header(header: Header) -> bool {
    header.flags & VERSION_MASK == VERSION
        && header.flags & FLAG_REPLY != 0
        && usize::try_from(header.size)
            .is_ok_and(|size| size <= vhost::vhost_user::message::MAX_MSG_SIZE)
}

fn expect_fds(message: &Message, want: usize) -> Result<(), Reason> {
    let got = message.fds.len();
    if got != want {
        return Err(Reason::FdCount { got, want });
    }
    Ok(())
}

/// `features`, if each was offered. A front end that never asked is held to nothing here.
fn offered(features: u64, offered: Option<u64>) -> Result<u64, Reason> {
    let offered = offered.unwrap_or(u64::MAX);
    match features & !offered {
        0 => Ok(features),
        extra => Err(Reason::NotOffered { extra, offered }),
    }
}
