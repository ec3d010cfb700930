//! A guest whose daemon is replaced beneath it.

use std::time::Duration;

use super::guest_support::{Daemon, Disk, Guest, MIB};

/// Three upgrades while the guest writes, flushes and reads back, without a front end that could reconnect: QEMU
/// does not notice anything, and the guest finds every byte.
#[test]
fn a_guest_does_not_notice_three_upgrades() {
    let disk = Disk::new(256 * MIB);
    let control = disk.control();
    let control = control.to_str().expect("a plain name");
    let args = ["--control-path", control, "--take-over", control];
    let mut daemon = Daemon::start(&disk, &args);
    let mut guest = Guest::qemu(2, 2)
        .disk(&disk)
        .option("--reconnect", "no")
        .start(
            r#"
        job='--ioengine=libaio --rw=randwrite --bsrange=512-256k --size=24m --offset_increment=64m --numjobs=2 --fsync=32'
        echo @@writing
        fio --name=upgrade --filename=/dev/vda --direct=1 --iodepth=32 --verify=crc32c --do_verify=0 --rate=4m --minimal $job >/tmp/out 2>&1 ||
            { cat /tmp/out; exit 1; }
        echo @@reading
        fio --name=upgrade --filename=/dev/vda --direct=1 --iodepth=32 --verify=crc32c --verify_only --verify_fatal=1 --rate=4m --minimal $job >/tmp/out 2>&1 ||
            { cat /tmp/out; exit 1; }
        echo @@verified
        "#,
        );
    guest.await_line("@@writing");
    let mut written = 0;
    for round in 1..=2 {
        daemon.await_that("more is written", Duration::from_secs(120), |_| {
            disk.allocated() >= round * 8 * MIB
        });
        let summary = upgrade(&mut daemon, &disk, &args);
        assert!(summary.sum("bytes_written") > 0, "before upgrade {round}");
        written += summary.sum("bytes_written");
    }
    guest.await_line("@@reading");
    let summary = upgrade(&mut daemon, &disk, &args);
    written += summary.sum("bytes_written");
    guest.await_line("@@verified");
    guest.finish();
    let summary = daemon.stop();
    summary.assert_no_errors();
    assert_eq!(written, 48 * MIB, "each write went through one daemon");
    assert!(
        summary.sum("bytes_read") > 24 * MIB,
        "most was read back through the last one"
    );
}

fn upgrade(daemon: &mut Daemon, disk: &Disk, args: &[&str]) -> super::guest_support::Summary {
    let new = Daemon::start(disk, args);
    let old = std::mem::replace(daemon, new);
    let summary = old.await_exit();
    summary.assert_no_errors();
    summary
}
