//! Upgrades that fail: the old daemon serves on, and the new one says why in one line.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit};

use super::support::*;
use super::{Lineage, MIB, under_load};

/// Starts a daemon that is to take over and must not; returns the one line it ends with.
fn refused(lineage: &Lineage, spec: &Spec) -> String {
    let mut new = lineage.daemon.beside(spec);
    let status = new.wait_exit();
    let (_, _, stderr) = new.terminate();
    assert!(!status.success(), "it ended with {status}: {stderr}");
    let line = stderr.lines().last().expect("a line").to_owned();
    assert!(line.starts_with("vhost-user-blkmq: "), "{stderr}");
    line
}

#[test]
fn a_new_daemon_that_does_not_fit_is_refused_and_the_old_one_serves_on() {
    let mut lineage = Lineage::start(Spec::image(64 * MIB), &[]);
    let mut disk = Disk::attach(lineage.daemon.socket(), 4);
    let other = lineage.dir.path().join("other.img");
    std::fs::File::create(&other)
        .and_then(|file| file.set_len(64 * MIB))
        .expect("an image");
    let elsewhere = lineage.dir.path().join("elsewhere.sock");
    under_load(&mut disk, |progress| {
        let spec = &lineage.spec;
        for (spec, part) in [
            (
                spec.clone().queues(3),
                "--num-queues was 4, and may not become less (3)",
            ),
            (
                spec.clone().queue_size(64),
                "--queue-size was 1024, and may not become less (64)",
            ),
            (
                spec.clone().read_only(),
                "read-only was false and would be true",
            ),
            (
                spec.clone().args(["--logical-block-size", "4096"]),
                "the logical block size was 512 and would be 4096",
            ),
            (
                spec.clone().args(["--discard", "off"]),
                "feature bits 0x2000 were never offered",
            ),
        ] {
            let line = refused(&lineage, &spec);
            assert!(
                line.contains("cannot take over from the daemon at") && line.contains(part),
                "{line}"
            );
            // Whoever connects next finds the old daemon.
            for socket in [lineage.daemon.socket(), &lineage.control()] {
                UnixStream::connect(socket).expect(part);
            }
            progress();
        }
        let socket = lineage.daemon.socket().to_owned();
        let args = ["--socket-path", socket.to_str().unwrap()];
        let line = refused_command(&lineage, &other, &args);
        assert!(
            line.contains("the image is not the file that the guest has been using"),
            "{line}"
        );
        progress();
        // Another command line altogether: it has none of the disks.
        let args = ["--socket-path", elsewhere.to_str().unwrap()];
        let line = refused_command(&lineage, &other, &args);
        assert!(
            line.contains("the new daemon has no disk on the socket") && line.contains("blk.sock"),
            "{line}"
        );
        assert!(!elsewhere.exists(), "and leaves nothing behind");
        progress();
    });
    let said = lineage.daemon.stderr();
    assert!(
        said.contains("not taken over, this daemon serves on"),
        "{said}"
    );
    // After all that it can still be taken over.
    under_load(&mut disk, |progress| {
        lineage.upgrade(&[]);
        progress();
    });
}

fn refused_command(lineage: &Lineage, image: &std::path::Path, args: &[&str]) -> String {
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_vhost-user-blkmq"))
        .arg("--take-over")
        .arg(lineage.control())
        .arg("--blk-file")
        .arg(image)
        .args(args)
        .output()
        .expect("it runs");
    assert!(!output.status.success());
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    stderr.lines().last().expect("a line").to_owned()
}

/// A process that is to take over, played by hand so that it can end at any point.
pub(super) struct Actor {
    stream: UnixStream,
    /// What it wants, in JSON.
    pub(super) plan: String,
}

impl Actor {
    /// Asks until nobody else is at it.
    pub(super) fn ask(lineage: &Lineage, formats: &str) -> (Actor, String) {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let asked = Self::ask_once(lineage, formats);
            if formats != "[1]" || !asked.1.contains(" 409 ") {
                return asked;
            }
            assert!(
                Instant::now() < deadline,
                "the one before is never given up"
            );
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn ask_once(lineage: &Lineage, formats: &str) -> (Actor, String) {
        Self::ask_as(lineage, formats, "test")
    }

    fn ask_as(lineage: &Lineage, formats: &str, version: &str) -> (Actor, String) {
        let mut stream = UnixStream::connect(lineage.control()).expect("it listens");
        stream.set_read_timeout(Some(DEADLINE)).expect("a timeout");
        let version = serde_json::json!(version);
        let body = format!(r#"{{"formats": {formats}, "version": {version}}}"#);
        let ask = format!(
            "POST /v1/take-over HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(ask.as_bytes()).expect("it listens");
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte).expect("an answer");
            head.push(byte[0]);
        }
        let socket = format!("the socket {:?}", lineage.daemon.socket());
        let plan = serde_json::json!({ "disks": [socket], "control": null }).to_string();
        (
            Actor { stream, plan },
            String::from_utf8(head).expect("text"),
        )
    }

    pub(super) fn say(&mut self, kind: u32, json: &str) {
        let header = [kind, json.len() as u32, 0].map(u32::to_ne_bytes).concat();
        self.stream.write_all(&header).expect("it listens");
        self.stream.write_all(json.as_bytes()).expect("it listens");
    }

    /// The kind of the next frame; its descriptors are thrown away.
    fn hear(&mut self) -> u32 {
        let mut header = [0; 12];
        self.stream.read_exact(&mut header).expect("a frame");
        let word = |at: usize| u32::from_ne_bytes(*header[at..].first_chunk().unwrap());
        let batches = word(8).div_ceil(128);
        let mut rest = vec![0; (word(4) + batches) as usize];
        self.stream.read_exact(&mut rest).expect("the frame's rest");
        word(0)
    }

    /// Goes as far as that: 0 has asked, 1 has the facts, 2 has said that it is ready, 3 has heard the state,
    /// 4 has heard the disk.
    pub(super) fn go(&mut self, step: u32) {
        if step >= 1 {
            let plan = self.plan.clone();
            self.say(1, &plan);
            assert_eq!(self.hear(), 2, "facts");
        }
        if step >= 2 {
            self.say(3, "");
        }
        if step >= 3 {
            assert_eq!(self.hear(), 4, "state");
        }
        if step >= 4 {
            assert_eq!(self.hear(), 5, "a disk");
        }
    }
}

#[test]
fn a_new_daemon_that_dies_on_the_way_leaves_the_old_one_serving() {
    let mut lineage = Lineage::start(Spec::image(64 * MIB), &["--workers", "2"]);
    let mut disk = Disk::attach(lineage.daemon.socket(), 4);
    under_load(&mut disk, |progress| {
        for round in 0..20 {
            let (mut actor, head) = Actor::ask(&lineage, "[1]");
            assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
            actor.go(round % 5);
            drop(actor);
            progress();
        }
        // One that says that it gives up, at the last moment.
        let (mut actor, _) = Actor::ask(&lineage, "[1]");
        actor.go(4);
        actor.say(7, r#"{"error": "no luck"}"#);
        assert_eq!(actor.hear(), 7, "both know that nothing was taken");
        assert!(
            lineage
                .daemon
                .wait_for_message("the new daemon gave up: no luck")
        );
        progress();
        lineage.upgrade(&[]);
        progress();
    });
}

#[test]
fn a_new_daemon_that_falls_silent_is_not_waited_for_for_ever() {
    let lineage = Lineage::start(Spec::image(64 * MIB), &[]);
    let mut disk = Disk::attach(lineage.daemon.socket(), 4);
    under_load(&mut disk, |progress| {
        let (mut actor, _) = Actor::ask(&lineage, "[1]");
        actor.go(4);
        assert!(
            lineage
                .daemon
                .wait_for_message("the new daemon does not answer"),
            "{}",
            lineage.daemon.stderr()
        );
        progress();
        // Too late: it cannot take the disks any more.
        let late = actor
            .stream
            .write_all(&[6_u32, 0, 0].map(u32::to_ne_bytes).concat());
        assert!(late.is_err());
        progress();
    });
}

#[test]
fn formats_that_are_not_read_and_second_takers_are_refused() {
    let lineage = Lineage::start(Spec::image(MIB), &[]);
    let (mut actor, head) = Actor::ask(&lineage, "[7, 8]");
    assert!(head.starts_with("HTTP/1.1 409 "), "{head}");
    let mut body = String::new();
    actor.stream.read_to_string(&mut body).expect("a body");
    assert!(
        body.contains("reads the state formats [7, 8]") && body.contains("writes 1"),
        "{body}"
    );
    // While one is at it, nobody else is, and nothing is changed.
    let (mut first, _) = Actor::ask(&lineage, "[1]");
    first.go(1);
    let (_, head) = Actor::ask_once(&lineage, "[1]");
    assert!(head.starts_with("HTTP/1.1 409 "), "{head}");
    let body = serde_json::json!({ "limits": { "iops": 5 } });
    let change = vhost_user_blkmq::control::client::ask(
        &lineage.control(),
        "PATCH",
        "/v1/disks/0",
        Some(&body),
    );
    let error = change.expect_err("not now").to_string();
    assert!(error.contains("are being handed over"), "{error}");
}

/// Not even with `--close-unready` does a session pay for what the daemon lacks.
#[test]
fn a_daemon_that_is_out_of_descriptors_serves_on_and_closes_no_session() {
    let mut lineage = Lineage::start(Spec::image(64 * MIB), &[]);
    let mut disk = Disk::attach(lineage.daemon.socket(), 4);
    let limit = |daemon: &Daemon, files: Option<u64>| {
        let pid = rustix::process::Pid::from_raw(daemon.pid() as i32);
        let now = rustix::process::prlimit(
            pid,
            Resource::Nofile,
            Rlimit {
                current: files,
                maximum: Some(4096),
            },
        );
        now.expect("its limits can be changed");
    };
    let open = std::fs::read_dir(format!("/proc/{}/fd", lineage.daemon.pid()));
    let open = open.expect("it runs").count() as u64;
    under_load(&mut disk, |progress| {
        // Enough for the new daemon's connection, and for a part of what it asks for.
        for more in [1, 2, 4, 8] {
            limit(&lineage.daemon, Some(open + more));
            let spec = lineage.spec.clone().args(["--close-unready"]);
            let line = refused(&lineage, &spec);
            assert!(line.contains("Too many open files"), "{line}");
            progress();
        }
        limit(&lineage.daemon, Some(4096));
        let said = lineage.daemon.stderr();
        assert!(!said.contains("the session was closed"), "{said}");
        lineage.upgrade(&[]);
        progress();
    });
}

#[test]
fn control_characters_of_the_new_daemon_are_not_logged() {
    let lineage = Lineage::start(Spec::null(MIB), &[]);
    let evil = "\u{1b}[2J\n[ERROR] all is lost";
    let (mut actor, head) = Actor::ask_as(&lineage, "[1]", evil);
    assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
    actor.say(7, &serde_json::json!({ "error": evil }).to_string());
    let shown = "the new daemon gave up: \\u{1b}[2J\\n[ERROR] all is lost";
    assert!(
        lineage.daemon.wait_for_message(shown),
        "{}",
        lineage.daemon.stderr()
    );
    let said = lineage.daemon.stderr();
    assert!(
        said.contains("version \\u{1b}[2J\\n[ERROR] all is lost asks"),
        "{said}"
    );
    assert!(
        said.lines().all(|line| !line.chars().any(char::is_control)),
        "{said:?}"
    );
}

#[test]
fn without_a_daemon_to_take_over_from_a_daemon_starts_afresh() {
    let lineage = Lineage::start(Spec::null(MIB), &[]);
    assert!(
        lineage.daemon.stderr().contains("starting afresh"),
        "{}",
        lineage.daemon.stderr()
    );
    // A wrong path does not lead to two daemons on one disk.
    let spec = Spec::null(MIB).args(["--take-over", "/nowhere/control.sock"]);
    let line = refused(&lineage, &spec);
    assert!(
        line.contains("another process is listening on it"),
        "{line}"
    );
}
