//! The descriptors that a session was promised: counted before a message with descriptors is carried out, so that the
//! device never lacks one.

use std::collections::BTreeSet;

use vhost::vhost_user::message::FrontendReq;

use super::refusal::Reason;
use super::wire::{Message, u64_at};
use crate::sys::fds::{Share, UsedUp};

/// What a kick, a call or an error becomes: what negotiates has one, the control plane one, and the ring's worker one.
const OF_A_RINGS: u64 = 3;

/// What any other becomes: ours and the device's.
const OF_ANOTHER: u64 = 2;

/// What a session has been promised so far. It keeps all of it until it ends: a descriptor that replaces another
/// takes its place.
#[derive(Debug, Default)]
pub(super) struct Promised {
    share: Share,
    /// Requests whose descriptor is counted, with the queue for those of a ring.
    counted: BTreeSet<(u32, u64)>,
    /// Regions of memory that are counted.
    regions: usize,
}

impl Promised {
    /// With what it had to begin.
    pub(super) fn new(share: Share) -> Promised {
        Promised {
            share,
            ..Promised::default()
        }
    }

    /// Counts what `message` brings. `regions` are those of the memory so far, which may be there for as long as
    /// requests use them.
    ///
    /// # Errors
    ///
    /// The process has no more.
    pub(super) fn count(
        &mut self,
        request: FrontendReq,
        message: &Message,
        regions: usize,
    ) -> Result<(), Reason> {
        use FrontendReq as R;
        let makes_one = request == R::GET_INFLIGHT_FD;
        if message.fds.is_empty() && !makes_one {
            return Ok(());
        }
        let (queue, each) = match request {
            R::SET_MEM_TABLE | R::ADD_MEM_REG => {
                return self.count_regions(regions + message.fds.len());
            }
            R::SET_VRING_KICK | R::SET_VRING_CALL | R::SET_VRING_ERR => {
                (u64_at(&message.payload, 0) & 0xff, OF_A_RINGS)
            }
            _ => (0, OF_ANOTHER),
        };
        let key = (request.into(), queue);
        if !self.counted.contains(&key) {
            self.grow(each)?;
            self.counted.insert(key);
        }
        Ok(())
    }

    fn count_regions(&mut self, regions: usize) -> Result<(), Reason> {
        let more = regions.saturating_sub(self.regions);
        self.grow(more as u64)?;
        self.regions = self.regions.max(regions);
        Ok(())
    }

    fn grow(&mut self, count: u64) -> Result<(), Reason> {
        self.share.grow(count).map_err(|UsedUp| Reason::NoFds)
    }
}
