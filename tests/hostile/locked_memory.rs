//! Kernels that charge rings to the user's locked memory.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::process::{Pid, Signal, geteuid, kill_process};

/// A user of one start alone: what others have locked counts as well, and what a daemon had for a while after its end.
fn user() -> u32 {
    static STARTS: AtomicU32 = AtomicU32::new(0);
    let start = STARTS.fetch_add(1, Ordering::Relaxed);
    1_000_000 + std::process::id() % 100_000 * 1000 + start
}

/// Starts a daemon whose user may lock so many bytes, and ends it; what it said until it listened, or failed.
fn said_with(bytes: u64) -> (bool, String) {
    let dir = tempfile::tempdir().expect("a directory");
    let user = user();
    chown(dir.path(), Some(user), None).expect("a directory of its own");
    let path = |name: &str| dir.path().join(name).display().to_string();
    let mut child = Command::new("prlimit")
        .arg(format!("--memlock={bytes}:{bytes}"))
        .arg(env!("CARGO_BIN_EXE_vhost-user-blkmq"))
        .args([
            "--socket-path",
            &path("disk.sock"),
            "--engine",
            "null",
            "--size",
            "1M",
            "--workers",
            "1",
        ])
        .args(["--control-path", &path("control.sock")])
        .uid(user)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("prlimit is there (util-linux)");
    let mut said = String::new();
    let mut listens = false;
    for line in BufReader::new(child.stderr.take().expect("piped")).lines() {
        let line = line.expect("text");
        if line.contains("listening on") {
            listens = true;
            let pid = Pid::from_raw(child.id().cast_signed()).expect("a process");
            kill_process(pid, Signal::TERM).expect("it is ours");
        }
        said += &line;
        said += "\n";
    }
    child.wait().expect("it ends");
    (listens, said)
}

#[test]
fn a_limit_of_locked_memory_that_a_take_over_would_meet_is_named_at_the_start() {
    if !geteuid().is_root() {
        println!("not tested: only root can start a daemon of a user that has none");
        return;
    }
    let (warning, error) = ("raise the limit (ulimit -Hl", "ulimit -l");
    let (listens, said) = said_with(4096);
    if listens {
        println!("not tested: this kernel does not charge rings to the user: {said}");
        return;
    }
    assert!(said.contains(error), "{said}");
    let mut warned = 0;
    for kib in (16..=1024).step_by(16) {
        let (listens, said) = said_with(kib * 1024);
        if listens && !said.contains(warning) {
            assert!(
                warned > 0,
                "with {kib} KiB there is room for two, with less for none"
            );
            return;
        }
        assert!(
            listens || warned == 0 && said.contains(error),
            "with {kib} KiB:\n{said}"
        );
        warned += u32::from(listens);
    }
    panic!("a MiB is enough for two rings");
}
