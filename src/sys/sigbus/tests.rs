use super::*;
use crate::sys::child;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::Barrier;
use std::thread;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// A file of shared memory, mapped and guarded.
struct Shared {
    file: OwnedFd,
    base: NonNull<u8>,
    len: usize,
    guarded: Option<Guarded>,
}

impl Shared {
    fn new(len: usize) -> Shared {
        let file = memfd_create("sigbus", MemfdFlags::CLOEXEC).unwrap();
        Shared::of(file, len, PAGE_BYTES).unwrap()
    }

    /// Of pages of `page` bytes.
    fn of(file: OwnedFd, len: usize, page: usize) -> io::Result<Shared> {
        ftruncate(&file, len as u64)?;
        // SAFETY: a new mapping at an address of the kernel's choice. Unsafe because of the file,
        // which the test truncates.
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
        let base = NonNull::new(base.cast()).unwrap();
        // SAFETY: the mapping just made, dropped before it is unmapped. Unsafe because it may be
        // replaced, which only raw reads below see.
        let guarded = unsafe { Guarded::buffers(base, len, page)? };
        Ok(Shared {
            file,
            base,
            len,
            guarded: Some(guarded),
        })
    }

    fn truncate(&self, len: u64) {
        ftruncate(self.file.as_fd(), len).unwrap();
    }

    fn read(&self, at: usize) -> u8 {
        assert!(at < self.len);
        // SAFETY: within the mapping. Unsafe because it is no Rust object.
        unsafe { self.base.add(at).read_volatile() }
    }

    fn write(&self, at: usize, value: u8) {
        assert!(at < self.len);
        // SAFETY: as in `read`. Unsafe for the same reason.
        unsafe { self.base.add(at).write_volatile(value) }
    }

    fn is_lost(&self) -> bool {
        self.guarded.as_ref().unwrap().is_lost()
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        drop(self.guarded.take());
        // SAFETY: mapped in `of`, and nobody else knows it. Unsafe because unmapping is.
        unsafe { munmap(self.base.as_ptr().cast(), self.len) }.unwrap();
    }
}

// SAFETY: the mapping may be reached from any thread by the volatile accesses above. Unsafe because
// of the raw pointer.
unsafe impl Sync for Shared {}

const LEN: usize = 64 * PAGE_BYTES;

#[test]
fn truncated_memory_reads_as_zeros_and_is_lost() {
    let (other, shared) = (Shared::new(LEN), Shared::new(LEN));
    other.write(5, 7);
    shared.write(0, 1);
    shared.write(LEN - 1, 2);
    let before = losses();
    shared.truncate(PAGE_BYTES as u64);
    assert_eq!(shared.read(0), 1, "what is left is left alone");
    assert!(!shared.is_lost());

    assert_eq!(shared.read(LEN - 1), 0);
    assert!(shared.is_lost());
    // Other tests of this process lose memory too.
    assert!(losses() > before);
    // The page is memory, of our own, and what is left is still left alone.
    assert_eq!(shared.read(0), 1);
    shared.write(LEN - 1, 9);
    assert_eq!(shared.read(LEN - 1), 9);

    assert!(!other.is_lost());
    assert_eq!(other.read(5), 7);
}

#[test]
fn a_write_beyond_the_end_is_contained_as_well() {
    let shared = Shared::new(LEN);
    shared.truncate(0);
    shared.write(LEN / 2, 3);
    assert_eq!((shared.is_lost(), shared.read(LEN / 2)), (true, 3));
}

#[test]
fn a_place_that_is_used_again_is_not_lost() {
    let first = Shared::new(LEN);
    first.truncate(0);
    first.read(0);
    let place = first.guarded.as_ref().unwrap().place;
    drop(first);
    // Other tests of this process take places too.
    let again = std::iter::repeat_with(|| Shared::new(LEN))
        .find(|new| new.guarded.as_ref().unwrap().place == place)
        .unwrap();
    assert!(!again.is_lost());
    again.truncate(0);
    again.read(0);
    assert!(again.is_lost());
}

/// Threads lose memory at once, one and the same and each its own, while others register and
/// unregister what they have.
#[test]
fn many_threads_lose_memory_at_once() {
    let rounds: usize = std::env::var("BLKMQ_ROUNDS").map_or(200, |r| r.parse().unwrap());
    for _ in 0..rounds.div_ceil(20) {
        let common = Shared::new(LEN);
        let barrier = Barrier::new(6);
        thread::scope(|scope| {
            for at in 0..3 {
                let (common, barrier) = (&common, &barrier);
                scope.spawn(move || {
                    barrier.wait();
                    for _ in 0..20 {
                        let own = Shared::new(LEN);
                        own.write(0, 1);
                        own.truncate(0);
                        assert_eq!(own.read(at * PAGE_BYTES), 0);
                        assert!(own.is_lost());
                        common.truncate(0);
                        assert_eq!(common.read(at * PAGE_BYTES), 0);
                    }
                });
            }
            for _ in 0..3 {
                let barrier = &barrier;
                scope.spawn(move || {
                    barrier.wait();
                    for round in 0..20 {
                        let own: Vec<Shared> = (1..8)
                            .map(|pages| Shared::new(pages * PAGE_BYTES))
                            .collect();
                        for shared in &own {
                            shared.write(PAGE_BYTES - 1, round);
                        }
                        for shared in &own {
                            assert_eq!(shared.read(PAGE_BYTES - 1), round);
                            assert!(!shared.is_lost());
                        }
                    }
                });
            }
        });
        assert!(common.is_lost());
    }
}

#[test]
fn a_range_that_loses_many_pages_is_replaced_as_a_whole() {
    let shared = Shared::new(LEN);
    let mut known = Losses::default();
    assert!(!known.are_any());
    shared.write(0, 1);
    shared.truncate(PAGE_BYTES as u64);
    for page in 1..=MOST_PAGES {
        shared.read(page * PAGE_BYTES);
    }
    let base = shared.base.addr().get();
    assert!(known.are_any() && !known.have(base, PAGE_BYTES));
    assert!(known.have(base + PAGE_BYTES - 1, 2));
    assert!(known.have(base + MOST_PAGES * PAGE_BYTES, 1));
    assert!(!known.have(base + (MOST_PAGES + 1) * PAGE_BYTES, 1));
    assert_eq!(shared.read(0), 1);
    shared.read((MOST_PAGES + 1) * PAGE_BYTES);
    assert!(known.are_any() && known.have(base, 1) && known.have(base + LEN - 1, 1));
    assert_eq!(shared.read(0), 0);
    drop(shared);
    known.are_any();
    assert!(
        !known.have(base, LEN),
        "what is given up is not lost any more"
    );
}

/// Pages of two MiB, where the system has any to give (sysctl vm.nr_hugepages).
#[test]
fn a_truncated_hugetlbfs_file_is_contained() {
    const HUGE: usize = 2 << 20;
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    let shared = memfd_create("huge", flags)
        .map_err(io::Error::from)
        .and_then(|file| Shared::of(file, 2 * HUGE, HUGE));
    let shared = match shared {
        Ok(shared) => shared,
        Err(error) => {
            println!("not tested, no huge pages: {error}");
            return;
        }
    };
    shared.write(0, 1);
    shared.write(HUGE, 2);
    shared.truncate(HUGE as u64);
    assert_eq!(shared.read(0), 1);
    assert_eq!(shared.read(2 * HUGE - 1), 0);
    assert!(shared.is_lost());
    assert_eq!(shared.read(0), 1, "a huge page is replaced, and no more");
}

#[test]
fn what_is_no_mapping_is_refused() {
    let page = NonNull::<u8>::without_provenance(std::num::NonZero::new(PAGE_BYTES).unwrap());
    let odd = NonNull::<u8>::without_provenance(std::num::NonZero::new(PAGE_BYTES + 1).unwrap());
    for (base, len) in [(page, 0), (odd, 8), (page, usize::MAX)] {
        // SAFETY: refused, so never registered. Unsafe as any call of it.
        let refused = unsafe { Guarded::new(base, len) };
        assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}

/// What ends a process ends a process: in one of its own.
fn in_a_child(name: &str) -> ExitStatus {
    child::run(child::of(module_path!(), name).env("BLKMQ_SIGBUS_CHILD", "1")).status
}

fn is_child() -> bool {
    std::env::var_os("BLKMQ_SIGBUS_CHILD").is_some()
}

#[test]
fn sigbus_outside_all_ranges_ends_the_process() {
    if is_child() {
        install().unwrap();
        let guarded = Shared::new(LEN);
        guarded.truncate(0);
        assert_eq!(guarded.read(0), 0);
        let mut unguarded = Shared::new(LEN);
        unguarded.truncate(0);
        unguarded.guarded = None;
        unguarded.read(0);
        unreachable!("it went on");
    }
    let status = in_a_child("sigbus_outside_all_ranges_ends_the_process");
    assert_eq!(status.signal(), Some(libc::SIGBUS), "{status}");
}

/// A page of ours that no thread has touched: there is nothing to repeat, and it may never be touched.
#[test]
fn an_early_warning_of_a_memory_error_ends_nothing() {
    if is_child() {
        install().unwrap();
        let shared = Shared::new(LEN);
        let mut own = vec![0_u8; PAGE_BYTES];
        for address in [own.as_mut_ptr(), shared.base.as_ptr()] {
            warn_of(address);
        }
        shared.truncate(0);
        assert_eq!((shared.read(5), shared.is_lost()), (0, true));
        return;
    }
    let status = in_a_child("an_early_warning_of_a_memory_error_ends_nothing");
    assert!(status.success(), "{status}");
}

/// Sends this thread what the kernel sends about a page that failed.
fn warn_of(address: *mut u8) {
    // SAFETY: all zeroes is a valid `siginfo_t`. Unsafe because of the C type.
    let mut info: siginfo_t = unsafe { MaybeUninit::zeroed().assume_init() };
    (info.si_signo, info.si_code) = (libc::SIGBUS, BUS_MCEERR_AO);
    // SAFETY: the address of a fault is the first of the fields behind the first three, aligned as a
    // pointer is; a process may send itself any signal. Unsafe because it is a union in C.
    let sent = unsafe {
        (&raw mut info).cast::<*mut u8>().add(2).write(address);
        let (pid, tid) = (libc::getpid(), libc::gettid());
        libc::syscall(
            libc::SYS_rt_tgsigqueueinfo,
            pid,
            tid,
            libc::SIGBUS,
            &raw const info,
        )
    };
    assert_eq!(sent, 0, "{}", io::Error::last_os_error());
}

#[test]
fn sigbus_that_is_sent_ends_the_process() {
    if is_child() {
        install().unwrap();
        let _shared = Shared::new(LEN);
        let pid = rustix::process::getpid();
        rustix::process::kill_process(pid, rustix::process::Signal::BUS).unwrap();
        unreachable!("it went on");
    }
    let status = in_a_child("sigbus_that_is_sent_ends_the_process");
    assert_eq!(status.signal(), Some(libc::SIGBUS), "{status}");
}
