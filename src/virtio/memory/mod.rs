//! The guest's memory as the data path sees it: where each guest-physical range is mapped here.

use std::any::Any;
use std::fmt;
use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

use crate::sys::sigbus::Guarded;
use vm_memory::bitmap::Bitmap;
use vm_memory::{
    FileOffset, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MemoryRegionAddress,
};

/// One range of guest-physical addresses and where it is mapped.
#[derive(Clone, Copy, Debug)]
pub struct Region {
    /// Its first guest-physical address.
    pub gpa: u64,
    /// Its bytes.
    pub len: u64,
    /// Where the first byte is mapped.
    pub host: NonNull<u8>,
}

impl Region {
    /// No memory at all: what a cached region is before the first look-up.
    pub(super) const NONE: Region = Region {
        gpa: 0,
        len: 0,
        host: NonNull::dangling(),
    };

    /// Where `gpa` is mapped, if the `len` bytes from there are all in this region.
    #[inline]
    pub(super) fn host(&self, gpa: u64, len: u64) -> Option<NonNull<u8>> {
        let offset = gpa.wrapping_sub(self.gpa);
        if offset < self.len && len <= self.len - offset {
            // The table's constructor checked that the whole mapping fits into an isize.
            let offset = usize::try_from(offset).ok()?;
            // SAFETY: `offset` is within the mapping that `MemoryTable::new`'s caller vouched for.
            // Unsafe because the mapping is the guest's too, so no reference may be made of it.
            Some(unsafe { self.host.add(offset) })
        } else {
            None
        }
    }
}

/// What is wrong with a list of regions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MemoryError {
    /// Empty, or its end wraps around in guest-physical or host addresses.
    #[error("guest memory region at {gpa:#x} has the impossible length {len:#x}")]
    Length {
        /// Where the region starts.
        gpa: u64,
        /// The length it was given.
        len: u64,
    },
    /// Two regions have addresses in common.
    #[error("guest memory regions at {first:#x} and {second:#x} overlap")]
    Overlap {
        /// Where the lower one starts.
        first: u64,
        /// Where the other one starts.
        second: u64,
    },
    /// The region has no host mapping.
    #[error("guest memory region at {gpa:#x} is not mapped")]
    NotMapped {
        /// Where the region starts.
        gpa: u64,
    },
    /// The region cannot be guarded against being truncated.
    #[error("guest memory region at {gpa:#x} cannot be guarded: {why}")]
    Unguarded {
        /// Where the region starts.
        gpa: u64,
        /// What [`Guarded::new`] said.
        why: io::ErrorKind,
    },
}

/// All of a guest's memory, at one moment. A change makes a new table.
pub struct MemoryTable {
    /// Sorted by address, disjoint, none empty.
    regions: Box<[Region]>,
    /// What contains SIGBUS in each region; before the mappings, so that it goes before them.
    guards: Box<[Arc<Guarded>]>,
    /// What keeps the mappings alive.
    _keep: Arc<dyn Any + Send + Sync>,
}

// SAFETY: the table itself never changes, and the memory it points to may be accessed from any
// thread: it is shared with the guest's vCPUs anyway. Unsafe because raw pointers carry no such
// promise by themselves.
unsafe impl Send for MemoryTable {}
// SAFETY: as for Send. Unsafe for the same reason.
unsafe impl Sync for MemoryTable {}

impl fmt::Debug for MemoryTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryTable")
            .field("regions", &self.regions)
            .finish_non_exhaustive()
    }
}

impl MemoryTable {
    /// A table of `regions`, in any order. `keep` is held as long as the table, or anything that
    /// was translated with it, lives.
    ///
    /// # Safety
    ///
    /// For as long as `keep` lives, each region's `len` bytes from `host` are mapped, readable and
    /// writable, and no Rust reference to them is made anywhere.
    pub unsafe fn new(
        mut regions: Vec<Region>,
        keep: Arc<dyn Any + Send + Sync>,
    ) -> Result<MemoryTable, MemoryError> {
        regions.sort_unstable_by_key(|region| region.gpa);
        for region in &regions {
            let Region { gpa, len, host } = *region;
            let host_len = isize::try_from(len).ok().map(isize::unsigned_abs);
            let fits = host_len.is_some_and(|len| host.addr().checked_add(len).is_some());
            if len == 0 || !fits || gpa.checked_add(len).is_none() {
                return Err(MemoryError::Length { gpa, len });
            }
        }
        for pair in regions.windows(2) {
            if pair[0].gpa + pair[0].len > pair[1].gpa {
                return Err(MemoryError::Overlap {
                    first: pair[0].gpa,
                    second: pair[1].gpa,
                });
            }
        }
        Ok(MemoryTable {
            regions: regions.into_boxed_slice(),
            guards: Box::default(),
            _keep: keep,
        })
    }

    /// A table of what vm-memory has mapped; it keeps `memory` alive. Each region is guarded: it is
    /// the front end's file, which the front end can truncate. Regions that were in `before` stay
    /// guarded, and lost if they were.
    pub fn from_guest_memory<B>(
        memory: Arc<GuestMemoryMmap<B>>,
        before: Option<&MemoryTable>,
    ) -> Result<MemoryTable, MemoryError>
    where
        B: Bitmap + Send + Sync + 'static,
    {
        let regions = memory
            .iter()
            .map(|region| {
                let gpa = region.start_addr().0;
                region
                    .get_host_address(MemoryRegionAddress(0))
                    .ok()
                    .and_then(NonNull::new)
                    .map(|host| Region {
                        gpa,
                        len: region.len(),
                        host,
                    })
                    .ok_or(MemoryError::NotMapped { gpa })
            })
            .collect::<Result<Vec<_>, _>>()?;
        let pages: Vec<usize> = memory
            .iter()
            .map(|region| guard::page_bytes(region.file_offset().map(FileOffset::file)))
            .collect();
        // SAFETY: vm-memory maps each region readable and writable, for its own length, until
        // `memory` goes, and hands out volatile slices only. Unsafe because that is its promise,
        // not something the compiler sees.
        let mut table = unsafe { MemoryTable::new(regions, memory) }?;
        // vm-memory has its regions in the order of their addresses, as the table does.
        table.guards = table
            .regions
            .iter()
            .zip(pages)
            .map(
                |(region, page)| match before.and_then(|table| table.guard_of(region)) {
                    Some(guard) => Ok(Arc::clone(guard)),
                    None => region.guard(page).map(Arc::new),
                },
            )
            .collect::<Result<_, _>>()?;
        Ok(table)
    }

    /// What guards the mapping of `region`, if it is in this table. An address says which mapping it
    /// is: as long as this table lives there is no other.
    fn guard_of(&self, region: &Region) -> Option<&Arc<Guarded>> {
        let is_same = |own: &Region| (own.host, own.len) == (region.host, region.len);
        let at = self.regions.iter().position(is_same)?;
        self.guards.get(at)
    }

    /// Whether any of it was taken away, so that zeros are in its place; see [`crate::sys::sigbus`].
    pub fn is_lost(&self) -> bool {
        self.guards.iter().any(|guard| guard.is_lost())
    }

    /// The regions, by ascending address.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// Where `gpa` is mapped, if the `len` bytes from there are all in one region. A length of
    /// zero asks for the one address.
    #[inline]
    pub fn host(&self, gpa: u64, len: u64) -> Option<NonNull<u8>> {
        self.find(gpa)?.host(gpa, len)
    }

    /// As [`MemoryTable::host`], looking into `hit` first and leaving there where it found it.
    #[inline]
    pub(super) fn host_near(&self, hit: &mut Region, gpa: u64, len: u64) -> Option<NonNull<u8>> {
        if let Some(host) = hit.host(gpa, len) {
            return Some(host);
        }
        let region = self.find(gpa)?;
        *hit = *region;
        region.host(gpa, len)
    }

    /// Calls `push` with each host buffer of the `len` bytes from `gpa`, which may go on from one
    /// region into the next if no address lies between them. Stops when `push` says false.
    ///
    /// False: not all of it is guest memory, or `push` said so; the buffers up to there were
    /// pushed.
    pub fn host_segments(
        &self,
        gpa: u64,
        len: u64,
        mut push: impl FnMut(NonNull<u8>, usize) -> bool,
    ) -> bool {
        let (mut gpa, mut len) = (gpa, len);
        while len > 0 {
            let Some(region) = self.find(gpa) else {
                return false;
            };
            let here = len.min(region.len - (gpa - region.gpa));
            let (Some(host), Ok(bytes)) = (region.host(gpa, here), usize::try_from(here)) else {
                return false;
            };
            if !push(host, bytes) {
                return false;
            }
            // Regions end below 2^64, so this does not wrap.
            gpa += here;
            len -= here;
        }
        true
    }

    /// The guest-physical address of what is mapped at `host`.
    pub(super) fn gpa(&self, host: NonNull<u8>) -> Option<u64> {
        self.regions.iter().find_map(|region| {
            let offset = host.addr().get().checked_sub(region.host.addr().get())? as u64;
            (offset < region.len).then(|| region.gpa + offset)
        })
    }

    /// Copies guest memory out, each byte read once. False, with `into` partly filled, if not all
    /// of it is guest memory.
    pub(super) fn read(&self, gpa: u64, into: &mut [u8]) -> bool {
        let mut done = 0;
        self.host_segments(gpa, into.len() as u64, |host, bytes| {
            // SAFETY: `host_segments` gives mapped memory. Unsafe because the guest may write it
            // meanwhile.
            unsafe { super::abi::read_bytes(host, &mut into[done..done + bytes]) };
            done += bytes;
            true
        })
    }

    /// The region `gpa` lies in.
    #[inline]
    fn find(&self, gpa: u64) -> Option<&Region> {
        let after = self.regions.partition_point(|region| region.gpa <= gpa);
        let region = self.regions.get(after.checked_sub(1)?)?;
        (gpa - region.gpa < region.len).then_some(region)
    }
}

mod guard;
mod nodes;
#[cfg(test)]
mod tests;
