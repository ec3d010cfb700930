//! Messages that are judged by what they hold and by nothing before them.

use vhost::vhost_user::message::{FrontendReq, VhostUserConfigFlags};

use super::CONFIG_SPACE_BYTES;
use super::payload_sizes::CONFIG_HEADER_BYTES;
use super::received_fds::FdKind;
use super::refusal::Reason;
use super::stream_sockets;
use super::wire::{Message, u32_at};
use crate::virtio::config_space::CONFIG_BYTES;

/// Where a read of `size` bytes at `offset` of the configuration space begins.
///
/// Cloud Hypervisor before v51 reads the whole of it at 0x100, which is where a virtio-mmio device has it. The
/// space of vhost-user ends there (`VHOST_USER_MAX_CONFIG_SIZE`), so nothing else can be meant.
pub fn read_from(offset: u32, size: u32) -> u32 {
    let whole = usize::try_from(size) == Ok(CONFIG_BYTES);
    if whole && offset == CONFIG_SPACE_BYTES {
        0
    } else {
        offset
    }
}

/// The direction in which the daemon writes a state.
const SAVE: u32 = 0;

/// GET_CONFIG and SET_CONFIG: offset, size, flags and contents.
pub(super) fn config(request: FrontendReq, payload: &[u8]) -> Result<(), Reason> {
    let (offset, size, flags) = (u32_at(payload, 0), u32_at(payload, 4), u32_at(payload, 8));
    let from = match request {
        FrontendReq::GET_CONFIG => read_from(offset, size),
        _ => offset,
    };
    let end = from.checked_add(size);
    if size == 0 || end.is_none_or(|end| end > CONFIG_SPACE_BYTES) {
        return Err(Reason::ConfigRange {
            offset,
            size,
            space: CONFIG_SPACE_BYTES,
        });
    }
    if flags & !VhostUserConfigFlags::all().bits() != 0 {
        return Err(Reason::ConfigFlags(flags));
    }
    let want = CONFIG_HEADER_BYTES + usize::try_from(size).expect("at most the config space");
    if payload.len() != want {
        return Err(Reason::PayloadContents {
            got: payload.len(),
            want,
        });
    }
    Ok(())
}

/// SET_DEVICE_STATE_FD: which way a state goes, and the channel it goes through.
pub(super) fn device_state(message: &Message) -> Result<(), Reason> {
    let (direction, phase) = (u32_at(&message.payload, 0), u32_at(&message.payload, 4));
    if direction > 1 || phase != 0 {
        return Err(Reason::StateTransfer { direction, phase });
    }
    let examine = |error: std::io::Error| Reason::Examine(error.to_string());
    let channel = &message.fds[0];
    match FdKind::of(channel).map_err(examine)? {
        FdKind::Pipe { .. } | FdKind::File { .. } => Ok(()),
        // A state that is loaded comes some time after its channel, which is kept until then. A socket that is to be
        // read cannot be kept: what waits in it may be the session's own connection.
        FdKind::UnixStream if direction == SAVE => {
            stream_sockets::written(channel, "device state's")
        }
        other => Err(Reason::StateChannel(other.describe())),
    }
}
