//! Driver tags: one set for each worker, shared by all its hctxs over all disks.
//!
//! This is blk-mq's shared tag set (`BLK_MQ_F_TAG_HCTX_SHARED`) with one owner, so a stack of free
//! slots takes the place of the kernel's sbitmap: last put, first taken, which keeps the engine's
//! slots warm. Fairness is the kernel's: with `n` active hctxs each may hold max(⌈depth/n⌉, 4)
//! (hctx_may_queue, block/blk-mq.h).

use super::ids::{DriverTag, RequestId};

/// What an hctx may hold at least, however many are active.
const FAIR_MINIMUM: u16 = 4;

/// A worker's driver tags.
#[derive(Debug)]
pub struct TagSet {
    slots: Box<[Slot]>,
    free: Vec<u16>,
    free_reserved: Vec<u16>,
    depth: u16,
    reserved: u16,
    in_use: u16,
    active_hctxs: u16,
    /// What each of them may hold. Kept, because a division for each request is dear.
    fair_share: u16,
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    generation: u16,
    owner: Option<RequestId>,
}

impl TagSet {
    /// A set of `depth` tags, of which the first `reserved` are for flushes.
    pub fn new(depth: u16, reserved: u16) -> Self {
        assert!(reserved < depth, "{reserved} of {depth} tags reserved");
        TagSet {
            slots: vec![
                Slot {
                    generation: 0,
                    owner: None
                };
                usize::from(depth)
            ]
            .into_boxed_slice(),
            free: (reserved..depth).rev().collect(),
            free_reserved: (0..reserved).rev().collect(),
            depth: depth - reserved,
            reserved,
            in_use: 0,
            active_hctxs: 0,
            fair_share: depth - reserved,
        }
    }

    /// Tags for ordinary requests, in all.
    pub fn depth(&self) -> u16 {
        self.depth
    }

    /// Whether no ordinary tag is left.
    pub fn is_exhausted(&self) -> bool {
        self.free.is_empty()
    }

    /// Tags taken, reserved ones included.
    pub fn in_use(&self) -> u16 {
        self.in_use
    }

    /// How many ordinary tags one hctx may hold now.
    #[inline]
    pub fn fair_share(&self) -> u16 {
        self.fair_share
    }

    /// The number of those that share has changed.
    fn share_anew(&mut self) {
        self.fair_share = match self.active_hctxs {
            0 | 1 => self.depth(),
            active => self.depth().div_ceil(active).max(FAIR_MINIMUM),
        };
    }

    /// An hctx started to use tags.
    pub fn hctx_activated(&mut self) {
        self.active_hctxs += 1;
        self.share_anew();
    }

    /// An hctx no longer uses tags.
    pub fn hctx_idled(&mut self) {
        assert!(self.active_hctxs > 0, "more hctxs idle than were active");
        self.active_hctxs -= 1;
        self.share_anew();
    }

    /// Takes an ordinary tag for an hctx that holds `held` of them.
    #[inline]
    pub fn get(&mut self, owner: RequestId, held: u16) -> Option<DriverTag> {
        if held >= self.fair_share {
            return None;
        }
        let index = self.free.pop()?;
        Some(self.take(index, owner))
    }

    /// Takes a reserved tag; fairness does not apply.
    pub fn get_reserved(&mut self, owner: RequestId) -> Option<DriverTag> {
        let index = self.free_reserved.pop()?;
        Some(self.take(index, owner))
    }

    #[inline]
    fn take(&mut self, index: u16, owner: RequestId) -> DriverTag {
        let slot = &mut self.slots[usize::from(index)];
        debug_assert!(slot.owner.is_none());
        slot.generation = slot.generation.wrapping_add(1);
        slot.owner = Some(owner);
        self.in_use += 1;
        DriverTag {
            index,
            generation: slot.generation,
        }
    }

    /// Gives a tag back and says whose it was; `None` for a completion that came late or twice.
    #[inline]
    pub fn put(&mut self, tag: DriverTag) -> Option<RequestId> {
        let slot = self.slots.get_mut(usize::from(tag.index))?;
        if slot.generation != tag.generation {
            return None;
        }
        let owner = slot.owner.take()?;
        self.in_use -= 1;
        if self.is_reserved(tag) {
            self.free_reserved.push(tag.index);
        } else {
            self.free.push(tag.index);
        }
        Some(owner)
    }

    /// Whose a tag is; `None` if it is nobody's any more.
    pub fn owner(&self, tag: DriverTag) -> Option<RequestId> {
        let slot = self.slots.get(usize::from(tag.index))?;
        slot.owner.filter(|_| slot.generation == tag.generation)
    }

    /// The tags that are taken, and whose they are.
    pub fn taken(&self) -> impl Iterator<Item = (DriverTag, RequestId)> {
        self.slots.iter().zip(0..).filter_map(|(slot, index)| {
            let generation = slot.generation;
            let tag = DriverTag { index, generation };
            Some((tag, slot.owner?))
        })
    }

    /// Whether the tag is one of the reserved ones.
    #[inline]
    pub fn is_reserved(&self, tag: DriverTag) -> bool {
        tag.index < self.reserved
    }
}

#[cfg(test)]
mod tests {
    use super::super::ids::{HctxId, RequestTag};
    use super::*;

    fn owner(tag: u16) -> RequestId {
        RequestId {
            hctx: HctxId(0),
            tag: RequestTag(tag),
        }
    }

    #[test]
    fn fair_share_is_the_models() {
        for (active, share) in [(1, 128), (2, 64), (3, 43), (64, 4)] {
            let mut tags = TagSet::new(128 + 1, 1);
            (0..active).for_each(|_| tags.hctx_activated());
            assert_eq!(tags.fair_share(), share, "{active} active");
        }
    }

    #[test]
    fn a_tag_is_handed_out_once_until_it_comes_back() {
        let mut tags = TagSet::new(5, 1);
        let taken: Vec<_> = (0..4).map(|i| tags.get(owner(i), 0).unwrap()).collect();
        assert_eq!(tags.get(owner(9), 0), None);
        let reserved = tags.get_reserved(owner(7)).unwrap();
        assert!(tags.is_reserved(reserved) && !tags.is_reserved(taken[0]));
        assert_eq!(tags.get_reserved(owner(8)), None);
        assert_eq!(tags.in_use(), 5);
        for (i, tag) in taken.iter().enumerate() {
            assert_eq!(tags.put(*tag), Some(owner(i as u16)));
        }
        assert_eq!(tags.put(reserved), Some(owner(7)));
        assert_eq!((tags.in_use(), tags.is_exhausted()), (0, false));
    }

    #[test]
    fn a_stale_completion_frees_nothing() {
        let mut tags = TagSet::new(2, 1);
        let first = tags.get(owner(0), 0).unwrap();
        assert_eq!(tags.put(first), Some(owner(0)));
        assert_eq!(tags.put(first), None, "twice");
        let second = tags.get(owner(1), 0).unwrap();
        assert_eq!(second.index, first.index);
        assert_eq!(tags.put(first), None, "an earlier owner's");
        assert_eq!(
            tags.put(DriverTag {
                index: 99,
                generation: 0
            }),
            None,
            "never handed out"
        );
        assert_eq!(tags.put(second), Some(owner(1)));
    }

    #[test]
    fn an_hctx_at_its_share_waits_while_another_is_served() {
        let mut tags = TagSet::new(17, 1);
        tags.hctx_activated();
        tags.hctx_activated();
        for held in 0..8 {
            assert!(tags.get(owner(held), held).is_some());
        }
        assert_eq!(tags.get(owner(8), 8), None);
        assert!(tags.get(owner(9), 0).is_some());
        tags.hctx_idled();
        assert!(tags.get(owner(8), 8).is_some(), "alone, there is no share");
    }
}
