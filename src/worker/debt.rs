//! What a disk was let do beyond its limits, and how it is paid for.
//!
//! When something waits for requests to end (a stop, new memory, another elevator, the end of the process),
//! what was taken is issued without waiting for tokens, and its tokens are charged as a debt. A front end
//! can make things wait as often as it likes, by stopping and starting its rings. So that it gets no more
//! than its limits that way, nothing is taken of the disk until the debt is paid: what is not taken has
//! nothing to end.

use crate::mq::ids::DiskId;

use super::{Worker, WorkerDisk};

/// Whether nothing is taken of a disk until it has paid.
pub(super) fn owes(disks: &[Option<WorkerDisk>], disk: DiskId) -> bool {
    disks[disk.index()]
        .as_ref()
        .is_some_and(|known| known.owes_until_ns > 0)
}

impl Worker {
    /// Rings of a disk start, or go on. First it pays for what it owes, if it has limits.
    pub(super) fn pay_first(&mut self, disk: DiskId) {
        let until_ns = self.mq.owes_until_ns(disk);
        if let Some(known) = &mut self.disks[disk.index()] {
            known.owes_until_ns = until_ns;
            self.indebted |= until_ns > 0;
        }
    }

    /// Limits have changed, and with them how long paying takes.
    pub(super) fn review_debts(&mut self) {
        if !self.indebted {
            return;
        }
        for (known, index) in self.disks.iter_mut().zip(0..) {
            if let Some(known) = known.as_mut().filter(|known| known.owes_until_ns > 0) {
                known.owes_until_ns = self.mq.owes_until_ns(DiskId(index));
            }
        }
    }

    /// Whether nothing is to be taken of a disk yet.
    #[cold]
    pub(super) fn owes(&mut self, disk: DiskId) -> bool {
        let now_ns = self.now_ns;
        if let Some(known) = &mut self.disks[disk.index()]
            && known.owes_until_ns <= now_ns
        {
            known.owes_until_ns = 0;
        }
        owes(&self.disks, disk)
    }

    /// When the first of the disks that owe something has paid.
    pub(super) fn next_paid_ns(&mut self) -> Option<u64> {
        if !self.indebted {
            return None;
        }
        let debts = self.disks.iter().flatten().map(|known| known.owes_until_ns);
        let next = debts.filter(|until| *until > 0).min();
        self.indebted = next.is_some();
        next
    }
}
