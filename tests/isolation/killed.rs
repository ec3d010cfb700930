//! A process that has ended while its storage does not answer: the kernel keeps all its files until it does.

use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Stdio};

use rustix::io::{FdFlags, fcntl_setfd};

use super::neighbours::{Frozen, Pair, push_everything};
use super::*;

/// Waits until a thread of the process waits for the file system.
pub fn wait_for_blocked(pid: u32) {
    let deadline = Instant::now() + DEADLINE;
    let blocked = || {
        let threads = std::fs::read_dir(format!("/proc/{pid}/task")).expect("it lives");
        let stats = threads.flatten().map(|thread| thread.path().join("stat"));
        stats
            .filter_map(|stat| std::fs::read_to_string(stat).ok())
            .any(|stat| stat.contains(") D "))
    };
    while !blocked() {
        assert!(Instant::now() < deadline, "{pid} waits for nothing");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Waits until the process has ended, as far as it can with threads that wait in the kernel.
pub fn wait_for_zombie(pid: u32) {
    let deadline = Instant::now() + DEADLINE;
    let stat = format!("/proc/{pid}/stat");
    while !std::fs::read_to_string(&stat).is_ok_and(|stat| stat.contains(") Z ")) {
        assert!(Instant::now() < deadline, "{pid} goes on");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Kills a daemon while I/O of `disk`, whose storage is frozen, keeps it from ending.
fn kill_in_frozen_io(daemon: &Daemon, disk: &mut Disk) {
    push_everything(disk, 2);
    wait_for_blocked(daemon.pid());
    daemon.signal(Signal::KILL);
    wait_for_zombie(daemon.pid());
}

/// A second daemon listens where the killed one did, serves what it can, and the frozen disk when it answers again.
#[test]
fn sockets_of_a_killed_process_whose_storage_is_frozen_are_replaced() {
    let Some(frozen) = Frozen::of(1, 64 << 20, 16 << 20) else {
        return;
    };
    let dir = tempfile::tempdir().expect("a directory");
    let path = |name: &str| dir.path().join(name).display().to_string();
    let other = format!("socket-path={},engine=null,size=1M", path("other.sock"));
    let spec = Spec::path(&frozen.images()[0]).args([
        "--lock",
        "in-use",
        "--control-path",
        &path("control.sock"),
        "--disk",
        &other,
    ]);
    let mut killed = Daemon::start_ours(&spec);
    let mut disk = Disk::attach(killed.socket(), 1);
    let cold = frozen.freeze();
    kill_in_frozen_io(&killed, &mut disk);

    let mut next = killed.beside(&spec);
    assert!(next.wait_for_message("listening on"), "{}", next.stderr());
    let said = format!("belongs to process {}", killed.pid());
    assert_eq!(next.stderr().matches(&said).count(), 3, "{}", next.stderr());
    Disk::attach(Path::new(&path("other.sock")), 1).read(0, 0, 4096);
    assert!(next.is_running());

    drop(cold);
    killed.wait_exit();
    drop(disk);
    Disk::attach(next.socket(), 1).read(0, 0, 4096);
    next.stop();
}

/// An old write would land on a new one otherwise.
#[test]
fn the_image_of_a_killed_process_whose_storage_is_frozen_is_waited_for_and_the_log_says_so() {
    let Some(frozen) = Frozen::of(1, 64 << 20, 16 << 20) else {
        return;
    };
    let spec = Spec::path(&frozen.images()[0]);
    let mut killed = Daemon::start_ours(&spec);
    let mut disk = Disk::attach(killed.socket(), 1);
    let cold = frozen.freeze();
    kill_in_frozen_io(&killed, &mut disk);
    let next = killed.beside(&spec);
    let said = format!("is locked by process {}", killed.pid());
    assert!(next.wait_for_message(&said), "{}", next.stderr());
    assert!(!next.stderr().contains("listening on"), "{}", next.stderr());
    drop(cold);
    assert!(next.wait_for_message("listening on"), "{}", next.stderr());
    killed.wait_exit();
    drop(disk);
    Disk::attach(next.socket(), 1).read(0, 0, 4096);
    next.stop();
}

/// Of a process that was told to end, only the disk that does not answer stays locked.
#[test]
fn images_of_disks_that_have_ended_are_unlocked_while_another_is_frozen() {
    let Some(frozen) = Frozen::of(1, 64 << 20, 16 << 20) else {
        return;
    };
    let pair = Pair::start(&frozen.images()[0], &[]);
    let mut disk = pair.attach();
    let mut other = pair.attach_other();
    other.write(0, 0, &[7; 4096]);
    let cold = frozen.freeze();
    push_everything(&mut disk, 2);
    wait_for_blocked(pair.daemon.pid());
    terminate_twice(&pair.daemon);
    wait_for_zombie(pair.daemon.pid());

    let spec = Spec::path(&pair.other_image());
    let next = Daemon::start_ours(&spec);
    assert_eq!(Disk::attach(next.socket(), 1).read(0, 0, 4096), [7; 4096]);
    next.stop();
    drop(cold);
    let mut daemon = pair.daemon;
    assert_eq!(daemon.wait_exit().code(), Some(1));
}

/// A process that lives has the socket, too: it opened it, and starts the next daemon with it.
#[test]
fn a_socket_that_a_supervisor_passed_to_a_killed_process_is_not_replaced() {
    let Some(frozen) = Frozen::of(1, 64 << 20, 16 << 20) else {
        return;
    };
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("passed.sock");
    let listener = UnixListener::bind(&path).expect("it listens");
    fcntl_setfd(&listener, FdFlags::empty()).expect("it can be inherited");
    let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-user-blkmq"));
    let command = command.arg("--fd").arg(listener.as_raw_fd().to_string());
    let command = command.arg("--blk-file").arg(&frozen.images()[0]);
    let mut killed = command.stderr(Stdio::null()).spawn().expect("it starts");
    fcntl_setfd(&listener, FdFlags::CLOEXEC).expect("it is open");
    let mut disk = Disk::attach(&path, 1);
    let cold = frozen.freeze();
    push_everything(&mut disk, 2);
    wait_for_blocked(killed.id());
    killed.kill().expect("it is ours");
    wait_for_zombie(killed.id());

    let mut next = Command::new(env!("CARGO_BIN_EXE_vhost-user-blkmq"));
    let next = next.arg("--socket-path").arg(&path);
    let next = next.args(["--engine", "null", "--size", "1M"]);
    let stderr = File::create(dir.path().join("said")).expect("a file");
    let mut next = next.stderr(stderr).spawn().expect("it starts");
    let deadline = Instant::now() + DEADLINE;
    let said = || std::fs::read_to_string(dir.path().join("said")).expect("text");
    let status = loop {
        if let Some(status) = next.try_wait().expect("it is ours") {
            break Some(status);
        }
        if said().contains("] listening on") || Instant::now() > deadline {
            let _ = next.kill();
            let _ = next.wait();
            break None;
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    drop(cold);
    killed.wait().expect("it is ours");
    assert_eq!(
        status.and_then(|status| status.code()),
        Some(1),
        "{}",
        said()
    );
    assert!(said().contains("is in use"), "{}", said());
    assert!(!said().contains("is replaced"), "{}", said());
    listener.set_nonblocking(true).expect("it is open");
    while listener.accept().is_ok() {}
    UnixStream::connect(&path).expect("it listens");
    listener.accept().expect("it leads to the one who has it");
}

/// The one that is dying has the image, and is not the reason.
#[test]
fn an_image_of_a_living_process_is_not_waited_for_because_a_killed_one_has_it_too() {
    let Some(frozen) = Frozen::of(1, 64 << 20, 16 << 20) else {
        return;
    };
    let spec = Spec::path(&frozen.images()[0]);
    let sharing = spec.clone().args(["--force-share"]);
    let mut killed = Daemon::start_ours(&sharing);
    let mut disk = Disk::attach(killed.socket(), 1);
    let living = Daemon::start_ours(&sharing);
    let cold = frozen.freeze();
    kill_in_frozen_io(&killed, &mut disk);

    let mut third = living.beside(&spec);
    let status = third.wait_exit();
    drop(cold);
    let said = third.stderr();
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(said.contains("another process writes to it"), "{said}");
    assert!(!said.contains("is locked by process"), "{said}");
    killed.wait_exit();
    drop(disk);
    living.stop();
}
