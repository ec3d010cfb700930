//! Guest memory: memfd regions at chosen guest addresses, shared with the back end.
//!
//! This is the only file of the front end with `unsafe` in it. It hands out [`Window`]s, whose accesses are checked
//! against their bounds and done as atomic loads and stores, because the back end is another process that reads and
//! writes the same bytes at the same time.

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, AtomicUsize, Ordering};

/// One memfd mapped at one guest physical address.
pub struct Region {
    /// First guest physical address of the region.
    pub gpa: u64,
    /// Length in bytes, a multiple of the page size.
    pub len: usize,
    file: OwnedFd,
    base: NonNull<u8>,
    allocated: AtomicUsize,
}

// SAFETY: needed because of the raw pointer: queues are driven from several threads. The mapping is shared memory that
// lives as long as the region, and every access goes through atomics or volatile byte copies, never through references.
unsafe impl Send for Region {}
// SAFETY: as for `Send`: no access hands out a reference to the mapped bytes.
unsafe impl Sync for Region {}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Region")
            .field("gpa", &format_args!("{:#x}", self.gpa))
            .field("len", &format_args!("{:#x}", self.len))
            .finish_non_exhaustive()
    }
}

impl Region {
    fn new(gpa: u64, len: usize, pages: MemfdFlags) -> io::Result<Self> {
        let file = memfd_create("guest-memory", MemfdFlags::CLOEXEC | pages)?;
        Self::of(gpa, len, file)
    }

    fn of(gpa: u64, len: usize, file: OwnedFd) -> io::Result<Self> {
        ftruncate(&file, len as u64)?;
        // SAFETY: unsafe is needed to map memory. A new mapping at an address the kernel chooses replaces nothing.
        let base = unsafe {
            mmap(
                ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                &file,
                0,
            )?
        };
        Ok(Self {
            gpa,
            len,
            file,
            base: NonNull::new(base.cast()).expect("mmap never returns a null address"),
            allocated: AtomicUsize::new(0),
        })
    }

    /// The memfd behind the region.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Where the region is mapped in this process: the "user address" of vhost-user messages.
    pub fn user_address(&self) -> u64 {
        self.base.as_ptr().expose_provenance() as u64
    }

    fn offset_of(&self, gpa: u64) -> Option<usize> {
        let offset = usize::try_from(gpa.checked_sub(self.gpa)?).ok()?;
        (offset < self.len).then_some(offset)
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: unsafe is needed to unmap. The range is the one mapped in `new`, and windows keep their region alive.
        let unmapped = unsafe { munmap(self.base.as_ptr().cast(), self.len) };
        assert!(unmapped.is_ok(), "a mapping of ours could not be unmapped");
    }
}

/// The guest's memory: regions in the order of their guest addresses.
#[derive(Debug)]
pub struct GuestMemory {
    regions: Vec<Arc<Region>>,
}

impl GuestMemory {
    /// Memory with one region for each `(guest address, length in bytes)`, sorted by address.
    pub fn new(layout: &[(u64, usize)]) -> io::Result<Self> {
        Self::of_pages(layout, MemfdFlags::empty())
    }

    /// The same of pages of 2 MiB, of which the kernel has to have enough reserved.
    pub fn huge(layout: &[(u64, usize)]) -> io::Result<Self> {
        Self::of_pages(layout, MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB)
    }

    /// Memory of one region in a memfd, and one after it in `file`, which is made as long.
    pub fn with_file(memfd: (u64, usize), file: (u64, usize), of: OwnedFd) -> io::Result<Self> {
        assert!(memfd.0 + memfd.1 as u64 <= file.0, "memory regions overlap");
        let regions = [
            Region::new(memfd.0, memfd.1, MemfdFlags::empty())?,
            Region::of(file.0, file.1, of)?,
        ];
        let regions = regions.map(Arc::new).into();
        Ok(Self { regions })
    }

    fn of_pages(layout: &[(u64, usize)], pages: MemfdFlags) -> io::Result<Self> {
        let mut layout = layout.to_vec();
        layout.sort_unstable();
        for pair in layout.windows(2) {
            let end = pair[0].0 + pair[0].1 as u64;
            assert!(end <= pair[1].0, "memory regions overlap");
        }
        let regions = layout
            .into_iter()
            .map(|(gpa, len)| Region::new(gpa, len, pages).map(Arc::new))
            .collect::<io::Result<_>>()?;
        Ok(Self { regions })
    }

    /// The regions, sorted by guest address.
    pub fn regions(&self) -> &[Arc<Region>] {
        &self.regions
    }

    /// Takes `len` bytes aligned to `align` out of the first region with room for them; they are never given back.
    pub fn alloc(&self, len: usize, align: usize) -> u64 {
        (0..self.regions.len())
            .find_map(|index| self.try_alloc_in(index, len, align))
            .unwrap_or_else(|| panic!("no region has {len} free bytes: set up more guest memory"))
    }

    /// Takes `len` bytes aligned to `align` out of region `index`.
    pub fn alloc_in(&self, index: usize, len: usize, align: usize) -> u64 {
        self.try_alloc_in(index, len, align)
            .unwrap_or_else(|| panic!("region {index} has no {len} free bytes: make it larger"))
    }

    fn try_alloc_in(&self, index: usize, len: usize, align: usize) -> Option<u64> {
        let region = &self.regions[index];
        let mut start = 0;
        region
            .allocated
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
                start = used.next_multiple_of(align);
                start.checked_add(len).filter(|end| *end <= region.len)
            })
            .ok()?;
        Some(region.gpa + start as u64)
    }

    /// The address in this process of a guest address, as vhost-user wants it for rings.
    pub fn user_address(&self, gpa: u64) -> u64 {
        let (region, offset) = self.find(gpa);
        region.user_address() + offset as u64
    }

    fn find(&self, gpa: u64) -> (&Arc<Region>, usize) {
        self.regions
            .iter()
            .find_map(|region| Some((region, region.offset_of(gpa)?)))
            .unwrap_or_else(|| panic!("guest address {gpa:#x} is in no region"))
    }

    /// A window on `len` bytes at `gpa`, which must lie in one region.
    pub fn window(&self, gpa: u64, len: usize) -> Window {
        let (region, offset) = self.find(gpa);
        assert!(len <= region.len - offset, "a window ends in its region");
        // SAFETY: unsafe is needed for pointer arithmetic; `offset` lies in the mapping, as `find` made sure.
        let base = unsafe { region.base.add(offset) };
        Window {
            region: Arc::clone(region),
            base,
            len,
        }
    }

    /// Calls `each` with a window and the range of the caller's buffer for every piece of `gpa..gpa + len` in a region.
    fn pieces(&self, gpa: u64, len: usize, mut each: impl FnMut(Window, std::ops::Range<usize>)) {
        let mut done = 0;
        while done < len {
            let (region, offset) = self.find(gpa + done as u64);
            let part = (region.len - offset).min(len - done);
            each(self.window(gpa + done as u64, part), done..done + part);
            done += part;
        }
    }

    /// Copies `bytes` to guest address `gpa`; they may cross from one region into the next.
    pub fn write(&self, gpa: u64, bytes: &[u8]) {
        self.pieces(gpa, bytes.len(), |window, range| {
            window.write(&bytes[range])
        });
    }

    /// Copies guest memory at `gpa` into `bytes`; it may cross from one region into the next.
    pub fn read(&self, gpa: u64, bytes: &mut [u8]) {
        self.pieces(gpa, bytes.len(), |window, range| {
            window.read(&mut bytes[range])
        });
    }

    /// `len` bytes of guest memory at `gpa`.
    pub fn read_vec(&self, gpa: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.read(gpa, &mut bytes);
        bytes
    }

    /// Fills `len` bytes at `gpa` with `byte`.
    pub fn fill(&self, gpa: u64, len: usize, byte: u8) {
        self.pieces(gpa, len, |window, _| window.fill(byte));
    }
}

/// A piece of guest memory within one region. Offsets are in bytes from the window's start.
#[derive(Debug)]
pub struct Window {
    region: Arc<Region>,
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: needed because of the raw pointer. The window keeps its region, and so the mapping, alive.
unsafe impl Send for Window {}

macro_rules! access {
    ($load:ident, $store:ident, $word:ty, $atomic:ty) => {
        #[doc = concat!("Loads the `", stringify!($word), "` at `offset`.")]
        #[inline]
        pub fn $load(&self, offset: usize, order: Ordering) -> $word {
            // SAFETY: `at` checked that the word lies in the mapping and is aligned, and the mapping lives as long
            // as the window. Unsafe is needed because memory shared with another process has no safe type.
            unsafe { <$atomic>::from_ptr(self.at::<$word>(offset)) }.load(order)
        }

        #[doc = concat!("Stores a `", stringify!($word), "` at `offset`.")]
        #[inline]
        pub fn $store(&self, offset: usize, value: $word, order: Ordering) {
            // SAFETY: as for the load.
            unsafe { <$atomic>::from_ptr(self.at::<$word>(offset)) }.store(value, order);
        }
    };
}

impl Window {
    #[inline]
    fn at<T>(&self, offset: usize) -> *mut T {
        assert!(
            offset <= self.len && size_of::<T>() <= self.len - offset,
            "an access stays in its window"
        );
        // SAFETY: unsafe is needed for pointer arithmetic; the assertion above keeps it in the mapping.
        let word = unsafe { self.base.as_ptr().add(offset) }.cast::<T>();
        assert!(word.is_aligned(), "words of a ring are aligned");
        word
    }

    access!(load_u8, store_u8, u8, AtomicU8);
    access!(load_u16, store_u16, u16, AtomicU16);
    access!(load_u32, store_u32, u32, AtomicU32);
    access!(load_u64, store_u64, u64, AtomicU64);

    fn write(&self, bytes: &[u8]) {
        assert!(bytes.len() <= self.len, "a copy stays in its window");
        // SAFETY: both ranges are valid for their length, and a slice of ours never overlaps the mapping. Unsafe is
        // needed because memory shared with another process cannot be a slice.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), self.base.as_ptr(), bytes.len()) }
    }

    fn read(&self, bytes: &mut [u8]) {
        assert!(bytes.len() <= self.len, "a copy stays in its window");
        // SAFETY: as in `write`, in the other direction.
        unsafe { ptr::copy_nonoverlapping(self.base.as_ptr(), bytes.as_mut_ptr(), bytes.len()) }
    }

    fn fill(&self, byte: u8) {
        // SAFETY: the window's bytes are in the mapping. Unsafe is needed for the reason given in `write`.
        unsafe { ptr::write_bytes(self.base.as_ptr(), byte, self.len) }
    }
}
