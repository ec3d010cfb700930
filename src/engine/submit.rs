//! From slots to submission entries.

use std::io;

use super::{Engine, KIND_SLOT, user_data};
use crate::engine::slot::Slot;

/// With so many commands of a batch the device begins with them, for the first time.
const EARLY: u32 = 2;

/// What was queued since the last [`Engine::commit_rqs`].
#[derive(Debug)]
pub(super) struct Batch {
    /// Commands that the kernel has not been given.
    queued: u32,
    /// With how many of them it is given them, although the batch goes on.
    early: u32,
}

impl Batch {
    pub(super) const NEW: Batch = Batch {
        queued: 0,
        early: EARLY,
    };
}

impl Engine {
    /// Whether the kernel has refused to be entered again and again. Then nothing arrives here, messages neither.
    pub fn is_refused(&self) -> bool {
        self.ring.is_refused()
    }

    /// Prepares the slot's next step, or has it wait for its turn; false if the ring takes none now.
    #[inline]
    pub(super) fn send(&mut self, index: u16) -> bool {
        let slot = &self.slots[usize::from(index)];
        let disk = self
            .disks
            .get(slot.disk)
            .expect("a disk with requests in flight stays");
        if slot.needs_lane(disk) {
            if !self.enter_lane(index) {
                return true;
            }
        } else if slot.left() > disk.small_bytes && !self.takes_turn(index) {
            return true;
        }
        let slot = &mut self.slots[usize::from(index)];
        if slot.wants_bounce {
            let Some(bounce) = self.memory.take_bounce(slot.disk) else {
                return false;
            };
            slot.wants_bounce = false;
            slot.bounce = Some(bounce);
            self.counters.bounced += 1;
        }
        let disk = self
            .disks
            .get(slot.disk)
            .expect("a disk with requests in flight stays");
        let mut entry = slot.sqe(disk, self.memory.extents(index), self.memory.zeroes());
        // What was copied into the buffer may be zeros.
        if slot.bounce.is_some() && slot.meets(&mut self.ring.losses) {
            entry = Slot::refused_sqe(disk);
        }
        let entry = entry.user_data(user_data(KIND_SLOT, u32::from(slot.generation), index));
        let polled = match &mut self.polled {
            Some(polled) if slot.goes_polled() => Some(polled),
            _ => None,
        };
        // SAFETY: the entry names the caller's buffers, which `queue_rq`'s caller keeps valid until
        // the slot is done, the slot's own memory, which goes after the ring is drained, or a static.
        // Unsafe because the kernel works on addresses.
        let sent = unsafe {
            match polled {
                Some(polled) => {
                    let sent = polled.ring.push(&entry, &mut self.counters);
                    polled.in_flight += u32::from(sent);
                    self.counters.polled += u64::from(sent);
                    sent
                }
                None => self.ring.push(&entry, &mut self.counters),
            }
        };
        if sent {
            // Queued, not submitted: the kernel has not begun.
            slot.sent(disk, self.memory.extents(index));
        }
        sent
    }

    /// Tries again what the ring had no room for.
    #[inline]
    pub(super) fn resend(&mut self) {
        // All are tried: one may wait for a bounce buffer that another of its disk holds.
        let mut at = 0;
        while at < self.unsent.len() {
            if self.send(self.unsent[at]) {
                self.unsent.swap_remove(at);
            } else {
                at += 1;
            }
        }
        if self.unsent_fds {
            self.resend_fds();
        }
    }

    /// Has the device begin with a batch while the rest of it is prepared: a request takes the kernel
    /// some microseconds, and a device that waits for all of them has nothing to do for that long. Each
    /// time twice as many are waited for, so that the calls stay few.
    #[inline]
    pub(super) fn begin_early(&mut self) {
        self.batch.queued += 1;
        if self.batch.queued == self.batch.early {
            self.batch.queued = 0;
            self.batch.early = self.batch.early.saturating_mul(2);
            // A ring that is broken says so again when the batch ends.
            let _ = self.submit();
        }
    }

    /// Ends a batch: submits what is queued with one system call; none if nothing is.
    ///
    /// What the kernel has no room for stays queued for the next time: it is not lost, and no error of its
    /// request. An error means that the ring itself is broken.
    pub fn commit_rqs(&mut self) -> io::Result<()> {
        self.resend();
        self.batch = Batch::NEW;
        self.submit()
    }

    pub(super) fn submit(&mut self) -> io::Result<()> {
        self.submit_polled()?;
        self.ring.submit(&mut self.counters)
    }
}
