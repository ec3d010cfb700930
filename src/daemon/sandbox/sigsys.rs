//! The last words of a process that made a system call it may not make.

use std::ffi::c_void;
use std::io;
use std::mem::MaybeUninit;
use std::ptr;

use libc::{c_int, siginfo_t};

use super::names::name_of;

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
    set_action(handler as usize, libc::SA_SIGINFO | libc::SA_ONSTACK)
}

fn set_action(action: usize, flags: c_int) -> io::Result<()> {
    // SAFETY: all zeroes is an action without flags and with an empty mask, and its two fields are set;
    // the call reads it and writes nothing. Unsafe because a handler runs at any time: this one keeps
    // to what a signal handler may do.
    let outcome = unsafe {
        let mut wanted = MaybeUninit::<libc::sigaction>::zeroed().assume_init();
        wanted.sa_sigaction = action;
        wanted.sa_flags = flags;
        libc::sigaction(libc::SIGSYS, &raw const wanted, ptr::null_mut())
    };
    if outcome == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

extern "C" fn on_sigsys(_signal: c_int, info: *mut siginfo_t, _context: *mut c_void) {
    // SAFETY: the kernel passes a siginfo_t to a handler installed with SA_SIGINFO, and the structure
    // is its beginning as it is for this signal. Unsafe because a pointer is read.
    let call = unsafe { (*info.cast::<SigsysInfo>()).syscall };
    let mut line = Line::new();
    line.push(b"vhost-user-blkmq: the sandbox does not allow system call ");
    match name_of(call.into()) {
        Some(name) => {
            line.push(name.as_bytes());
            line.push(b" (");
            line.push_number(call.unsigned_abs());
            line.push(b")");
        }
        None => {
            line.push_number(call.unsigned_abs());
            line.push(b" (see ausyscall or unistd.h)");
        }
    }
    line.push(
        b": this is a bug or an attack, and the process ends; --sandbox seccomp=off allows it\n",
    );
    let _ = rustix::io::write(
        // SAFETY: the number of standard error is only used for this call. Unsafe because it may have
        // been closed, and then nobody hears of it.
        unsafe { rustix::fd::BorrowedFd::borrow_raw(libc::STDERR_FILENO) },
        line.bytes(),
    );
    let _ = set_action(libc::SIG_DFL, 0);
    // Blocked while we are here, so that it comes when we return, before the call does.
    // SAFETY: it takes a number. Unsafe because all of the C library is; rustix has no such call that
    // works in a handler.
    let _ = unsafe { libc::raise(libc::SIGSYS) };
}

/// A line of text without an allocator.
struct Line {
    bytes: [u8; 256],
    len: usize,
}

impl Line {
    fn new() -> Line {
        Line {
            bytes: [0; 256],
            len: 0,
        }
    }

    fn push(&mut self, text: &[u8]) {
        for byte in text.iter().take(self.bytes.len() - self.len) {
            self.bytes[self.len] = *byte;
            self.len += 1;
        }
    }

    fn push_number(&mut self, number: u32) {
        let mut divisor = 1_000_000_000;
        let mut begun = false;
        while divisor > 0 {
            let digit = u8::try_from(number / divisor % 10).unwrap_or(0);
            begun |= digit > 0 || divisor == 1;
            if begun {
                self.push(&[b'0' + digit]);
            }
            divisor /= 10;
        }
    }

    fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

/// Makes memory that can be run, which a sandbox refuses.
#[cfg(test)]
pub(super) fn map_executable() -> io::Result<()> {
    use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
    let access = ProtFlags::READ | ProtFlags::EXEC;
    // SAFETY: a new mapping at a place of the kernel's choice, which nobody looks at. Unsafe because
    // mapping is.
    let mapped = unsafe { mmap_anonymous(ptr::null_mut(), 4096, access, MapFlags::PRIVATE) };
    mapped.map(drop).map_err(io::Error::from)
}
