//! The ring itself: how it is set up, and the only place that enters the kernel.

mod refusal;
mod unsent;

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::RawFd;
use std::thread;
use std::time::Duration;

use io_uring::types::{SubmitArgs, Timespec};
use io_uring::{
    EnterFlags, IoUring, cqueue, opcode,
    register::{Probe, Restriction},
    squeue,
};

use self::refusal::Refusals;
use self::unsent::Entries;
pub(super) use self::unsent::NOWHERE;
use super::EngineCounters;
use crate::mq::limits::DRIVER_TAGS;
use crate::sys::sigbus::Losses;

/// How many completions are taken out of the ring at a time.
pub(super) const REAP_BATCH: usize = 32;

/// What to ask the kernel for. Tests ask for less, to be where an older kernel is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ask {
    /// How many of the ways to set a ring up, from the best on, are not even tried.
    pub(super) skipped_modes: usize,
    pub(super) fixed_files: bool,
    pub(super) silent_writes: bool,
    /// Completions are to be had by polling the device.
    pub(super) polled: bool,
    /// The ring can do what the engine does, and nothing else.
    pub(super) restricted: bool,
    /// The most kernel threads that wait for files and devices.
    pub(super) threads: u32,
}

impl Ask {
    pub(super) const ALL: Ask = Ask {
        threads: DRIVER_TAGS as u32,
        skipped_modes: 0,
        fixed_files: true,
        silent_writes: true,
        polled: false,
        restricted: true,
    };
}

/// An io_uring with what the kernel could give.
pub(super) struct Ring {
    ring: IoUring,
    /// Places of the registered file table; 0: there is none.
    files: u32,
    /// A write can be told to complete without a word (Linux 5.17).
    pub(super) silent_writes: bool,
    pub(super) restricted: bool,
    mode: &'static str,
    refusals: Refusals,
    entries: Entries,
    /// Memory that I/O may not use any more.
    pub(super) losses: Losses,
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.describe())
    }
}

impl Ring {
    /// A ring with room for `sqes` entries to submit and `cqes` completions, for the calling thread
    /// only: as good as `ask` says, or what the kernel has. The registered file table gets the first
    /// of the sizes in `files` that the kernel allows.
    pub(super) fn new(sqes: u32, cqes: u32, files: &[u32], ask: Ask) -> io::Result<Self> {
        let mut builder = IoUring::builder();
        builder.dontfork().setup_cqsize(cqes).setup_clamp();
        if ask.restricted {
            builder.setup_r_disabled();
        }
        if ask.polled {
            builder.setup_iopoll();
        }
        let mut best = builder.clone();
        best.setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .setup_submit_all();
        let mut middle = builder.clone();
        middle
            .setup_coop_taskrun()
            .setup_taskrun_flag()
            .setup_submit_all();
        let modes = [
            (best, "single issuer, deferred task running"),
            (middle, "cooperative task running (Linux older than 6.1)"),
            (builder, "plain (Linux older than 5.19: more interruptions)"),
        ];
        let mut made = Err(io::Error::from_raw_os_error(libc::EINVAL));
        for (builder, mode) in &modes[ask.skipped_modes..] {
            made = builder.build(sqes).map(|ring| (ring, *mode));
            match &made {
                // Flags an older kernel does not know.
                Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {}
                _ => break,
            }
        }
        let (ring, mode) = made.map_err(unavailable)?;
        let params = ring.params();
        // Completions are never lost, vectors are read at submission, waits have a timeout, and
        // polls repeat (5.13 brought the latter together with resource tagging).
        if !(params.is_feature_nodrop()
            && params.is_feature_submit_stable()
            && params.is_feature_ext_arg()
            && params.is_feature_resource_tagging())
        {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "this kernel's io_uring is too old; Linux 5.13 or later is needed",
            ));
        }
        assert!(
            params.cq_entries() >= cqes.min(65536),
            "the kernel keeps the size asked for"
        );
        let silent_writes = ask.silent_writes && params.is_feature_skip_cqe_on_success();
        // The kernel allows as many as the process may open.
        let files = files
            .iter()
            .copied()
            .find(|files| ask.fixed_files && ring.submitter().register_files_sparse(*files).is_ok())
            .unwrap_or(0);
        // Threads for all that can be with the kernel at a time; by default there are four for each CPU. 0: those
        // for other than files are as many as the user may have.
        if let Err(error) = ring
            .submitter()
            .register_iowq_max_workers(&mut [ask.threads, 0])
        {
            log::debug!("the kernel threads of io_uring stay as few as they are: {error}");
        }
        if ask.restricted {
            restrict(&ring).map_err(unrestricted)?;
        }
        let entries = Entries::map(&ring)?;
        Ok(Ring {
            ring,
            files,
            silent_writes,
            restricted: ask.restricted,
            mode,
            refusals: Refusals::default(),
            entries,
            losses: Losses::default(),
        })
    }

    /// What kind of ring it became, for a log line.
    pub(super) fn describe(&self) -> String {
        format!(
            "io_uring: {}, {}{}, {} submission and {} completion entries",
            self.mode,
            if self.restricted { "restricted, " } else { "" },
            if self.has_files() {
                "registered files"
            } else {
                "plain files"
            },
            self.ring.params().sq_entries(),
            self.ring.params().cq_entries()
        )
    }

    /// Whether there is a registered file table.
    pub(super) fn has_files(&self) -> bool {
        self.files > 0
    }

    /// Puts a file into the registered table; whether it is there.
    pub(super) fn register_file(&self, place: impl Into<u32>, fd: RawFd) -> bool {
        self.update_file(place.into(), fd)
    }

    /// Takes a file out of the registered table. Should that fail, its place is overwritten by the next one
    /// at the latest.
    pub(super) fn unregister_file(&self, place: impl Into<u32>) {
        self.update_file(place.into(), -1);
    }

    fn update_file(&self, place: u32, fd: RawFd) -> bool {
        let submitter = self.ring.submitter();
        place < self.files && submitter.register_files_update(place, &[fd]).is_ok()
    }

    /// Prepares an entry. When the queue is full it is submitted; false: that did not help now.
    ///
    /// # Safety
    ///
    /// What the entry names stays valid until its completion has been reaped.
    #[inline]
    pub(super) unsafe fn push(
        &mut self,
        entry: &squeue::Entry,
        counters: &mut EngineCounters,
    ) -> bool {
        // SAFETY: passed on to our caller. Unsafe because the kernel works on addresses.
        let mut pushed = unsafe { self.ring.submission().push(entry) }.is_ok();
        if !pushed && self.submit(counters).is_ok() {
            // SAFETY: as above.
            pushed = unsafe { self.ring.submission().push(entry) }.is_ok();
        }
        counters.sqes += u64::from(pushed);
        self.entries.pushed(pushed);
        pushed
    }

    /// Whether entries wait to be submitted.
    #[inline]
    pub(super) fn has_queued(&mut self) -> bool {
        !self.ring.submission().is_empty()
    }

    /// Whether completions can be had without the kernel.
    #[inline]
    pub(super) fn has_completions(&mut self) -> bool {
        !self.ring.completion().is_empty()
    }

    /// Submits what is queued. Entries the kernel has no room for stay queued.
    pub(super) fn submit(&mut self, counters: &mut EngineCounters) -> io::Result<()> {
        self.spoil_lost();
        while self.has_queued() {
            let entered = self.ring.submit();
            if self.entered(entered, counters)? == 0 {
                break;
            }
        }
        Ok(())
    }

    /// Runs what the kernel put off until we ask, if it says that there is something.
    #[inline]
    pub(super) fn run_task_work(&mut self, counters: &mut EngineCounters) -> io::Result<()> {
        let sq = self.ring.submission();
        if sq.taskrun() || sq.cq_overflow() {
            drop(sq);
            return self.enter_events(counters);
        }
        Ok(())
    }

    /// Submits what is queued and lets completions that are due happen, without waiting.
    pub(super) fn enter_events(&mut self, counters: &mut EngineCounters) -> io::Result<()> {
        self.spoil_lost();
        let queued = u32::try_from(self.ring.submission().len()).expect("at most the queue's size");
        // SAFETY: no argument is passed, so no memory is named. Unsafe because the crate offers no
        // other way to enter for events without waiting for one.
        let entered = unsafe {
            self.ring.submitter().enter::<libc::sigset_t>(
                queued,
                0,
                EnterFlags::GETEVENTS.bits(),
                None,
            )
        };
        self.entered(entered, counters).map(drop)
    }

    /// Submits what is queued and waits for a completion, at most `timeout`. Where the kernel refuses
    /// that again and again, waits for a while all the same: whoever waits has nothing else to do.
    pub(super) fn wait(
        &mut self,
        timeout: Option<Duration>,
        counters: &mut EngineCounters,
    ) -> io::Result<()> {
        self.spoil_lost();
        let entered = match timeout {
            None => self.ring.submit_and_wait(1),
            Some(timeout) => {
                let timespec = Timespec::from(timeout);
                self.ring
                    .submitter()
                    .submit_with_args(1, &SubmitArgs::new().timespec(&timespec))
            }
        };
        self.entered(entered, counters)?;
        if self.is_refused() {
            let pause = self.pause();
            thread::sleep(timeout.map_or(pause, |timeout| timeout.min(pause)));
        }
        Ok(())
    }

    /// What came of a call: how many entries were taken. None is no error if the call is right again
    /// later.
    #[inline]
    fn entered(
        &mut self,
        outcome: io::Result<usize>,
        counters: &mut EngineCounters,
    ) -> io::Result<usize> {
        counters.enters += 1;
        match outcome {
            Ok(taken) => {
                self.refusals.end();
                Ok(taken)
            }
            Err(error) => self.refused(error, counters),
        }
    }

    #[cold]
    fn refused(&mut self, error: io::Error, counters: &mut EngineCounters) -> io::Result<usize> {
        match error.raw_os_error() {
            // What was waited for did not come in time.
            Some(libc::ETIME) => self.refusals.end(),
            // A signal; no memory for the moment; completions to be reaped first.
            Some(libc::EINTR | libc::EAGAIN | libc::ENOMEM | libc::EBUSY) => {
                counters.refused += 1;
                self.refusals.add(error);
            }
            _ => return Err(error),
        }
        Ok(0)
    }

    /// Whether the kernel has refused the last calls, so that the next one had better wait.
    #[inline]
    pub(super) fn is_refused(&self) -> bool {
        self.refusals.is_repeated()
    }

    /// For how long, if the caller does.
    pub(super) fn pause(&mut self) -> Duration {
        self.refusals.pause()
    }

    /// Takes up to [`REAP_BATCH`] completions out of the ring.
    #[inline]
    pub(super) fn take<'a>(
        &mut self,
        batch: &'a mut [MaybeUninit<cqueue::Entry>; REAP_BATCH],
    ) -> &'a [cqueue::Entry] {
        self.ring.completion().fill(batch)
    }
}

impl Drop for Ring {
    /// A ring is taken apart some time after it was closed. Until then it would keep the images open,
    /// and with them their locks, although the process has ended.
    fn drop(&mut self) {
        if self.has_files() {
            let _ = self.ring.submitter().unregister_files();
        }
    }
}

/// All that a worker's ring is for. What a ring does is no system call that a filter could see, so this is
/// where it is made unable to open files, to connect, or to send.
const OPERATIONS: &[u8] = &[
    opcode::Read::CODE,
    opcode::Write::CODE,
    opcode::Readv::CODE,
    opcode::Writev::CODE,
    opcode::Fsync::CODE,
    opcode::Fallocate::CODE,
    opcode::UringCmd16::CODE,
    opcode::Timeout::CODE,
    opcode::PollAdd::CODE,
    opcode::AsyncCancel2::CODE,
];

/// IORING_REGISTER_FILES_UPDATE and IORING_UNREGISTER_FILES (uapi/linux/io_uring.h).
const REGISTRATIONS: &[u8] = &[6, 3];

/// Limits a ring that is still disabled to [`OPERATIONS`], for good, and enables it.
fn restrict(ring: &IoUring) -> io::Result<()> {
    // A list with an operation that the kernel has not got is refused.
    let mut there = Probe::new();
    ring.submitter().register_probe(&mut there)?;
    let mut list: Vec<Restriction> = OPERATIONS
        .iter()
        .filter(|code| there.is_supported(**code))
        .map(|code| Restriction::sqe_op(*code))
        .chain(
            REGISTRATIONS
                .iter()
                .map(|code| Restriction::register_op(*code)),
        )
        .collect();
    let flags = squeue::Flags::FIXED_FILE | squeue::Flags::ASYNC | squeue::Flags::SKIP_SUCCESS;
    list.push(Restriction::sqe_flags_allowed(flags.bits()));
    ring.submitter().register_restrictions(&mut list)?;
    ring.submitter().register_enable_rings()
}

fn unrestricted(error: io::Error) -> io::Error {
    let text =
        format!("the ring cannot be restricted (--sandbox io-uring=off does without): {error}");
    io::Error::new(error.kind(), text)
}

fn unavailable(error: io::Error) -> io::Error {
    let hint = match error.raw_os_error() {
        Some(libc::EPERM) => "forbidden here; see the sysctl kernel.io_uring_disabled",
        Some(libc::ENOSYS) => {
            "not in this kernel, or filtered by a sandbox; Linux 5.13 or later is needed"
        }
        Some(libc::ENOMEM) => "no memory for its rings; raise the locked-memory limit (ulimit -l)",
        Some(libc::EMFILE | libc::ENFILE) => "no file descriptor left; raise the limit (ulimit -n)",
        _ => return error,
    };
    io::Error::new(error.kind(), format!("io_uring is {hint}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use io_uring::types::Fd;

    /// What a ring says to opening a file, and to being given buffers of its own.
    fn tries(ask: Ask) -> (i32, bool) {
        let mut counters = EngineCounters::default();
        let mut ring = Ring::new(8, 16, &[], ask).expect("a ring");
        let path = c"/dev/null";
        let open = opcode::OpenAt::new(Fd(libc::AT_FDCWD), path.as_ptr()).build();
        // SAFETY: the path is there for ever. Unsafe because the kernel works on addresses.
        assert!(unsafe { ring.push(&open, &mut counters) });
        ring.submit(&mut counters).expect("submitted");
        while !ring.has_completions() {
            ring.enter_events(&mut counters).expect("entered");
        }
        let result = ring
            .ring
            .completion()
            .next()
            .expect("there is one")
            .result();
        let bound = ring.ring.submitter().register_iowq_max_workers(&mut [1, 1]);
        (result, bound.is_ok())
    }

    #[test]
    fn a_restricted_ring_opens_no_files() {
        assert_eq!(tries(Ask::ALL), (-libc::EACCES, false));
        let (result, bound) = tries(Ask {
            restricted: false,
            ..Ask::ALL
        });
        assert!(result >= 0 && bound, "{result}");
    }
}
