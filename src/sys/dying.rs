//! Processes that run no more code of their own, as `/proc` shows them.
//!
//! A process that was killed, or has ended, keeps its files until its last thread has left the kernel: a thread that
//! waits for a frozen file system, or one of io_uring's, holds all of them. So its sockets go on listening, its
//! connections stay open and its images stay locked until that I/O has ended.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

/// Flags of a thread (include/linux/sched.h): it exits, or it has taken the signal that ends it.
const EXITING: u32 = 0x4;
const SIGNALED: u32 = 0x400;

/// SIGKILL in a set of pending signals.
const KILL: u64 = 1 << 8;

/// A process of which no thread will run code of its own again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dying {
    pid: u32,
    name: String,
    /// Threads that are still in the kernel, and hold its files.
    left: usize,
    /// Those of them that wait there and cannot be interrupted.
    blocked: usize,
}

impl Dying {
    /// Whether it can still have files. A process of which only the entry in the table is left has none: a socket of it
    /// that still listens is another process's.
    pub fn has_threads(&self) -> bool {
        self.left > 0
    }
}

impl fmt::Display for Dying {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Dying {
            pid, name, blocked, ..
        } = self;
        write!(
            f,
            "process {pid} ({name}), which was killed or has ended and of which {blocked} threads in state D wait for \
             their I/O"
        )
    }
}

/// What one thread's files in `/proc` say.
struct Thread {
    ends: bool,
    gone: bool,
    blocked: bool,
}

impl Thread {
    fn read(directory: &Path) -> Option<Thread> {
        let stat = fs::read_to_string(directory.join("stat")).ok()?;
        // The name before it may hold anything, but it is the last thing in parentheses.
        let (_, fields) = stat.rsplit_once(')')?;
        let mut fields = fields.split_whitespace();
        let state = fields.next()?;
        let flags: u32 = fields.nth(5)?.parse().ok()?;
        let status = fs::read_to_string(directory.join("status")).ok()?;
        let pending = ["SigPnd:", "ShdPnd:"].iter().any(|set| {
            let line = status.lines().find_map(|line| line.strip_prefix(set));
            line.and_then(|set| u64::from_str_radix(set.trim(), 16).ok())
                .is_some_and(|set| set & KILL != 0)
        });
        let gone = matches!(state, "Z" | "X" | "x");
        Some(Thread {
            ends: gone || flags & (EXITING | SIGNALED) != 0 || pending,
            gone,
            blocked: state == "D",
        })
    }
}

/// The process `pid`, if it is one of those. `None` as well where that cannot be seen.
pub fn find(pid: u32) -> Option<Dying> {
    find_in(Path::new("/proc"), pid)
}

/// The same, with the processes' directories in `proc`.
pub fn find_in(proc: &Path, pid: u32) -> Option<Dying> {
    let (mut left, mut blocked) = (0, 0);
    let threads = threads_in(proc, pid);
    if threads.is_empty() {
        return None;
    }
    for directory in threads {
        let thread = match Thread::read(&directory) {
            Some(thread) => thread,
            // It has ended meanwhile.
            None if !directory.exists() => continue,
            None => return None,
        };
        if !thread.ends {
            return None;
        }
        left += usize::from(!thread.gone);
        blocked += usize::from(thread.blocked);
    }
    let name = fs::read_to_string(proc.join(pid.to_string()).join("comm")).ok()?;
    Some(Dying {
        pid,
        name: name.trim_end().escape_debug().to_string(),
        left,
        blocked,
    })
}

/// The directories of a process's threads.
pub fn threads_in(proc: &Path, pid: u32) -> Vec<PathBuf> {
    let threads = fs::read_dir(proc.join(pid.to_string()).join("task"));
    threads
        .into_iter()
        .flatten()
        .flatten()
        .map(|thread| thread.path())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, id};

    /// A process whose threads have these states, flags and pending signals of their own and of the process.
    fn fake(proc: &Path, pid: u32, threads: &[(&str, u32, u64, u64)]) {
        let directory = proc.join(pid.to_string());
        for (number, (state, flags, own, shared)) in threads.iter().enumerate() {
            let thread = directory.join(format!("task/{number}"));
            fs::create_dir_all(&thread).unwrap();
            let stat = format!("{number} (a) R (b) {state} 1 2 3 0 -1 {flags} 0 0\n");
            fs::write(thread.join("stat"), stat).unwrap();
            let status = format!("Name:\tx\nSigPnd:\t{own:016x}\nShdPnd:\t{shared:016x}\n");
            fs::write(thread.join("status"), status).unwrap();
        }
        fs::write(directory.join("comm"), "a\n").unwrap();
    }

    #[test]
    fn a_process_is_dying_when_none_of_its_threads_goes_on() {
        let proc = tempfile::tempdir().unwrap();
        let proc = proc.path();
        // As seen: killed, with a worker that waits for io_uring's threads.
        let killed = [
            ("Z", 4_228_364, 0, 0x100),
            ("D", 4_195_400, 0, 0x100),
            ("D", 4_210_768, 0x100, 0x100),
        ];
        fake(proc, 1, &killed);
        let found = find_in(proc, 1).unwrap();
        assert_eq!((found.pid, found.blocked), (1, 2));
        assert!(found.has_threads());
        assert!(found.to_string().contains("process 1 (a)"));
        // Its first thread has ended, and another serves.
        fake(proc, 2, &[("Z", 4, 0, 0), ("S", 0x40, 0, 0)]);
        assert_eq!(find_in(proc, 2), None);
        // It waits, and will go on.
        fake(proc, 3, &[("D", 0x40, 0, 0x4000)]);
        assert_eq!(find_in(proc, 3), None);
        // It has ended by itself: the others were told to, and have taken that.
        fake(proc, 4, &[("Z", 4, 0, 0), ("D", SIGNALED, 0, 0)]);
        assert!(find_in(proc, 4).is_some());
        assert_eq!(find_in(proc, 5), None, "there is none");
        // It waits for its parent only, and has no files.
        fake(proc, 6, &[("Z", 4, 0, 0)]);
        assert!(!find_in(proc, 6).unwrap().has_threads());
    }

    #[test]
    fn living_processes_and_zombies_are_told_apart() {
        assert_eq!(find(id()), None);
        let mut child = Command::new("sleep").arg("600").spawn().unwrap();
        assert_eq!(find(child.id()), None);
        child.kill().unwrap();
        // A signal that is pending is enough, so there is nothing to wait for.
        assert_eq!(find(child.id()).map(|found| found.pid), Some(child.id()));
        child.wait().unwrap();
    }
}
