//! The requests there are, how long each one's payload is, and which protocol feature brings it.
//!
//! The list is what the device and the guard offer and no more. A request that is missing here is refused by
//! its header alone.

use vhost::vhost_user::message::{FrontendReq, VhostUserProtocolFeatures as Protocol};

use super::CONFIG_SPACE_BYTES;
use super::inflight::{DESCRIPTION_BYTES, DESCRIPTION_BYTES_PADDED};
use super::memory_regions::REGION_BYTES;
use super::wire::MAX_FDS;

/// Bytes of a u64 payload.
pub(super) const U64_BYTES: usize = 8;
/// Bytes of a vring state: queue index and value, each a `u32`.
const VRING_STATE_BYTES: usize = 8;
/// Bytes of a vring address description.
const VRING_ADDR_BYTES: usize = 40;
/// Bytes of a state transfer: direction and phase, each a `u32`.
const STATE_BYTES: usize = 8;
/// Bytes of a log description: size and offset, each a `u64`.
const LOG_BYTES: usize = 16;
/// Bytes in front of the regions of SET_MEM_TABLE: their number and padding.
pub(super) const TABLE_HEADER_BYTES: usize = 8;
/// Bytes in front of the region of ADD_MEM_REG and REM_MEM_REG: padding.
pub(super) const SINGLE_HEADER_BYTES: usize = 8;
/// Bytes in front of the contents of GET_CONFIG and SET_CONFIG: offset, size and flags.
pub(super) const CONFIG_HEADER_BYTES: usize = 12;
/// The shape of a request: bytes of payload, and the protocol feature that brings it.
pub(super) struct Shape {
    pub(super) least: usize,
    pub(super) most: usize,
    pub(super) needs: Option<(Protocol, &'static str)>,
}

impl Shape {
    /// The shape of each request there is. What is not here is refused.
    pub(super) fn of(request: FrontendReq) -> Option<Shape> {
        use FrontendReq as R;
        let (least, most) = match request {
            R::GET_FEATURES
            | R::SET_OWNER
            | R::RESET_OWNER
            | R::GET_PROTOCOL_FEATURES
            | R::GET_QUEUE_NUM
            | R::SET_BACKEND_REQ_FD
            | R::RESET_DEVICE
            | R::CHECK_DEVICE_STATE
            | R::GET_MAX_MEM_SLOTS => (0, 0),
            R::SET_FEATURES
            | R::SET_PROTOCOL_FEATURES
            | R::SET_VRING_KICK
            | R::SET_VRING_CALL
            | R::SET_VRING_ERR => (U64_BYTES, U64_BYTES),
            R::SET_VRING_NUM | R::SET_VRING_BASE | R::GET_VRING_BASE | R::SET_VRING_ENABLE => {
                (VRING_STATE_BYTES, VRING_STATE_BYTES)
            }
            R::SET_VRING_ADDR => (VRING_ADDR_BYTES, VRING_ADDR_BYTES),
            R::SET_LOG_BASE => (LOG_BYTES, LOG_BYTES),
            R::SET_DEVICE_STATE_FD => (STATE_BYTES, STATE_BYTES),
            R::SET_MEM_TABLE => (
                TABLE_HEADER_BYTES + REGION_BYTES,
                TABLE_HEADER_BYTES + REGION_BYTES * MAX_FDS,
            ),
            R::ADD_MEM_REG | R::REM_MEM_REG => {
                let bytes = SINGLE_HEADER_BYTES + REGION_BYTES;
                (bytes, bytes)
            }
            R::GET_CONFIG | R::SET_CONFIG => (
                CONFIG_HEADER_BYTES + 1,
                CONFIG_HEADER_BYTES + CONFIG_SPACE_BYTES as usize,
            ),
            R::GET_INFLIGHT_FD | R::SET_INFLIGHT_FD => {
                (DESCRIPTION_BYTES, DESCRIPTION_BYTES_PADDED)
            }
            _ => return None,
        };
        let needs = match request {
            R::GET_QUEUE_NUM => Some((Protocol::MQ, "MQ")),
            R::SET_DEVICE_STATE_FD | R::CHECK_DEVICE_STATE => {
                Some((Protocol::DEVICE_STATE, "DEVICE_STATE"))
            }
            R::SET_LOG_BASE => Some((Protocol::LOG_SHMFD, "LOG_SHMFD")),
            R::SET_BACKEND_REQ_FD => Some((Protocol::BACKEND_REQ, "BACKEND_REQ")),
            R::RESET_DEVICE => Some((Protocol::RESET_DEVICE, "RESET_DEVICE")),
            R::GET_CONFIG | R::SET_CONFIG => Some((Protocol::CONFIG, "CONFIG")),
            R::GET_MAX_MEM_SLOTS | R::ADD_MEM_REG | R::REM_MEM_REG => {
                Some((Protocol::CONFIGURE_MEM_SLOTS, "CONFIGURE_MEM_SLOTS"))
            }
            R::GET_INFLIGHT_FD | R::SET_INFLIGHT_FD => {
                Some((Protocol::INFLIGHT_SHMFD, "INFLIGHT_SHMFD"))
            }
            _ => None,
        };
        Some(Shape { least, most, needs })
    }
}
