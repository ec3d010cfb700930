//! What a signal does to the process.

use std::io;
use std::mem::MaybeUninit;
use std::ptr;

use libc::c_int;

/// Sets what `signal` does: a handler's address, or `SIG_DFL`, or `SIG_IGN`. May be called in a handler.
///
/// # Errors
///
/// What `sigaction` says.
///
/// # Safety
///
/// A handler does only what a signal handler may, and takes the arguments that `flags` say.
pub unsafe fn set(signal: c_int, handler: usize, flags: c_int) -> io::Result<()> {
    // SAFETY: all zeroes is a `sigaction` without flags and with an empty mask. Unsafe because of the C
    // type.
    let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    action.sa_sigaction = handler;
    action.sa_flags = flags;
    // SAFETY: `action` is whole, and the caller vouches for its handler; the call reads it and writes
    // nothing. Unsafe because a handler runs at any time.
    match unsafe { libc::sigaction(signal, &raw const action, ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Ignores `signal` from now on.
///
/// # Errors
///
/// It cannot be ignored.
pub fn ignore(signal: c_int) -> io::Result<()> {
    // SAFETY: there is no handler.
    unsafe { set(signal, libc::SIG_IGN, 0) }
}
