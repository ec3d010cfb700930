//! Upgrades of a disk whose requests wait for its user after an I/O error (`--on-error`).

use std::time::Instant;

use serde_json::json;

use super::Lineage;
use super::support::disk::{finish, status};
use super::support::full::Full;
use super::support::*;

fn is_held(lineage: &Lineage) -> bool {
    lineage.ask("GET", "/v1/disks/0", None)["held"] == true
}

/// Makes room, resumes, and has the request that waited end well.
fn resolves(lineage: &mut Lineage, full: &Full, disk: &mut Disk) {
    assert!(is_held(lineage), "it waits on");
    assert!(!disk.queues[0].has_completions(), "the guest was not told");
    full.make_room();
    lineage.ask("POST", "/v1/disks/0/resume", None);
    // As before, which is how long it would wait.
    let unlimited = json!({ "limits": { "bps": 0 } });
    lineage.ask("PATCH", "/v1/disks/0", Some(&unlimited));
    assert_eq!(finish(&mut disk.queues[0]).status, status::OK);
    lineage.upgrade(&[]);
    assert_eq!(disk.read(0, 4096, 4096), [7; 4096]);
}

fn write(disk: &mut Disk, sector: u64, len: usize) {
    let gpa = disk.mem().alloc(len, 4096);
    disk.mem().fill(gpa, len, 7);
    Request::write(sector, &[Seg::readable(gpa, len)]).push(&mut disk.queues[0], sector);
    disk.queues[0].publish();
}

fn refused(lineage: &Lineage, args: &[&str]) {
    let spec = lineage.spec.clone().args(args.iter().copied());
    let mut new = lineage.daemon.beside(&spec);
    assert_eq!(new.wait_exit().code(), Some(1), "{}", new.stderr());
    let (_, _, said) = new.terminate();
    assert!(
        said.contains("disk s is held after an error; remove the cause, run blkmqctl resume"),
        "{said}"
    );
}

#[test]
fn a_disk_that_is_held_after_an_error_is_not_handed_over_and_its_guest_is_not_told() {
    let Some(full) = Full::new() else { return };
    let args = ["--on-error", "enospc", "--serial", "s"];
    let spec = Spec::path(&full.image()).args(args);
    let mut lineage = Lineage::start(spec, &["--workers", "2"]);
    let mut disk = Disk::attach(lineage.daemon.socket(), 2);
    write(&mut disk, 4096, 4096);
    let deadline = Instant::now() + DEADLINE;
    while !is_held(&lineage) {
        assert!(Instant::now() < deadline, "it is not held");
        std::thread::yield_now();
    }
    refused(&lineage, &[]);
    resolves(&mut lineage, &full, &mut disk);
}

/// A request that waits for a limit goes out with the upgrade, and fails only then.
#[test]
fn a_disk_that_fails_while_it_is_handed_over_stays_and_its_guest_is_not_told() {
    let Some(full) = Full::new() else { return };
    let args = [
        "--on-error",
        "enospc",
        "--serial",
        "s",
        "--limit",
        "bps=512",
    ];
    let spec = Spec::path(&full.image()).args(args);
    let mut lineage = Lineage::start(spec, &["--workers", "2"]);
    let mut disk = Disk::attach(lineage.daemon.socket(), 2);
    // Uses up the limit for two minutes.
    write(&mut disk, 0, 65536);
    assert_eq!(finish(&mut disk.queues[0]).status, status::OK);
    write(&mut disk, 4096, 4096);
    assert!(!is_held(&lineage), "it waits for the limit");
    refused(&lineage, &[]);
    resolves(&mut lineage, &full, &mut disk);
}
