//! A guest that chooses a cache mode, and whose daemon is killed.

use std::fs::OpenOptions;
use std::time::Duration;

use super::guest_support::{Daemon, Disk, Guest, MIB};

/// Whether writes are durable when they complete.
fn is_write_through(disk: &Disk) -> bool {
    disk.shown()["write_through"].as_bool().expect("a boolean")
}

/// Linux writes the mode once, and never again: neither it nor QEMU tells the next daemon.
#[test]
fn write_through_that_a_guest_chose_is_kept_when_its_daemon_is_killed() {
    let disk = Disk::new(64 * MIB);
    let control = disk.control();
    let args = ["--cache", "writeback", "--control-path"];
    let args = [&args[..], &[control.to_str().expect("a plain name")]].concat();
    let daemon = Daemon::start(&disk, &args);
    let mut guest = Guest::qemu(2, 2).disk(&disk).start(
        r#"
        same before "$(cat /sys/block/vda/cache_type)" "write back"
        echo "write through" >/sys/block/vda/cache_type
        same chosen "$(cat /sys/block/vda/cache_type)" "write through"
        dd if=/dev/zero of=/dev/vda bs=4k count=8 oflag=direct 2>/dev/null
        echo @@chosen
        # Until the next daemon has answered: the disk grows then, by the hand of the test.
        until [ "$(cat /sys/block/vda/size)" = $((96 * 2048)) ]; do
            dd if=/dev/zero of=/dev/vda bs=4k count=1 oflag=direct 2>/dev/null
            sleep 0.05
        done
        same after "$(cat /sys/block/vda/cache_type)" "write through"
        echo @@done
        "#,
    );
    guest.await_line("@@chosen");
    assert!(is_write_through(&disk));
    // SIGKILL.
    drop(daemon);
    let mut daemon = Daemon::start(&disk, &args);
    daemon.await_that("QEMU is back", Duration::from_secs(60), |daemon| {
        daemon.said().contains("goes on with write-through")
    });
    assert!(is_write_through(&disk));
    OpenOptions::new()
        .write(true)
        .open(disk.image())
        .and_then(|image| image.set_len(96 * MIB))
        .expect("the image can be extended");
    guest.await_line("@@done");
    guest.finish();
    daemon.stop().assert_no_errors();
}
