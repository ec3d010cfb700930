//! Memory that somebody else may take away.
//!
//! A front end shares its guest's memory as files, and whoever can write to a file can truncate it.
//! What lies behind the new end is still mapped here, and touching it is SIGBUS, which ends the
//! process and with it every other disk. The same signal comes for a page whose hardware failed.
//!
//! So each such mapping is registered as a [`Guarded`] range. When a thread touches what is gone, the
//! signal's handler puts zero pages in the place of the *whole* mapping, says that it is lost, and
//! lets the instruction be repeated. Nothing in guest memory is believed anyway, so zeros are as good
//! as whatever else a guest might write there; who uses the mapping finds out by [`losses`] and
//! [`Guarded::is_lost`] and ends its session. The whole mapping, because a hugetlbfs mapping has no
//! smaller pieces that could be replaced, and because a file that is truncated once is not to be
//! touched again.
//!
//! A SIGBUS anywhere else is a bug, and ends the process as it always did.
//!
//! # How the handler finds the range
//!
//! It may interrupt anything, so it takes no lock and allocates nothing: it reads a fixed table of
//! atomics. Each slot is written by one thread at a time, which holds a mutex, and carries a count
//! that is odd while it is written (a seqlock). The handler leaves out a slot that changes while it
//! looks: such a slot cannot be the one it is looking for, because a thread that touches a range has
//! been given it after it was registered, and gives it up before it is unregistered.

mod slot;

use std::ffi::c_void;
use std::io;
use std::mem::MaybeUninit;
use std::ptr::{self, NonNull};
use std::sync::{Mutex, MutexGuard, PoisonError};

use libc::{c_int, siginfo_t};

use self::slot::Slot;
use crate::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};

/// How many ranges can be registered at once: as many regions as a session may have for each of 64
/// disks, twice, because a change of the memory has both for a moment. Two MiB of addresses, of which
/// only what is used takes memory.
pub const MAX_RANGES: usize = 65_536;

/// What is replaced where the whole range cannot be.
const PAGE_BYTES: usize = 4096;

/// What each place is made as.
#[expect(
    clippy::declare_interior_mutable_const,
    reason = "copied into each place, and nothing else is done with it"
)]
const FREE: Slot = Slot {
    turn: AtomicU32::new(0),
    lost: AtomicBool::new(false),
    base: AtomicUsize::new(0),
    len: AtomicUsize::new(0),
};

static TABLE: [Slot; MAX_RANGES] = [const { FREE }; MAX_RANGES];

/// Slots from here on were never used, so the handler need not look at them.
static USED_SLOTS: AtomicUsize = AtomicUsize::new(0);

/// How often a thread found a range gone.
static LOSSES: AtomicU64 = AtomicU64::new(0);

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
    set_action(
        handler as usize,
        libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER,
    )?;
    *installed = true;
    Ok(())
}

/// How often memory was lost in this process so far. A thread that uses guarded memory compares it
/// with what it saw last; only when it differs are there [`Guarded::is_lost`] to ask.
#[inline]
pub fn losses() -> u64 {
    // Acquire pairs with the handler's release: who sees the count sees which range it was. That is
    // a plain load on x86.
    LOSSES.load(Ordering::Acquire)
}

/// A range of addresses in which SIGBUS does not end the process. Dropping it ends that.
#[derive(Debug)]
pub struct Guarded {
    place: usize,
}

impl Guarded {
    /// Guards the `len` bytes from `base`, which is the start of a page, and installs the handler if
    /// nobody has yet.
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
    /// made, and it stays mapped until this one is dropped. At any time it may be replaced by zero
    /// pages.
    pub unsafe fn new(base: NonNull<u8>, len: usize) -> io::Result<Guarded> {
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
        let slot = &TABLE[place];
        slot.lost.store(false, Ordering::Relaxed);
        slot.set(base, len);
        Ok(Guarded { place })
    }

    /// Whether what was there is gone, and zeros are in its place.
    #[inline]
    pub fn is_lost(&self) -> bool {
        TABLE[self.place].lost.load(Ordering::Relaxed)
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        let mut free = places();
        TABLE[self.place].set(0, 0);
        free.push(self.place);
    }
}

/// Sets what SIGBUS does.
fn set_action(handler: usize, flags: c_int) -> io::Result<()> {
    // SAFETY: all zeroes is a `sigaction` with an empty mask. Unsafe because of the C type.
    let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    action.sa_sigaction = handler;
    action.sa_flags = flags;
    // SAFETY: `action` is whole, and its handler is either the default or one that does only what a
    // signal handler may. Unsafe because no wrapper lets a handler for SIGBUS return.
    match unsafe { libc::sigaction(libc::SIGBUS, &raw const action, ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The handler. Calls nothing but `mmap`, `sigaction` and `raise`, and allocates nothing.
extern "C" fn on_sigbus(_signal: c_int, info: *mut siginfo_t, _context: *mut c_void) {
    // SAFETY: with SA_SIGINFO the kernel gives a valid siginfo_t, and its address is only looked at
    // when the code says that the signal is a fault's. Unsafe because it is a union behind a raw
    // pointer.
    let (code, address) = unsafe { ((*info).si_code, (*info).si_addr().addr()) };
    // Not more than 0: somebody sent it (SI_USER, SI_TKILL), and where it was has no meaning.
    if code > 0 && replace_what_holds(address) {
        return;
    }
    // Not ours: what happens to a process without us happens. A fault returns to its instruction and
    // faults once more; a signal that was sent is sent again.
    if set_action(libc::SIG_DFL, 0).is_ok() && code > 0 {
        return;
    }
    // SAFETY: raises a signal, whose action is the default now. Unsafe as all of C's functions.
    unsafe { libc::raise(libc::SIGBUS) };
}

/// Puts zeros where the range that holds `address` was. False: there is no such range, or it cannot
/// be replaced.
fn replace_what_holds(address: usize) -> bool {
    let used = USED_SLOTS.load(Ordering::Acquire);
    let found = TABLE[..used].iter().find_map(|slot| {
        let (base, len) = slot.get()?;
        (address.wrapping_sub(base) < len).then_some((slot, base, len))
    });
    let Some((slot, base, len)) = found else {
        return false;
    };
    slot.lose(&LOSSES);
    // Where the system counts every page that could be written to (vm.overcommit_memory=2), the whole
    // range may be too much, and the page has to do.
    let page = address & !(PAGE_BYTES - 1);
    put_zeros(base, len) || put_zeros(page, PAGE_BYTES)
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
