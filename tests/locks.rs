//! Who may have an image at the same time: another daemon of ours, QEMU's tools, a migration's other end.

mod support;

use std::fs::File;
use std::path::Path;
use std::process::{Command, Output};

use rustix::process::Signal;
use tempfile::TempDir;

use support::{Daemon, Disk, QueueSetup, Setup, Spec};

/// An image of 1 MiB.
fn image() -> (TempDir, std::path::PathBuf) {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("disk.img");
    File::create(&path)
        .and_then(|file| file.set_len(1 << 20))
        .expect("an image");
    (dir, path)
}

/// Our program with arguments that it should refuse: what it says.
fn refused(image: &Path, args: &[&str]) -> String {
    let dir = tempfile::tempdir().expect("a directory");
    let output = Command::new(env!("CARGO_BIN_EXE_vhost-user-blkmq"))
        .arg("--socket-path")
        .arg(dir.path().join("s"))
        .arg("--blk-file")
        .arg(image)
        .args(args)
        .output()
        .expect("the program starts");
    let text = String::from_utf8(output.stderr).expect("text");
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
    text
}

/// Runs a program of Debian's qemu-utils.
fn run(command: &[&str]) -> Output {
    Command::new(command[0])
        .args(&command[1..])
        .output()
        .unwrap_or_else(|error| panic!("{command:?} (Debian: qemu-utils): {error}"))
}

#[test]
fn a_second_writer_is_told_who_is_there_and_what_to_do() {
    let (_dir, path) = image();
    let first = Daemon::start_ours(&Spec::path(&path));
    let text = refused(&path, &[]);
    assert!(
        text.contains("disk.img") && text.contains("is in use: another process writes to it"),
        "{text}"
    );
    assert!(text.contains("--force-share"), "{text}");
    let sharing = Daemon::start_ours(&Spec::path(&path).args(["--force-share"]));
    sharing.stop();
    first.stop();
    Daemon::start_ours(&Spec::path(&path)).stop();
}

#[test]
fn readers_share_an_image_and_keep_writers_out() {
    let (_dir, path) = image();
    let readers = [(); 2].map(|()| Daemon::start_ours(&Spec::path(&path).read_only()));
    let text = refused(&path, &[]);
    assert!(
        text.contains("another process reads it and does not let others write"),
        "{text}"
    );
    for reader in readers {
        reader.stop();
    }
}

#[test]
fn two_disks_of_one_daemon_do_not_write_to_one_image() {
    let (dir, path) = image();
    let second = format!(
        "socket-path={}/t,blk-file={}",
        dir.path().display(),
        path.display()
    );
    let text = refused(&path, &["--disk", &second]);
    assert!(text.contains("is in use"), "{text}");
}

#[test]
fn the_successor_of_a_killed_daemon_gets_the_image() {
    let (_dir, path) = image();
    for _ in 0..5 {
        let mut daemon = Daemon::start_ours(&Spec::path(&path));
        let mut disk = Disk::attach(daemon.socket(), 1);
        disk.write(0, 0, &[7; 4096]);
        daemon.signal(Signal::KILL);
        daemon.wait_exit();
    }
    Daemon::start_ours(&Spec::path(&path)).stop();
}

#[test]
fn qemus_tools_refuse_an_image_that_is_served_and_we_one_that_qemu_has() {
    let (dir, path) = image();
    let daemon = Daemon::start_ours(&Spec::path(&path));
    let copy = dir.path().join("copy.img");
    let (image, copy) = (path.to_str().expect("text"), copy.to_str().expect("text"));
    for command in [
        ["qemu-io", "-f", "raw", "-c", "write 0 512", image].as_slice(),
        &["qemu-img", "resize", "-f", "raw", image, "2M"],
        &["qemu-img", "convert", "-f", "raw", image, copy],
    ] {
        let output = run(command);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "{command:?}");
        assert!(text.contains("lock"), "{command:?}: {text}");
    }
    let looked = run(&["qemu-img", "info", "-U", "-f", "raw", image]);
    assert!(looked.status.success(), "{looked:?}");
    daemon.stop();
    let written = run(&["qemu-io", "-f", "raw", "-c", "write 0 512", image]);
    assert!(written.status.success(), "{written:?}");

    // And the other way: QEMU's own daemon has it.
    let qemu = Daemon::start_qsd(&Spec::path(&path));
    let text = refused(&path, &[]);
    assert!(text.contains("another process writes to it"), "{text}");
    let text = refused(&path, &["--read-only"]);
    assert!(text.contains("another process writes to it"), "{text}");
    Daemon::start_ours(&Spec::path(&path).args(["--force-share"])).stop();
    drop(qemu);
    Daemon::start_ours(&Spec::path(&path)).stop();
}

#[test]
fn two_daemons_take_turns_where_the_lock_is_for_use_only() {
    let (_dir, path) = image();
    let spec = Spec::path(&path).args(["--lock", "in-use"]);
    let [source, destination] = [(); 2].map(|()| Daemon::start_ours(&spec));
    let mut here = Disk::attach(source.socket(), 2);
    here.write(0, 0, &[1; 512]);
    // The other's queue does not start while this one's run: its session ends.
    let early = Disk::attach_with(
        destination.socket(),
        &Setup::default(),
        1,
        QueueSetup::default(),
    );
    assert!(destination.wait_for_message("is in use: another process writes to it"));
    assert!(destination.wait_for_message("the session was closed"));
    drop(early);
    here.write(1, 1, &[2; 512]);
    // The source's queues stop one by one, as a migration stops them; its connection stays.
    here.front.stop(0).expect("stopped");
    here.front.stop(1).expect("stopped");
    let mut there = Disk::attach(destination.socket(), 2);
    assert_eq!(there.read(0, 0, 1024), [[1; 512], [2; 512]].concat());
    there.write(1, 2, &[3; 512]);
    drop(there);
    // And back, once the destination's front end has left.
    assert!(destination.wait_for_message("the session ended"));
    drop(here);
    let mut here = Disk::attach(source.socket(), 1);
    assert_eq!(here.read(0, 2, 512), [3; 512]);
    drop(here);
    source.stop();
    destination.stop();
}
