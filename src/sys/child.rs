//! Tests that need a process of their own.

use std::process::{Command, Output};

/// This test program again, with one test: `name` of the module whose `module_path!()` is given.
pub fn of(module: &str, name: &str) -> Command {
    let (_, module) = module.split_once("::").expect("a module of this crate");
    let mut command = Command::new(std::env::current_exe().expect("our own path"));
    command
        .args(["--exact", &format!("{module}::{name}"), "--nocapture"])
        .env("RUST_TEST_THREADS", "1");
    command
}

/// Runs it.
///
/// # Panics
///
/// The program has no such test: then it would pass whatever the test does.
pub fn run(command: &mut Command) -> Output {
    let output = command.output().expect("it starts");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("running 1 test"), "there is none: {output:?}");
    output
}
