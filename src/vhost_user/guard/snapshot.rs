//! What a session has agreed on, taken out of one guard and put into another.
//!
//! The front end has no part in it: the new device gets the messages that lead to where the old one
//! was, each judged by the rules as if the front end had sent it. So nothing has to be known of the
//! crate's insides, and a state that no front end could have brought about is refused.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use vhost::vhost_user::message::{FrontendReq, VhostUserProtocolFeatures, VhostUserVirtioFeatures};

use super::barrier;
use super::inflight::{self, CarriedInflight};
use super::memory_regions::REGION_BYTES;
use super::wire::{Flushed, Header, MAX_FDS, Message, Progress, VERSION, u64_at};
use super::{Guard, Refusal, RequestName, rules};

/// The bit of SET_VRING_KICK that says that no descriptor is attached.
const VRING_NO_FD: u64 = 0x100;

/// A memory region, in bytes throughout (vhost-user, "Memory region description").
#[derive(Debug)]
pub struct CarriedRegion {
    /// Guest physical address.
    pub guest: u64,
    /// Its length.
    pub size: u64,
    /// Its address in the front end.
    pub user: u64,
    /// Where it begins in its file.
    pub offset: u64,
    /// Its file.
    pub file: OwnedFd,
}

/// A ring, as far as anything was said about it.
#[derive(Debug)]
pub struct CarriedRing {
    /// Which one.
    pub index: u16,
    /// SET_VRING_NUM
    pub size: u16,
    /// The next avail index.
    pub base: u16,
    /// Descriptor table, used ring and available ring, in the front end's addresses.
    pub addresses: Option<[u64; 3]>,
    /// SET_VRING_ENABLE
    pub enabled: bool,
    /// It was started: SET_VRING_KICK came, with an fd or without.
    pub kicked: bool,
    /// It was being served.
    pub running: bool,
    /// What SET_VRING_KICK, CALL and ERR gave.
    pub kick: Option<OwnedFd>,
    /// See `kick`.
    pub call: Option<OwnedFd>,
    /// See `kick`.
    pub err: Option<OwnedFd>,
}

/// What was negotiated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Negotiated {
    /// SET_OWNER
    pub owned: bool,
    /// SET_FEATURES
    pub features: u64,
    /// SET_PROTOCOL_FEATURES
    pub protocol_features: u64,
}

/// A session at rest.
#[derive(Debug)]
pub struct CarriedSession {
    /// The connection to the front end.
    pub front_end: OwnedFd,
    /// SET_BACKEND_REQ_FD
    pub channel: Option<OwnedFd>,
    /// What was negotiated.
    pub negotiated: Negotiated,
    /// The guest's memory, by address.
    pub regions: Vec<CarriedRegion>,
    /// SET_INFLIGHT_FD
    pub inflight: Option<CarriedInflight>,
    /// Rings about which something was said.
    pub rings: Vec<CarriedRing>,
}

/// Why a session could not be put into a guard. One line.
#[derive(Debug, thiserror::Error)]
pub enum PrimeError {
    /// The rules refuse it.
    #[error("this program refuses what the other had agreed on: {0}")]
    Refused(#[from] Refusal),
    /// The device closed its side.
    #[error("the device cannot be brought to where it was")]
    Device,
    /// It takes too long.
    #[error("the device does not answer")]
    Late,
    /// A socket failed.
    #[error("the device cannot be reached: {0}")]
    Io(#[from] io::Error),
}

impl Guard {
    /// What was negotiated so far.
    pub fn negotiated(&self) -> Negotiated {
        Negotiated {
            owned: self.rules.owned,
            features: self.rules.acked,
            protocol_features: self.rules.protocol_acked,
        }
    }

    /// Duplicates of the connection to the front end and of the back-end channel.
    ///
    /// # Errors
    ///
    /// The process is out of descriptors.
    pub fn connections(&self) -> io::Result<(OwnedFd, Option<OwnedFd>)> {
        Ok((
            self.front_end.as_fd().try_clone_to_owned()?,
            self.channel.duplicate()?,
        ))
    }

    /// The regions of memory, with the descriptor that `file_of` has for each, by guest address.
    ///
    /// # Errors
    ///
    /// What `file_of` says.
    pub fn regions(
        &self,
        file_of: impl Fn(u64) -> io::Result<OwnedFd>,
    ) -> io::Result<Vec<CarriedRegion>> {
        let regions = self.rules.memory.regions().iter();
        regions
            .map(|region| {
                Ok(CarriedRegion {
                    guest: region.guest,
                    size: region.size,
                    user: region.user,
                    offset: region.offset,
                    file: file_of(region.guest)?,
                })
            })
            .collect()
    }

    /// Brings rules and device to where `session` was; its front end is not heard meanwhile. Ready not
    /// later than `deadline`.
    ///
    /// # Errors
    ///
    /// The rules or the device refuse a message; the device does not answer. The guard is of no
    /// more use then.
    pub fn prime(&mut self, session: CarriedSession, deadline: Instant) -> Result<(), PrimeError> {
        // The rules hold the front end to what was offered, so they have to hear it.
        for question in [
            FrontendReq::GET_FEATURES,
            FrontendReq::GET_PROTOCOL_FEATURES,
        ] {
            self.tell(message(question, Vec::new(), None), deadline)?;
            self.hear(deadline)?;
        }
        for message in messages(session) {
            self.tell(message, deadline)?;
        }
        // It works in order, so when it answers this it has carried out all else.
        self.tell(barrier::question(), deadline)?;
        self.hear(deadline)
    }

    /// Sends the device a message that the front end might have sent.
    fn tell(&mut self, message: Message, deadline: Instant) -> Result<(), PrimeError> {
        let request = Some(RequestName(message.header.request));
        let refused = |reason| Refusal { request, reason };
        self.rules.check_header(message.header).map_err(refused)?;
        let message = self.rules.admit(message).map_err(refused)?;
        if inflight::is_ours(message.header.request) {
            // No ring has started, so it comes early enough.
            let answer = self.rules.carry_out(&message, &self.inflight);
            return Ok(answer.map(drop).map_err(refused)?);
        }
        self.to_device.push(message);
        loop {
            if self.to_device.flush(&self.device)? == Flushed::Closed {
                return Err(PrimeError::Device);
            }
            if self.to_device.is_empty() {
                return Ok(());
            }
            self.await_device(PollFlags::OUT, deadline)?;
        }
    }

    /// Takes the device's answer to the last message.
    fn hear(&mut self, deadline: Instant) -> Result<(), PrimeError> {
        loop {
            match self.from_device.receive(&self.device)? {
                Progress::Header(header) if rules::check_answer_header(header) => {
                    self.from_device.expect_payload(header);
                }
                Progress::Message(message) => {
                    self.rules.observe_answer(&message);
                    return Ok(());
                }
                Progress::Blocked => self.await_device(PollFlags::IN, deadline)?,
                _ => return Err(PrimeError::Device),
            }
        }
    }

    fn await_device(&self, what: PollFlags, deadline: Instant) -> Result<(), PrimeError> {
        let left = deadline.saturating_duration_since(Instant::now());
        let left =
            Timespec::try_from(left.max(Duration::from_millis(1))).map_err(|_| PrimeError::Late)?;
        match poll(&mut [PollFd::new(&self.device, what)], Some(&left)) {
            Ok(0) => Err(PrimeError::Late),
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(errno) => Err(PrimeError::Io(errno.into())),
        }
    }
}

/// The messages that lead to where a session was, in an order a front end could have sent them in.
fn messages(session: CarriedSession) -> Vec<Message> {
    use FrontendReq as R;
    let Negotiated {
        owned,
        features,
        protocol_features,
    } = session.negotiated;
    let mut list = Vec::new();
    if protocol_features != 0 {
        list.push(u64_message(R::SET_PROTOCOL_FEATURES, protocol_features));
    }
    if owned {
        list.push(message(R::SET_OWNER, Vec::new(), None));
    }
    if features != 0 {
        list.push(u64_message(R::SET_FEATURES, features));
    }
    if let Some(channel) = session.channel {
        list.push(message(R::SET_BACKEND_REQ_FD, Vec::new(), Some(channel)));
    }
    list.extend(memory_messages(session.regions, protocol_features));
    if let Some(CarriedInflight { payload, file }) = session.inflight {
        list.push(message(R::SET_INFLIGHT_FD, payload, Some(file)));
    }
    for ring in session.rings {
        list.extend(ring_messages(ring, features));
    }
    list
}

/// One table, or region by region where there are more than one message takes.
fn memory_messages(regions: Vec<CarriedRegion>, protocol_features: u64) -> Vec<Message> {
    let slots = VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS.bits();
    let describe = |region: &CarriedRegion| {
        let words = [region.guest, region.size, region.user, region.offset];
        let bytes: Vec<u8> = words.into_iter().flat_map(u64::to_ne_bytes).collect();
        debug_assert_eq!(
            (bytes.len(), u64_at(&bytes, 0)),
            (REGION_BYTES, region.guest)
        );
        bytes
    };
    if regions.is_empty() {
        return Vec::new();
    }
    if regions.len() > MAX_FDS && protocol_features & slots != 0 {
        let add = |region: CarriedRegion| {
            let payload = [vec![0; 8], describe(&region)].concat();
            message(FrontendReq::ADD_MEM_REG, payload, Some(region.file))
        };
        return regions.into_iter().map(add).collect();
    }
    let mut payload = (regions.len() as u64).to_ne_bytes().to_vec();
    payload.extend(regions.iter().flat_map(describe));
    let files = regions.into_iter().map(|region| region.file);
    vec![message(FrontendReq::SET_MEM_TABLE, payload, files)]
}

/// The kick comes last: it starts the ring.
fn ring_messages(ring: CarriedRing, features: u64) -> Vec<Message> {
    use FrontendReq as R;
    let index = u32::from(ring.index);
    let state = |request, value: u32| {
        let words = [index, value];
        message(
            request,
            words.into_iter().flat_map(u32::to_ne_bytes).collect(),
            None,
        )
    };
    let with_fd = |request, fd: Option<OwnedFd>| {
        let bits = u64::from(index) | if fd.is_none() { VRING_NO_FD } else { 0 };
        message(request, bits.to_ne_bytes().to_vec(), fd)
    };
    let mut list = vec![
        state(R::SET_VRING_NUM, ring.size.into()),
        state(R::SET_VRING_BASE, ring.base.into()),
    ];
    if let Some([desc, used, avail]) = ring.addresses {
        // Index and flags, then the addresses, the last for a log.
        let mut payload = [index, 0].map(u32::to_ne_bytes).concat();
        payload.extend([desc, used, avail, 0].map(u64::to_ne_bytes).concat());
        list.push(message(R::SET_VRING_ADDR, payload, None));
    }
    list.extend(ring.call.map(|fd| with_fd(R::SET_VRING_CALL, Some(fd))));
    list.extend(ring.err.map(|fd| with_fd(R::SET_VRING_ERR, Some(fd))));
    // Without protocol features a ring is enabled from the start.
    if features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() != 0 {
        list.push(state(R::SET_VRING_ENABLE, ring.enabled.into()));
    }
    if ring.kicked {
        list.push(with_fd(R::SET_VRING_KICK, ring.kick));
    }
    list
}

fn u64_message(request: FrontendReq, value: u64) -> Message {
    message(request, value.to_ne_bytes().to_vec(), None)
}

fn message(
    request: FrontendReq,
    payload: Vec<u8>,
    fds: impl IntoIterator<Item = OwnedFd>,
) -> Message {
    Message {
        header: Header {
            request: request.into(),
            flags: VERSION,
            size: u32::try_from(payload.len()).expect("a payload of few bytes"),
        },
        payload,
        fds: fds.into_iter().collect(),
    }
}
