//! A session that comes to rest: between two messages, with every request carried out and every
//! answer delivered, so that what it has agreed on can be handed to another process.
//!
//! Whether the device has carried out what it was sent is found out by asking it something behind
//! that: it works in order. GET_FEATURES is what every device answers at any time and what changes
//! nothing; the answer is ours if no answer to the front end's own GET_FEATURES is outstanding.

use std::net::Shutdown;
use std::os::fd::OwnedFd;

use vhost::vhost_user::message::FrontendReq;

use super::wire::{Header, Message, VERSION};
use super::{Guard, SessionEnd};

/// How [`Guard::serve`] returned.
#[derive(Debug)]
pub enum Served {
    /// The session is at rest.
    AtRest,
    /// It is over; [`Guard::close`] is to follow.
    Over(SessionEnd),
}

impl Guard {
    /// Comes to rest, and returns from [`Guard::serve`], whenever `wish` is readable. Ends if it is not at rest when
    /// `make_way` is readable.
    pub fn heed(mut self, wish: OwnedFd, make_way: OwnedFd) -> Guard {
        self.rest.wish = Some(wish);
        self.rest.make_way = Some(make_way);
        self
    }

    /// Carries messages until the session is over, or at rest as was wished. A session at rest has
    /// no message half received, none that the device has not carried out, and no answer that its
    /// front end does not have; it goes on when this is called again.
    pub fn serve(&mut self) -> Served {
        loop {
            if let Err(end) = self.turn() {
                return Served::Over(end);
            }
            if self.rest.is_over(self.to_front_end.is_empty()) {
                return Served::AtRest;
            }
        }
    }

    /// Shuts both connections down.
    pub fn close(&self) {
        self.channel.close();
        // Closing is not enough where the caller or the device holds a duplicate. A peer that is
        // gone already makes these fail, which changes nothing.
        let _ = self.front_end.shutdown(Shutdown::Both);
        self.part();
    }

    /// Shuts the connection to the device down. The front end does not notice: its connection is
    /// somebody else's by now, or was not used yet.
    pub fn part(&self) {
        let _ = self.device.shutdown(Shutdown::Both);
    }
}

/// How far a session has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Phase {
    /// Nobody asked.
    #[default]
    Serving,
    /// A message that has begun is received to its end, and no other is begun.
    Finishing,
    /// The device was asked, behind all else.
    Asked,
    /// The device has answered.
    Calm,
}

/// What a guard knows of coming to rest.
#[derive(Debug, Default)]
pub(super) struct Rest {
    wish: Option<OwnedFd>,
    make_way: Option<OwnedFd>,
    phase: Phase,
    /// The front end's own GET_FEATURES that are not answered yet.
    outstanding: usize,
}

impl Rest {
    /// What to poll for, as long as it has not been seen.
    pub(super) fn wish(&self) -> Option<&OwnedFd> {
        self.wish.as_ref().filter(|_| self.phase == Phase::Serving)
    }

    /// What to poll for at any time.
    pub(super) fn make_way(&self) -> Option<&OwnedFd> {
        self.make_way.as_ref()
    }

    /// The wish was seen.
    pub(super) fn begin(&mut self) {
        self.phase = Phase::Finishing;
    }

    /// Whether more of the front end may be read; `midway` is whether a message has begun.
    pub(super) fn lets_read(&self, midway: bool) -> bool {
        match self.phase {
            Phase::Serving => true,
            Phase::Finishing => midway,
            Phase::Asked | Phase::Calm => false,
        }
    }

    /// The question for the device, once, when nothing is on its way to it: `midway` is whether
    /// anything is.
    pub(super) fn question(&mut self, midway: bool) -> Option<Message> {
        if self.phase != Phase::Finishing || midway {
            return None;
        }
        self.phase = Phase::Asked;
        Some(question())
    }

    /// Takes note of a request of the front end.
    pub(super) fn passes(&mut self, request: &Message) {
        self.outstanding += usize::from(is_get_features(request));
    }

    /// Whether an answer of the device is for us, and not for the front end.
    pub(super) fn takes(&mut self, answer: &Message) -> bool {
        if !is_get_features(answer) {
            return false;
        }
        if self.phase == Phase::Asked && self.outstanding == 0 {
            self.phase = Phase::Calm;
            return true;
        }
        self.outstanding = self.outstanding.saturating_sub(1);
        false
    }

    /// Whether the session is at rest; `delivered` is whether the front end has all its answers. It
    /// goes on from here.
    pub(super) fn is_over(&mut self, delivered: bool) -> bool {
        let over = self.phase == Phase::Calm && delivered;
        if over {
            self.phase = Phase::Serving;
        }
        over
    }
}

/// What the device answers at any time.
pub(super) fn question() -> Message {
    Message {
        header: Header {
            request: FrontendReq::GET_FEATURES.into(),
            flags: VERSION,
            size: 0,
        },
        payload: Vec::new(),
        fds: Vec::new(),
    }
}

fn is_get_features(message: &Message) -> bool {
    message.header.request == u32::from(FrontendReq::GET_FEATURES)
}
