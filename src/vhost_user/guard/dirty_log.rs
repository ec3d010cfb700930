//! The dirty log of a session, as far as the front end's messages are about it.
//!
//! The crate behind takes a log too, one bitmap for each region, and would neither stop when LOG_ALL is
//! cleared nor know where a ring is logged. So the log is mapped here, and whoever marks pages learns of it
//! from here; the crate gets the message as well, for its answer.

use std::fmt;
use std::sync::Arc;

use vhost::vhost_user::message::VhostUserVringAddrFlags;

use super::received_fds::FdKind;
use super::refusal::Reason;
use super::wire::{Message, u64_at};
use crate::sys::filesystem::FileSystem;
use crate::virtio::dirty_log::{DirtyLog, LOG_PAGE_BYTES};
use crate::virtio::features::LOG_ALL;

/// Who marks pages. Both return when nobody marks pages as before any more.
pub trait LogKeeper: fmt::Debug + Send + Sync {
    /// Pages are to be marked in `log`, whenever the feature LOG_ALL is set.
    fn set_log(&self, log: DirtyLog);

    /// The used ring of `queue` is to be logged at this guest-physical address, or, without one, where
    /// it is.
    fn log_used_at(&self, queue: u32, address: Option<u64>);
}

/// What the rules remember of it.
#[derive(Debug, Default)]
pub(super) struct Log {
    keeper: Option<Arc<dyn LogKeeper>>,
    /// Pages the log has bits for, once there is one.
    pages: Option<u64>,
}

impl Log {
    /// Tells `keeper` of the log from now on.
    pub(super) fn keep(&mut self, keeper: Arc<dyn LogKeeper>) {
        self.keeper = Some(keeper);
    }

    /// SET_LOG_BASE: a file, and which part of it is the log. The guest's memory ends at `guest_end`.
    pub(super) fn set_base(&mut self, message: &Message, guest_end: u64) -> Result<(), Reason> {
        let (size, offset) = (u64_at(&message.payload, 0), u64_at(&message.payload, 8));
        let page = rustix::param::page_size() as u64;
        let end = offset.checked_add(size);
        let (Some(needs), true) = (end, size > 0 && offset.is_multiple_of(page)) else {
            return Err(Reason::LogPlace { size, offset, page });
        };
        let Some(keeper) = &self.keeper else {
            return Err(Reason::Unsupported);
        };
        let file = &message.fds[0];
        match FdKind::of(file).map_err(|error| Reason::Examine(error.to_string()))? {
            // Marking a page must not wait for a device: a worker does it, which serves other disks.
            FdKind::File {
                bytes,
                read_write: true,
                on: FileSystem::Tmpfs,
            } if needs <= bytes => {}
            FdKind::File {
                bytes,
                read_write: true,
                on,
            } => {
                let found = format!("a file of {bytes:#x} on {on}");
                return Err(Reason::LogFile { needs, found });
            }
            other => {
                let found = other.describe();
                return Err(Reason::LogFile { needs, found });
            }
        }
        let log =
            DirtyLog::map(file, offset, size).map_err(|error| Reason::LogMap(error.to_string()))?;
        check_reach(log.pages(), guest_end)?;
        self.pages = Some(log.pages());
        keeper.set_log(log);
        Ok(())
    }

    /// While pages are marked, each page of the guest's memory has a bit. A front end makes its log longer
    /// before it makes the memory larger. `acked` are the features that the front end acknowledged.
    pub(super) fn check(&self, acked: u64, guest_end: u64) -> Result<(), Reason> {
        match self.pages {
            Some(pages) if acked & LOG_ALL != 0 => check_reach(pages, guest_end),
            _ => Ok(()),
        }
    }

    /// The part of SET_VRING_ADDR that is about the log.
    pub(super) fn set_ring(&self, queue: u32, flags: u32, address: u64) -> Result<(), Reason> {
        let logged = flags & VhostUserVringAddrFlags::VHOST_VRING_F_LOG.bits() != 0;
        if logged && !address.is_multiple_of(4) {
            return Err(Reason::AddressAlign {
                queue,
                part: "used ring's log",
                address,
                align: 4,
            });
        }
        if let Some(keeper) = &self.keeper {
            keeper.log_used_at(queue, logged.then_some(address));
        }
        Ok(())
    }
}

fn check_reach(pages: u64, guest_end: u64) -> Result<(), Reason> {
    let needs = guest_end.div_ceil(LOG_PAGE_BYTES);
    if pages < needs {
        return Err(Reason::LogShort { has: pages, needs });
    }
    Ok(())
}
