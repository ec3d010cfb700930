//! Processes that only say that they are the daemon to take over from.

use std::fs::Permissions;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Command, Output};
use std::thread;

use rustix::process::{Uid, geteuid};
use rustix::thread::set_thread_res_uid;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::MIB;
use super::support::DEADLINE;
use super::support::front::send_with_fds;

const NOBODY: u32 = 65534;

/// Where a new daemon is lured to: two disks, and a control socket that is not a daemon's.
struct Trap {
    dir: TempDir,
    control: PathBuf,
    disks: [(PathBuf, PathBuf); 2],
}

impl Trap {
    fn new() -> Trap {
        let dir = TempDir::new().expect("a directory");
        let at = |name: &str| dir.path().join(name);
        let disks = [
            (at("a.sock"), at("a.img")),
            (at("private.sock"), at("private.img")),
        ];
        for (_, image) in &disks {
            let file = std::fs::File::create(image).expect("an image");
            file.set_len(MIB).expect("a size");
            file.write_all_at(b"private", 0).expect("it is written");
        }
        let control = at("theirs").join("control.sock");
        let theirs = control.parent().expect("a directory");
        std::fs::create_dir(theirs).expect("a directory");
        if geteuid().is_root() {
            chown(theirs, Some(NOBODY), None).expect("it is given away");
            std::fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).expect("a mode");
        }
        Trap {
            dir,
            control,
            disks,
        }
    }

    /// Starts a daemon that is to take over, and waits for its end.
    fn lure(&self) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-user-blkmq"));
        command.arg("--take-over").arg(&self.control);
        for (socket, image) in &self.disks {
            let disk = format!(
                "socket-path={},blk-file={}",
                socket.display(),
                image.display()
            );
            command.args(["--disk", &disk]);
        }
        let child = command
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .expect("it starts");
        let mut guard = Guarded(child.id(), true);
        let output = child.wait_with_output().expect("it ends");
        guard.1 = false;
        output
    }

    /// The last line of a daemon that must not have taken over.
    fn refused(&self) -> String {
        let output = self.lure();
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{stderr}");
        assert!(!stderr.contains("took over"), "{stderr}");
        let line = stderr.lines().last().expect("a line").to_owned();
        assert!(
            line.contains("cannot take over from the daemon at"),
            "{stderr}"
        );
        for (_, image) in &self.disks {
            let mut found = [0; 7];
            let file = std::fs::File::open(image).expect("it is there");
            file.read_exact_at(&mut found, 0).expect("it is read");
            assert_eq!(&found, b"private");
        }
        line
    }

    fn name(&self, disk: usize) -> String {
        format!("the socket {:?}", self.disks[disk].0)
    }

    /// What a daemon would say of a disk.
    fn facts(&self, disk: usize) -> Value {
        let image = std::fs::metadata(&self.disks[disk].1).expect("it is there");
        json!({
            "socket": self.name(disk), "file": [image.dev(), image.ino(), 0], "size_bytes": MIB,
            "logical_block_size": 512, "read_only": false, "num_queues": 1, "queue_size": 64,
        })
    }
}

/// Ends a process that was not waited for.
struct Guarded(u32, bool);

impl Drop for Guarded {
    fn drop(&mut self) {
        if let (true, Ok(pid)) = (self.1, i32::try_from(self.0))
            && let Some(pid) = rustix::process::Pid::from_raw(pid)
        {
            // It may have ended.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }
}

fn become_nobody() {
    let nobody = Uid::from_raw(NOBODY);
    set_thread_res_uid(nobody, nobody, nobody).expect("root may");
}

/// One who is asked.
struct Impostor(UnixStream);

impl Impostor {
    fn accept(listener: &UnixListener) -> Impostor {
        let (stream, _) = listener.accept().expect("it is asked");
        stream.set_read_timeout(Some(DEADLINE)).expect("a timeout");
        Impostor(stream)
    }

    /// Reads the question and agrees.
    fn agree(&mut self) {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            self.0.read_exact(&mut byte).expect("a question");
            head.push(byte[0]);
        }
        let head = String::from_utf8(head).expect("text");
        let length = head.split_once("Content-Length: ").expect("a length").1;
        let length = length.lines().next().and_then(|text| text.parse().ok());
        let mut body = vec![0; length.expect("a number")];
        self.0.read_exact(&mut body).expect("a body");
        self.write(b"HTTP/1.1 101 Switching Protocols\r\n\r\n");
        assert_eq!(self.hear(), Some(1), "a plan");
    }

    fn write(&mut self, bytes: &[u8]) {
        // It may have turned away already.
        let _ = self.0.write_all(bytes);
    }

    fn say(&mut self, kind: u32, json: &Value) {
        self.say_with(kind, json, &[]);
    }

    fn say_with(&mut self, kind: u32, json: &Value, fds: &[BorrowedFd<'_>]) {
        let json = match json {
            Value::Null => String::new(),
            json => json.to_string(),
        };
        let words = [kind, json.len() as u32, fds.len() as u32];
        self.write(&words.map(u32::to_ne_bytes).concat());
        self.write(json.as_bytes());
        if !fds.is_empty() {
            // It may have turned away already.
            let _ = send_with_fds(&self.0, &[0], fds);
        }
    }

    /// The kind of the next frame, or `None` at the end.
    fn hear(&mut self) -> Option<u32> {
        let mut header = [0; 12];
        self.0.read_exact(&mut header).ok()?;
        let word = |at: usize| u32::from_ne_bytes(*header[at..].first_chunk().expect("a word"));
        let mut rest = vec![0; word(4) as usize];
        self.0.read_exact(&mut rest).ok()?;
        Some(word(0))
    }
}

fn disk_state(name: &str, listener: Value) -> Value {
    json!({
        "socket": name, "size_bytes": MIB, "was_write_through": false, "scheduler": null, "limits": null,
        "group": null, "write_through": null, "listener": listener, "session": null,
    })
}

/// Plays the daemon at `trap`'s control socket while one is lured there; the line that it ends with.
fn play(trap: &Trap, act: impl FnOnce(&mut Impostor) + Send) -> String {
    let listener = UnixListener::bind(&trap.control).expect("it is free");
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut impostor = Impostor::accept(&listener);
            impostor.agree();
            act(&mut impostor);
        });
        trap.refused()
    })
}

#[test]
fn a_control_socket_of_another_user_is_not_even_asked() {
    if !geteuid().is_root() {
        println!("skipped: another user's socket can only be made by root");
        return;
    }
    let trap = Trap::new();
    let control = &trap.control;
    let line = thread::scope(|scope| {
        let (ready, listening) = std::sync::mpsc::channel();
        let listens = scope.spawn(move || {
            become_nobody();
            let listener = UnixListener::bind(control).expect("it is free");
            ready.send(()).expect("it is waited for");
            let mut heard = Vec::new();
            let mut asked = Impostor::accept(&listener);
            asked.0.read_to_end(&mut heard).expect("the end");
            heard
        });
        listening.recv().expect("it listens");
        let line = trap.refused();
        let heard = listens.join().expect("it was asked");
        assert_eq!(String::from_utf8_lossy(&heard), "", "not a word");
        line
    });
    assert!(line.contains("it is a process of user 65534"), "{line}");
}

#[test]
fn a_socket_of_root_that_another_user_answers_is_not_believed() {
    if !geteuid().is_root() {
        println!("skipped: another user can only be made by root");
        return;
    }
    let trap = Trap::new();
    let line = play(&trap, |impostor| {
        become_nobody();
        impostor.say(
            2,
            &json!({ "version": "1", "control": false, "disks": [trap.facts(0)] }),
        );
    });
    assert!(line.contains("it is a process of user 65534"), "{line}");
}

/// The image of a disk that was not announced was opened as ours alone and is not known to be the other's.
#[test]
fn only_announced_disks_are_taken_over_each_of_them_once() {
    let trap = Trap::new();
    let facts = |disks: &[Value], control: bool| json!({ "version": "1", "control": control, "disks": disks });
    let state = |disks: usize| json!({ "groups": {}, "disks": disks, "control": null });
    let listener = |name: &str| UnixListener::bind(trap.dir.path().join(name)).expect("it is free");
    let listening = json!({ "socket": 0, "file": null });
    let one = facts(&[trap.facts(0)], false);
    let again = || std::fs::remove_file(&trap.control).expect("the last one's");

    let others = listener("others");
    let line = play(&trap, |impostor| {
        impostor.say(2, &one);
        assert_eq!(impostor.hear(), Some(3), "ready");
        impostor.say(4, &state(1));
        let disk = disk_state(&trap.name(1), listening.clone());
        impostor.say_with(5, &disk, &[others.as_fd()]);
        assert_eq!(impostor.hear(), Some(7), "a refusal");
    });
    assert!(
        line.contains("private.sock") && line.contains("did not announce"),
        "{line}"
    );
    again();
    let line = play(&trap, |impostor| {
        impostor.say(2, &one);
        assert_eq!(impostor.hear(), Some(3), "ready");
        impostor.say(4, &state(2));
    });
    assert!(line.contains("it announced 1 disks and has 2"), "{line}");
    again();
    let both = facts(&[trap.facts(0), trap.facts(1)], false);
    let line = play(&trap, |impostor| {
        impostor.say(2, &both);
        assert_eq!(impostor.hear(), Some(3), "ready");
        impostor.say(4, &state(2));
        let disk = disk_state(&trap.name(0), listening.clone());
        impostor.say_with(5, &disk, &[others.as_fd()]);
        impostor.say_with(5, &disk, &[others.as_fd()]);
        assert_eq!(impostor.hear(), Some(7), "a refusal");
    });
    assert!(
        line.contains("a.sock") && line.contains("or twice"),
        "{line}"
    );

    // In the facts already.
    for (facts, part) in [
        (
            facts(&[trap.facts(0), trap.facts(0)], false),
            "announces a disk twice",
        ),
        (
            facts(&[trap.facts(0)], true),
            "announces a control socket, which was not asked for",
        ),
        (
            facts(
                &[json!({
                    "socket": "the socket \"/elsewhere\"", "file": null, "size_bytes": 0, "logical_block_size": 512,
                    "read_only": false, "num_queues": 1, "queue_size": 64,
                })],
                false,
            ),
            "announces a disk on the socket \"/elsewhere\", which was not asked for",
        ),
    ] {
        again();
        let line = play(&trap, |impostor| impostor.say(2, &facts));
        assert!(line.contains(part), "{line}");
    }
}

#[test]
fn descriptors_that_are_not_what_they_are_said_to_be_are_refused() {
    let trap = Trap::new();
    let facts = json!({ "version": "1", "control": false, "disks": [trap.facts(0)] });
    let state = json!({ "groups": {}, "disks": 1, "control": null });
    let listener = UnixListener::bind(trap.dir.path().join("others")).expect("it is free");
    let (connected, _other) = UnixStream::pair().expect("a pair");
    let file = std::fs::File::open("/dev/null").expect("it is there");
    let session = json!({
        "front_end": 1, "channel": null, "owned": true, "features": 0, "protocol_features": 0, "regions": [],
        "rings": [],
    });
    let listening = json!({ "socket": 0, "file": null });
    let no_listener = "its socket came as a descriptor that is no listening Unix stream socket";
    let no_front_end = "its front end came as a descriptor that is no connected Unix stream socket";
    let cases: [(&str, Value, Value, Vec<BorrowedFd<'_>>); 6] = [
        (
            no_listener,
            listening.clone(),
            Value::Null,
            vec![file.as_fd()],
        ),
        (
            no_listener,
            listening.clone(),
            Value::Null,
            vec![connected.as_fd()],
        ),
        (
            no_front_end,
            listening.clone(),
            session.clone(),
            vec![listener.as_fd(), file.as_fd()],
        ),
        (
            no_front_end,
            listening.clone(),
            session,
            vec![listener.as_fd(), listener.as_fd()],
        ),
        (
            "its socket did not come along",
            Value::Null,
            Value::Null,
            vec![],
        ),
        (
            "a file descriptor is missing",
            listening,
            Value::Null,
            vec![],
        ),
    ];
    for (part, listener, session, fds) in cases {
        let mut disk = disk_state(&trap.name(0), listener);
        disk["session"] = session;
        let line = play(&trap, |impostor| {
            impostor.say(2, &facts);
            assert_eq!(impostor.hear(), Some(3), "ready");
            impostor.say(4, &state);
            impostor.say_with(5, &disk, &fds);
            assert_eq!(impostor.hear(), Some(7), "a refusal");
        });
        assert!(line.contains(part), "{line}");
        std::fs::remove_file(&trap.control).expect("the last one's");
    }
}

#[test]
fn an_old_daemon_that_dies_on_the_way_is_an_error_and_its_sockets_are_left() {
    let trap = Trap::new();
    let facts = json!({ "version": "1", "control": false, "disks": [trap.facts(0)] });
    let state = json!({ "groups": {}, "disks": 1, "control": null });
    let socket = &trap.disks[0].0;
    for step in 0..5 {
        let listener = UnixListener::bind(socket).expect("it is free");
        let file = std::fs::metadata(socket).expect("a socket");
        let listening = json!({ "socket": 0, "file": [file.dev(), file.ino()] });
        let line = play(&trap, |impostor| {
            if step >= 1 {
                impostor.say(2, &facts);
            }
            if step >= 2 {
                assert_eq!(impostor.hear(), Some(3), "ready");
            }
            if step >= 3 {
                impostor.say(4, &state);
            }
            if step >= 4 {
                // It does not wait for the answer.
                let disk = disk_state(&trap.name(0), listening.clone());
                impostor.0.shutdown(std::net::Shutdown::Read).expect("open");
                impostor.say_with(5, &disk, &[listener.as_fd()]);
            }
        });
        assert!(
            line.contains("it ended") || line.contains("does not listen"),
            "{line}"
        );
        assert!(socket.exists(), "step {step}");
        for path in [socket, &trap.control] {
            std::fs::remove_file(path).expect("the last one's");
        }
    }
}

#[test]
fn control_characters_of_the_other_daemon_are_not_shown() {
    let trap = Trap::new();
    let evil = "\u{1b}[2J\r\nvhost-user-blkmq: all is well";
    let shown = "\\u{1b}[2J\\r\\nvhost-user-blkmq: all is well";
    let plain = |line: &str| {
        assert!(line.contains(shown), "{line}");
        assert!(!line.chars().any(char::is_control), "{line:?}");
    };
    plain(&play(&trap, |impostor| {
        impostor.say(7, &json!({ "error": evil }))
    }));
    std::fs::remove_file(&trap.control).expect("the last one's");
    plain(&play(&trap, |impostor| {
        let mut disk = trap.facts(0);
        disk["socket"] = evil.into();
        impostor.say(
            2,
            &json!({ "version": "1", "control": false, "disks": [disk] }),
        );
    }));
    std::fs::remove_file(&trap.control).expect("the last one's");
    plain(&play(&trap, |impostor| {
        impostor.say(
            2,
            &json!({ "version": "1", "control": false, "disks": [trap.facts(0)] }),
        );
        assert_eq!(impostor.hear(), Some(3), "ready");
        impostor.say(
            4,
            &json!({ "groups": { "g": { evil: [1, 1] } }, "disks": 1, "control": null }),
        );
    }));
}
