//! What is known of a session's rings, for another process to go on with.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::PoisonError;

use vhost_user_backend::VringT;
use virtio_queue::QueueT;

use crate::mq::ids::QueueId;
use crate::mq::limits::MAX_RING_SIZE;

use super::{SessionState, Vring};
use crate::vhost_user::guard::CarriedRing;

impl SessionState {
    /// All rings about which something was said. `base_of` is the next avail index of a ring that a
    /// worker has, `user_of` the front end's address for a guest physical one.
    ///
    /// # Errors
    ///
    /// The process is out of descriptors.
    pub fn carry_rings(
        &self,
        base_of: impl Fn(QueueId) -> Option<u16>,
        user_of: impl Fn(u64) -> Option<u64>,
    ) -> io::Result<Vec<CarriedRing>> {
        let mut carried = Vec::new();
        for ring in self.rings() {
            carried.extend(ring.carry(&base_of, &user_of)?);
        }
        Ok(carried)
    }

    /// The rings, in order.
    pub(super) fn rings(&self) -> Vec<Vring> {
        let rings = self.rings.lock().unwrap_or_else(PoisonError::into_inner);
        rings.clone()
    }

    /// Whether a worker has the ring.
    pub fn is_running(&self, index: u16) -> bool {
        let rings = self.rings();
        let ring = rings.get(usize::from(index));
        ring.is_some_and(|ring| ring.link.own().running)
    }
}

impl Vring {
    /// `None`: nothing was said about it.
    fn carry(
        &self,
        base_of: impl Fn(QueueId) -> Option<u16>,
        user_of: impl Fn(u64) -> Option<u64>,
    ) -> io::Result<Option<CarriedRing>> {
        let queue = self.link.ring.queue;
        let own = self.link.own();
        let state = self.inner.get_ref();
        let ring = state.get_queue();
        let parts = [ring.desc_table(), ring.used_ring(), ring.avail_ring()];
        let users = parts.map(&user_of);
        let duplicate = |fd: &Option<OwnedFd>| fd.as_ref().map(OwnedFd::try_clone).transpose();
        let carried = CarriedRing {
            index: queue.0,
            size: ring.size(),
            base: match own.running {
                true => base_of(queue).unwrap_or_else(|| ring.next_avail()),
                false => ring.next_avail(),
            },
            addresses: match users {
                [Some(desc), Some(used), Some(avail)] if parts != [0; 3] => {
                    Some([desc, used, avail])
                }
                // Never given, or in memory that was taken away.
                _ => None,
            },
            enabled: state.is_enabled(),
            kicked: ring.ready() || own.kick.is_some(),
            running: own.running,
            kick: duplicate(&own.kick)?,
            call: duplicate(&own.call)?,
            err: duplicate(&own.err)?,
        };
        let said = carried.size != MAX_RING_SIZE
            || carried.base != 0
            || carried.addresses.is_some()
            || carried.enabled
            || carried.kicked
            || carried.call.is_some()
            || carried.err.is_some();
        Ok(said.then_some(carried))
    }
}
