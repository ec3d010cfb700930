//! Names of system calls, for the line that is written when one is not allowed.

use libc::c_long;

/// Numbers and names, as the C library spells them.
macro_rules! table {
    ($($call:ident)*) => { &[$((libc::$call, stringify!($call))),*] };
}

/// Those that are likely to be met: what is allowed with some arguments only, what somebody would try who has taken
/// the process over, and what a library may one day use where it used something else. Not all there are: of others
/// the number is told.
const NAMES: &[(c_long, &str)] = table! {
    SYS_mmap SYS_mprotect SYS_clone SYS_socket SYS_ioctl SYS_prctl SYS_tgkill SYS_prlimit64
    SYS_execve SYS_execveat SYS_ptrace SYS_process_vm_readv SYS_process_vm_writev SYS_kill SYS_tkill
    SYS_rt_sigqueueinfo SYS_pidfd_open SYS_pidfd_getfd SYS_pidfd_send_signal
    SYS_bind SYS_socketpair SYS_sendmmsg SYS_recvmmsg
    SYS_setuid SYS_setgid SYS_setresuid SYS_setresgid SYS_setgroups SYS_capset
    SYS_io_uring_setup SYS_bpf SYS_seccomp SYS_userfaultfd SYS_perf_event_open SYS_keyctl
    SYS_mount SYS_umount2 SYS_chroot SYS_unshare SYS_setns SYS_reboot SYS_init_module
    SYS_mkdirat SYS_renameat2 SYS_linkat SYS_symlinkat SYS_mknodat SYS_fchmod SYS_fchmodat SYS_fchownat SYS_truncate
    SYS_epoll_create1 SYS_epoll_ctl SYS_epoll_pwait SYS_pselect6 SYS_signalfd4 SYS_timerfd_create
    SYS_futex_waitv SYS_sched_setaffinity SYS_mbind SYS_mlock SYS_msync SYS_mincore SYS_sysinfo SYS_uname
    SYS_dup SYS_dup3 SYS_tee SYS_vmsplice SYS_sync_file_range SYS_getppid SYS_wait4 SYS_waitid SYS_getrlimit
};

/// Older names of such calls that only this architecture has.
#[cfg(target_arch = "x86_64")]
const OLDER: &[(c_long, &str)] = table! {
    SYS_fork SYS_vfork SYS_rename SYS_mkdir SYS_chmod SYS_select SYS_epoll_wait SYS_dup2 SYS_pipe SYS_eventfd
};
#[cfg(not(target_arch = "x86_64"))]
const OLDER: &[(c_long, &str)] = &[];

/// The name of a system call, if it is one of those. Looks through two lists of constants, so that a signal handler may
/// ask.
pub(super) fn name_of(call: c_long) -> Option<&'static str> {
    let mut known = NAMES.iter().chain(OLDER);
    let (_, name) = known.find(|(number, _)| *number == call)?;
    name.strip_prefix("SYS_")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_have_the_names_people_know_them_by() {
        assert_eq!(name_of(libc::SYS_execve), Some("execve"));
        assert_eq!(name_of(libc::SYS_io_uring_setup), Some("io_uring_setup"));
        assert_eq!(name_of(-1), None);
        assert_eq!(name_of(100_000), None);
    }
}
