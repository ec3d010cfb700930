//! User-Mode Linux, a vhost-user front end that shares no code with QEMU, on disks that the daemon serves.

mod guest_support;

use std::process::Command;

use guest_support::{Daemon, Disk, Guest, MIB};

/// Data and a file system through the second front end's single queue.
#[test]
fn user_mode_linux_is_served() {
    let disk = Disk::new(512 * MIB);
    let daemon = Daemon::start(&disk, &[]);
    let out = Guest::uml().disk(&disk).run(
        r#"
        same queues "$(ls /sys/block/vda/mq | wc -l)" 1
        verify random 65536 --ioengine=libaio --rw=randwrite --bsrange=512-1m --size=64m --fsync=16
        verify sequential 65536 --ioengine=io_uring --rw=write --bsrange=512-1m --size=64m --fsync=16
        tr '\0' '\377' </dev/zero | dd of=/dev/vda bs=1M seek=128 count=32 iflag=fullblock oflag=direct 2>/dev/null
        blkdiscard -o $((128 << 20)) -l $((8 << 20)) /dev/vda
        blkdiscard -z -o $((144 << 20)) -l $((8 << 20)) /dev/vda
        {
            head -c $((8 << 20)) /dev/zero
            tr '\0' '\377' </dev/zero | head -c $((8 << 20))
            head -c $((8 << 20)) /dev/zero
            tr '\0' '\377' </dev/zero | head -c $((8 << 20))
        } | sha256sum | cut -d' ' -f1 >/tmp/expected
        same holes "$(dd if=/dev/vda bs=1M skip=128 count=32 iflag=direct 2>/dev/null | sha256sum | cut -d' ' -f1)" "$(cat /tmp/expected)"
        mkfs.ext4 -q /dev/vda
        mkdir -p /mnt/disk
        mount -t ext4 /dev/vda /mnt/disk
        cp -r /tools/bin /mnt/disk/
        sync
        echo 3 >/proc/sys/vm/drop_caches
        for file in /tools/bin/*; do cmp "$file" "/mnt/disk/bin/${file##*/}"; done
        umount /mnt/disk
        e2fsck -fn /dev/vda
        echo "@@sha256 $(sha256 /dev/vda)"
        "#,
    );
    assert_eq!(out.value("@@sha256"), disk.sha256());
    let summary = daemon.stop();
    summary.assert_no_errors();
    for kind in ["read", "write", "flush", "discard", "write_zeroes"] {
        assert!(summary.of(0, kind) > 0, "no {kind} request was counted");
    }
}

/// A disk that a QEMU guest has put a file system on, read block by block by User-Mode Linux onto another
/// disk: `qemu-img compare` finds the two images identical.
#[test]
fn what_qemu_wrote_user_mode_linux_reads() {
    let (disk, copy) = (Disk::new(256 * MIB), Disk::new(256 * MIB));
    let daemons = [Daemon::start(&disk, &[]), Daemon::start(&copy, &[])];
    let out = Guest::qemu(2, 2).disk(&disk).run(
        r#"
        mkfs.ext4 -q /dev/vda
        mkdir -p /mnt/disk
        mount -t ext4 /dev/vda /mnt/disk
        cp -r /tools/bin /tools/etc /mnt/disk/
        sync
        umount /mnt/disk
        echo "@@sha256 $(sha256 /dev/vda)"
        "#,
    );
    let written = out.value("@@sha256").to_owned();
    let out = Guest::uml().disk(&disk).disk(&copy).run(
        r#"
        echo "@@sha256 $(sha256 /dev/vda)"
        dd if=/dev/vda of=/dev/vdb bs=1M iflag=direct oflag=direct 2>/dev/null
        sync
        e2fsck -fn /dev/vdb
        "#,
    );
    assert_eq!(out.value("@@sha256"), written);
    let compared = Command::new("qemu-img")
        .args(["compare", "-f", "raw", "-F", "raw"])
        .args([disk.image(), copy.image()])
        .output()
        .expect("qemu-img runs");
    let said = String::from_utf8_lossy(&compared.stdout);
    assert!(
        compared.status.success() && said.contains("identical"),
        "qemu-img compare: {said}"
    );
    for daemon in daemons {
        daemon.stop().assert_no_errors();
    }
}
