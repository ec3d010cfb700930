//! A disk that is held after an error, and what asks something of it meanwhile.

use super::*;
use serde_json::json;

/// Write-through (0) or write-back (1).
fn choose(disk: &mut Disk, writeback: u8) {
    disk.front
        .set_config(BlkConfig::WRITEBACK_AT, &[writeback])
        .expect("it is answered");
}

fn is_write_through(served: &Served) -> bool {
    served.disk(0)["write_through"] == json!(true)
}

/// On a file system in memory, and on one that the kernel does I/O for.
fn mounts() -> [Mount; 2] {
    [Mount::tmpfs(4 << 20), Mount::ext4("defaults")]
}

/// Data of what waits.
fn push_writes(disk: &mut Disk, count: u64) {
    let gpa = disk.mem().alloc(4096, 4096);
    disk.mem().fill(gpa, 4096, 7);
    for queue in &mut disk.queues {
        let base = 65536 + queue.index as u64 * 4096;
        for nth in 0..count {
            write_at(gpa, base + nth * 64, 4096).push(queue, nth);
        }
        queue.publish();
    }
}

fn all_end_well(disk: &mut Disk, count: u64) {
    for queue in &mut disk.queues {
        let done = finish_all(queue, count as usize);
        assert!(done.iter().all(|done| done.status == status::OK));
    }
    for nth in 0..count {
        assert_eq!(disk.read(0, 65536 + nth * 64, 4096), [7; 4096]);
    }
}

#[test]
fn a_guest_that_changes_the_cache_mode_of_a_held_disk_gets_no_errors() {
    if !may_mount() {
        return;
    }
    for mount in mounts() {
        let image = mount.image(64 << 20);
        let args = ["--on-error", "stop", "--cache", "writeback"];
        let served = Served::start(&image, &args);
        let mut disk = Disk::attach(served.daemon.socket(), 2);
        let filler = fill(&mount, 0);
        push_writes(&mut disk, 8);
        served.wait_held();
        for writeback in [0, 1, 0] {
            choose(&mut disk, writeback);
            assert_eq!(is_write_through(&served), writeback == 0);
            assert_eq!(served.disk(0)["held"], true);
        }
        let told = disk.queues.iter().any(Queue::has_completions);
        assert!(!told, "the guest was told");
        fs::remove_file(filler).expect("removed");
        served.resume();
        all_end_well(&mut disk, 8);
        assert_eq!(served.disk(0)["held"], false);
    }
}

/// What waits for a limit goes out when the cache mode changes, and fails only then.
#[test]
fn a_disk_that_fails_while_its_cache_mode_changes_is_held() {
    if !may_mount() {
        return;
    }
    let mount = Mount::tmpfs(4 << 20);
    let image = mount.image(64 << 20);
    let args = ["--on-error", "stop", "--limit", "bps-wr=512"];
    let served = Served::start(&image, &args);
    let mut disk = Disk::attach(served.daemon.socket(), 1);
    // Uses up the limit for two minutes.
    disk.write(0, 0, &[1; 65536]);
    let filler = fill(&mount, 0);
    push_writes(&mut disk, 3);
    assert_eq!(served.disk(0)["held"], false, "they wait for the limit");
    choose(&mut disk, 0);
    served.wait_held();
    assert!(!disk.queues[0].has_completions(), "the guest was told");
    fs::remove_file(filler).expect("removed");
    served.resume();
    let unlimited = json!({ "limits": { "bps-wr": 0 } });
    client::ask(&served.control, "PATCH", "/v1/disks/@0", Some(&unlimited)).expect("limits");
    all_end_well(&mut disk, 3);
}
