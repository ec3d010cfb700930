//! Signals, and what a parent process leaves of them.

use rustix::process::Signal;
use std::os::unix::net::UnixStream;

use super::bare::{Bare, under, wait_until};
use super::support::*;

#[test]
fn a_hangup_ends_the_daemon_as_a_termination_does() {
    let mut bare = Bare::start(1, |_| ());
    let _front_end = Disk::attach(&bare.socket(0), 1);
    bare.signal(Signal::HUP);
    let status = bare.wait_exit();
    assert!(status.success(), "{status}");
    bare.is_clean();
}

#[test]
fn a_hangup_is_ignored_under_nohup() {
    let bare = Bare::start(1, under(&["nohup"]));
    bare.signal(Signal::HUP);
    bare.work(0);
    bare.end();
}

#[test]
fn signals_that_the_parent_blocked_arrive() {
    let blocked = &["env", "--block-signal=TERM,INT,HUP,USR1,BUS,XFSZ"];
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let mut bare = Bare::start(1, under(blocked));
        bare.work(0);
        bare.signal(signal);
        let status = bare.wait_exit();
        assert!(status.success(), "{signal:?}: {status}");
        bare.is_clean();
    }
}

#[test]
fn a_limit_of_file_sizes_fails_a_write_and_not_the_process() {
    let dir = tempfile::tempdir().expect("a directory");
    let image = dir.path().join("disk.img");
    let file = std::fs::File::create(&image).expect("an image");
    file.set_len(4 << 20).expect("a size");
    // A soft limit is raised; the hard one stays.
    let limits: [(&[&str], bool); 2] = [
        (&["prlimit", "--fsize=1048576:1048576"], true),
        (&["prlimit", "--fsize=1048576:unlimited"], false),
    ];
    for (limit, fails) in limits {
        let socket = dir.path().join("s");
        let disk = format!(
            "socket-path={},blk-file={}",
            socket.display(),
            image.display()
        );
        let bare = Bare::start(1, |command| {
            command.args(["--disk", &disk]);
            under(limit)(command);
        });
        wait_until("it listens", || UnixStream::connect(&socket).is_ok());
        let mut disk = Disk::attach(&socket, 1);
        let gpa = disk.mem().alloc(4096, 4096);
        for (sector, status) in [(0, 0), (3 << 11, u8::from(fails)), (8, 0)] {
            let request = Request::write(sector, &[Seg::readable(gpa, 4096)]);
            assert_eq!(
                disk.run(0, &request).status,
                status,
                "{limit:?}: sector {sector}"
            );
        }
        drop(disk);
        bare.work(0);
        bare.end();
    }
}
