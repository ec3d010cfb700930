//! Memory that another process may take away.
//!
//! A front end shares its guest's memory as files, and a process that can write to a file can truncate it.
//! What lies behind the new end is still mapped here, and touching it is SIGBUS, which ends the
//! process and with it every other disk. The same signal comes for a page whose hardware failed.
//!
//! So each such mapping is registered as a [`Guarded`] range. When a thread touches what is gone, the
//! signal's handler says which page is lost, puts a zero page in its place, and lets the instruction be
//! repeated. Pages that are still there stay: other requests use them, and what they hold is right. Only a
//! range that loses many pages is replaced as a whole, because each replaced page is a mapping more. On
//! hugetlbfs a page is a huge page.
//!
//! # What becomes of the zeros
//!
//! They are not what the guest wrote. Rings, headers and tables are not believed anyway, but data is written
//! to the disk, and a write of zeros that is answered OK is data lost. So a loss is counted and recorded
//! *before* the zeros are there, and each reader looks after it has read: a request that was parsed
//! meanwhile is not carried out, a transfer that may have met the zeros fails ([`Losses`]), be it copied by
//! us or read by the kernel. The session ends ([`losses`], [`Guarded::is_lost`]).
//!
//! A SIGBUS anywhere else is a bug, and ends the process as it always did, but for one: the early warning
//! of a memory error (BUS_MCEERR_AO), which is about a page that may never be touched.
//!
//! # How the handler finds the range
//!
//! It may interrupt anything, so it takes no lock and allocates nothing: it reads a fixed table of
//! atomics. Each slot is written by one thread at a time, which holds a mutex, and carries a count
//! that is odd while it is written (a seqlock). The handler leaves out a slot that changes while it
//! looks: such a slot cannot be the one it is looking for, because a thread that touches a range has
//! been given it after it was registered, and gives it up before it is unregistered.

pub mod action;
mod losses;
mod slot;

use std::ffi::c_void;
use std::io;
use std::ptr::{self, NonNull};
use std::sync::{Mutex, MutexGuard, PoisonError};

use libc::{c_int, siginfo_t};

pub use self::losses::Losses;
use self::slot::{Recorded, Slot};
use crate::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};

/// How many ranges can be registered at once: as many regions as a session may have for each of 64
/// disks, twice, because a change of the memory has both for a moment. Eight MiB of addresses, of which
/// only what is used takes memory.
pub const MAX_RANGES: usize = 65_536;

/// The machine's page, at the least.
const PAGE_BYTES: usize = 4096;

/// How many pages of a range are replaced one by one. The page after them takes the whole range with it, so
/// that a range that loses many pages does not become as many mappings.
const MOST_PAGES: usize = 8;

/// How many pages of all ranges together are replaced one by one. After that ranges are replaced as a whole,
/// so that a front end with many regions does not use up the mappings that a process may have
/// (vm.max_map_count), nor make [`Losses`] long.
const MOST_PAGES_IN_ALL: usize = 64;

/// `BUS_MCEERR_AO` (uapi/asm-generic/siginfo.h): a page of this process failed, which no thread has touched.
const BUS_MCEERR_AO: c_int = 5;

/// What each place is made as.
#[expect(
    clippy::declare_interior_mutable_const,
    reason = "copied into each place, and nothing else is done with it"
)]
const FREE: Slot = Slot {
    turn: AtomicU32::new(0),
    lost: AtomicBool::new(false),
    buffers: AtomicBool::new(false),
    base: AtomicUsize::new(0),
    len: AtomicUsize::new(0),
    page: AtomicUsize::new(0),
    whole: AtomicBool::new(false),
    count: AtomicUsize::new(0),
    pages: [const { AtomicUsize::new(0) }; MOST_PAGES],
};

static TABLE: [Slot; MAX_RANGES] = [const { FREE }; MAX_RANGES];

/// Slots from here on were never used, so the handler need not look at them.
static USED_SLOTS: AtomicUsize = AtomicUsize::new(0);

/// How often a thread found a page gone, or a range with such a page was given up.
static LOSSES: AtomicU64 = AtomicU64::new(0);

/// Pages that are replaced one by one at present.
static PAGES: AtomicUsize = AtomicUsize::new(0);

/// Places below [`USED_SLOTS`] that are free again. Also the right to write to the table.
static PLACES: Mutex<Vec<usize>> = Mutex::new(Vec::new());

fn places() -> MutexGuard<'static, Vec<usize>> {
    // Nothing below panics between two steps that belong together.
    PLACES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes SIGBUS in guarded ranges harmless from now on, in every thread. Doing it again changes
/// nothing.
///
/// # Errors
///
/// What `sigaction` says.
pub fn install() -> io::Result<()> {
    static INSTALLED: Mutex<bool> = Mutex::new(false);
    let mut installed = INSTALLED.lock().unwrap_or_else(PoisonError::into_inner);
    if *installed {
        return Ok(());
    }
    let handler: extern "C" fn(c_int, *mut siginfo_t, *mut c_void) = on_sigbus;
    // SA_ONSTACK: on the stack that the standard library gives each thread for its own handler.
    // SA_NODEFER: so that the signal can be raised once more within the handler.
    let flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
    // SAFETY: the handler takes what SA_SIGINFO says and calls nothing but `mmap`, `sigaction` and `raise`.
    unsafe { action::set(libc::SIGBUS, handler as usize, flags)? };
    *installed = true;
    Ok(())
}

/// A count that changes when memory is lost in this process, and when lost memory is given up. A thread that
/// uses guarded memory compares it with what it saw last; only when it differs are there
/// [`Guarded::is_lost`] and [`Losses`] to ask.
#[inline]
pub fn losses() -> u64 {
    // Acquire pairs with the handler's release: a thread that sees the count sees which page it was. That
    // is a plain load on x86.
    LOSSES.load(Ordering::Acquire)
}

/// A range of addresses in which SIGBUS does not end the process. Dropping it ends that.
#[derive(Debug)]
pub struct Guarded {
    place: usize,
}

impl Guarded {
    /// Guards the `len` bytes from `base`, which is the start of a page, and installs the handler if
    /// that has not been done yet.
    ///
    /// # Errors
    ///
    /// `base` is not the start of a page, `len` is 0 or wraps; [`MAX_RANGES`] are guarded already;
    /// [`install`] failed.
    ///
    /// # Safety
    ///
    /// The range is a whole mapping, readable and writable, or several: of a hugetlbfs file to the
    /// end of its last huge page. No other live `Guarded` has any of it, no Rust reference to it is
    /// made, and it stays mapped until this one is dropped. At any time any of it may be replaced by zero
    /// pages.
    pub unsafe fn new(base: NonNull<u8>, len: usize) -> io::Result<Guarded> {
        // SAFETY: passed on to our caller. Unsafe because the range may be replaced.
        unsafe { Guarded::register(base, len, PAGE_BYTES, false) }
    }

    /// The same for memory that I/O goes from and to, of pages of `page` bytes: what is lost of it is known
    /// to [`Losses`].
    ///
    /// # Errors
    ///
    /// As there.
    ///
    /// # Safety
    ///
    /// As there.
    pub unsafe fn buffers(base: NonNull<u8>, len: usize, page: usize) -> io::Result<Guarded> {
        // SAFETY: passed on to our caller. Unsafe because the range may be replaced.
        unsafe { Guarded::register(base, len, page.max(PAGE_BYTES), true) }
    }

    /// # Safety
    ///
    /// As for [`Guarded::new`].
    unsafe fn register(
        base: NonNull<u8>,
        len: usize,
        page: usize,
        buffers: bool,
    ) -> io::Result<Guarded> {
        let base = base.addr().get();
        if !base.is_multiple_of(PAGE_BYTES) || len == 0 || base.checked_add(len).is_none() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{len:#x} bytes at {base:#x} are no mapping"),
            ));
        }
        install()?;
        let mut free = places();
        let place = match free.pop() {
            Some(place) => place,
            None => {
                let next = USED_SLOTS.load(Ordering::Relaxed);
                if next == MAX_RANGES {
                    return Err(io::Error::new(
                        io::ErrorKind::OutOfMemory,
                        format!("{MAX_RANGES} ranges of shared memory are guarded already"),
                    ));
                }
                // So that giving the place back never allocates.
                free.reserve(next + 1);
                USED_SLOTS.store(next + 1, Ordering::Release);
                next
            }
        };
        TABLE[place].describe(page, buffers);
        TABLE[place].set(base, len);
        Ok(Guarded { place })
    }

    /// Whether some of what was there is gone, and zeros are in its place.
    #[inline]
    pub fn is_lost(&self) -> bool {
        TABLE[self.place].lost.load(Ordering::Relaxed)
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        let mut free = places();
        let slot = &TABLE[self.place];
        slot.set(0, 0);
        PAGES.fetch_sub(slot.pages_lost(), Ordering::Relaxed);
        if slot.forget() {
            // Other memory may come to lie at these addresses. Pairs with the acquire load of `losses`.
            LOSSES.fetch_add(1, Ordering::Release);
        }
        free.push(self.place);
    }
}

/// The handler. Calls nothing but `mmap`, `sigaction` and `raise`, and allocates nothing.
extern "C" fn on_sigbus(_signal: c_int, info: *mut siginfo_t, _context: *mut c_void) {
    // SAFETY: with SA_SIGINFO the kernel gives a valid siginfo_t, and its address is only looked at
    // when the code says that the signal is a fault's. Unsafe because it is a union behind a raw
    // pointer.
    let (code, address) = unsafe { ((*info).si_code, (*info).si_addr().addr()) };
    // Not more than 0: a process sent it (SI_USER, SI_TKILL), and where it was has no meaning.
    if code > 0 && (replace_what_holds(address) || code == BUS_MCEERR_AO) {
        return;
    }
    // Not ours: what happens to a process without us happens. A fault returns to its instruction and
    // faults once more; a signal that was sent is sent again.
    // SAFETY: the default has no handler.
    let to_default = unsafe { action::set(libc::SIGBUS, libc::SIG_DFL, 0) };
    if to_default.is_ok() && code > 0 {
        return;
    }
    // SAFETY: raises a signal, whose action is the default now. Unsafe as all of C's functions.
    unsafe { libc::raise(libc::SIGBUS) };
}

/// Puts zeros where the page at `address` was. False: it is in no range, or cannot be replaced.
fn replace_what_holds(address: usize) -> bool {
    let used = USED_SLOTS.load(Ordering::Acquire);
    let found = TABLE[..used].iter().find_map(|slot| {
        let (base, len) = slot.get()?;
        (address.wrapping_sub(base) < len).then_some((slot, base, len))
    });
    let Some((slot, base, len)) = found else {
        return false;
    };
    let size = slot.page.load(Ordering::Relaxed);
    let page = (address - address % size).max(base);
    let recorded = match PAGES.load(Ordering::Relaxed) < MOST_PAGES_IN_ALL {
        true => slot.lose(page, &LOSSES),
        false => Recorded::NoPlace,
    };
    if recorded == Recorded::New {
        PAGES.fetch_add(1, Ordering::Relaxed);
    }
    let alone = recorded != Recorded::NoPlace;
    if alone && put_zeros(page, size.min(base + len - page)) {
        return true;
    }
    slot.lose_all(&LOSSES);
    put_zeros(base, len)
}

fn put_zeros(base: usize, len: usize) -> bool {
    let errno = Errno::save();
    // SAFETY: the range is within one that `Guarded::new`'s caller gave over to be replaced, and that
    // is still registered: the thread we interrupt uses it. Others may do the same at the same time,
    // which puts other zeros there. Unsafe because it replaces a mapping.
    let new = unsafe {
        libc::mmap(
            ptr::with_exposed_provenance_mut(base),
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    errno.restore();
    new != libc::MAP_FAILED
}

/// The interrupted code's `errno`, which it may be about to read.
struct Errno(c_int);

impl Errno {
    fn save() -> Errno {
        // SAFETY: the thread's own `errno`. Unsafe because it is reached by a raw pointer.
        Errno(unsafe { *libc::__errno_location() })
    }

    fn restore(self) {
        // SAFETY: as above. Unsafe for the same reason.
        unsafe { *libc::__errno_location() = self.0 };
    }
}

#[cfg(test)]
mod tests;
