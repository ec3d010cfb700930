//! Names, directories, descriptors and users that a daemon is started with.

use std::fs::{self, File, Permissions};
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::process::{Command, Output, Stdio};

use rustix::process::geteuid;

use super::bare::{Bare, PROGRAM, under, wait_until};
use super::support::*;
use super::threads;

/// What a start that fails says. A daemon that serves instead is ended.
fn refused(command: &mut Command) -> Output {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it starts");
    let deadline = std::time::Instant::now() + DEADLINE;
    while child.try_wait().expect("ours").is_none() {
        if std::time::Instant::now() > deadline {
            child.kill().expect("ours");
            panic!("{command:?} serves");
        }
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    child.wait_with_output().expect("it has ended")
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn relative_paths_are_taken_over() {
    let dir = tempfile::tempdir().expect("a directory");
    File::create(dir.path().join("disk.img"))
        .and_then(|file| file.set_len(1 << 20))
        .expect("an image");
    let daemon = || {
        let mut command = Command::new(PROGRAM);
        command
            .current_dir(dir.path())
            .args(["--socket-path", "disk.sock", "--blk-file", "disk.img"])
            .args(["--control-path", "./control", "--take-over", "control"])
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        command
    };
    let mut old = Bare::of(daemon().stderr(Stdio::null()));
    let socket = dir.path().join("disk.sock");
    wait_until("it listens", || UnixStream::connect(&socket).is_ok());
    let mut disk = Disk::attach(&socket, 1);
    disk.write(0, 0, &[3; 4096]);
    for _ in 0..2 {
        let (mut reader, writer) = std::io::pipe().expect("a pipe");
        let new = Bare::of(daemon().stderr(Stdio::from(writer)));
        let status = old.wait_exit();
        assert!(status.success(), "{status}");
        assert_eq!(disk.read(0, 0, 4096), [3; 4096]);
        assert!(socket.exists() && dir.path().join("control").exists());
        old = new;
        let mut said = [0; 4096];
        let read = reader.read(&mut said).expect("it says something");
        assert!(read > 0);
    }
    drop(disk);
    old.end();
    let left = fs::read_dir(dir.path()).expect("there").count();
    assert_eq!(left, 1, "the image");
}

#[test]
fn no_writable_temporary_directory_is_no_reason_not_to_start() {
    for temporary in ["/nowhere", "/proc", "relative"] {
        let bare = Bare::start(2, |command| {
            command.env("TMPDIR", temporary);
        });
        bare.work(0);
        bare.work(1);
        bare.end();
    }
}

#[test]
fn no_inotify_is_a_warning_that_names_the_limit() {
    let dir = tempfile::tempdir().expect("a directory");
    let image = dir.path().join("disk.img");
    File::create(&image)
        .and_then(|file| file.set_len(1 << 20))
        .expect("an image");
    for (limit, named) in [
        ("max_inotify_instances", "fs.inotify.max_user_instances"),
        ("max_inotify_watches", "fs.inotify.max_user_watches"),
    ] {
        // A limit of a user namespace, which concerns nobody else.
        let script = format!("echo 0 > /proc/sys/user/{limit} && exec \"$0\" \"$@\"");
        let mut probe = Command::new("unshare");
        probe.args(["-Ur", "sh", "-c", &script, "true"]);
        if !probe.status().is_ok_and(|status| status.success()) {
            eprintln!("skipped: no user namespaces");
            return;
        }
        let socket = dir.path().join("s");
        let mut command = Command::new("unshare");
        command
            .args(["-Ur", "sh", "-c", &script, PROGRAM, "--socket-path"])
            .arg(&socket)
            .arg("--blk-file")
            .arg(&image)
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        let (mut reader, writer) = std::io::pipe().expect("a pipe");
        let bare = Bare::of(command.stderr(Stdio::from(writer)));
        drop(command);
        wait_until("it listens", || UnixStream::connect(&socket).is_ok());
        let mut disk = Disk::attach(&socket, 1);
        disk.write(0, 0, &[3; 4096]);
        drop(disk);
        bare.end();
        let mut said = String::new();
        reader.read_to_string(&mut said).expect("text");
        assert!(
            said.contains("cannot be watched") && said.contains(named),
            "{said}"
        );
    }
}

/// Whether this test program has a descriptor that its children inherit.
fn is_passed_on(fd: i32) -> bool {
    let facts = fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).unwrap_or_default();
    let mut lines = facts.lines();
    let flags = lines.find_map(|line| line.strip_prefix("flags:"));
    // O_CLOEXEC, in octal.
    flags.is_some_and(|flags| u32::from_str_radix(flags.trim(), 8).unwrap_or(0) & 0o2_000_000 == 0)
}

#[test]
fn a_descriptor_that_the_parent_did_not_pass_is_refused() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = |name: &str| dir.path().join(name).to_str().expect("text").to_owned();
    for fd in (3..24).filter(|fd| !is_passed_on(*fd)) {
        let mut command = Command::new(PROGRAM);
        command.args(["--control-path", &path("control")]);
        for disk in 0..4 {
            let socket = path(&disk.to_string());
            command.args([
                "--disk",
                &format!("socket-path={socket},engine=null,size=1M"),
            ]);
        }
        command.args(["--disk", &format!("fd={fd},engine=null,size=1M")]);
        let output = refused(&mut command);
        let said = text(&output);
        assert_eq!(output.status.code(), Some(1), "{fd}: {said}");
        assert!(said.contains(&format!("descriptor {fd} given")), "{said}");
        assert!(said.contains("is not open"), "{fd}: {said}");
        assert_eq!(fs::read_dir(dir.path()).expect("there").count(), 0);
    }
}

#[test]
fn a_user_and_group_are_all_there_is_or_it_does_not_start() {
    if !geteuid().is_root() {
        eprintln!("skipped: only root may start a process with other groups");
        return;
    }
    let dir = tempfile::tempdir().expect("a directory");
    fs::set_permissions(dir.path(), Permissions::from_mode(0o777)).expect("ours");
    // The build's directory may be closed to other users.
    let program = dir.path().join("program");
    fs::copy(PROGRAM, &program).expect("a copy");
    let socket = dir.path().join("s");
    let daemon = |privileges: &[&str], user: &str| {
        let mut command = Command::new("setpriv");
        command
            .args(["--reuid=65534", "--regid=65534", "--groups=65534,1"])
            .args(privileges)
            .arg(&program)
            .arg("--socket-path")
            .arg(&socket)
            .args(["--engine", "null", "--size", "1M", "--user", user])
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        command
    };
    let output = refused(&mut daemon(&[], "nobody:nogroup"));
    let said = text(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(said.contains("has the groups 1 as well"), "{said}");
    assert!(!socket.exists());

    let may = ["--inh-caps=+setgid", "--ambient-caps=+setgid"];
    for (privileges, user, groups) in [
        (&may[..], "nobody:nogroup", "65534"),
        // What the user's own groups are is for the user database to say.
        (&may[..], "nobody", "65534"),
        (&[], "nobody", "1 65534"),
    ] {
        let bare = Bare::of(daemon(privileges, user).stderr(Stdio::null()));
        wait_until("it listens", || UnixStream::connect(&socket).is_ok());
        drop(Disk::attach(&socket, 1));
        for (name, fields) in threads(bare.pid()) {
            assert_eq!(fields["Groups"], groups, "{privileges:?} {user}: {name}");
        }
        bare.end();
    }
}

/// Several nodes, made up as sysfs would describe them: what they make the daemon do it does with the sandbox closed.
#[test]
fn made_up_numa_nodes_are_served() {
    if !geteuid().is_root() {
        eprintln!("skipped: only root may put directories in the place of others");
        return;
    }
    let machines: [&[(u16, &str)]; 7] = [
        &[(0, "0"), (1, "1")],
        &[(0, "0-1"), (1, "")],
        &[(0, ""), (1, "0-1")],
        &[(0, "0-1"), (1, "2-255")],
        &[(0, "0"), (1, "1"), (7, "64-127"), (1023, "")],
        &[(3, "0"), (900, "1")],
        &[(0, "what?"), (1, "0"), (2, "1")],
    ];
    for nodes in machines {
        let dir = tempfile::tempdir().expect("a directory");
        for (node, cpus) in nodes {
            let node = dir.path().join(format!("node{node}"));
            fs::create_dir(&node).expect("a node");
            fs::write(node.join("cpulist"), format!("{cpus}\n")).expect("its CPUs");
        }
        let script = format!(
            "mount --bind {} /sys/devices/system/node && exec \"$0\" \"$@\"",
            dir.path().display()
        );
        let words = ["unshare", "--mount", "sh", "-c", &script];
        let bare = Bare::start_on("2", 2, under(&words));
        // Memory that is there, and memory that is not yet; small pages and, where there are some, large ones.
        let layouts = [vec![(0, 64 << 20)], vec![(0, 4 << 20), (1 << 32, 1 << 30)]];
        for memory in layouts {
            for disk in 0..2 {
                let setup = Setup {
                    memory: memory.clone(),
                    ..Setup::default()
                };
                let mut disk =
                    Disk::attach_with(&bare.socket(disk), &setup, 2, QueueSetup::default())
                        .expect("a session");
                disk.write(0, 0, &[9; 4096]);
                disk.write(1, 8, &[9; 4096]);
            }
        }
        bare.end();
    }
}
