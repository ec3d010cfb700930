//! vhost-user messages as bytes and file descriptors: received whole from a stream, queued, sent on.
//!
//! Nothing here knows what a request means. Every buffer has a bound, and no call here blocks.

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use vhost::vhost_user::message::MAX_ATTACHED_FD_ENTRIES;

/// Bytes of a message header: request, flags and payload size, each a `u32` in the machine's byte
/// order (vhost-user, "Message Specification", "Header").
pub(super) const HEADER_BYTES: usize = 12;

/// File descriptors one message may carry. SET_MEM_TABLE is the request with the most of them, one
/// for each region; the protocol promises 8, front ends built on the `vhost` crate send up to 32.
pub(super) const MAX_FDS: usize = MAX_ATTACHED_FD_ENTRIES;

/// Room for one more than that, so that more are noticed. The kernel drops those beyond it, so that no front end fills
/// the process's table with the 253 that a message may carry (SCM_MAX_FD, include/net/scm.h).
const ROOM_FDS: usize = MAX_FDS + 1;

/// Descriptors that may be received and not judged yet: the room, in whole words.
pub(super) const UNJUDGED_FDS: u64 = ROOM_FDS as u64 + 1;

/// Messages that may wait for one receiver. A peer that sends before it reads its answers is
/// rare; one that never reads them costs this many messages and no more.
const QUEUE_MESSAGES: usize = 4;

/// The version every message carries in bits 0 and 1 of its flags.
pub(super) const VERSION: u32 = 0x1;
/// Bits 0 and 1 of the flags.
pub(super) const VERSION_MASK: u32 = 0x3;
/// The message answers an earlier one.
pub(super) const FLAG_REPLY: u32 = 0x4;
/// The sender wants an answer even where the request has none of its own.
pub(super) const FLAG_NEED_REPLY: u32 = 0x8;

/// A message's first twelve bytes, decoded and not yet believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) request: u32,
    pub(super) flags: u32,
    /// Bytes of payload that the sender says will follow.
    pub(super) size: u32,
}

impl Header {
    /// Decodes the first `HEADER_BYTES` of `bytes`.
    fn decode(bytes: &[u8]) -> Header {
        Header {
            request: u32_at(bytes, 0),
            flags: u32_at(bytes, 4),
            size: u32_at(bytes, 8),
        }
    }

    /// The header's bytes as they travel.
    pub(super) fn encode(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0..4].copy_from_slice(&self.request.to_ne_bytes());
        bytes[4..8].copy_from_slice(&self.flags.to_ne_bytes());
        bytes[8..12].copy_from_slice(&self.size.to_ne_bytes());
        bytes
    }
}

/// The `u16` at byte `at` of a payload whose size was checked before.
pub(super) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    let mut word = [0; 2];
    word.copy_from_slice(&bytes[at..at + 2]);
    u16::from_ne_bytes(word)
}

/// The `u32` at byte `at` of a payload whose size was checked before.
pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_ne_bytes(word)
}

/// The `u64` at byte `at` of a payload whose size was checked before.
pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_ne_bytes(word)
}

/// One whole message. Dropping it closes its file descriptors.
#[derive(Debug)]
pub(super) struct Message {
    pub(super) header: Header,
    /// Exactly as many bytes as `header.size` says.
    pub(super) payload: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
}

/// What one step of a [`Receiver`] came to.
#[derive(Debug)]
pub(super) enum Progress {
    /// A header is complete. The caller checks it and calls [`Receiver::expect_payload`].
    Header(Header),
    /// A message is complete.
    Message(Message),
    /// More than [`MAX_FDS`] file descriptors came with one message.
    TooManyFds,
    /// The kernel dropped file descriptors because this process has no numbers left for them.
    FdsLost,
    /// The peer has not sent more.
    Blocked,
    /// The peer sends no more, whether or not a message was whole.
    Closed,
}

/// Puts the messages of one stream together from whatever segments they come in.
///
/// It never reads past the end of the current message, so the file descriptors it meets belong to
/// that message: the kernel hands them over with the first byte of the segment they came with.
#[derive(Debug)]
pub(super) struct Receiver {
    bytes: Vec<u8>,
    filled: usize,
    fds: Vec<OwnedFd>,
    /// The checked header of the message whose payload is being received.
    header: Option<Header>,
    /// Bytes received so far, of all messages.
    total: u64,
}

impl Receiver {
    pub(super) fn new() -> Receiver {
        Receiver {
            bytes: vec![0; HEADER_BYTES],
            filled: 0,
            fds: Vec::new(),
            header: None,
            total: 0,
        }
    }

    /// Bytes received so far.
    pub(super) fn total(&self) -> u64 {
        self.total
    }

    /// The request being received, once its header is whole.
    pub(super) fn request(&self) -> Option<u32> {
        (self.filled >= HEADER_BYTES).then(|| u32_at(&self.bytes, 0))
    }

    /// Whether a message has begun and is not whole.
    pub(super) fn is_midway(&self) -> bool {
        self.filled > 0
    }

    /// Makes room for the payload of a header that was found good. The caller has bounded its size.
    pub(super) fn expect_payload(&mut self, header: Header) {
        assert!(self.header.is_none() && self.filled == HEADER_BYTES);
        let size = usize::try_from(header.size).expect("a size the caller bounded");
        self.bytes.resize(HEADER_BYTES + size, 0);
        self.header = Some(header);
    }

    /// Reads until a header or a message is whole, or the socket has nothing more. Never blocks.
    pub(super) fn receive(&mut self, socket: &UnixStream) -> io::Result<Progress> {
        loop {
            if self.filled == self.bytes.len() {
                return Ok(match self.header.take() {
                    None => Progress::Header(Header::decode(&self.bytes)),
                    Some(header) => Progress::Message(self.take(header)),
                });
            }
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(ROOM_FDS))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let received = match recvmsg(
                socket,
                &mut [IoSliceMut::new(&mut self.bytes[self.filled..])],
                &mut control,
                RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC,
            ) {
                Ok(received) => received,
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => return Ok(Progress::Blocked),
                Err(Errno::CONNRESET) => return Ok(Progress::Closed),
                Err(errno) => return Err(errno.into()),
            };
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(fds) = message {
                    self.fds.extend(fds);
                }
            }
            if self.fds.len() > MAX_FDS {
                return Ok(Progress::TooManyFds);
            }
            // There was room for them.
            if received.flags.contains(ReturnFlags::CTRUNC) {
                return Ok(Progress::FdsLost);
            }
            if received.bytes == 0 {
                return Ok(Progress::Closed);
            }
            self.filled += received.bytes;
            self.total += received.bytes as u64;
        }
    }

    fn take(&mut self, header: Header) -> Message {
        let payload = self.bytes.split_off(HEADER_BYTES);
        self.filled = 0;
        Message {
            header,
            payload,
            fds: std::mem::take(&mut self.fds),
        }
    }
}

/// What came of sending what is queued.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flushed {
    /// Everything is sent, or the receiver takes no more now.
    Open,
    /// The receiver has closed its end.
    Closed,
}

/// Messages on their way to one receiver, a bounded number of them.
#[derive(Debug, Default)]
pub(super) struct SendQueue {
    /// Header and payload together, and the file descriptors that leave with the first byte.
    messages: VecDeque<(Vec<u8>, Vec<OwnedFd>)>,
    /// Bytes of the first message that are sent.
    sent: usize,
    /// Bytes sent so far, of all messages.
    total: u64,
}

impl SendQueue {
    pub(super) fn is_empty(&self) -> bool {
        self.messages.is_empty()
    }

    /// Bytes sent so far.
    pub(super) fn total(&self) -> u64 {
        self.total
    }

    /// Whether another message may be pushed. Where not, its source is not read.
    pub(super) fn has_room(&self) -> bool {
        self.messages.len() < QUEUE_MESSAGES
    }

    /// Queues `message` behind the others.
    pub(super) fn push(&mut self, message: Message) {
        assert!(self.has_room(), "a full queue's source is not read");
        assert_eq!(
            u32::try_from(message.payload.len()),
            Ok(message.header.size)
        );
        let mut bytes = Vec::with_capacity(HEADER_BYTES + message.payload.len());
        bytes.extend_from_slice(&message.header.encode());
        bytes.extend_from_slice(&message.payload);
        self.messages.push_back((bytes, message.fds));
    }

    /// Sends as much as `socket` takes. Never blocks.
    ///
    /// Each message leaves in a `sendmsg` of its own, header, payload and descriptors together:
    /// the `vhost` crate reads a payload with one `recvmsg` and takes descriptors with the header
    /// only.
    pub(super) fn flush(&mut self, socket: &UnixStream) -> io::Result<Flushed> {
        while let Some((bytes, fds)) = self.messages.front_mut() {
            let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !borrowed.is_empty() {
                let pushed = control.push(SendAncillaryMessage::ScmRights(&borrowed));
                assert!(pushed, "at most MAX_FDS descriptors are received");
            }
            match sendmsg(
                socket,
                &[IoSlice::new(&bytes[self.sent..])],
                &mut control,
                SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
            ) {
                Ok(bytes_sent) => {
                    self.sent += bytes_sent;
                    self.total += bytes_sent as u64;
                    if self.sent == bytes.len() {
                        self.messages.pop_front();
                        self.sent = 0;
                    } else {
                        fds.clear();
                    }
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(Flushed::Open),
                Err(Errno::PIPE | Errno::CONNRESET) => return Ok(Flushed::Closed),
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(Flushed::Open)
    }
}
