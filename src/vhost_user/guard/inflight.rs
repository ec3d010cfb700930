//! GET_INFLIGHT_FD and SET_INFLIGHT_FD, which are answered here: the device behind knows neither
//! (vhost-user, "Inflight description").
//!
//! Answers leave in the order of the requests, and a region counts for what comes after it and not for what
//! came before. So such a message waits until the device has handled all that was passed on before: a
//! question without effect is sent to the device in its place, its answer is the moment, and until then
//! nothing more is read from the front end.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::fstat;
use vhost::vhost_user::message::FrontendReq;

use super::SessionLimits;
use super::received_fds::FdKind;
use super::refusal::Reason;
use super::wire::{FLAG_NEED_REPLY, FLAG_REPLY, Header, Message, VERSION, u16_at, u64_at};
use crate::disk::guest_notes::NoteKeeper;
use crate::virtio::inflight::{
    InflightQueue, InflightRegion, create, is_memory, records_bytes, region_bytes,
};

/// Bytes of an in-flight description: mapping size and offset, number and size of the queues.
pub(super) const DESCRIPTION_BYTES: usize = 20;
/// The same as a C structure, which is how QEMU and the `vhost` crate send it.
pub(super) const DESCRIPTION_BYTES_PADDED: usize = 24;

/// Bytes of a description in front of the offset, the number of queues, and their size.
const OFFSET_AT: usize = 8;
const QUEUES_AT: usize = 16;
const QUEUE_SIZE_AT: usize = 18;

/// The in-flight region a session has, if its front end wants one: set by the guard, used where rings
/// start.
#[derive(Debug, Default)]
pub struct InflightStore {
    given: Mutex<Option<Given>>,
    keeper: Option<Arc<dyn NoteKeeper>>,
}

/// A region in use, and what it was made of, for the process after this one.
#[derive(Debug)]
struct Given {
    region: InflightRegion,
    inflight: CarriedInflight,
}

/// SET_INFLIGHT_FD as it was sent.
#[derive(Debug)]
pub struct CarriedInflight {
    /// The description.
    pub payload: Vec<u8>,
    /// The region.
    pub file: OwnedFd,
}

impl InflightStore {
    /// No region yet; the notes of those to come are `keeper`'s.
    pub fn new(keeper: Arc<dyn NoteKeeper>) -> InflightStore {
        InflightStore {
            given: Mutex::default(),
            keeper: Some(keeper),
        }
    }

    /// Uses this region for rings that start from now on.
    fn set(&self, region: InflightRegion, inflight: CarriedInflight) -> Result<(), Reason> {
        if let Some(keeper) = &self.keeper {
            keeper.adopt(&region).map_err(Reason::Promise)?;
        }
        let given = Given { region, inflight };
        *self.given.lock().unwrap_or_else(PoisonError::into_inner) = Some(given);
        Ok(())
    }

    fn get(&self) -> Option<InflightRegion> {
        let given = self.given.lock().unwrap_or_else(PoisonError::into_inner);
        given.as_ref().map(|given| given.region.clone())
    }

    /// What the front end gave, for another process to go on with: described from where the records begin, with the
    /// size that they have. The last release finds them by that, and no other way.
    ///
    /// # Errors
    ///
    /// The process is out of descriptors.
    pub fn carry(&self) -> io::Result<Option<CarriedInflight>> {
        let given = self.given.lock().unwrap_or_else(PoisonError::into_inner);
        let carry = |given: &Given| {
            let mut payload = given.inflight.payload.clone();
            let before = given.region.records_at() as u64;
            let (size, offset) = (u64_at(&payload, 0), u64_at(&payload, OFFSET_AT));
            payload[..OFFSET_AT].copy_from_slice(&(size - before).to_ne_bytes());
            payload[OFFSET_AT..QUEUES_AT].copy_from_slice(&(offset + before).to_ne_bytes());
            payload[QUEUE_SIZE_AT..DESCRIPTION_BYTES]
                .copy_from_slice(&given.region.queue_size().to_ne_bytes());
            Ok(CarriedInflight {
                payload,
                file: given.inflight.file.try_clone()?,
            })
        };
        given.as_ref().map(carry).transpose()
    }

    /// The record for a ring of `size` entries that starts now; `None` without a region, or if the region has
    /// no room for it.
    pub fn queue(&self, index: u16, size: u16) -> Option<InflightQueue> {
        let region = self.get()?;
        let queue = region.queue(index, size);
        if queue.is_none() {
            let (disk, serial) = self.keeper.as_ref().map_or((0, ""), |keeper| keeper.who());
            log::warn!(
                disk = disk; "disk {serial}: queue {index} of {size} entries is not in the front end's in-flight region of {} queues \
                 of {}: after a crash of the daemon its requests would be lost",
                region.queues(),
                region.queue_size()
            );
        }
        queue
    }

    /// Forgets what was in flight: the device was reset, and no ring runs.
    pub fn clear(&self) {
        if let Some(region) = self.get() {
            region.clear();
        }
    }
}

/// What a front end says of a region. Sizes in bytes.
struct Description {
    size: u64,
    offset: u64,
    queues: u16,
    queue_size: u16,
}

impl Description {
    /// Decodes the payload, whose length was checked, and checks what it says of queues.
    fn decode(payload: &[u8], limits: &SessionLimits) -> Result<Description, Reason> {
        let description = Description {
            size: u64_at(payload, 0),
            offset: u64_at(payload, OFFSET_AT),
            queues: u16_at(payload, QUEUES_AT),
            queue_size: u16_at(payload, QUEUE_SIZE_AT),
        };
        let (queues, queue_size) = (description.queues, description.queue_size);
        let (max_queues, max_size) = (limits.max_queues, limits.max_queue_size);
        if !(1..=max_queues).contains(&queues) || !(1..=max_size).contains(&queue_size) {
            return Err(Reason::InflightQueues {
                queues,
                queue_size,
                max_queues,
                max_size,
            });
        }
        Ok(description)
    }

    /// The payload of `bytes` bytes that describes a new region for these queues.
    fn encode_new(&self, bytes: usize) -> Vec<u8> {
        let size = region_bytes(self.queues) as u64;
        let mut payload = Vec::with_capacity(bytes);
        payload.extend_from_slice(&size.to_ne_bytes());
        payload.extend_from_slice(&0_u64.to_ne_bytes());
        payload.extend_from_slice(&self.queues.to_ne_bytes());
        payload.extend_from_slice(&self.queue_size.to_ne_bytes());
        payload.resize(bytes, 0);
        payload
    }

    /// Maps the region that `file` holds.
    fn adopt(&self, file: &OwnedFd) -> Result<InflightRegion, Reason> {
        let examine = |error: io::Error| Reason::Examine(error.to_string());
        let needs = records_bytes(self.queues, self.queue_size) as u64;
        if self.size < needs {
            return Err(Reason::InflightSize {
                has: self.size,
                needs,
            });
        }
        let kind = FdKind::of(file).map_err(examine)?;
        // A worker writes there for each request, and must not wait for a device. What has seals is memory.
        match kind {
            FdKind::File {
                read_write: true,
                on,
                ..
            } if on.is_memory() && is_memory(file) => {}
            other => return Err(Reason::InflightFile(other.describe())),
        }
        // Its length only now that it cannot shrink any more, if that can be had.
        let has = fstat(file).map_err(|errno| examine(errno.into()))?.st_size;
        let has = u64::try_from(has).unwrap_or(0);
        if self
            .offset
            .checked_add(self.size)
            .is_none_or(|end| end > has)
        {
            return Err(Reason::InflightBeyondFile {
                offset: self.offset,
                size: self.size,
                has,
            });
        }
        self.map(file, self.size)
    }

    fn map(&self, file: &OwnedFd, size: u64) -> Result<InflightRegion, Reason> {
        InflightRegion::map(file, self.offset, size, self.queues, self.queue_size)
            .map_err(|error| Reason::InflightMap(error.to_string()))
    }

    /// Makes a region.
    fn create(&self, store: &InflightStore) -> Result<OwnedFd, Reason> {
        let file = create(self.queues, self.queue_size)
            .map_err(|error| Reason::InflightCreate(error.to_string()))?;
        if let Some(keeper) = &store.keeper {
            let whole = Description { offset: 0, ..*self };
            let region = whole.map(&file, region_bytes(self.queues) as u64)?;
            region.write_notes(&keeper.notes());
        }
        Ok(file)
    }
}

/// Whether the guard answers this request itself.
pub(super) fn is_ours(request: u32) -> bool {
    [FrontendReq::GET_INFLIGHT_FD, FrontendReq::SET_INFLIGHT_FD]
        .into_iter()
        .any(|ours| u32::from(ours) == request)
}

/// Judges a message that [`is_ours`] when it comes.
pub(super) fn check(message: &Message, limits: &SessionLimits) -> Result<(), Reason> {
    Description::decode(&message.payload, limits).map(drop)
}

/// Carries a message out, with `acked` saying whether the front end gets the acknowledgements it asks for.
/// Returns the answer, if it has one.
pub(super) fn carry_out(
    message: &Message,
    limits: &SessionLimits,
    store: &InflightStore,
    acked: bool,
) -> Result<Option<Message>, Reason> {
    let description = Description::decode(&message.payload, limits)?;
    let (payload, fds) = if message.header.request == u32::from(FrontendReq::GET_INFLIGHT_FD) {
        let file = description.create(store)?;
        (description.encode_new(message.payload.len()), vec![file])
    } else {
        let file = &message.fds[0];
        let region = description.adopt(file)?;
        let kept = file.try_clone();
        let inflight = CarriedInflight {
            payload: message.payload.clone(),
            file: kept.map_err(|error| Reason::Examine(error.to_string()))?,
        };
        store.set(region, inflight)?;
        if !acked || message.header.flags & FLAG_NEED_REPLY == 0 {
            return Ok(None);
        }
        (0_u64.to_ne_bytes().to_vec(), Vec::new())
    };
    let header = Header {
        request: message.header.request,
        flags: VERSION | FLAG_REPLY,
        size: u32::try_from(payload.len()).expect("a few bytes"),
    };
    Ok(Some(Message {
        header,
        payload,
        fds,
    }))
}

/// Lets a message wait for the device.
#[derive(Debug, Default)]
pub(super) struct Turnstile {
    waiting: Option<Message>,
    /// GET_FEATURES of the front end that the device has not answered.
    asked: usize,
}

impl Turnstile {
    /// What goes to the device: the message, or the question in place of one that is ours.
    pub(super) fn pass(&mut self, message: Message) -> Message {
        let question = u32::from(FrontendReq::GET_FEATURES);
        if is_ours(message.header.request) {
            assert!(self.waiting.is_none(), "nothing is read while one waits");
            self.waiting = Some(message);
            return Message {
                header: Header {
                    request: question,
                    flags: VERSION,
                    size: 0,
                },
                payload: Vec::new(),
                fds: Vec::new(),
            };
        }
        self.asked += usize::from(message.header.request == question);
        message
    }

    /// Whether a message waits, so that none may overtake it.
    pub(super) fn is_closed(&self) -> bool {
        self.waiting.is_some()
    }

    /// An answer of the device. Returns the message whose turn has come, in which case the answer is not for the
    /// front end.
    pub(super) fn answered(&mut self, answer: &Message) -> Option<Message> {
        if answer.header.request != u32::from(FrontendReq::GET_FEATURES) {
            return None;
        }
        if self.asked > 0 {
            self.asked -= 1;
            return None;
        }
        self.waiting.take()
    }
}
