//! How a session is written: a part of [`super`], and under its format number.

use std::io;

use serde::{Deserialize, Serialize};

use super::{In, Out};
use crate::vhost_user::guard::{
    CarriedInflight, CarriedRegion, CarriedRing, CarriedSession, Negotiated,
};

/// A session.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct SessionState {
    front_end: usize,
    channel: Option<usize>,
    owned: bool,
    features: u64,
    protocol_features: u64,
    regions: Vec<RegionState>,
    #[serde(default)]
    inflight: Option<InflightState>,
    rings: Vec<RingState>,
}

impl SessionState {
    pub(super) fn has_running_ring(&self) -> bool {
        self.rings.iter().any(|ring| ring.running)
    }
}

/// SET_INFLIGHT_FD as it was sent: bytes and a file.
#[derive(Debug, Serialize, Deserialize)]
struct InflightState {
    payload: Vec<u8>,
    file: usize,
}

#[derive(Debug, Serialize, Deserialize)]
struct RegionState {
    guest: u64,
    size: u64,
    user: u64,
    offset: u64,
    file: usize,
}

#[derive(Debug, Serialize, Deserialize)]
struct RingState {
    index: u16,
    size: u16,
    base: u16,
    /// Descriptor table, used ring, available ring.
    addresses: Option<[u64; 3]>,
    enabled: bool,
    kicked: bool,
    running: bool,
    kick: Option<usize>,
    call: Option<usize>,
    err: Option<usize>,
}

pub(super) fn write_session(session: CarriedSession, out: &mut Out) -> SessionState {
    SessionState {
        front_end: out.put(session.front_end),
        channel: session.channel.map(|fd| out.put(fd)),
        owned: session.negotiated.owned,
        features: session.negotiated.features,
        protocol_features: session.negotiated.protocol_features,
        regions: session
            .regions
            .into_iter()
            .map(|region| RegionState {
                guest: region.guest,
                size: region.size,
                user: region.user,
                offset: region.offset,
                file: out.put(region.file),
            })
            .collect(),
        inflight: session.inflight.map(|inflight| InflightState {
            payload: inflight.payload,
            file: out.put(inflight.file),
        }),
        rings: session
            .rings
            .into_iter()
            .map(|ring| RingState {
                index: ring.index,
                size: ring.size,
                base: ring.base,
                addresses: ring.addresses,
                enabled: ring.enabled,
                kicked: ring.kicked,
                running: ring.running,
                kick: ring.kick.map(|fd| out.put(fd)),
                call: ring.call.map(|fd| out.put(fd)),
                err: ring.err.map(|fd| out.put(fd)),
            })
            .collect(),
    }
}

pub(super) fn read_session(state: SessionState, fds: &mut In) -> io::Result<CarriedSession> {
    Ok(CarriedSession {
        front_end: fds.take(state.front_end)?,
        channel: fds.optional(state.channel)?,
        negotiated: Negotiated {
            owned: state.owned,
            features: state.features,
            protocol_features: state.protocol_features,
        },
        regions: state
            .regions
            .into_iter()
            .map(|region| {
                Ok(CarriedRegion {
                    guest: region.guest,
                    size: region.size,
                    user: region.user,
                    offset: region.offset,
                    file: fds.take(region.file)?,
                })
            })
            .collect::<io::Result<_>>()?,
        inflight: state
            .inflight
            .map(|inflight| {
                Ok::<_, io::Error>(CarriedInflight {
                    payload: inflight.payload,
                    file: fds.take(inflight.file)?,
                })
            })
            .transpose()?,
        rings: state
            .rings
            .into_iter()
            .map(|ring| {
                Ok(CarriedRing {
                    index: ring.index,
                    size: ring.size,
                    base: ring.base,
                    addresses: ring.addresses,
                    enabled: ring.enabled,
                    kicked: ring.kicked,
                    running: ring.running,
                    kick: fds.optional(ring.kick)?,
                    call: fds.optional(ring.call)?,
                    err: fds.optional(ring.err)?,
                })
            })
            .collect::<io::Result<_>>()?,
    })
}
