//! The system calls there are, by seccomp.
//!
//! What is on no list here ends the process, and the log says which call it was. That is harsh on
//! the other disks of the process, but a call nobody foresaw is either a mistake of ours, which must
//! not go on as a request that silently failed, or somebody's first step.
//!
//! Some calls get an error instead, because libraries try them and know what to do without: [`DENIED`] and
//! [`MISSING`].
//!
//! The lists are what the daemon was seen to call in the tests (strace), what the engine calls where
//! io_uring has no way, and what other C libraries and older kernels call for the same.

use std::collections::BTreeMap;
use std::io;

use libc::c_long;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, apply_filter_all_threads,
};

/// Data path: all of a worker's waiting and submitting.
const RING: &[c_long] = &[libc::SYS_io_uring_enter, libc::SYS_io_uring_register];

/// Files that are open: a sync when the guest changes the cache mode, growth, the engines beside
/// io_uring, the log, sockets as streams, snapshots.
const FILES: &[c_long] = &[
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_lseek,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_fallocate,
    libc::SYS_ftruncate,
    libc::SYS_fadvise64,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_fstatfs,
    libc::SYS_readlinkat,
    libc::SYS_fcntl,
    libc::SYS_close,
    libc::SYS_close_range,
    libc::SYS_pipe2,
    libc::SYS_splice,
];

/// The end: our sockets' files are removed. Landlock says where.
const REMOVAL: &[c_long] = &[libc::SYS_unlinkat];

/// Front ends and the control socket. `connect` is how a session's two halves meet inside the process;
/// the sockets it can use are of the UNIX domain (see [`conditions`]).
const SOCKETS: &[c_long] = &[
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_connect,
    libc::SYS_listen,
    libc::SYS_sendmsg,
    libc::SYS_recvmsg,
    libc::SYS_sendto,
    libc::SYS_recvfrom,
    libc::SYS_shutdown,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
];

/// Waiting for something.
const EVENTS: &[c_long] = &[libc::SYS_ppoll, libc::SYS_eventfd2];

/// Memory: guests' memory and where it is, the in-flight region, the allocator. Never executable (see
/// [`conditions`]).
const MEMORY: &[c_long] = &[
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_memfd_create,
    libc::SYS_mincore,
    libc::SYS_get_mempolicy,
];

/// Threads: a session has some. New processes are not among what `clone` may make (see
/// [`conditions`]).
const THREADS: &[c_long] = &[
    libc::SYS_futex,
    libc::SYS_set_robust_list,
    libc::SYS_get_robust_list,
    libc::SYS_rseq,
    libc::SYS_set_tid_address,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_membarrier,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_restart_syscall,
];

/// Signals, and ending by one. `tgkill` reaches no other process (see [`conditions`]).
const SIGNALS: &[c_long] = &[
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
];

/// Time, chance, limits, and who we are.
const FACTS: &[c_long] = &[
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_gettimeofday,
    libc::SYS_getrandom,
    libc::SYS_getrusage,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
];

/// Older names of the above that only this architecture has.
#[cfg(target_arch = "x86_64")]
const OLDER: &[c_long] = &[
    libc::SYS_poll,
    libc::SYS_unlink,
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_readlink,
    libc::SYS_time,
    libc::SYS_arch_prctl,
];
#[cfg(not(target_arch = "x86_64"))]
const OLDER: &[c_long] = &[];

/// Calls that fail rather than end the process: libraries look for files they can do without, and a
/// panic for the directory it is in.
const DENIED: &[c_long] = &[
    libc::SYS_openat,
    libc::SYS_openat2,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_open,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_access,
    libc::SYS_getdents64,
    libc::SYS_getcwd,
];

/// Not there, as in an older kernel, for which libraries know another way: to make a thread by a call whose
/// flags can be looked at, to copy by reading and writing.
const MISSING: &[c_long] = &[
    libc::SYS_clone3,
    libc::SYS_sendfile,
    libc::SYS_copy_file_range,
];

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// What is allowed with some arguments only.
fn conditions() -> Result<Rules, seccompiler::BackendError> {
    let word =
        |argument, op, value| SeccompCondition::new(argument, SeccompCmpArgLen::Dword, op, value);
    let all = |conditions: Vec<SeccompCondition>| SeccompRule::new(conditions);
    let bits = |value: libc::c_int| u64::from(value.cast_unsigned());
    let without =
        |argument, flag: libc::c_int| word(argument, SeccompCmpOp::MaskedEq(bits(flag)), 0);
    let with = |argument, flag: libc::c_int| {
        word(argument, SeccompCmpOp::MaskedEq(bits(flag)), bits(flag))
    };
    let is = |argument, value: libc::c_int| word(argument, SeccompCmpOp::Eq, bits(value));
    let own = rustix::process::getpid().as_raw_nonzero().get();
    Ok(BTreeMap::from([
        (
            libc::SYS_mmap,
            vec![all(vec![without(2, libc::PROT_EXEC)?])?],
        ),
        (
            libc::SYS_mprotect,
            vec![all(vec![without(2, libc::PROT_EXEC)?])?],
        ),
        (
            libc::SYS_clone,
            vec![all(vec![with(0, libc::CLONE_THREAD)?])?],
        ),
        (libc::SYS_socket, vec![all(vec![is(0, libc::AF_UNIX)?])?]),
        // Non-blocking or not, for std's sockets; nothing that talks to a device.
        (
            libc::SYS_ioctl,
            vec![all(vec![word(
                1,
                SeccompCmpOp::Eq,
                u64::from(u32::try_from(libc::FIONBIO).expect("a small number")),
            )?])?],
        ),
        // Names of threads and of the allocator's mappings.
        (
            libc::SYS_prctl,
            vec![
                all(vec![is(0, libc::PR_SET_NAME)?])?,
                all(vec![is(0, libc::PR_GET_NAME)?])?,
                all(vec![is(0, libc::PR_SET_VMA)?])?,
            ],
        ),
        (libc::SYS_tgkill, vec![all(vec![is(0, own)?])?]),
        // Our own limits.
        (libc::SYS_prlimit64, vec![all(vec![is(0, 0)?])?]),
    ]))
}

/// Puts the filters on all threads.
pub(super) fn install() -> io::Result<()> {
    let Ok(arch) = TargetArch::try_from(std::env::consts::ARCH) else {
        log::warn!("there are no seccomp filters for this architecture");
        return Ok(());
    };
    programs(arch)
        .map_err(io::Error::other)?
        .iter()
        .try_for_each(|program| apply_filter_all_threads(program))
        .map_err(io::Error::other)
}

/// The strictest word of all filters counts: a call with an error must be allowed by the last. The last
/// is put on last, because it forbids to put on filters.
fn programs(arch: TargetArch) -> Result<[BpfProgram; 3], seccompiler::BackendError> {
    let plain = |calls: &[c_long]| -> Rules { calls.iter().map(|call| (*call, vec![])).collect() };
    let fails = |calls: &[c_long], errno: libc::c_int| {
        SeccompFilter::new(
            plain(calls),
            SeccompAction::Allow,
            SeccompAction::Errno(errno.cast_unsigned()),
            arch,
        )?
        .try_into()
    };
    let mut allowed = conditions()?;
    for calls in [
        RING, FILES, REMOVAL, SOCKETS, EVENTS, MEMORY, THREADS, SIGNALS, FACTS, OLDER, DENIED,
        MISSING,
    ] {
        allowed.extend(plain(calls));
    }
    let rest =
        SeccompFilter::new(allowed, SeccompAction::Trap, SeccompAction::Allow, arch)?.try_into()?;
    Ok([
        fails(DENIED, libc::EACCES)?,
        fails(MISSING, libc::ENOSYS)?,
        rest,
    ])
}
