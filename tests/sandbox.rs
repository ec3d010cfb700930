//! What the daemon has given up, as the kernel tells it of a process that serves; and that what it is entrusted with
//! does not get out by its log or a core dump. What each layer refuses is tried in `src/sandbox/tests.rs`.

mod support;

#[path = "sandbox/bare.rs"]
mod bare;
#[path = "sandbox/places.rs"]
mod places;
#[path = "sandbox/signals.rs"]
mod signals;
#[path = "sandbox/starts.rs"]
mod starts;
#[path = "sandbox/streams.rs"]
mod streams;

use std::collections::BTreeMap;
use std::fs::{self, File, Permissions};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

use rustix::process::{Signal, geteuid};
use support::*;
use tempfile::TempDir;
use vhost_user_blkmq::control::client;

const PROGRAM: &str = env!("CARGO_BIN_EXE_vhost-user-blkmq");

const MIB: usize = 1 << 20;

/// The fields of `/proc/PID/task/TID/status` of each thread of ours, by its name.
fn threads(pid: u32) -> Vec<(String, BTreeMap<String, String>)> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("it runs");
    let mut threads = Vec::new();
    for task in tasks.map(|task| task.expect("an entry").path()) {
        // One may end while it is looked at.
        let Ok(status) = fs::read_to_string(task.join("status")) else {
            continue;
        };
        let fields: BTreeMap<String, String> = status
            .lines()
            .filter_map(|line| line.split_once(':'))
            .map(|(name, value)| {
                let words: Vec<&str> = value.split_whitespace().collect();
                (name.to_owned(), words.join(" "))
            })
            .collect();
        // The kernel's own, for io_uring, make no system calls.
        let name = fields["Name"].clone();
        if !name.starts_with("iou-") {
            threads.push((name, fields));
        }
    }
    assert!(threads.len() > 2, "{threads:?}");
    threads
}

const CAPABILITIES: [&str; 5] = ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"];

/// Every thread has a filter, cannot gain privileges, and has none.
fn assert_shut_in(pid: u32) {
    for (name, fields) in threads(pid) {
        assert_eq!(fields["Seccomp"], "2", "{name}");
        assert_eq!(fields["NoNewPrivs"], "1", "{name}");
        for set in &CAPABILITIES[..3] {
            assert_eq!(fields[*set].trim_start_matches('0'), "", "{name}: {set}");
        }
        // Who may not change the bounding set has nothing that could be kept in it either.
        if geteuid().is_root() {
            for set in CAPABILITIES {
                assert_eq!(fields[set].trim_start_matches('0'), "", "{name}: {set}");
            }
        }
    }
}

/// Writes and reads through all queues.
fn work(disk: &mut Disk, queues: usize) {
    for queue in 0..queues {
        let byte = u8::try_from(queue).expect("few queues") + 1;
        disk.write(queue, 64 * queue as u64, &[byte; 8192]);
        assert_eq!(disk.read(queue, 64 * queue as u64, 8192), vec![byte; 8192]);
    }
    disk.flush(0);
}

#[test]
fn every_thread_is_shut_in_before_a_front_end_is_heard_and_after() {
    let dir = TempDir::new().expect("a directory");
    let control = dir.path().join("control");
    let control = control.to_str().expect("text");
    let daemon = Daemon::start_ours(&Spec::image(1 << 20).args(["--control-path", control]));
    assert_shut_in(daemon.pid());
    let mut disk = Disk::attach(daemon.socket(), 4);
    work(&mut disk, 4);
    let names: Vec<String> = threads(daemon.pid())
        .into_iter()
        .map(|(name, _)| name)
        .collect();
    for part in ["disk-0", "session-0", "worker-0", "control", "growth"] {
        assert!(names.iter().any(|name| name == part), "{part}: {names:?}");
    }
    assert_shut_in(daemon.pid());
    // The socket's file is the one thing that is still to be removed.
    let (socket, dir) = (daemon.socket().to_owned(), dir.path().to_owned());
    drop(disk);
    daemon.stop();
    assert!(!socket.exists() && fs::read_dir(dir).expect("there").next().is_none());
}

#[test]
fn each_layer_has_a_switch() {
    if !geteuid().is_root() {
        eprintln!("skipped: only root has capabilities to keep");
        return;
    }
    let check = |layers: &str, [seccomp, no_new, bound]: [bool; 3]| {
        let spec = Spec::image(1 << 20).args(["--sandbox", layers]);
        let daemon = Daemon::start_ours(&spec.args(["--log", "debug"]));
        let mut disk = Disk::attach(daemon.socket(), 4);
        work(&mut disk, 4);
        for (name, fields) in threads(daemon.pid()) {
            assert_eq!(fields["Seccomp"] == "2", seccomp, "{layers}: {name}");
            assert_eq!(fields["NoNewPrivs"] == "1", no_new, "{layers}: {name}");
            let bounded = fields["CapBnd"].trim_start_matches('0').is_empty();
            assert_eq!(bounded, bound, "{layers}: {name}");
        }
        let restricted = daemon.stderr().contains("restricted");
        drop(disk);
        daemon.stop();
        restricted
    };
    assert!(check("on", [true, true, true]));
    assert!(!check("off", [false, false, false]));
    // A filter needs no_new_privs (unless one is root, which is what is given up), and so does landlock.
    assert!(check("seccomp=off", [false, true, true]));
    assert!(check("privileges=off", [true, true, false]));
    assert!(check("landlock=off,dumps=off", [true, true, true]));
    assert!(!check("io-uring=off", [true, true, true]));
}

#[test]
fn another_user_serves_with_nothing_of_roots() {
    if !geteuid().is_root() {
        eprintln!("skipped: only root may become another user");
        return;
    }
    let dir = TempDir::new().expect("a directory");
    // Sockets are removed by who has become the user; who may connect there is not to be seen.
    let sockets = dir.path().join("sockets");
    fs::create_dir(&sockets).expect("room");
    let nobody = 65534;
    std::os::unix::fs::chown(&sockets, Some(nobody), Some(nobody)).expect("root may");
    fs::set_permissions(dir.path(), Permissions::from_mode(0o711)).expect("ours");
    // And the image is one that only root may open.
    let image = dir.path().join("disk.img");
    let file = File::create(&image).expect("an image");
    file.set_len(MIB as u64).expect("room");
    fs::set_permissions(&image, Permissions::from_mode(0o600)).expect("ours");

    let path = |name: &str| sockets.join(name).to_str().expect("text").to_owned();
    let (disk_socket, control) = (path("disk"), path("control"));
    // The support's own disk is in a place of root's.
    let arguments = format!("socket-path={disk_socket},blk-file={}", image.display());
    let spec = Spec::null(1 << 20)
        .args(["--user", "nobody", "--disk", &arguments])
        .args(["--control-path", &control, "--take-over", &control]);
    let daemon = Daemon::start_ours(&spec);
    let mut disk = Disk::attach(Path::new(&disk_socket), 4);
    work(&mut disk, 4);
    let ids = |pid: u32| {
        for (name, fields) in threads(pid) {
            let id = nobody.to_string();
            let all = [id.as_str(); 4].join(" ");
            assert_eq!((&fields["Uid"], &fields["Gid"]), (&all, &all), "{name}");
            assert_eq!(fields["Groups"].replace(&id, ""), "", "{name}");
        }
        // Files there are root's in a process that must not be dumped or looked into.
        let facts = fs::metadata(format!("/proc/{pid}/environ")).expect("it runs");
        assert_eq!(facts.uid(), 0);
        assert_shut_in(pid);
    };
    ids(daemon.pid());
    for socket in [&disk_socket, &control] {
        let facts = fs::metadata(socket).expect("it is there");
        assert_eq!(facts.uid(), nobody, "{socket}");
    }
    assert_eq!(fs::metadata(&control).expect("there").mode() & 0o777, 0o600);

    // Whoever takes over was root when it asked.
    let mut old = daemon;
    let new = old.beside(&spec);
    assert!(
        new.wait_for_message("took over; the guests go on"),
        "{}\n{}",
        new.stderr(),
        old.stderr()
    );
    assert!(old.wait_exit().success());
    ids(new.pid());
    work(&mut disk, 4);
    drop(disk);
    new.stop();
    assert_eq!(fs::read_dir(&sockets).expect("there").count(), 0);
}

#[test]
fn a_socket_is_for_those_it_is_meant_for() {
    let gid = if geteuid().is_root() { "nogroup" } else { "" };
    let dir = TempDir::new().expect("a directory");
    let second = dir.path().join("second");
    let disk = format!(
        "socket-path={},engine=null,size=1M,socket-mode=0600",
        second.display()
    );
    let mut spec = Spec::null(1 << 20).args(["--socket-mode", "0660", "--disk", &disk]);
    if !gid.is_empty() {
        spec = spec.args(["--socket-group", gid]);
    }
    let daemon = Daemon::start_ours(&spec);
    let facts = fs::metadata(daemon.socket()).expect("there");
    assert_eq!(facts.mode() & 0o777, 0o660);
    if !gid.is_empty() {
        assert_eq!(facts.gid(), 65534);
    }
    assert!(daemon.wait_for_message(second.to_str().expect("text")));
    let facts = fs::metadata(&second).expect("there");
    assert_eq!(facts.mode() & 0o777, 0o600);
    daemon.stop();
}

#[test]
fn what_makes_no_sense_is_said_in_one_line() {
    let dir = TempDir::new().expect("a directory");
    let socket = dir.path().join("s");
    for (args, said) in [
        (
            ["--sandbox", "sec"],
            "'sec' is none of on, off, seccomp=on|off",
        ),
        (["--sandbox", "seccomp"], "'seccomp' is none of"),
        (["--sandbox", "seccomp=off,"], "'' is none of"),
        (["--sandbox", "landlock=no"], "'landlock=no' is none of"),
        (["--user", ""], "USER or USER:GROUP"),
        (
            ["--user", "no-such-user"],
            "there is no user 'no-such-user'",
        ),
        (
            ["--user", "root:no-such-group"],
            "there is no group 'no-such-group'",
        ),
        (["--socket-mode", "0999"], "three octal digits"),
        (["--socket-mode", "0444"], "the owner"),
        (
            ["--socket-group", "no-such-group"],
            "there is no group 'no-such-group'",
        ),
    ] {
        let output = Command::new(PROGRAM)
            .arg("--socket-path")
            .arg(&socket)
            .args(["--engine", "null", "--size", "1M"])
            .args(args)
            .output()
            .expect("the program starts");
        let text = String::from_utf8(output.stderr).expect("text");
        assert!(!output.status.success(), "{args:?}");
        assert_eq!(text.lines().count(), 1, "{args:?}: {text}");
        assert!(text.contains(said), "{args:?}: {text}");
        assert!(!socket.exists(), "{args:?}");
    }
}

/// What no guest and no daemon has in its memory by chance.
const SECRET: &[u8] = b"~the guest's own secret~";

fn secret_block(len: usize) -> Vec<u8> {
    SECRET.iter().copied().cycle().take(len).collect()
}

/// The secret goes through every way that data takes: straight, through a bounce buffer, merged, at large.
fn entrust(disk: &mut Disk) {
    disk.write(0, 0, &secret_block(MIB));
    assert_eq!(disk.read(0, 0, MIB), secret_block(MIB));
    // O_DIRECT does not take such an address.
    let gpa = disk.mem().alloc(64 * 1024, 4096) + 4;
    disk.mem().write(gpa, &secret_block(32 * 1024));
    let request = Request::write(128, &[Seg::readable(gpa, 32 * 1024)]);
    assert_eq!(disk.run(1, &request).status, 0);
    let request = Request::read(128, &[Seg::writable(gpa, 32 * 1024)]);
    assert_eq!(disk.run(1, &request).status, 0);
    disk.flush(0);
}

/// Where the secret is in the process's memory: the mappings, and whether they go into a core dump.
fn secrets_in(pid: u32) -> io::Result<Vec<(String, bool)>> {
    let mut text = String::new();
    File::open(format!("/proc/{pid}/smaps"))?.read_to_string(&mut text)?;
    let memory = File::open(format!("/proc/{pid}/mem"))?;
    let mut found = Vec::new();
    let mut mapping = None;
    for line in text.lines() {
        let Some(flags) = line.strip_prefix("VmFlags:") else {
            let range = line.split_whitespace().next().and_then(|word| {
                let (start, end) = word.split_once('-')?;
                let number = |text| u64::from_str_radix(text, 16).ok();
                Some((number(start)?, number(end)?))
            });
            if let Some(range) = range {
                mapping = Some((range, line.to_owned()));
            }
            continue;
        };
        let Some(((start, end), name)) = mapping.take() else {
            continue;
        };
        let flags: Vec<&str> = flags.split_whitespace().collect();
        if !flags.contains(&"rd") || flags.contains(&"io") {
            continue;
        }
        // Piece by piece, each with the beginning of the next.
        let mut piece = vec![0; MIB + SECRET.len()];
        for at in (start..end).step_by(MIB) {
            let len = piece.len().min(usize::try_from(end - at).expect("64 bits"));
            // What is not there (a hole, memory of a device) is not in a dump either.
            let Ok(got) = memory.read_at(&mut piece[..len], at) else {
                continue;
            };
            if piece[..got].windows(SECRET.len()).any(|w| w == SECRET) {
                found.push((name, !flags.contains(&"dd")));
                break;
            }
        }
    }
    Ok(found)
}

/// With dumps allowed, because the layer that forbids them would hide that they have nothing in them.
#[test]
fn guest_data_is_in_no_core_dump() {
    let in_memory = tempfile::tempdir_in("/dev/shm").expect("/dev/shm is there");
    let mapped = in_memory.path().join("disk.img");
    File::create(&mapped)
        .and_then(|file| file.set_len(4 * MIB as u64))
        .expect("an image in memory");
    for spec in [Spec::image(4 * MIB as u64), Spec::path(&mapped)] {
        let daemon = Daemon::start_ours(&spec.args(["--sandbox", "dumps=off"]));
        let mut disk = Disk::attach(daemon.socket(), 2);
        entrust(&mut disk);
        let found = match secrets_in(daemon.pid()) {
            Ok(found) => found,
            Err(error) => {
                eprintln!("skipped: no look into another process's memory: {error}");
                return;
            }
        };
        assert!(!found.is_empty(), "the guest's memory is somewhere");
        let dumped: Vec<_> = found.iter().filter(|(_, dumped)| *dumped).collect();
        assert!(dumped.is_empty(), "{dumped:#?}");
        if daemon.stderr().contains("O_DIRECT") {
            let bounced = found.iter().any(|(name, _)| name.contains(" 00:00 0"));
            assert!(bounced, "bounce buffers were used: {found:#?}");
        }
        drop(disk);
        daemon.stop();
    }
}

#[test]
fn guest_data_is_in_no_message() {
    let dir = TempDir::new().expect("a directory");
    let control = dir.path().join("control");
    let spec = Spec::image(4 * MIB as u64)
        .args(["--log", "trace", "--control-path"])
        .args([control.to_str().expect("text")]);
    let daemon = Daemon::start_ours(&spec);
    let ask = |method, path, body: Option<&serde_json::Value>| {
        client::ask(&control, method, path, body).expect("an answer")
    };
    let everything = serde_json::json!({});
    ask("POST", "/v1/trace", Some(&everything));
    let mut disk = Disk::attach(daemon.socket(), 2);
    entrust(&mut disk);
    // And where things go wrong: no such request, beyond the end, a header that is the secret.
    let gpa = disk.mem().alloc(4096, 4096);
    disk.mem().write(gpa, &secret_block(4096));
    let secret = Seg::readable(gpa, 512);
    for request in [
        Request::new(0x7365_6372, 0, &[secret]),
        Request::write(1 << 40, &[secret]),
        Request::write(0, &[Seg::readable(gpa, 500)]),
    ] {
        assert_ne!(disk.run(0, &request).status, 0);
    }
    disk.queues[1].push_chain(7, &[secret, Seg::readable(gpa, 16)], gpa);
    disk.queues[1].publish();
    disk.queues[1].kick();
    assert!(daemon.wait_for_message("stopped"), "{}", daemon.stderr());
    let mut said = ["/v1/trace", "/v1/disks", "/metrics"]
        .map(|path| ask("GET", path, None))
        .join("\n");
    assert!(said.contains("blkmq_"), "{said}");
    daemon.signal(Signal::USR1);
    disk.front.send_bytes(&secret_block(64), &[]).expect("sent");
    assert!(daemon.wait_for_message("the session was closed"));
    drop(disk);
    let (status, stdout, stderr) = daemon.terminate();
    assert!(status.success(), "{stderr}");
    assert!(stderr.contains("started: "), "much was told: {stderr}");
    said += &stdout;
    said += &stderr;
    // As text, or as numbers of some bytes.
    for part in ["secret", "guest's own", "7e746865", "65687"] {
        assert!(!said.contains(part), "{part}: {said}");
    }
}
