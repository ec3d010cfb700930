//! QEMU's machine protocol, as far as a migration needs it.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// A connection to a QEMU.
#[derive(Debug)]
pub struct Qmp {
    lines: BufReader<UnixStream>,
}

impl Qmp {
    /// Connects to a QEMU that is being started.
    ///
    /// # Panics
    ///
    /// When it does not listen within a minute.
    pub fn connect(path: &Path) -> Self {
        let deadline = Instant::now() + Duration::from_secs(60);
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(error) => assert!(Instant::now() < deadline, "{}: {error}", path.display()),
            }
            thread::sleep(Duration::from_millis(10));
        };
        stream
            .set_read_timeout(Some(Duration::from_secs(60)))
            .expect("a time limit above zero");
        let lines = BufReader::new(stream);
        let mut qmp = Self { lines };
        let greeting = qmp.next();
        assert!(greeting["QMP"].is_object(), "{greeting}");
        qmp.run("qmp_capabilities", json!({}));
        qmp
    }

    fn next(&mut self) -> Value {
        let mut line = String::new();
        self.lines
            .read_line(&mut line)
            .expect("QEMU says something");
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line:?}"))
    }

    /// Runs a command and returns what it returned.
    ///
    /// # Panics
    ///
    /// When it failed.
    pub fn run(&mut self, command: &str, arguments: Value) -> Value {
        let mut message = json!({ "execute": command, "arguments": arguments }).to_string();
        message.push('\n');
        let stream = self.lines.get_mut();
        stream.write_all(message.as_bytes()).expect("QEMU listens");
        loop {
            let mut answer = self.next();
            assert!(answer["error"].is_null(), "{command}: {answer}");
            if !answer["return"].is_null() {
                return answer["return"].take();
            }
            println!("qemu: {answer}");
        }
    }

    /// Waits until the migration is over; returns what QEMU says of it.
    ///
    /// # Panics
    ///
    /// When it failed, or was not over within two minutes.
    pub fn await_end(&mut self) -> Value {
        let deadline = Instant::now() + Duration::from_secs(120);
        loop {
            let info = self.run("query-migrate", json!({}));
            assert!(info["status"] != "failed", "{info}");
            if info["status"] == "completed" {
                return info;
            }
            assert!(
                Instant::now() < deadline,
                "the migration does not end: {info}"
            );
            thread::sleep(Duration::from_millis(50));
        }
    }
}
