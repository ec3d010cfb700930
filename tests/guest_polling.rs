//! A device that is polled for its completions, which takes one that has queues for it: a guest with an
//! emulated NVMe disk. The daemon and the front end of the native tests run in there, side by side, so this
//! program is what the guest runs too.

#![allow(
    clippy::cast_possible_truncation,
    reason = "test code: sizes and offsets are small and known"
)]

mod guest_support;
mod support;

use std::fs;
use std::path::Path;
use std::process::Command;

use support::disk::{kind, status};
use support::*;

/// The disk, as the guest sees it.
const NVME: &str = "/dev/nvme0n1";

/// How much of it is written and compared.
const BYTES: usize = 4 << 20;

#[test]
fn a_device_with_queues_for_it_is_polled_and_nothing_is_lost() {
    let image = guest_support::Disk::new(64 * guest_support::MIB);
    let this = std::env::current_exe().expect("a program");
    let daemon = env!("CARGO_BIN_EXE_vhost-user-blkmq");
    let script = format!(
        r#"
        export LD_LIBRARY_PATH=/programs:$LD_LIBRARY_PATH
        # Where this program has been told to look for it.
        mkdir -p '{folder}'
        ln -s /programs/vhost-user-blkmq '{daemon}'
        same 'the device can be polled' "$(cat /sys/block/nvme0n1/queue/io_poll)" 1
        /programs/{this} --ignored --exact in_the_guest --nocapture
        "#,
        folder = Path::new(daemon).parent().expect("a folder").display(),
        this = this.file_name().expect("a name").display(),
    );
    guest_support::Guest::qemu(2, 2)
        .nvme(&image.image())
        .program(Path::new(daemon))
        .program(&this)
        .option("--append", "nvme.poll_queues=1")
        .run(&script);
}

#[test]
#[ignore = "runs in the guest of the test above"]
fn in_the_guest() {
    all_transfers_are_polled_for_if_asked();
    a_queue_whose_guest_polls_is_polled_for_and_another_is_not();
    a_file_on_such_a_device_is_not_polled_for();
}

fn all_transfers_are_polled_for_if_asked() {
    let spec = Spec::path(Path::new(NVME)).args(["--io-poll", "on", "--workers", "1"]);
    let daemon = Daemon::start_ours(&spec);
    assert!(daemon.stderr().contains(", polled"), "{}", daemon.stderr());
    let mut disk = Disk::attach(daemon.socket(), 2);
    let mut model = vec![0; BYTES];
    let before = interrupts();
    let mut requests = 0;
    for queue in 0..2 {
        requests += load(&mut disk, queue, &mut model, 400);
    }
    requests += compare(&mut disk, &model);
    // The completion of a transfer that is polled for raises none.
    assert_eq!(interrupts(), before, "of the device's queues");
    // More than the kernel polls for in one piece.
    let long = Rng::new(3).bytes(Disk::BUFFER);
    disk.write(0, BYTES as u64 / SECTOR, &long);
    assert!(disk.read(1, BYTES as u64 / SECTOR, long.len()) == long);
    requests += 2;
    let before = interrupts();
    disk.flush(0);
    assert!(interrupts() > before, "a flush is waited for");
    drop(disk);
    let polled = polled(daemon);
    // Neighbours may have been merged.
    assert!(
        polled > requests / 2 && polled <= requests,
        "{polled} of {requests}"
    );
}

fn a_queue_whose_guest_polls_is_polled_for_and_another_is_not() {
    let daemon = Daemon::start_ours(&Spec::path(Path::new(NVME)).args(["--workers", "1"]));
    let said = daemon.stderr();
    assert!(
        said.contains("polled for the guest's poll queues"),
        "{said}"
    );
    let setup = QueueSetup {
        call: false,
        ..QueueSetup::default()
    };
    let mut disk = Disk::attach(daemon.socket(), 1);
    disk.queues
        .push(disk.front.queue(1, setup).expect("a queue that polls"));
    let before = interrupts();
    for at in 0..32 {
        disk.write(1, at * 8, &[at as u8; 4096]);
    }
    assert_eq!(interrupts(), before, "nobody waits for an interrupt");
    for at in 0..32 {
        assert_eq!(disk.read(0, at * 8, 4096), [at as u8; 4096]);
    }
    assert!(interrupts() >= before + 32, "each read was waited for");
    drop(disk);
    assert_eq!(polled(daemon), 32);
}

/// A file system may wait for a write itself, while nobody polls for it: ext4 does in this guest, and the
/// write would never end.
fn a_file_on_such_a_device_is_not_polled_for() {
    shell(&format!(
        "mkdir -p /mnt/nvme && mkfs.ext4 -q -F {NVME} && mount -t ext4 {NVME} /mnt/nvme"
    ));
    let image = Path::new("/mnt/nvme/disk.img");
    fs::File::create(image)
        .and_then(|file| file.set_len(BYTES as u64))
        .expect("a sparse image");
    let refused = Command::new(env!("CARGO_BIN_EXE_vhost-user-blkmq"))
        .args(["--io-poll", "on", "--socket-path", "/tmp/s", "--blk-file"])
        .arg(image)
        .output()
        .expect("the daemon can be run");
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success(), "{said}");
    assert!(said.contains("no block device"), "{said}");
    let daemon = Daemon::start_ours(&Spec::path(image).args(["--workers", "1"]));
    let mut disk = Disk::attach(daemon.socket(), 1);
    let setup = QueueSetup {
        call: false,
        ..QueueSetup::default()
    };
    let queue = disk.front.queue(1, setup).expect("a queue that polls");
    disk.queues.push(queue);
    let mut model = vec![0; BYTES];
    load(&mut disk, 1, &mut model, 200);
    compare(&mut disk, &model);
    disk.flush(0);
    drop(disk);
    assert_eq!(polled(daemon), 0);
    assert!(fs::read(image).expect("the image") == model, "the image");
    shell("umount /mnt/nvme");
}

/// Writes here and there, 32 at a time, which are put into the model as well; returns how many.
fn load(disk: &mut Disk, queue: usize, model: &mut [u8], total: u64) -> u64 {
    const ROOM: usize = 64 << 10;
    let mut rng = Rng::new(queue as u64 + 7);
    let area = disk.mem().alloc(32 * ROOM, 4096);
    for batch in 0..total / 32 {
        // A place of its own for each, so that their order does not matter.
        let step = BYTES / 32;
        for at in 0..32 {
            let len = 512 * rng.between(1, ROOM as u64 / 512) as usize;
            let from = at * step + 512 * rng.below(((step - len) / 512) as u64) as usize;
            let bytes = rng.bytes(len);
            let gpa = area + (at * ROOM) as u64;
            disk.mem().write(gpa, &bytes);
            model[from..from + len].copy_from_slice(&bytes);
            let data = [Seg::readable(gpa, len)];
            let queue = &mut disk.queues[queue];
            let pushed = queue.push(batch, kind::OUT, 0, from as u64 / SECTOR, &data);
            pushed.expect("the ring has room");
        }
        disk.queues[queue].publish();
        for done in disk::finish_all(&mut disk.queues[queue], 32) {
            assert_eq!(done.status, status::OK);
        }
    }
    total / 32 * 32
}

/// Reads it all back; returns in how many requests.
fn compare(disk: &mut Disk, model: &[u8]) -> u64 {
    const STEP: usize = 128 << 10;
    for (at, expected) in model.chunks(STEP).enumerate() {
        let sector = (at * STEP) as u64 / SECTOR;
        assert!(disk.read(0, sector, STEP) == expected, "at sector {sector}");
    }
    (model.len() / STEP) as u64
}

/// Interrupts of the device's I/O queues so far; queue 0 is for administration.
fn interrupts() -> u64 {
    let text = fs::read_to_string("/proc/interrupts").expect("procfs");
    let lines = text.lines().filter(|line| {
        let name = line.split_whitespace().last().unwrap_or_default();
        name.starts_with("nvme0q") && name != "nvme0q0"
    });
    let counts = lines.map(|line| {
        let words = line.split_whitespace().skip(1);
        words
            .map_while(|word| word.parse::<u64>().ok())
            .sum::<u64>()
    });
    counts.sum()
}

/// Ends the daemon; how many transfers it polled for.
fn polled(daemon: Daemon) -> u64 {
    let summary = daemon.stop();
    assert_eq!(summary.total(|queue| queue.errors), 0);
    summary.workers.iter().map(|worker| worker.polled).sum()
}

fn shell(command: &str) {
    let status = Command::new("dash").args(["-c", command]).status();
    assert!(status.expect("a shell").success(), "{command}");
}
