//! Upgrades from the last release, and back to it.
//!
//! The last release is built once, into the user's cache folder:
//!
//! ```sh
//! cargo nextest run --test upgrade --run-ignored only -E 'test(last_release)'
//! ```

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::json;

use super::support::*;
use super::{Lineage, MIB, under_load};

/// The commit of the last release.
const COMMIT: &str = "bb5a7f7";

/// Where its program is, if it can be built.
fn last_release() -> Option<PathBuf> {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let home = || Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache"));
    let dir = cache.or_else(home)?.join("vhost-user-blkmq").join(COMMIT);
    let program = dir.join("vhost-user-blkmq");
    if !program.exists() {
        build(&dir, &program)?;
    }
    Some(program)
}

fn build(dir: &Path, program: &Path) -> Option<()> {
    let source = dir.join("source");
    std::fs::create_dir_all(&source).ok()?;
    let mut archive = Command::new("git")
        .args(["-C", env!("CARGO_MANIFEST_DIR"), "archive", COMMIT])
        .stdout(Stdio::piped())
        .spawn()
        .ok()?;
    let unpacked = Command::new("tar")
        .args(["-x", "-C"])
        .arg(&source)
        .stdin(archive.stdout.take()?)
        .status()
        .ok()?;
    if !(archive.wait().ok()?.success() && unpacked.success()) {
        println!("skipped: the history has no commit {COMMIT}");
        return None;
    }
    let built = Command::new(env!("CARGO"))
        .args([
            "build",
            "--locked",
            "--bin",
            "vhost-user-blkmq",
            "--target-dir",
        ])
        .arg(dir.join("target"))
        .current_dir(&source)
        .env("CARGO_PROFILE_DEV_DEBUG", "0")
        .status();
    assert!(built.ok()?.success(), "the last release cannot be built");
    std::fs::copy(dir.join("target/debug/vhost-user-blkmq"), program).ok()?;
    Some(())
}

#[test]
#[ignore = "builds the last release, once"]
fn upgrades_from_the_last_release_and_back_under_load_lose_nothing() {
    let Some(last) = last_release() else {
        println!("skipped: there is no last release");
        return;
    };
    let last = Some(&*last);
    let spec = Spec::image(64 * MIB)
        .program(last)
        .lifetime(Duration::from_secs(600));
    let mut lineage = Lineage::start(spec, &["--serial", "s"]);
    let mut disk = Disk::attach(lineage.daemon.socket(), 4);
    let mut served = 0;
    // What a guest chose and what was changed travels both ways.
    let written = disk.front.set_config(BlkConfig::WRITEBACK_AT, &[0]);
    written.expect("the guest chooses");
    let change = json!({ "scheduler": "kyber", "limits": { "iops": 900_000 } });
    lineage.ask("PATCH", "/v1/disks/s", Some(&change));
    let before = lineage.ask("GET", "/v1/disks/s", None);
    let (requests, longest) = under_load(&mut disk, |progress| {
        for round in 0..9 {
            // To this build, within it, and back.
            let program = last.filter(|_| round % 3 == 2);
            lineage.spec = lineage.spec.clone().program(program);
            served += lineage
                .upgrade(&["--serial", "s"])
                .total(|queue| queue.requests);
            progress();
            let now = lineage.ask("GET", "/v1/disks/s", None);
            for what in ["scheduler", "limits"] {
                assert_eq!(now[what], before[what], "{what} in round {round}");
            }
        }
    });
    println!("{requests} requests, no queue stood still for longer than {longest:?}");
    assert_eq!(disk.front.config().expect("a config").writeback, 0);
    drop(disk);
    served += lineage.daemon.stop().total(|queue| queue.requests);
    assert_eq!(served, requests, "each was served by exactly one daemon");
}
