//! Driver tags: one set for each worker, shared by all its hctxs over all disks.
//!
//! This is blk-mq's shared tag set (`BLK_MQ_F_TAG_HCTX_SHARED`) with one owner, so a stack of free
//! slots takes the place of the kernel's sbitmap: last put, first taken, which keeps the engine's
//! slots warm.
//!
//! The kernel's fairness (hctx_may_queue, block/blk-mq.h) counts the hctxs that were active of late: a disk
//! whose requests do not come back keeps what it took while it was alone, and one with many queues gets more
//! than one with few. Here each disk has a part that no other disk can take, also while it is idle
//! ([`TagDepth::of_disk`] tags, and [`TagDepth::of_disk_flushes`] more that only its flushes take). The rest
//! is shared: beyond its part a disk may hold as many as its share among the active disks, and an hctx as
//! many as its share among the active hctxs of its disk, max(⌈share/n⌉, 4) as in the kernel.
//!
//! The parts are counted and not set aside: where a disk holds less than its part, one tag is free for each
//! that it lacks. So the next tag is always the one used last, and a request costs a comparison.

use super::ids::{DriverTag, HctxId, RequestId, RequestTag};
use super::limits::{
    DISK_FLUSH_TAGS, DISK_TAGS, DRIVER_TAGS, MIN_DISK_FLUSH_TAGS, MIN_DISK_TAGS, SHARED_TAGS,
};

/// What an hctx may hold at least of what its disk may hold, however many are active.
const FAIR_MINIMUM: u16 = 4;

/// How many tags there are, and which part of them belongs to each disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TagDepth {
    /// Disks that have a part.
    pub disks: u16,
    /// Tags that each of them can always have.
    pub of_disk: u16,
    /// Tags that the flushes of each of them can always have.
    pub of_disk_flushes: u16,
    /// Tags that any disk can take beyond that.
    pub shared: u16,
}

impl TagDepth {
    /// For a worker that serves rings of so many disks: [`DRIVER_TAGS`] in all for a few, more for many.
    pub fn for_disks(disks: u16) -> TagDepth {
        let disks = disks.max(1);
        let of_disk = (4 * DISK_TAGS / disks).clamp(MIN_DISK_TAGS, DISK_TAGS);
        let of_disk_flushes = (DISK_FLUSH_TAGS / disks).max(MIN_DISK_FLUSH_TAGS);
        let parts = disks.saturating_mul(of_disk + of_disk_flushes);
        TagDepth {
            disks,
            of_disk,
            of_disk_flushes,
            shared: DRIVER_TAGS.saturating_sub(parts).max(SHARED_TAGS),
        }
    }

    /// All tags: the most requests the engine can have.
    pub fn total(self) -> u16 {
        let parts = self
            .disks
            .saturating_mul(self.of_disk + self.of_disk_flushes);
        parts.saturating_add(self.shared)
    }
}

/// One disk's account with the set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TagShare {
    /// Its own part.
    part: u16,
    flush_part: u16,
    /// Tags it holds, without those of its flushes' part.
    held: u16,
    /// Those.
    flushes: u16,
    /// Its hctxs that use tags.
    active_hctxs: u16,
}

impl TagShare {
    /// Whether completions of its own are what it waits for when it waits for one, because it gets no tag
    /// only where it holds some.
    pub fn has_part(&self) -> bool {
        self.part > 0
    }

    /// Tags it holds in all.
    pub fn in_use(&self) -> u16 {
        self.held + self.flushes
    }
}

/// A worker's driver tags.
#[derive(Clone, Debug)]
pub struct TagSet {
    slots: Box<[Slot]>,
    free: Vec<u16>,
    /// What disks can take beyond their parts.
    shared_left: u16,
    /// How many of those each active disk may hold. Kept, because a division for each request is dear.
    fair_share: u16,
    active_disks: u16,
    depth: TagDepth,
    /// Disks that can still be given a part.
    seats: u16,
}

/// What a tag is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Use {
    Free,
    Ordinary,
    /// From the part of a disk's flushes.
    Flush,
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    generation: u16,
    used: Use,
    /// Of one that is not free.
    owner: RequestId,
}

/// A tag that was given back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Returned {
    /// Whose it was.
    pub owner: RequestId,
    /// It counts as one of its hctx's ([`TagSet::get`]).
    pub ordinary: bool,
}

impl TagSet {
    /// A set in which nobody holds anything.
    pub fn new(depth: TagDepth) -> Self {
        let blank = Slot {
            generation: 0,
            used: Use::Free,
            owner: RequestId {
                hctx: HctxId(0),
                tag: RequestTag(0),
            },
        };
        TagSet {
            slots: vec![blank; usize::from(depth.total())].into_boxed_slice(),
            free: (0..depth.total()).rev().collect(),
            shared_left: depth.shared,
            fair_share: depth.shared,
            active_disks: 0,
            depth,
            seats: depth.disks,
        }
    }

    /// How many there are, and for whom.
    pub fn depth(&self) -> TagDepth {
        self.depth
    }

    /// Whether no tag is left.
    #[inline]
    pub fn is_exhausted(&self) -> bool {
        self.free.is_empty()
    }

    /// Tags taken.
    pub fn in_use(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// A disk comes: from here on it has its part. More disks than the set was made for have none, and
    /// share what is shared.
    pub fn seat(&mut self, share: &mut TagShare) {
        debug_assert_eq!(share.in_use(), 0);
        if let Some(seats) = self.seats.checked_sub(1) {
            self.seats = seats;
            (share.part, share.flush_part) = (self.depth.of_disk, self.depth.of_disk_flushes);
        }
    }

    /// A disk that holds nothing leaves.
    pub fn unseat(&mut self, share: &mut TagShare) {
        debug_assert_eq!(share.in_use(), 0);
        if share.part != 0 || share.flush_part != 0 {
            self.seats += 1;
            (share.part, share.flush_part) = (0, 0);
        }
    }

    /// The number of those that share has changed.
    fn share_anew(&mut self) {
        self.fair_share = self.depth.shared.div_ceil(self.active_disks.max(1));
    }

    /// An hctx of the disk started to use tags.
    pub fn hctx_activated(&mut self, share: &mut TagShare) {
        share.active_hctxs += 1;
        if share.active_hctxs == 1 {
            self.active_disks += 1;
            self.share_anew();
        }
    }

    /// An hctx of the disk no longer uses tags.
    pub fn hctx_idled(&mut self, share: &mut TagShare) {
        share.active_hctxs -= 1;
        if share.active_hctxs == 0 {
            self.active_disks -= 1;
            self.share_anew();
        }
    }

    /// Whether a disk may take one of those that are shared, for an hctx that holds `held`.
    fn may_share(&self, share: &TagShare, held: u16) -> bool {
        let most = share.part.saturating_add(self.fair_share);
        let of_hctxs = u32::from(held) * u32::from(share.active_hctxs);
        self.shared_left > 0
            && share.held < most
            && (held < FAIR_MINIMUM || of_hctxs < u32::from(most))
    }

    /// Whether [`Self::get`] has a tag.
    #[inline]
    pub fn may_get(&self, share: &TagShare, held: u16) -> bool {
        share.held < share.part || self.may_share(share, held)
    }

    /// How many tags [`Self::get`] has for an hctx that holds `held`, or a few less.
    pub fn room(&self, share: &TagShare, held: u16) -> u16 {
        let part_left = share.part.saturating_sub(share.held);
        let most = share.part.saturating_add(self.fair_share);
        let of_hctx = (most / share.active_hctxs.max(1)).max(FAIR_MINIMUM);
        let of_disk = most.saturating_sub(share.held.max(share.part));
        let shared = of_disk.min(of_hctx.saturating_sub(held));
        part_left.saturating_add(shared.min(self.shared_left))
    }

    /// Takes an ordinary tag for an hctx that holds `held` of them.
    #[inline]
    pub fn get(&mut self, share: &mut TagShare, owner: RequestId, held: u16) -> Option<DriverTag> {
        if share.held >= share.part {
            self.take_shared(share, held)?;
        }
        // Where the disk's part is not used up, or the shared one was not, one is free.
        let index = self.free.pop()?;
        share.held += 1;
        Some(self.take(index, owner, Use::Ordinary))
    }

    /// Counts one that is shared as taken.
    #[inline]
    fn take_shared(&mut self, share: &TagShare, held: u16) -> Option<()> {
        self.may_share(share, held).then(|| self.shared_left -= 1)
    }

    /// Takes a tag of the part that the disk's flushes have.
    pub fn get_for_flush(&mut self, share: &mut TagShare, owner: RequestId) -> Option<DriverTag> {
        if share.flushes >= share.flush_part {
            return None;
        }
        let index = self.free.pop()?;
        share.flushes += 1;
        Some(self.take(index, owner, Use::Flush))
    }

    #[inline]
    fn take(&mut self, index: u16, owner: RequestId, used: Use) -> DriverTag {
        let slot = &mut self.slots[usize::from(index)];
        debug_assert_eq!(slot.used, Use::Free);
        slot.generation = slot.generation.wrapping_add(1);
        (slot.used, slot.owner) = (used, owner);
        DriverTag {
            index,
            generation: slot.generation,
        }
    }

    /// Takes a tag back and says whose it was; `None` for a completion that came late or twice. Its disk's
    /// account is to follow, with [`Self::credit`].
    #[inline]
    pub fn put(&mut self, tag: DriverTag) -> Option<Returned> {
        let slot = self.slots.get_mut(usize::from(tag.index))?;
        if slot.generation != tag.generation || slot.used == Use::Free {
            return None;
        }
        let ordinary = std::mem::replace(&mut slot.used, Use::Free) == Use::Ordinary;
        self.free.push(tag.index);
        Some(Returned {
            owner: slot.owner,
            ordinary,
        })
    }

    /// The disk that held a tag, which was taken back, no longer does.
    #[inline]
    pub fn credit(&mut self, share: &mut TagShare, ordinary: bool) {
        if !ordinary {
            share.flushes -= 1;
            return;
        }
        share.held -= 1;
        if share.held >= share.part {
            self.shared_left += 1;
        }
    }

    /// Whose a tag is; `None` if it is nobody's any more.
    pub fn owner(&self, tag: DriverTag) -> Option<RequestId> {
        let slot = self.slots.get(usize::from(tag.index))?;
        let taken = slot.used != Use::Free && slot.generation == tag.generation;
        taken.then_some(slot.owner)
    }

    /// The tags that are taken, and whose they are.
    pub fn taken(&self) -> impl Iterator<Item = (DriverTag, RequestId)> {
        self.slots.iter().zip(0..).filter_map(|(slot, index)| {
            let generation = slot.generation;
            let tag = DriverTag { index, generation };
            (slot.used != Use::Free).then_some((tag, slot.owner))
        })
    }

    /// Lets every disk take all that is shared.
    #[cfg(test)]
    pub fn be_unfair(&mut self) {
        self.fair_share = u16::MAX;
    }
}

#[cfg(test)]
mod tests;
