//! What a ring does with an in-flight record: it goes on where the process before was killed.

use super::{Head, Ring, RingError};
use crate::virtio::inflight::{InflightQueue, Tracker};

/// Chains that were taken by the process before, to be taken again before anything else. While there is
/// one of these, nothing is popped from the available ring.
#[derive(Debug)]
pub(super) struct Resume {
    heads: Vec<u16>,
    /// How many of them were popped.
    popped: usize,
}

impl Ring {
    /// Keeps account in `record` from now on of what is in flight, and takes up what was in flight when the
    /// process before ended: [`Ring::available`] and [`Ring::pop_head`] give those chains first, in the order in
    /// which they were taken. The available index follows from them, whatever was said in the set-up.
    ///
    /// Nothing may have been popped from the ring yet. On an error the ring cannot be used.
    pub fn track(&mut self, record: InflightQueue) -> Result<(), RingError> {
        assert_eq!(self.in_flight, 0, "the ring is in use already");
        let (size, used) = (self.setup.size, self.published);
        let (tracker, recovered) = Tracker::recover(record, size, used)?;
        let next = recovered.next_avail;
        self.next_avail = next;
        // More in flight than was ever offered, or another ring's record.
        self.available()?;
        self.seen_avail = next;
        self.tracker = Some(tracker);
        if !recovered.heads.is_empty() {
            self.used_before = true;
            self.must_call = true;
            self.resume = Some(Box::new(Resume {
                heads: recovered.heads,
                popped: 0,
            }));
        }
        Ok(())
    }

    /// Chains of the process before that have not been popped again yet.
    #[inline]
    pub fn to_resume(&self) -> usize {
        match &self.resume {
            None => 0,
            Some(resume) => resume.heads.len() - resume.popped,
        }
    }

    /// How many chains of the process before are there to be popped; `None` if there are none left.
    #[inline]
    pub(super) fn resumable(&mut self) -> Option<u16> {
        self.resume.as_ref()?;
        self.look_at_resume()
    }

    #[cold]
    fn look_at_resume(&mut self) -> Option<u16> {
        match self.to_resume() {
            0 => {
                self.resume = None;
                None
            }
            left => Some(u16::try_from(left).expect("at most the ring's size")),
        }
    }

    /// Pops the next chain of the process before.
    #[inline]
    pub(super) fn pop_resumed(&mut self) -> Option<Head> {
        self.resume.as_ref()?;
        self.pop_from_resume()
    }

    #[cold]
    fn pop_from_resume(&mut self) -> Option<Head> {
        let resume = self.resume.as_mut()?;
        let head = *resume.heads.get(resume.popped)?;
        resume.popped += 1;
        self.in_flight_heads[usize::from(head / 64)] |= 1 << (head % 64);
        self.in_flight += 1;
        self.last_head = head;
        Some(Head(head))
    }

    /// Enters a chain that was popped into the account. One of the process before is in it, and keeps its
    /// place in the order.
    #[inline]
    pub(super) fn track_taken(&mut self, head: u16) {
        if let Some(tracker) = &mut self.tracker
            && self.resume.is_none()
        {
            tracker.take(head);
        }
    }

    /// Gives the chain popped last back, because there is no room for it now.
    pub fn unpop(&mut self, head: Head) {
        assert_eq!(
            head.0, self.last_head,
            "only the head popped last can be given back"
        );
        self.release(head.0);
        match &mut self.resume {
            Some(resume) => resume.popped -= 1,
            None => self.next_avail = self.next_avail.wrapping_sub(1),
        }
    }
}

#[cfg(test)]
mod tests;
