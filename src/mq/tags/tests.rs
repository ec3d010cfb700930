use std::collections::{HashSet, VecDeque};
use std::hash::Hash;

use super::*;

fn owner(tag: u16) -> RequestId {
    RequestId {
        hctx: HctxId(0),
        tag: RequestTag(tag),
    }
}

/// A disk with `hctxs` active.
fn disk(tags: &mut TagSet, hctxs: u16) -> TagShare {
    let mut share = TagShare::default();
    tags.seat(&mut share);
    (0..hctxs).for_each(|_| tags.hctx_activated(&mut share));
    share
}

fn depth(disks: u16, of_disk: u16, of_disk_flushes: u16, shared: u16) -> TagDepth {
    TagDepth {
        disks,
        of_disk,
        of_disk_flushes,
        shared,
    }
}

/// Takes as many as there are for one hctx.
fn take_all(tags: &mut TagSet, share: &mut TagShare) -> Vec<DriverTag> {
    let mut held = Vec::new();
    while let Some(tag) = tags.get(share, owner(0), u16::try_from(held.len()).unwrap()) {
        held.push(tag);
    }
    held
}

fn put(tags: &mut TagSet, share: &mut TagShare, tag: DriverTag) {
    let returned = tags.put(tag).expect("it was taken");
    tags.credit(share, returned.ordinary);
}

#[test]
fn a_few_disks_have_the_tags_they_always_had_and_many_have_at_least_two_and_one_for_flushes() {
    for (disks, total) in [(0, 256), (1, 256), (2, 256), (4, 264), (32, 288), (64, 320)] {
        assert_eq!(TagDepth::for_disks(disks).total(), total, "{disks} disks");
    }
    for disks in 1..=1024 {
        let depth = TagDepth::for_disks(disks);
        assert!(
            depth.of_disk >= 2 && depth.of_disk_flushes >= 1,
            "{depth:?}"
        );
        assert!(depth.shared >= 128, "{depth:?}");
        let parts = u32::from(disks) * u32::from(depth.of_disk + depth.of_disk_flushes);
        assert_eq!(u32::from(depth.total()), parts + u32::from(depth.shared));
    }
}

#[test]
fn two_busy_disks_have_half_each_however_many_queues_they_have() {
    let mut tags = TagSet::new(TagDepth::for_disks(2));
    let (mut many, mut one) = (disk(&mut tags, 64), disk(&mut tags, 1));
    let mut of_many = 0;
    for _ in 0..64 {
        of_many += take_all(&mut tags, &mut many).len();
    }
    assert_eq!((of_many, take_all(&mut tags, &mut one).len()), (124, 124));
}

#[test]
fn hctxs_of_one_disk_share_what_their_disk_may_hold() {
    let mut tags = TagSet::new(depth(1, 0, 0, 64));
    let mut share = disk(&mut tags, 3);
    // ⌈64/3⌉ each, and the last one what is left.
    let taken: Vec<_> = (0..3)
        .map(|_| take_all(&mut tags, &mut share).len())
        .collect();
    assert_eq!(taken, [22, 22, 20]);
    let mut tags = TagSet::new(depth(1, 0, 0, 64));
    let mut share = disk(&mut tags, 64);
    assert_eq!(take_all(&mut tags, &mut share).len(), 4, "so many at least");
}

#[test]
fn a_tag_is_handed_out_once_until_it_comes_back() {
    let mut tags = TagSet::new(depth(1, 2, 1, 2));
    let mut share = disk(&mut tags, 1);
    let taken = take_all(&mut tags, &mut share);
    assert_eq!(taken.len(), 4);
    let flush = tags.get_for_flush(&mut share, owner(7)).unwrap();
    assert_eq!(tags.get_for_flush(&mut share, owner(8)), None);
    let indices: HashSet<_> = taken.iter().chain([&flush]).map(|tag| tag.index).collect();
    assert_eq!((indices.len(), tags.in_use()), (5, 5));
    assert!(tags.is_exhausted());
    assert_eq!(tags.owner(flush), Some(owner(7)));
    for tag in taken.into_iter().chain([flush]) {
        put(&mut tags, &mut share, tag);
    }
    assert_eq!((tags.in_use(), share.in_use()), (0, 0));
    assert_eq!(take_all(&mut tags, &mut share).len(), 4);
}

#[test]
fn a_stale_completion_frees_nothing() {
    let mut tags = TagSet::new(depth(1, 1, 0, 0));
    let mut share = disk(&mut tags, 1);
    let first = tags.get(&mut share, owner(0), 0).unwrap();
    put(&mut tags, &mut share, first);
    assert_eq!(tags.put(first), None, "twice");
    let second = tags.get(&mut share, owner(1), 0).unwrap();
    assert_eq!(second.index, first.index);
    assert_eq!(tags.put(first), None, "an earlier owner's");
    let never = DriverTag {
        index: 99,
        generation: 0,
    };
    assert_eq!(tags.put(never), None, "never handed out");
    let returned = tags.put(second).expect("it is taken");
    assert_eq!((returned.owner, returned.ordinary), (owner(1), true));
}

#[test]
fn more_disks_than_there_are_parts_for_share_what_is_shared() {
    let mut tags = TagSet::new(depth(1, 2, 1, 3));
    let (mut first, mut second) = (disk(&mut tags, 1), disk(&mut tags, 1));
    assert_eq!(
        take_all(&mut tags, &mut second).len(),
        2,
        "half, rounded up"
    );
    assert_eq!(tags.get_for_flush(&mut second, owner(0)), None);
    assert_eq!(
        take_all(&mut tags, &mut first).len(),
        3,
        "its part and the rest"
    );
}

/// What can happen to the tags of a small worker.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// An hctx of a disk asks for a tag.
    Get(usize, usize),
    Flush(usize),
    /// The oldest that it holds come back.
    Put(usize, usize),
    PutFlush(usize),
    /// An hctx is counted as active, or is not.
    Wake(usize, usize),
    Sleep(usize, usize),
}

#[derive(Clone)]
struct World {
    tags: TagSet,
    shares: [TagShare; 2],
    held: [[Vec<DriverTag>; 2]; 2],
    flushes: [Vec<DriverTag>; 2],
    active: [[bool; 2]; 2],
}

impl World {
    fn new() -> World {
        let mut tags = TagSet::new(depth(2, 1, 1, 3));
        World {
            shares: [0, 0].map(|_| disk(&mut tags, 0)),
            tags,
            held: Default::default(),
            flushes: Default::default(),
            active: Default::default(),
        }
    }

    fn apply(&mut self, step: Step) {
        let tags = &mut self.tags;
        match step {
            Step::Get(at, hctx) => {
                let held = &mut self.held[at][hctx];
                let count = u16::try_from(held.len()).unwrap();
                held.extend(tags.get(&mut self.shares[at], owner(0), count));
            }
            Step::Flush(at) => {
                let tag = tags.get_for_flush(&mut self.shares[at], owner(0));
                self.flushes[at].extend(tag);
            }
            Step::Put(at, hctx) => {
                let tag = self.held[at][hctx].remove(0);
                put(tags, &mut self.shares[at], tag);
            }
            Step::PutFlush(at) => {
                let tag = self.flushes[at].remove(0);
                put(tags, &mut self.shares[at], tag);
            }
            Step::Wake(at, hctx) => {
                self.active[at][hctx] = true;
                tags.hctx_activated(&mut self.shares[at]);
            }
            Step::Sleep(at, hctx) => {
                self.active[at][hctx] = false;
                tags.hctx_idled(&mut self.shares[at]);
            }
        }
    }

    fn possible(&self) -> Vec<Step> {
        let mut steps = Vec::new();
        for at in 0..2 {
            for hctx in 0..2 {
                steps.push(Step::Get(at, hctx));
                if !self.held[at][hctx].is_empty() {
                    steps.push(Step::Put(at, hctx));
                }
                steps.push(match self.active[at][hctx] {
                    true => Step::Sleep(at, hctx),
                    false => Step::Wake(at, hctx),
                });
            }
            steps.push(Step::Flush(at));
            if !self.flushes[at].is_empty() {
                steps.push(Step::PutFlush(at));
            }
        }
        steps
    }

    /// What decides what can happen from here on: which tags they are does not.
    fn state(&self) -> impl Hash + Eq + use<> {
        let held = self.held.each_ref();
        let held = held.map(|hctxs| hctxs.each_ref().map(Vec::len));
        let flushes = self.flushes.each_ref().map(Vec::len);
        (held, flushes, self.active)
    }

    /// Each disk has its part at once, for whichever of its hctxs asks, and one tag more for a flush.
    fn check(mut self) {
        let all = self.held.iter().flatten().flatten();
        let all = all.chain(self.flushes.iter().flatten());
        let indices: HashSet<_> = all.clone().map(|tag| tag.index).collect();
        assert_eq!(indices.len(), all.count(), "a tag is used twice");
        for (at, share) in self.shares.iter_mut().enumerate() {
            if self.held[at].iter().all(Vec::is_empty) {
                assert!(self.tags.get(share, owner(0), 0).is_some(), "disk {at}");
            }
            if self.flushes[at].is_empty() {
                let tag = self.tags.get_for_flush(share, owner(0));
                assert!(tag.is_some(), "a flush of disk {at}");
            }
        }
    }
}

#[test]
fn no_schedule_of_one_disk_takes_the_part_of_another() {
    let mut seen = HashSet::new();
    let mut worlds = VecDeque::from([World::new()]);
    seen.insert(worlds[0].state());
    while let Some(world) = worlds.pop_front() {
        for step in world.possible() {
            let mut next = world.clone();
            next.apply(step);
            if seen.insert(next.state()) {
                worlds.push_back(next);
            }
        }
        world.check();
    }
    assert!(seen.len() > 1000, "{}", seen.len());
}
