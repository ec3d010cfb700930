//! The last words of a process that made a system call it may not make.

use std::ffi::c_void;
use std::fmt::Write as _;
use std::io;

use libc::{c_int, siginfo_t};

use super::syscall_names::name_of;
use crate::logging::fatal::{self, Line};
use crate::sys::sigbus::action;

/// The kernel's siginfo of SIGSYS (`_sigsys` in asm-generic/siginfo.h), which the libc crate leaves
/// out.
#[repr(C)]
struct SigsysInfo {
    signo: c_int,
    errno: c_int,
    code: c_int,
    _pad: c_int,
    call_addr: *const c_void,
    syscall: c_int,
    arch: u32,
}

const _: () = assert!(size_of::<SigsysInfo>() <= size_of::<siginfo_t>());

/// Has SIGSYS say which call it was before it ends the process.
pub(super) fn install() -> io::Result<()> {
    let handler: extern "C" fn(c_int, *mut siginfo_t, *mut c_void) = on_sigsys;
    // On the stack that the standard library gives each thread for its own handler.
    let flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: the handler takes what SA_SIGINFO says, and neither allocates nor locks.
    unsafe { action::set(libc::SIGSYS, handler as usize, flags) }
}

extern "C" fn on_sigsys(_signal: c_int, info: *mut siginfo_t, _context: *mut c_void) {
    // SAFETY: the kernel passes a siginfo_t to a handler installed with SA_SIGINFO, and the structure
    // is its beginning as it is for this signal. Unsafe because a pointer is read.
    let call = unsafe { (*info.cast::<SigsysInfo>()).syscall };
    let mut line = Line::new("the sandbox does not allow system call ");
    let number = call.unsigned_abs();
    let _ = match name_of(call.into()) {
        Some(name) => write!(line, "{name} ({number})"),
        None => write!(line, "{number} (see ausyscall or unistd.h)"),
    };
    let _ = line.write_str(
        ": this is a bug or an attack, and the process ends; --sandbox seccomp=off allows it",
    );
    fatal::write_line(&line);
    // SAFETY: the default has no handler.
    let _ = unsafe { action::set(libc::SIGSYS, libc::SIG_DFL, 0) };
    // Blocked while we are here, so that it comes when we return, before the call does.
    // SAFETY: it takes a number. Unsafe because all of the C library is; rustix has no such call that
    // works in a handler.
    let _ = unsafe { libc::raise(libc::SIGSYS) };
}

/// Makes memory that can be run, which a sandbox refuses.
#[cfg(test)]
pub(super) fn map_executable() -> io::Result<()> {
    use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
    let access = ProtFlags::READ | ProtFlags::EXEC;
    // SAFETY: a new mapping at a place of the kernel's choice, which nobody looks at. Unsafe because
    // mapping is.
    let mapped = unsafe { mmap_anonymous(std::ptr::null_mut(), 4096, access, MapFlags::PRIVATE) };
    mapped.map(drop).map_err(io::Error::from)
}
