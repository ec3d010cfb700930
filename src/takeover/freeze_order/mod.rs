//! Holding all disks still, so that one whose storage is slow keeps the other disks' guests waiting as little as can be.
//!
//! A disk is still when what it has in flight has ended, which is up to its storage. All disks have to be still at one
//! time. So those that may take long are held first, while the others go on: disks with a request that their storage has
//! had for some time already. The others follow together. If one of them turns out to take long, the rest go on again
//! until it is still.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::mq::ids::QueueId;

use crate::disk::{Disk, Holding, NotHeld};

/// How long disks wait for each other at most, and what a request takes at most that is not slow.
const TOGETHER: Duration = Duration::from_millis(250);

/// Why a disk could not be held still: its place, and the reason.
pub(super) type Restless = (usize, NotHeld);

/// What this needs of a disk.
pub(super) trait Holdable {
    /// What waits for it to be still.
    type Waiting: Waiting;

    /// Begins to hold it.
    fn begin(&self) -> Self::Waiting;

    /// Lets it go on.
    fn let_go(&self);
}

/// Waits for a disk to be still.
pub(super) trait Waiting {
    fn wait(&mut self, deadline: Instant) -> Result<(), NotHeld>;
}

impl Holdable for Disk {
    type Waiting = Holding;

    fn begin(&self) -> Holding {
        self.hold()
    }

    fn let_go(&self) {
        self.release();
    }
}

impl Waiting for Holding {
    fn wait(&mut self, deadline: Instant) -> Result<(), NotHeld> {
        Holding::wait(self, deadline)
    }
}

/// A disk that is still.
#[derive(Debug)]
pub(super) struct Still<W> {
    /// What was waited for.
    held: W,
    /// Since when nothing is taken of it: its guest waits.
    pub since: Instant,
}

/// Holds all disks, and returns when all are still, in their order; `oldest` is for how long the storage of each has had
/// the oldest of its requests. They have to be let go of afterwards, also after an error.
pub(super) fn hold_still<D: Holdable>(
    disks: &[&D],
    oldest: &[Duration],
    deadline: Instant,
) -> Result<Vec<Still<D::Waiting>>, Restless> {
    let begin = |at: usize| Still {
        since: Instant::now(),
        held: disks[at].begin(),
    };
    let mut held: BTreeMap<usize, Still<D::Waiting>> = BTreeMap::new();
    let (mut slow, mut rest): (Vec<usize>, Vec<usize>) =
        (0..disks.len()).partition(|at| oldest[*at] >= TOGETHER);
    loop {
        for at in &slow {
            held.entry(*at).or_insert_with(|| begin(*at));
        }
        for at in &slow {
            let waiting = &mut held.get_mut(at).expect("it was begun").held;
            waiting.wait(deadline).map_err(|why| (*at, why))?;
        }
        for at in &rest {
            held.insert(*at, begin(*at));
        }
        let together = deadline.min(Instant::now() + TOGETHER);
        let mut late = Vec::new();
        for at in &rest {
            let waiting = &mut held.get_mut(at).expect("it was begun").held;
            match waiting.wait(together) {
                Ok(()) => {}
                Err(NotHeld::Late) => late.push(*at),
                Err(why) => return Err((*at, why)),
            }
        }
        if late.is_empty() {
            return Ok(held.into_values().collect());
        }
        rest.retain(|at| !late.contains(at));
        for at in &rest {
            held.remove(at);
            disks[*at].let_go();
        }
        slow = late;
    }
}

/// The rings of disks that are still.
pub(super) fn rings(still: Vec<Still<Holding>>) -> Vec<BTreeMap<QueueId, u16>> {
    let rings = still.into_iter().map(|still| still.held.into_rings());
    rings.collect()
}

#[cfg(test)]
mod tests;
