//! A guest whose disk grows.

use std::fs::OpenOptions;

use super::guest_support::{Daemon, Disk, Guest, MIB};

/// The image is extended while the guest writes: its kernel sees the new size without being asked to
/// look, and what it writes there is there.
#[test]
fn a_guest_sees_its_disk_grow() {
    let disk = Disk::new(64 * MIB);
    let daemon = Daemon::start(&disk, &[]);
    let mut guest = Guest::qemu(2, 2).disk(&disk).start(
        r#"
        same before "$(cat /sys/block/vda/size)" $((64 * 2048))
        if dd if=/dev/zero of=/dev/vda bs=4k seek=16384 count=1 oflag=direct 2>/dev/null; then exit 1; fi
        fio --name=load --filename=/dev/vda --direct=1 --ioengine=libaio --iodepth=16 --rw=randwrite --bs=4k --size=64m \
            --time_based --runtime=600 --minimal >/dev/null 2>&1 &
        load=$!
        echo @@small
        until [ "$(cat /sys/block/vda/size)" = $((96 * 2048)) ]; do sleep 0.1; done
        echo @@larger
        kill $load
        wait $load || true
        verify grown 16384 --ioengine=libaio --rw=randwrite --bsrange=512-1m --offset=72m --size=16m
        if dd if=/dev/zero of=/dev/vda bs=4k seek=24576 count=1 oflag=direct 2>/dev/null; then exit 1; fi
        echo "@@sha256 $(sha256 /dev/vda)"
        "#,
    );
    guest.await_line("@@small");
    OpenOptions::new()
        .write(true)
        .open(disk.image())
        .and_then(|image| image.set_len(96 * MIB))
        .expect("the image can be extended");
    guest.await_line("@@larger");
    let out = guest.finish();
    assert_eq!(out.value("@@sha256"), disk.sha256());
    daemon.stop().assert_no_errors();
}
