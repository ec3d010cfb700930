//! A change of an image's size that waits in the kernel for storage that does not answer, longer than its process lives.

use std::path::PathBuf;
use std::thread::{self, JoinHandle};

use serde_json::json;
use vhost_user_blkmq::control::client;

use super::killed::{wait_for_blocked, wait_for_zombie};
use super::neighbours::Frozen;
use super::*;

const MIB: u64 = 1 << 20;

/// The image is to have 32 MiB; the answer comes when the storage answers.
fn grow(control: PathBuf) -> JoinHandle<bool> {
    thread::spawn(move || {
        let body = json!({ "size_bytes": 32 * MIB });
        client::ask(&control, "POST", "/v1/disks/0/resize", Some(&body)).is_ok()
    })
}

fn with_control(frozen: &Frozen, args: &[&str]) -> (Spec, PathBuf, tempfile::TempDir) {
    let dir = tempfile::tempdir().expect("a directory");
    let control = dir.path().join("control.sock");
    let spec = Spec::path(&frozen.images()[0]);
    let spec = spec.args(["--control-path", text(&control)]);
    (spec.args(args.iter().copied()), control, dir)
}

/// The next one would serve an image that the call then cuts.
#[test]
fn an_image_that_is_being_made_longer_stays_locked_after_its_process_has_ended() {
    let Some(frozen) = Frozen::of(1, 64 << 20, 16 << 20) else {
        return;
    };
    let (spec, control, _dir) = with_control(&frozen, &[]);
    let mut ended = Daemon::start_ours(&spec);
    let cold = frozen.freeze();
    let asked = grow(control);
    wait_for_blocked(ended.pid());
    ended.signal(Signal::TERM);
    assert!(
        ended.wait_for_message("stays locked until its storage has answered"),
        "{}",
        ended.stderr()
    );
    wait_for_zombie(ended.pid());

    let next = ended.beside(&spec);
    let said = format!("is locked by process {}", ended.pid());
    assert!(next.wait_for_message(&said), "{}", next.stderr());
    assert!(!next.stderr().contains("listening on"), "{}", next.stderr());
    drop(cold);
    assert!(next.wait_for_message("listening on"), "{}", next.stderr());
    assert!(ended.wait_exit().success());
    asked.join().expect("it was not answered");
    let mut disk = Disk::attach(next.socket(), 1);
    disk.write(0, 0, &[1; 4096]);
    next.stop();
}

/// The locks that the kernel says a process has on a file.
fn locks(pid: u32, file: &Path) -> usize {
    let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd")).expect("it lives");
    let of_file = descriptors
        .flatten()
        .filter(|fd| std::fs::read_link(fd.path()).is_ok_and(|path| path == file));
    let infos = of_file.map(|fd| {
        let name = fd.file_name();
        let info = format!("/proc/{pid}/fdinfo/{}", name.to_str().expect("a number"));
        std::fs::read_to_string(info).unwrap_or_default()
    });
    infos.map(|info| info.matches("lock:").count()).sum()
}

#[test]
fn an_image_locked_in_use_stays_locked_while_it_is_being_made_longer_and_no_ring_runs() {
    let Some(frozen) = Frozen::of(1, 64 << 20, 16 << 20) else {
        return;
    };
    let image = frozen.images()[0].clone();
    let (spec, control, _dir) = with_control(&frozen, &["--lock", "in-use"]);
    let daemon = Daemon::start_ours(&spec);
    assert_eq!(locks(daemon.pid(), &image), 0);
    let mut disk = Disk::attach(daemon.socket(), 1);
    disk.write(0, 0, &[1; 4096]);
    disk.flush(0);
    assert_ne!(locks(daemon.pid(), &image), 0);

    let cold = frozen.freeze();
    let asked = grow(control.clone());
    wait_for_blocked(daemon.pid());
    disk.front.stop(0).expect("it stops");
    let kept = locks(daemon.pid(), &image);
    drop(cold);
    assert!(asked.join().expect("it is asked"), "it grows");
    assert_ne!(kept, 0, "the last ring has unlocked it");
    assert_eq!(locks(daemon.pid(), &image), 0, "nothing uses it any more");

    // Without a ring the change itself locks it, and is refused where another process has it.
    let other = Daemon::start_ours(&Spec::path(&image));
    let body = json!({ "size_bytes": 48 * MIB });
    let refused = client::ask(&control, "POST", "/v1/disks/0/resize", Some(&body));
    let refused = refused.expect_err("another one serves it").to_string();
    assert!(refused.contains("is in use"), "{refused}");
    other.stop();
    client::ask(&control, "POST", "/v1/disks/0/resize", Some(&body)).expect("it is free");
    assert_eq!(locks(daemon.pid(), &image), 0);
    drop(disk);
    daemon.stop();
}
