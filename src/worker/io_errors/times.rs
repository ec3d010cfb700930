//! How often a disk was held, and how much of that a worker has followed.

use crate::atomic::{AtomicU32, Ordering};

/// How often a disk was held after an error; one for all workers that serve it.
#[derive(Debug, Default)]
pub struct Times(AtomicU32);

impl Times {
    /// How often so far.
    pub fn get(&self) -> u32 {
        // Not ordered with anything here: who changes it wakes the others, and who asks for a disk to
        // be resumed does so by a message.
        self.0.load(Ordering::Relaxed)
    }

    fn add(&self) -> u32 {
        self.0.fetch_add(1, Ordering::Relaxed) + 1
    }
}

/// Up to which time a worker has held the disk, or gone on.
#[derive(Debug)]
pub struct Followed(u32);

impl Followed {
    /// What happened so far is of no concern to a worker that begins now.
    pub fn new(times: &Times) -> Followed {
        Followed(times.get())
    }

    /// The worker holds the disk, and the others are to follow.
    pub fn begin(&mut self, times: &Times) {
        self.0 = times.add();
    }

    /// Whether another worker has held it since.
    pub fn follow(&mut self, times: &Times) -> bool {
        let now = times.get();
        std::mem::replace(&mut self.0, now) != now
    }

    /// Somebody said that the disk is to go on, when it had been held `until` times. Not whatever is true
    /// when the worker hears of it: another one may have gone on, failed again and held the disk anew.
    pub fn resume(&mut self, until: u32) {
        self.0 = until;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_that_fails_again_before_all_have_resumed_is_held_by_all() {
        let times = Times::default();
        let (mut fast, mut slow) = (Followed::new(&times), Followed::new(&times));
        fast.begin(&times);
        assert!(slow.follow(&times) && !slow.follow(&times));
        let until = times.get();
        fast.resume(until);
        assert!(!fast.follow(&times));
        fast.begin(&times);
        slow.resume(until);
        assert!(slow.follow(&times), "only one of two holds the disk");
        assert!(!fast.follow(&times));
    }
}
