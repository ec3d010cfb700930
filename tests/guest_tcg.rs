//! Real Linux guests under QEMU's emulated processor, on disks that the daemon serves.

#[path = "guest_tcg/cache_mode.rs"]
mod cache_mode;
mod guest_support;
#[path = "guest_tcg/pseries.rs"]
mod pseries;
#[path = "guest_tcg/resize.rs"]
mod resize;
#[path = "guest_tcg/upgrade.rs"]
mod upgrade;

use std::time::Duration;

use guest_support::{Daemon, Disk, Guest, MIB};

/// Every kind of request on one queue, with the data compared after each, and both cache modes.
#[test]
fn one_queue_serves_every_kind_of_request() {
    let disk = Disk::new(512 * MIB);
    let daemon = Daemon::start(&disk, &[]);
    let out = Guest::qemu(1, 1).disk(&disk).run(
        r#"
        same serial "$(cat /sys/block/vda/serial)" guest-test
        same queues "$(ls /sys/block/vda/mq | wc -l)" 1

        same 'cache at the start' "$(cat /sys/block/vda/cache_type)" 'write back'
        verify random 32768 --ioengine=libaio --rw=randwrite --bsrange=512-1m --size=32m --fsync=16
        verify sequential 32768 --ioengine=io_uring --rw=write --bsrange=512-1m --size=32m --fsync=16
        verify small 4096 --ioengine=io_uring --rw=randwrite --bssplit=512/60:4k/30:64k/10 --size=4m

        echo 'write through' >/sys/block/vda/cache_type
        same 'cache_type' "$(cat /sys/block/vda/cache_type)" 'write through'
        same 'the kernel agrees' "$(cat /sys/block/vda/queue/write_cache)" 'write through'
        verify through 4096 --ioengine=libaio --rw=randwrite --bsrange=512-256k --size=4m --fsync=8
        echo 'write back' >/sys/block/vda/cache_type
        same 'cache_type again' "$(cat /sys/block/vda/cache_type)" 'write back'
        verify back 4096 --ioengine=libaio --rw=randwrite --bsrange=512-256k --size=4m --fsync=8

        # A pattern with two holes: one discarded, one zeroed by the device.
        [ "$(cat /sys/block/vda/queue/discard_max_bytes)" -gt 0 ]
        [ "$(cat /sys/block/vda/queue/write_zeroes_max_bytes)" -gt 0 ]
        tr '\0' '\377' </dev/zero | dd of=/dev/vda bs=1M seek=64 count=64 iflag=fullblock oflag=direct 2>/dev/null
        echo @@filled
        blkdiscard -o $((72 << 20)) -l $((16 << 20)) /dev/vda
        blkdiscard -z -o $((100 << 20)) -l $((8 << 20)) /dev/vda
        {
            tr '\0' '\377' </dev/zero | head -c $((8 << 20))
            head -c $((16 << 20)) /dev/zero
            tr '\0' '\377' </dev/zero | head -c $((12 << 20))
            head -c $((8 << 20)) /dev/zero
            tr '\0' '\377' </dev/zero | head -c $((20 << 20))
        } | sha256sum | cut -d' ' -f1 >/tmp/expected
        same 'holes' "$(dd if=/dev/vda bs=1M skip=64 count=64 iflag=direct 2>/dev/null | sha256sum | cut -d' ' -f1)" "$(cat /tmp/expected)"

        # What the disk cannot do fails cleanly, and it goes on.
        if dd if=/dev/zero of=/dev/vda bs=512 seek=$((512 * 2048)) count=1 oflag=direct 2>/dev/null; then exit 1; fi
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

/// A file system made, filled, trimmed and checked on two queues; guest and host agree on every byte.
#[test]
fn two_queues_carry_a_file_system() {
    let disk = Disk::new(512 * MIB);
    let daemon = Daemon::start(&disk, &[]);
    let out = Guest::qemu(2, 2).disk(&disk).run(
        r#"
        same queues "$(ls /sys/block/vda/mq | wc -l)" 2
        verify random 49152 --ioengine=libaio --rw=randwrite --bsrange=512-1m --size=24m --offset_increment=32m --numjobs=2 --fsync=16
        verify sequential 49152 --ioengine=io_uring --rw=write --bsrange=512-1m --size=24m --offset_increment=32m --numjobs=2 --fsync=16
        mkfs.ext4 -q /dev/vda
        mkdir -p /mnt/disk
        mount -t ext4 -o discard /dev/vda /mnt/disk
        cp -r /tools/bin /mnt/disk/one
        cp -r /tools/bin /mnt/disk/two &
        mkdir /mnt/disk/many
        for i in $(seq 500); do echo $i >/mnt/disk/many/$i; done
        wait
        sync
        echo 3 >/proc/sys/vm/drop_caches
        for file in /tools/bin/*; do
            cmp "$file" "/mnt/disk/one/${file##*/}"
            cmp "$file" "/mnt/disk/two/${file##*/}"
        done
        rm -r /mnt/disk/one
        fstrim /mnt/disk
        umount /mnt/disk
        e2fsck -fn /dev/vda
        echo "@@sha256 $(sha256 /dev/vda)"
        "#,
    );
    assert_eq!(out.value("@@sha256"), disk.sha256());
    let summary = daemon.stop();
    summary.assert_no_errors();
    assert!(
        summary.sum("discard") > 0,
        "fstrim reached the daemon as discards"
    );
    assert!(
        (0..2).all(|queue| summary.of(queue, "write") > 0),
        "both queues carried writes"
    );
}

/// With as many queues as vCPUs, queue i is vCPU i's own: the daemon's count of each queue's bytes is
/// exactly what the fio job that ran on that vCPU wrote.
#[test]
fn four_queues_each_serve_their_own_vcpu() {
    let disk = Disk::new(512 * MIB);
    let daemon = Daemon::start(&disk, &["--vcpus", "4"]);
    Guest::qemu(4, 4).disk(&disk).run(
        r#"
        for queue in 0 1 2 3; do
            same "mq/$queue" "$(cat /sys/block/vda/mq/$queue/cpu_list)" $queue
        done
        same scheduler "$(sed 's/.*\[\(.*\)\].*/\1/' /sys/block/vda/queue/scheduler)" none
        for rw in randwrite write; do
            for cpu in 0 1 2 3; do
                mib=$((8 * (cpu + 1)))
                verify $rw-$cpu $((mib * 1024)) --ioengine=libaio --rw=$rw --bsrange=512-1m --offset=$((cpu * 64))m --size=${mib}m \
                    --cpus_allowed=$cpu --fsync=4 &
                pids="${pids-} $!"
            done
            for pid in $pids; do wait $pid; done
            pids=
        done
        "#,
    );
    let summary = daemon.stop();
    summary.assert_no_errors();
    for queue in 0..4 {
        let written = 2 * 8 * (queue as u64 + 1) * MIB;
        assert_eq!(
            summary.of(queue, "bytes_written"),
            written,
            "bytes written through queue {queue}"
        );
        assert!(
            summary.of(queue, "bytes_read") >= written,
            "all of it was read back through queue {queue}"
        );
        assert!(
            summary.of(queue, "flush") > 0,
            "queue {queue} carried its job's flushes"
        );
        assert_eq!(summary.cpus(queue), [queue as u64]);
        assert_eq!(summary.of(queue, "ctxs"), 1);
    }
}

/// Four vCPUs on two queues: each queue has two ctxs and serves the two vCPUs the guest gave it.
#[test]
fn four_vcpus_share_two_queues() {
    let disk = Disk::new(512 * MIB);
    let daemon = Daemon::start(&disk, &["--vcpus", "4"]);
    Guest::qemu(4, 2).disk(&disk).run(
        r#"
        same mq/0 "$(cat /sys/block/vda/mq/0/cpu_list)" '0, 1'
        same mq/1 "$(cat /sys/block/vda/mq/1/cpu_list)" '2, 3'
        for cpu in 0 1 2 3; do
            mib=$((4 * (cpu + 1)))
            verify randwrite-$cpu $((mib * 1024)) --ioengine=io_uring --rw=randwrite --bsrange=512-1m --offset=$((cpu * 64))m --size=${mib}m \
                --cpus_allowed=$cpu --fsync=4 &
            pids="${pids-} $!"
        done
        for pid in $pids; do wait $pid; done
        "#,
    );
    let summary = daemon.stop();
    summary.assert_no_errors();
    assert_eq!(summary.cpus(0), [0, 1]);
    assert_eq!(summary.cpus(1), [2, 3]);
    assert_eq!((summary.of(0, "ctxs"), summary.of(1, "ctxs")), (2, 2));
    assert_eq!(summary.of(0, "bytes_written"), (4 + 8) * MIB);
    assert_eq!(summary.of(1, "bytes_written"), (12 + 16) * MIB);
}

/// A read-only disk says so, gives its bytes, and refuses to be written, beside one that can be.
#[test]
fn a_read_only_disk_stays_as_it_is() {
    let (fixed, other) = (Disk::new(64 * MIB), Disk::new(64 * MIB));
    fixed.fill();
    let before = fixed.sha256();
    let daemons = [
        Daemon::start(&fixed, &["--read-only"]),
        Daemon::start(&other, &[]),
    ];
    let out = Guest::qemu(1, 1).disk(&fixed).disk(&other).run(
        r#"
        same ro "$(cat /sys/block/vda/ro)" 1
        same 'ro of the other' "$(cat /sys/block/vdb/ro)" 0
        if dd if=/dev/zero of=/dev/vda bs=4k count=1 oflag=direct 2>/dev/null; then echo written; exit 1; fi
        if blkdiscard /dev/vda 2>/dev/null; then echo discarded; exit 1; fi
        if blkdiscard -z /dev/vda 2>/dev/null; then echo zeroed; exit 1; fi
        dd if=/dev/vda of=/dev/vdb bs=1M iflag=direct oflag=direct 2>/dev/null
        sync
        echo "@@sha256 $(sha256 /dev/vda)"
        "#,
    );
    assert_eq!(out.value("@@sha256"), before);
    assert_eq!(fixed.sha256(), before, "the image is untouched");
    assert_eq!(
        other.sha256(),
        before,
        "the copy through two disks is the same"
    );
    let [fixed, other] = daemons.map(Daemon::stop);
    fixed.assert_no_errors();
    other.assert_no_errors();
    assert_eq!(fixed.sum("write"), 0);
}

/// Two of four queues polled: nobody waits for their calls, and all that is asked of them is served.
#[test]
fn poll_queues_are_served_without_an_interrupt() {
    let disk = Disk::new(512 * MIB);
    let daemon = Daemon::start(&disk, &[]);
    Guest::qemu(4, 4).disk(&disk).option("--module-args", "poll_queues=2").run(
        r#"
        same io_poll "$(cat /sys/block/vda/queue/io_poll)" 1
        same queues "$(ls /sys/block/vda/mq | wc -l)" 4
        verify polled 49152 --ioengine=io_uring --hipri --rw=randwrite --bsrange=512-256k --size=24m --offset_increment=64m --numjobs=2
        verify pvsync2 2048 --ioengine=pvsync2 --hipri --rw=randwrite --bs=4k --size=2m
        verify interrupts 16384 --ioengine=libaio --rw=randwrite --bsrange=512-1m --size=16m --fsync=16
        "#,
    );
    let summary = daemon.stop();
    summary.assert_no_errors();
    let polled = summary.of(2, "bytes_written") + summary.of(3, "bytes_written");
    assert!(
        polled >= 48 * MIB,
        "the polled writes went through the poll queues: {polled} bytes"
    );
    // Their driver never moves used_event on from 0, so it asks for the first completion's call at most.
    let calls = (summary.of(2, "calls"), summary.of(3, "calls"));
    assert!(
        calls.0 <= 1 && calls.1 <= 1,
        "calls on poll queues: {calls:?}"
    );
}

/// A daemon stopped in the midst of writing, and again of reading back, and started again: the guest waits,
/// goes on and loses nothing.
#[test]
fn a_restarted_daemon_finds_its_guest_again() {
    let disk = Disk::new(256 * MIB);
    let mut first = Daemon::start(&disk, &[]);
    let mut guest = Guest::qemu(2, 2).disk(&disk).start(
        r#"
        job='--ioengine=libaio --rw=randwrite --bsrange=512-256k --size=24m --offset_increment=64m --numjobs=2 --fsync=32'
        echo @@writing
        fio --name=restart --filename=/dev/vda --direct=1 --iodepth=32 --verify=crc32c --do_verify=0 --rate=4m --minimal $job >/tmp/out 2>&1 ||
            { cat /tmp/out; exit 1; }
        echo @@reading
        fio --name=restart --filename=/dev/vda --direct=1 --iodepth=32 --verify=crc32c --verify_only --verify_fatal=1 --rate=4m --minimal $job >/tmp/out 2>&1 ||
            { cat /tmp/out; exit 1; }
        echo @@verified
        "#,
    );
    guest.await_line("@@writing");
    first.await_that("4 MiB of 48 are written", Duration::from_secs(120), |_| {
        disk.allocated() >= 4 * MIB
    });
    let summary = first.stop();
    summary.assert_no_errors();
    assert!(
        summary.sum("bytes_written") < 48 * MIB,
        "it was stopped before all was written"
    );

    let second = Daemon::start(&disk, &[]);
    guest.await_line("@@reading");
    let summary = second.stop();
    summary.assert_no_errors();
    assert!(
        summary.sum("bytes_written") > 0,
        "the guest's writes went on"
    );

    let third = Daemon::start(&disk, &[]);
    guest.await_line("@@verified");
    guest.finish();
    let summary = third.stop();
    summary.assert_no_errors();
    assert!(
        summary.sum("bytes_read") > 24 * MIB,
        "most was read back through the third daemon"
    );
}

/// Four jobs of different I/O priority, more than a limited disk can serve: mq-deadline orders their
/// latencies by class, `none` treats all alike. The guest's own scheduler is out of the way.
#[test]
fn the_guests_priorities_count_with_mq_deadline_and_not_without() {
    let latencies_us = |scheduler: &str| -> [u64; 4] {
        let disk = Disk::new(64 * MIB);
        // 200 a second for jobs that want 256 together, 192 of them above the idle class.
        let daemon = Daemon::start(&disk, &["--scheduler", scheduler, "--limit", "iops=200/1"]);
        let out = Guest::qemu(2, 1).disk(&disk).run(
            r#"
            echo none >/sys/block/vda/queue/scheduler
            job() { echo --name=$1 --prioclass=$2 --prio=$3; }
            fio --minimal --terse-version=3 --direct=1 --ioengine=libaio --filename=/dev/vda --rw=randread --bs=4k \
                --time_based --runtime=8 --iodepth=16 --rate_iops=64 \
                $(job realtime 1 4) $(job best-effort 2 0) $(job low 2 7) $(job idle 3 0) >/tmp/out 2>&1 || { cat /tmp/out; exit 1; }
            awk -F';' '$1 == 3 { print "@@" $3, int($16) }' /tmp/out
            "#,
        );
        daemon.stop().assert_no_errors();
        ["@@realtime", "@@best-effort", "@@low", "@@idle"]
            .map(|job| out.value(job).parse().expect("a number of microseconds"))
    };
    let none = latencies_us("none");
    let deadline = latencies_us("mq-deadline");
    println!(
        "mean latency in µs, realtime, best effort, low, idle: none {none:?}, mq-deadline {deadline:?}"
    );
    let (least, most) = (none.iter().min().unwrap(), none.iter().max().unwrap());
    assert!(most < &(least * 2), "without a scheduler: {none:?}");
    let [realtime, best_effort, low, idle] = deadline;
    let middle = best_effort.min(low);
    assert!(realtime < middle, "{deadline:?}");
    assert!(best_effort.max(low) * 4 < idle, "{deadline:?}");
    assert!(
        realtime * 10 < *least,
        "the first class does not wait: {deadline:?}"
    );
}
