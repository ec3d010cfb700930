//! Why a front end's message was not let through, in words for the person who reads the log.

use std::fmt;

use vhost::vhost_user::message::FrontendReq;

use crate::virtio::features::{DISCARD, RO, WRITE_ZEROES, names};

/// A request's name as the protocol spells it, or its number where it has none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestName(pub u32);

impl fmt::Display for RequestName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match FrontendReq::try_from(self.0) {
            Ok(request) => write!(f, "{request:?}"),
            Err(()) => write!(f, "request {}", self.0),
        }
    }
}

/// A message of the front end that did not pass, and why. Its text is one line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}{reason}", request.map_or(String::new(), |request| format!("{request}: ")))]
pub struct Refusal {
    /// What was asked, if it came that far.
    pub request: Option<RequestName>,
    /// What was wrong with it.
    pub reason: Reason,
}

/// What is wrong with a message, with the value that is wrong. Addresses and sizes are in bytes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[allow(
    missing_docs,
    reason = "each variant's text below says what its fields are"
)]
pub enum Reason {
    #[error("header flags {0:#x} are not a request's of vhost-user version 1")]
    Flags(u32),
    #[error("this daemon has no such request; turn off what needs it in the front end")]
    Unsupported,
    #[error("protocol feature {0} was not negotiated before; set it first")]
    ProtocolFeature(&'static str),
    #[error("feature bit 30 (VHOST_USER_F_PROTOCOL_FEATURES) was not negotiated; set it first")]
    NoProtocolFeatures,
    #[error("payload of {got} bytes, expected {least} to {most}")]
    PayloadSize { got: u32, least: usize, most: usize },
    #[error("payload of {got} bytes does not fit its contents, which take {want}")]
    PayloadContents { got: usize, want: usize },
    #[error("{got} file descriptors attached, expected {want}")]
    FdCount { got: usize, want: usize },
    #[error("more than {0} file descriptors attached")]
    TooManyFds(usize),
    #[error("file descriptors were lost: raise the daemon's limit of open files (ulimit -n)")]
    FdsLost,
    #[error(
        "the daemon has no file descriptors left for it: raise its limit of open files (ulimit -n, LimitNOFILE=), \
         or lower --num-queues"
    )]
    NoFds,
    #[error("the session has an owner already")]
    Owned,
    #[error("feature bits {extra:#x} were never offered ({}){}", names(*extra), advice(*extra, *offered))]
    NotOffered { extra: u64, offered: u64 },
    #[error("feature bits {0:#x} were never offered")]
    ProtocolNotOffered(u64),
    #[error(
        "queue {index} does not exist, this disk has {count}; lower the front end's num-queues"
    )]
    QueueIndex { index: u32, count: u16 },
    #[error("value {0:#x} has bits beyond the queue index and the no-descriptor flag")]
    QueueBits(u64),
    #[error("queue {queue}: size {size} is no power of two from 1 to {max}")]
    QueueSize { queue: u32, size: u32, max: u16 },
    #[error("queue {queue}: base {base} is beyond a split ring's 16-bit index")]
    QueueBase { queue: u32, base: u32 },
    #[error("queue {queue}: {value} is neither 0 (disable) nor 1 (enable)")]
    QueueEnable { queue: u32, value: u32 },
    #[error("queue {queue}: unknown address flags {flags:#x}")]
    AddressFlags { queue: u32, flags: u32 },
    #[error("queue {queue}: the {part} at {address:#x} is not aligned to {align} bytes")]
    AddressAlign {
        queue: u32,
        part: &'static str,
        address: u64,
        align: u64,
    },
    #[error("queue {queue}: the {part} at {address:#x} is in no memory region the front end gave")]
    AddressUnmapped {
        queue: u32,
        part: &'static str,
        address: u64,
    },
    #[error("queue {queue}: the {role} descriptor is {found}, expected {expected}")]
    FdKind {
        queue: u64,
        role: &'static str,
        found: String,
        expected: &'static str,
    },
    #[error("the back-end channel is {0}, expected a stream socket of the Unix domain")]
    ChannelKind(String),
    #[error(
        "the channel of the device's state is {0}, expected a pipe or a file, or to save it a Unix stream socket"
    )]
    StateChannel(String),
    #[error("device state in direction {direction} and phase {phase}, expected 0 or 1 and 0")]
    StateTransfer { direction: u32, phase: u32 },
    #[error(
        "the {role} descriptor is a connection to this daemon, which would keep it open for ever"
    )]
    OwnConnection { role: &'static str },
    #[error("the {role} descriptor is a socket that listens; send one that is connected")]
    Listens { role: &'static str },
    #[error("a file descriptor could not be examined: {0}")]
    Examine(String),
    #[error("config access of {size} bytes at {offset} is outside 1 to {space} bytes")]
    ConfigRange { offset: u32, size: u32, space: u32 },
    #[error("unknown config flags {0:#x}")]
    ConfigFlags(u32),
    #[error("{count} memory regions, expected 1 to {max}")]
    RegionCount { count: u64, max: usize },
    #[error("memory region at guest address {guest:#x} is empty")]
    RegionEmpty { guest: u64 },
    #[error(
        "memory region at guest address {guest:#x}: {size:#x} bytes run past the end of the {space}"
    )]
    RegionWraps {
        guest: u64,
        size: u64,
        space: &'static str,
    },
    #[error(
        "memory region at guest address {guest:#x} needs {needs:#x} bytes of a file that has {has:#x}; \
         make the memory backend as large as the guest's memory"
    )]
    RegionBeyondFile { guest: u64, needs: u64, has: u64 },
    #[error(
        "memory region at guest address {guest:#x} is no whole number of its file's huge pages of \
         {page:#x} bytes"
    )]
    RegionHugePages { guest: u64, page: u64 },
    #[error(
        "memory region at guest address {guest:#x} is backed by {found}, expected a file open for \
         reading and writing; share the guest's memory (QEMU: share=on, Cloud Hypervisor: shared=on)"
    )]
    RegionFile { guest: u64, found: String },
    #[error("memory regions at guest addresses {first:#x} and {second:#x} overlap")]
    RegionOverlap { first: u64, second: u64 },
    #[error(
        "dirty log of {size:#x} bytes at {offset:#x}: expected some, from a multiple of {page:#x}"
    )]
    LogPlace { size: u64, offset: u64, page: u64 },
    #[error(
        "dirty log needs {needs:#x} bytes of {found}, expected that many of a memfd or a file on tmpfs, open for \
         reading and writing"
    )]
    LogFile { needs: u64, found: String },
    #[error("dirty log of {has} pages for guest memory that ends at page {needs}")]
    LogShort { has: u64, needs: u64 },
    #[error("the dirty log cannot be mapped: {0}")]
    LogMap(String),
    #[error(
        "an in-flight region for {queues} queues of {queue_size}, expected 1 to {max_queues} queues of 1 to \
         {max_size}; the front end's num-queues or queue-size is too high"
    )]
    InflightQueues {
        queues: u16,
        queue_size: u16,
        max_queues: u16,
        max_size: u16,
    },
    #[error("an in-flight region of {has:#x} bytes for queues that need {needs:#x}")]
    InflightSize { has: u64, needs: u64 },
    #[error(
        "the in-flight region is in {0}, expected a memfd or a file on tmpfs, open for writing"
    )]
    InflightFile(String),
    #[error(
        "the in-flight region, {size:#x} bytes at {offset:#x}, ends beyond its file of {has:#x}"
    )]
    InflightBeyondFile { offset: u64, size: u64, has: u64 },
    #[error("the in-flight region cannot be mapped: {0}")]
    InflightMap(String),
    #[error("no memory for an in-flight region: {0}")]
    InflightCreate(String),
    #[error("the guest cannot go on with this disk: {0}")]
    Promise(String),
    #[error("no memory region of {size:#x} bytes at guest address {guest:#x} to remove")]
    RegionUnknown { guest: u64, size: u64 },
}

/// What makes a disk lack the features of a guest that runs: an option that the daemon before did not have.
fn advice(extra: u64, offered: u64) -> &'static str {
    let read_only = offered & RO != 0;
    if read_only && extra & (DISCARD | WRITE_ZEROES) != 0 {
        "; the guest was started with a disk that can be written: start this daemon without --read-only, or \
         restart the virtual machine"
    } else if extra & RO != 0 {
        "; the guest was started with a disk that cannot be written: start this daemon with --read-only, or \
         restart the virtual machine"
    } else if extra & DISCARD != 0 {
        "; the guest was started with discard: start this daemon without --discard off, on an image that can \
         free space, or restart the virtual machine"
    } else {
        ""
    }
}
