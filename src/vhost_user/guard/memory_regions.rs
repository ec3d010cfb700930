//! The memory regions a front end has announced, as far as they must be known to judge messages.
//!
//! Nothing is mapped here. What is checked here is what the crates behind take on trust: sums that
//! wrap, regions longer than their file (a later access would be SIGBUS), regions that overlap.

use std::os::fd::OwnedFd;

use super::received_fds::{FdKind, granule};
use super::refusal::Reason;
use super::wire::u64_at;

/// Bytes of one region description (vhost-user, "Memory region description").
pub(super) const REGION_BYTES: usize = 32;

/// One memory region, in bytes throughout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Region {
    /// Guest physical address of its first byte.
    pub(super) guest: u64,
    pub(super) size: u64,
    /// The address of its first byte in the front end, in which ring addresses are given.
    pub(super) user: u64,
    /// Offset of its first byte in its file.
    pub(super) offset: u64,
}

impl Region {
    /// Decodes the description in the first `REGION_BYTES` of `bytes`.
    pub(super) fn decode(bytes: &[u8]) -> Region {
        Region {
            guest: u64_at(bytes, 0),
            size: u64_at(bytes, 8),
            user: u64_at(bytes, 16),
            offset: u64_at(bytes, 24),
        }
    }

    /// Checks that the region is sound in itself.
    pub(super) fn check(&self) -> Result<(), Reason> {
        let Region {
            guest,
            size,
            user,
            offset,
        } = *self;
        if size == 0 {
            return Err(Reason::RegionEmpty { guest });
        }
        for (start, space) in [
            (guest, "guest's address space"),
            (user, "front end's address space"),
            (offset, "largest file"),
        ] {
            if start.checked_add(size).is_none() {
                return Err(Reason::RegionWraps { guest, size, space });
            }
        }
        Ok(())
    }

    /// Checks that a sound region lies inside the file behind `fd`. A character device does not
    /// say how long it is; there the mapping itself is the check.
    pub(super) fn check_file(&self, fd: &OwnedFd) -> Result<(), Reason> {
        let kind = FdKind::of(fd).map_err(|error| Reason::Examine(error.to_string()))?;
        let needs = self.offset + self.size;
        match kind {
            FdKind::File {
                bytes,
                read_write: true,
                on,
            } if needs <= bytes => match (self.offset | self.size) & (granule(on) - 1) {
                0 => Ok(()),
                _ => Err(Reason::RegionHugePages {
                    guest: self.guest,
                    page: granule(on),
                }),
            },
            FdKind::File {
                bytes,
                read_write: true,
                ..
            } => Err(Reason::RegionBeyondFile {
                guest: self.guest,
                needs,
                has: bytes,
            }),
            FdKind::Device { read_write: true } => Ok(()),
            other => Err(Reason::RegionFile {
                guest: self.guest,
                found: other.describe(),
            }),
        }
    }

    /// The first guest address after a sound region.
    fn guest_end(&self) -> u64 {
        self.guest + self.size
    }
}

/// The regions of a session, sound, by guest address and without overlap.
#[derive(Debug, Default)]
pub(super) struct RegionTable {
    regions: Vec<Region>,
}

impl RegionTable {
    /// The first guest address after all regions.
    pub(super) fn guest_end(&self) -> u64 {
        self.regions.last().map_or(0, Region::guest_end)
    }

    /// The regions.
    pub(super) fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// How many regions there are.
    pub(super) fn len(&self) -> usize {
        self.regions.len()
    }

    /// Takes `regions`, sound ones sorted by guest address, in place of all there were.
    pub(super) fn replace(&mut self, regions: Vec<Region>) -> Result<(), Reason> {
        for pair in regions.windows(2) {
            if pair[0].guest_end() > pair[1].guest {
                return Err(overlap(&pair[0], &pair[1]));
            }
        }
        self.regions = regions;
        Ok(())
    }

    /// Adds a sound region.
    pub(super) fn insert(&mut self, region: Region) -> Result<(), Reason> {
        let at = self.regions.partition_point(|r| r.guest < region.guest);
        if let Some(before) = at.checked_sub(1).map(|before| &self.regions[before])
            && before.guest_end() > region.guest
        {
            return Err(overlap(before, &region));
        }
        if let Some(after) = self.regions.get(at)
            && region.guest_end() > after.guest
        {
            return Err(overlap(after, &region));
        }
        self.regions.insert(at, region);
        Ok(())
    }

    /// Removes the region with `region`'s guest address, size and front-end address, by which the
    /// protocol identifies it; the offset does not count.
    pub(super) fn remove(&mut self, region: &Region) -> Result<(), Reason> {
        let found = self.regions.iter().position(|r| {
            r.guest == region.guest && r.size == region.size && r.user == region.user
        });
        match found {
            Some(at) => {
                self.regions.remove(at);
                Ok(())
            }
            None => Err(Reason::RegionUnknown {
                guest: region.guest,
                size: region.size,
            }),
        }
    }

    /// Whether the front end's address `user` is in one of the regions.
    pub(super) fn contains_user(&self, user: u64) -> bool {
        self.regions
            .iter()
            .any(|r| user >= r.user && user - r.user < r.size)
    }
}

fn overlap(first: &Region, second: &Region) -> Reason {
    Reason::RegionOverlap {
        first: first.guest,
        second: second.guest,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn region(guest: u64, size: u64) -> Region {
        Region {
            guest,
            size,
            user: guest,
            offset: 0,
        }
    }

    #[test]
    fn regions_that_wrap_or_are_empty_are_unsound() {
        assert_eq!(region(5, 0).check(), Err(Reason::RegionEmpty { guest: 5 }));
        let max = u64::MAX;
        for (bad, word) in [
            (region(max, 1), "guest's"),
            (
                Region {
                    user: max - 6,
                    ..region(0, 7)
                },
                "front end's",
            ),
            (
                Region {
                    offset: max - 1,
                    ..region(0, 2)
                },
                "largest file",
            ),
        ] {
            assert!(bad.check().unwrap_err().to_string().contains(word));
        }
        assert_eq!(region(max - 1, 1).check(), Ok(()));
    }

    #[test]
    fn addresses_are_found_from_the_first_byte_to_the_last() {
        let mut table = RegionTable::default();
        table.insert(region(0x1000, 0x1000)).unwrap();
        for (user, known) in [
            (0xfff, false),
            (0x1000, true),
            (0x1fff, true),
            (0x2000, false),
        ] {
            assert_eq!(table.contains_user(user), known, "{user:#x}");
        }
        table.remove(&region(0x1000, 0x1000)).unwrap();
        assert!(!table.contains_user(0x1000));
        assert!(table.remove(&region(0x1000, 0x1000)).is_err());
    }

    proptest! {
        /// A table never holds two regions that share a byte, and refuses no region that shares
        /// none: checked against comparing every pair.
        #[test]
        fn overlap_is_found_exactly(regions in prop::collection::vec((0_u64..40, 1_u64..8), 1..12)) {
            let mut table = RegionTable::default();
            let mut oracle: Vec<(u64, u64)> = Vec::new();
            for (guest, size) in regions {
                let free = oracle
                    .iter()
                    .all(|&(g, s)| guest + size <= g || g + s <= guest);
                prop_assert_eq!(table.insert(region(guest, size)).is_ok(), free);
                if free {
                    oracle.push((guest, size));
                }
                prop_assert_eq!(table.len(), oracle.len());
                prop_assert!(table.regions.is_sorted_by_key(|r| r.guest));
            }
        }
    }
}
