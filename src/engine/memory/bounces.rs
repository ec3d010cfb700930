//! The bounce buffers of an engine. Each disk has a part that no other disk can take, however long the
//! others keep what they hold; the rest is shared.
//!
//! The parts are counted and not set aside: a disk that holds less than its part may always take one, and
//! beyond that each takes from what is shared. So there is a free buffer for all that the disks lack of
//! their parts, and buffers used last are used first, whoever used them.

use std::io;
use std::ptr::NonNull;

use super::{Bounce, Mapping};
use crate::engine::{BOUNCE_BYTES, MAX_DISKS};

/// A number of buffers, counted disk by disk.
#[derive(Debug)]
pub(super) struct Bounces {
    mappings: Vec<Mapping>,
    free: Vec<NonNull<u8>>,
    /// By disk: how many it holds.
    held: Box<[u16]>,
    /// How many each disk can always have.
    each: u16,
    /// What can be taken beyond that, by any disk.
    shared_left: u16,
    /// Disks there are, and disks there are buffers for.
    disks: u16,
    room: u16,
}

impl Bounces {
    /// With `shared` of them, and `each` more for every disk that is added.
    pub fn new(shared: u16, each: u16) -> io::Result<Self> {
        let mut bounces = Bounces {
            mappings: Vec::new(),
            free: Vec::new(),
            held: vec![0; usize::from(MAX_DISKS)].into_boxed_slice(),
            each,
            shared_left: shared,
            disks: 0,
            room: 0,
        };
        bounces.map(shared)?;
        Ok(bounces)
    }

    fn map(&mut self, count: u16) -> io::Result<()> {
        let bytes = BOUNCE_BYTES as usize;
        let mapping = Mapping::new(usize::from(count) * bytes)?;
        self.free.reserve(usize::from(count));
        for index in (0..usize::from(count)).rev() {
            // SAFETY: inside the mapping, which has room for `count` of them. Unsafe because the
            // buffers are handed to the kernel by address.
            self.free.push(unsafe { mapping.base.add(index * bytes) });
        }
        self.mappings.push(mapping);
        Ok(())
    }

    /// See [`super::Memory::add_disk`]. What a removed disk had is used again.
    pub fn add_disk(&mut self, disk: u16) -> io::Result<()> {
        debug_assert_eq!(self.held[usize::from(disk)], 0);
        if self.disks == self.room {
            self.map(self.each)?;
            // A free list never grows while buffers are lent and given back.
            self.free.reserve(self.lent());
            self.room += 1;
        }
        self.disks += 1;
        Ok(())
    }

    /// See [`super::Memory::remove_disk`].
    pub fn remove_disk(&mut self, disk: u16) {
        debug_assert_eq!(self.held[usize::from(disk)], 0);
        self.disks -= 1;
    }

    /// See [`super::Memory::take_bounce`].
    pub fn take(&mut self, disk: u16) -> Option<Bounce> {
        let held = &mut self.held[usize::from(disk)];
        if *held >= self.each {
            self.shared_left = self.shared_left.checked_sub(1)?;
        }
        // One is free: the part of this disk is not used up, or the shared one was not.
        let base = self.free.pop()?;
        *held += 1;
        Some(Bounce { disk, base })
    }

    /// See [`super::Memory::put_bounce`].
    pub fn put(&mut self, bounce: Bounce) {
        debug_assert!(!self.free.contains(&bounce.base));
        let held = &mut self.held[usize::from(bounce.disk)];
        *held -= 1;
        if *held >= self.each {
            self.shared_left += 1;
        }
        self.free.push(bounce.base);
    }

    fn lent(&self) -> usize {
        self.held.iter().map(|held| usize::from(*held)).sum()
    }

    /// See [`super::Memory::leak`].
    pub fn leak(&mut self) {
        for mapping in &mut self.mappings {
            mapping.leaked = true;
        }
    }

    /// How many are free.
    #[cfg(test)]
    pub fn free(&self) -> usize {
        self.free.len()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    const DISKS: u16 = 3;

    /// Plays takes (a disk's number) and puts (the number plus [`DISKS`]; the oldest one goes back).
    fn play(steps: &[u16]) -> (Bounces, Vec<Vec<Bounce>>) {
        let mut bounces = Bounces::new(2, 2).expect("memory");
        let mut held = vec![Vec::new(); usize::from(DISKS)];
        (0..DISKS).for_each(|disk| bounces.add_disk(disk).expect("memory"));
        for step in steps {
            let at = usize::from(step % DISKS);
            if *step < DISKS {
                held[at].extend(bounces.take(*step));
            } else {
                bounces.put(held[at].remove(0));
            }
        }
        (bounces, held)
    }

    #[test]
    fn no_schedule_of_other_disks_takes_a_disks_part_of_the_bounce_buffers() {
        let mut seen = HashSet::new();
        let mut paths = vec![Vec::new()];
        while let Some(path) = paths.pop() {
            let (mut bounces, held) = play(&path);
            let counts: Vec<usize> = held.iter().map(Vec::len).collect();
            if !seen.insert(counts.clone()) {
                continue;
            }
            let all: HashSet<_> = held.iter().flatten().map(|b| b.base).collect();
            assert_eq!(all.len(), counts.iter().sum::<usize>(), "one is lent twice");
            for disk in 0..DISKS {
                let step = |step| path.iter().copied().chain([step]).collect::<Vec<_>>();
                let at = usize::from(disk);
                // The disk whose turn it is gets its part at once, whatever the others hold.
                if counts[at] < 2 {
                    let got = bounces.take(disk);
                    assert!(got.is_some(), "disk {disk} of {counts:?}");
                    bounces.put(got.expect("just asserted"));
                }
                paths.push(step(disk));
                if counts[at] > 0 {
                    paths.push(step(disk + DISKS));
                }
            }
        }
        // Each of 0 to 2, and of what is beyond that two at most.
        assert_eq!(seen.len(), 27 + 27 + 27 + 9, "{seen:?}");
    }

    #[test]
    fn a_disk_that_is_added_later_finds_its_part_though_another_has_taken_all_there_was() {
        let mut bounces = Bounces::new(2, 2).expect("memory");
        bounces.add_disk(0).expect("memory");
        let all: Vec<_> = std::iter::from_fn(|| bounces.take(0)).collect();
        assert_eq!(all.len(), 4);
        bounces.add_disk(1).expect("memory");
        let own: Vec<_> = std::iter::from_fn(|| bounces.take(1)).collect();
        assert_eq!(own.len(), 2);
        assert_eq!(bounces.take(0), None);
        own.into_iter().for_each(|bounce| bounces.put(bounce));
        bounces.remove_disk(1);
        bounces.add_disk(7).expect("memory");
        assert_eq!(bounces.mappings.len(), 3, "what was mapped is used again");
        assert!(bounces.take(7).is_some());
    }
}
