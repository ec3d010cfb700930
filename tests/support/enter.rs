//! Stands between the program and the kernel where the program enters its io_uring, and has the system call fail as
//! the test likes, for as long as it likes. The program is as it always is; its calls are stopped by a seccomp filter
//! that asks somebody (seccomp(2), "SECCOMP_RET_USER_NOTIF").

use std::io;
use std::mem::{MaybeUninit, offset_of};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use super::front::send_with_fds;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

/// What a call of `io_uring_enter` asks for.
#[derive(Clone, Copy, Debug)]
pub struct Enter {
    /// Entries to be taken.
    pub to_submit: u64,
    /// Completions to be waited for.
    pub min_complete: u64,
}

/// Says what a call fails with; `None`: the kernel carries it out.
type Answer = Box<dyn FnMut(Enter) -> Option<i32> + Send>;

/// Decides about a program's calls.
pub struct Gate {
    shared: Arc<Shared>,
}

struct Shared {
    answer: Mutex<Answer>,
    refused: AtomicU64,
}

impl std::fmt::Debug for Gate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gate")
            .field("refused", &self.refused())
            .finish_non_exhaustive()
    }
}

impl Gate {
    /// Puts the filter on what `command` will start. Everything passes until told otherwise.
    pub fn put_on(command: &mut Command) -> Gate {
        Gate::put_on_call(command, libc::SYS_io_uring_enter)
    }

    /// The same for another system call, whose arguments mean nothing here.
    pub fn put_on_call(command: &mut Command, call: libc::c_long) -> Gate {
        let (ours, theirs) = UnixStream::pair().expect("sockets");
        let install = move || {
            let asked = install_filter(call)?;
            send_with_fds(&theirs, &[0], &[asked.as_fd()])?;
            Ok(())
        };
        // SAFETY: needed to run code between fork and exec, where only what may be done in a signal handler may be done:
        // it makes three system calls, and allocates nothing.
        unsafe { command.pre_exec(install) };
        let shared = Arc::new(Shared {
            answer: Mutex::new(Box::new(|_| None)),
            refused: AtomicU64::new(0),
        });
        let of_thread = Arc::clone(&shared);
        // Begins and ends with the program.
        std::thread::spawn(move || serve(&receive(&ours), &of_thread));
        Gate { shared }
    }

    /// Calls fail as `answer` says.
    pub fn answer(&self, answer: impl FnMut(Enter) -> Option<i32> + Send + 'static) {
        *self.shared.answer.lock().expect("no holder panics") = Box::new(answer);
    }

    /// How many have failed.
    pub fn refused(&self) -> u64 {
        self.shared.refused.load(Ordering::Relaxed)
    }
}

/// Asks about a system call, allows everything else. For the calling thread and what it becomes.
fn install_filter(call: libc::c_long) -> io::Result<OwnedFd> {
    // LD, JEQ and RET as in linux/bpf_common.h.
    const fn step(code: u32, jt: u8, jf: u8, k: u32) -> libc::sock_filter {
        libc::sock_filter {
            code: code as u16,
            jt,
            jf,
            k,
        }
    }
    let mut steps = [
        step(
            libc::BPF_LD | libc::BPF_W | libc::BPF_ABS,
            0,
            0,
            offset_of!(libc::seccomp_data, nr) as u32,
        ),
        step(
            libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
            0,
            1,
            call as u32,
        ),
        step(
            libc::BPF_RET | libc::BPF_K,
            0,
            0,
            libc::SECCOMP_RET_USER_NOTIF,
        ),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog {
        len: steps.len() as u16,
        filter: steps.as_mut_ptr(),
    };
    rustix::thread::set_no_new_privs(true)?;
    // SAFETY: needed because no crate here makes this call. The program and its steps live until it returns, and it only
    // reads them.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
            &raw const program,
        )
    };
    match RawFd::try_from(fd) {
        // SAFETY: needed to own what the kernel has just made, which nobody else knows of.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

fn receive(theirs: &UnixStream) -> OwnedFd {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    recvmsg(
        theirs,
        &mut [io::IoSliceMut::new(&mut byte)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )
    .expect("the program sends what its filter asks with");
    let mut messages = control.drain();
    match messages.next() {
        Some(RecvAncillaryMessage::ScmRights(mut fds)) => fds.next().expect("one descriptor"),
        _ => panic!("no descriptor came"),
    }
}

/// Answers until the program has ended.
fn serve(asked: &OwnedFd, shared: &Shared) {
    loop {
        let mut fds = [PollFd::new(asked, PollFlags::IN)];
        poll(&mut fds, None).expect("it can be waited for");
        if !fds[0].revents().contains(PollFlags::IN) {
            return;
        }
        // SAFETY: needed to make a C structure that has to be all zeroes for the call; zeroes are a value of it.
        let mut question: libc::seccomp_notif = unsafe { std::mem::zeroed() };
        // SAFETY: needed because ioctl takes a pointer: the structure is this request's, and lives.
        if unsafe {
            libc::ioctl(
                asked.as_raw_fd(),
                libc::SECCOMP_IOCTL_NOTIF_RECV,
                &raw mut question,
            )
        } != 0
        {
            // A signal has ended the call meanwhile.
            continue;
        }
        let [_, to_submit, min_complete, ..] = question.data.args;
        let enter = Enter {
            to_submit,
            min_complete,
        };
        let errno = shared.answer.lock().expect("no holder panics")(enter);
        shared
            .refused
            .fetch_add(u64::from(errno.is_some()), Ordering::Relaxed);
        let answer = libc::seccomp_notif_resp {
            id: question.id,
            val: 0,
            error: errno.map_or(0, |errno| -errno),
            flags: if errno.is_some() {
                0
            } else {
                libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32
            },
        };
        // SAFETY: as above. It fails where a signal has ended the call, which is then made anew.
        let _ = unsafe {
            libc::ioctl(
                asked.as_raw_fd(),
                libc::SECCOMP_IOCTL_NOTIF_SEND,
                &raw const answer,
            )
        };
    }
}
