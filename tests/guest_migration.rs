//! A real guest that migrates from one QEMU, with one daemon, to another QEMU with another daemon, on a
//! shared image.

mod guest_support;
#[path = "guest_support/qmp.rs"]
mod qmp;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use guest_support::{Daemon, Disk, Guest, MIB, Running};
use qmp::Qmp;
use rustix::fs::fsync;
use serde_json::json;
use tempfile::TempDir;

/// Where the guest looks for a word from outside: the last block of a disk of 256 MiB.
const WORD_AT: u64 = 256 * MIB - 4096;

/// The guest's memory: 512 MiB and two pages. Before 9.0, QEMU's emulated processors go on writing to pages that
/// a migration has just begun to watch, unnoticed, and the guest arrives with a corrupted heap, whatever disk it
/// has. That is so where QEMU takes 64 pages at once from its bitmap, which it does for memory that can be divided
/// by as many. (Fixed there by "physmem: Fix migration dirty bitmap coherency with TCG memory access".)
const MEMORY: &str = "524296K";

/// One QEMU, one daemon and where they can be reached.
struct Host {
    daemon: Daemon,
    guest: Running,
    qmp: Qmp,
}

/// What two hosts share: the image, and a directory for sockets.
struct Cluster {
    disk: Disk,
    dir: TempDir,
    script: &'static str,
}

impl Cluster {
    fn new(script: &'static str) -> Self {
        let dir = tempfile::Builder::new().prefix("blkmq-test.").tempdir();
        Cluster {
            disk: Disk::new(256 * MIB),
            dir: dir.expect("a temporary directory"),
            script,
        }
    }

    fn path(&self, name: &str, number: u32) -> PathBuf {
        self.dir.path().join(format!("{name}{number}"))
    }

    fn uri(&self, number: u32) -> String {
        format!("unix:{}", self.path("migration", number).display())
    }

    /// Starts host `number`; all but the first wait for the guest to come.
    fn host(&self, number: u32) -> Host {
        let socket = self.path("disk", number);
        let daemon = Daemon::start_at(
            &self.disk,
            &socket,
            &["--cache", "none", "--lock", "in-use"],
        );
        let qmp = self.path("qmp", number);
        let mut guest = Guest::qemu(2, 2)
            .option("--mem", MEMORY)
            .socket(&socket)
            .qmp(&qmp);
        if number > 0 {
            guest = guest.option("--incoming", &self.uri(number));
        }
        let guest = guest.start(self.script);
        let qmp = Qmp::connect(&qmp);
        Host { daemon, guest, qmp }
    }

    /// Says a word to the guest, four bytes long, through its disk.
    fn say(&self, word: &str) {
        let file = File::options().write(true).open(self.disk.image());
        let file = file.expect("the image can be written");
        file.write_all_at(word.as_bytes(), WORD_AT)
            .expect("the image can be written");
        fsync(&file).expect("the image can be written");
    }
}

/// Two vCPUs write and verify without end, and a third of the disk is read into the page cache while the guest
/// moves, so that pages which the first pass has sent are written again by the device and by nobody else. Each
/// host keeps the guest until it has written and verified there. In the end the page cache is what the disk is,
/// and every block that was written verifies.
#[test]
fn a_guest_migrates_twice_under_load() {
    let cluster = Cluster::new(
        r#"
        heard() { dd if=/dev/vda bs=4096 skip=65535 count=1 iflag=direct 2>/dev/null | head -c 4; }
        dd if=/dev/urandom of=/dev/vda bs=1M count=64 oflag=direct 2>/dev/null
        before=$(dd if=/dev/vda bs=1M count=64 iflag=direct 2>/dev/null | sha256sum)
        # Whatever is open: what the last one closes is dropped from the page cache.
        exec 9</dev/vda
        while [ ! -e /tmp/enough ]; do
            verify moving 4096 --ioengine=libaio --rw=randwrite --bsrange=512-64k --rate=2m --fsync=32 \
                --offset=128m --size=2m --offset_increment=32m --numjobs=2 || break
        done >/tmp/rounds 2>&1 &
        writer=$!
        # Two rounds that end after this: all of the second is written and verified after it, too.
        two_rounds() {
            seen=$(wc -l </tmp/rounds)
            while [ "$(wc -l </tmp/rounds)" -lt $((seen + 2)) ] && kill -0 "$writer" 2>/dev/null; do usleep 100000; done
        }
        echo @@running
        # 32 MiB in the first move, 32 in the second, slowly.
        for half in 0 1; do
            while [ "$(heard)" != "go $half" ]; do usleep 200000; done
            for mib in $(seq $((half * 32)) $((half * 32 + 31))); do
                dd if=/dev/vda of=/dev/null bs=1M skip=$mib count=1 2>/dev/null
                usleep 50000
            done
            while [ "$(heard)" != "here" ]; do usleep 200000; done
            two_rounds
            echo "@@arrived $half"
        done
        same 'the page cache' "$(dd if=/dev/vda bs=1M count=64 2>/dev/null | sha256sum)" "$before"
        : >/tmp/enough
        wait
        cat /tmp/rounds
        if grep -v '^fio moving wrote 4096 verified 4096 errors 0$' /tmp/rounds; then exit 1; fi
        echo "@@rounds $(wc -l </tmp/rounds)"
        "#,
    );
    let mut from = cluster.host(0);
    from.guest.await_line("@@running");
    for hop in 0..2 {
        let mut to = cluster.host(hop + 1);
        let speed = json!({ "max-bandwidth": 40 * MIB, "downtime-limit": 500 });
        from.qmp.run("migrate-set-parameters", speed);
        from.qmp
            .run("migrate", json!({ "uri": cluster.uri(hop + 1) }));
        // Not before the first pass: those pages count that are sent and then written again.
        cluster.say(&format!("go {hop}"));
        let info = from.qmp.await_end();
        println!("hop {hop}: {info}");
        assert!(
            info["ram"]["dirty-sync-count"].as_u64() >= Some(3),
            "{info}"
        );
        let left = from.daemon.stop();
        left.assert_no_errors();
        assert!(
            left.sum("bytes_written") > 0,
            "nothing was written before it left"
        );
        drop(from.guest);
        cluster.say("here");
        to.guest.await_line(&format!("@@arrived {hop}"));
        from = to;
    }
    let out = from.guest.finish();
    let rounds: u32 = out.value("@@rounds").parse().expect("a number");
    assert!(rounds >= 4, "{rounds} rounds were written and verified");
    let arrived = from.daemon.stop();
    arrived.assert_no_errors();
    assert!(arrived.sum("bytes_read") > 0 && arrived.sum("bytes_written") > 0);
}
