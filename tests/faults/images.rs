//! What an image is taken for: what is found out about it when it is opened, and what it turns out to be later.

use std::fs::{self, File};
use std::process::Command;

use crate::fuse::FuseMount;
use crate::support::disk::{Range, finish, kind, status};
use crate::support::*;
use crate::{Loop, Mount, Served, may_mount, run, text, write_at};

/// Whether the image can free space used to be found out by freeing some, behind an end that may have moved.
#[test]
fn opening_an_image_changes_nothing_in_it() {
    let Some(fuse) = FuseMount::new(&[("disk.img", 1 << 20)]) else {
        return;
    };
    let image = fuse.path("disk.img");
    for more in [
        &["--lock", "in-use"][..],
        &["--cache", "writeback"],
        &["--read-only"],
    ] {
        let served = Served::start(&image, more);
        drop(Disk::attach(served.daemon.socket(), 1));
        served.daemon.stop();
    }
    let journal = fuse.journal();
    assert!(journal.is_empty(), "{journal:?}");
}

/// Near the largest file there can be there is no place behind the end to try anything in.
#[test]
fn an_image_of_the_largest_size_has_discards() {
    if !may_mount() {
        return;
    }
    let ext4 = Mount::on("ext4", Loop::new(64 << 20), &["-b", "4096"], "defaults");
    let mounts = [
        (Some(ext4), 17_592_186_040_320),
        (Mount::of("xfs", 512 << 20), i64::MAX as u64 & !4095),
        (Mount::of("btrfs", 512 << 20), i64::MAX as u64 & !4095),
        (Some(Mount::tmpfs(4 << 20)), i64::MAX as u64 & !4095),
    ];
    for (mount, bytes) in mounts {
        let Some(mount) = mount else { continue };
        let image = mount.image(bytes);
        let served = Served::start(&image, &[]);
        let mut disk = Disk::attach(served.daemon.socket(), 1);
        assert_ne!(disk.front.features & features::DISCARD, 0);
        let last = bytes / 512 - 16;
        disk.write(0, last, &[7; 4096]);
        let done = disk.clear(0, kind::DISCARD, Range::new(last, 8));
        assert_eq!(done.status, status::OK);
        assert_eq!(disk.read(0, last, 4096), [0; 4096], "{}", text(&image));
        drop(disk);
        served.daemon.stop();
    }
}

#[test]
fn a_device_that_is_set_read_only_is_not_served_as_writable() {
    if !may_mount() {
        return;
    }
    let device = Loop::read_only(1 << 20);
    let refused = Command::new(env!("CARGO_BIN_EXE_vhost-user-blkmq"))
        .args(["--socket-path", "/nonexistent/socket", "--blk-file"])
        .arg(&device.path)
        .output()
        .expect("it runs");
    let said = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(1), "{said}");
    assert!(
        said.contains("Read-only file system") && said.contains("--read-only"),
        "{said}"
    );
    let served = Served::start(&device.path, &["--read-only"]);
    let mut disk = Disk::attach(served.daemon.socket(), 1);
    assert_eq!(disk.read(0, 0, 512), [0; 512]);
    drop(disk);
    served.daemon.stop();
}

#[test]
fn the_end_of_a_device_that_shrank_is_no_lack_of_space() {
    if !may_mount() {
        return;
    }
    for cache in ["none", "writeback", "directsync"] {
        let device = Loop::new(1 << 20);
        let args = ["--cache", cache, "--on-error", "enospc"];
        let served = Served::start(&device.path, &args);
        let mut disk = Disk::attach(served.daemon.socket(), 1);
        disk.write(0, 2040, &[1; 4096]);
        File::options()
            .write(true)
            .open(&device.file)
            .and_then(|file| file.set_len(512 << 10))
            .expect("cut");
        run("losetup", &["--set-capacity", text(&device.path)]);
        let gpa = disk.mem().alloc(8192, 4096);
        for (sector, len) in [(2040, 4096), (1016, 8192)] {
            let done = disk.run(0, &write_at(gpa, sector, len));
            assert_eq!(done.status, status::IOERR, "{cache}: sector {sector}");
        }
        let seen = served.disk(0);
        assert_eq!(seen["held"], false, "{cache}");
        assert_eq!(seen["io_errors"]["no_space"], 0, "{seen}");
        disk.write(0, 8, &[2; 4096]);
        assert_eq!(disk.read(0, 8, 4096), [2; 4096]);
    }
}

/// Clones `image`, so that it shares its extents.
fn clone(mount: &Mount, image: &std::path::Path) {
    let copy = mount.path("clone.img");
    run("cp", &["--reflink=always", text(image), text(&copy)]);
}

/// XFS says that a file with shared extents wants 4096 bytes, and takes 512 as before.
#[test]
fn a_cloned_image_is_served_as_before() {
    if !may_mount() {
        return;
    }
    for kind in ["xfs", "btrfs"] {
        let Some(mount) = Mount::of(kind, 512 << 20) else {
            continue;
        };
        let image = mount.path("disk.img");
        fs::write(&image, vec![7; 1 << 20]).expect("an image");
        run("sync", &["-f", text(&image)]);
        // Cloned while it is served, and then from the start.
        let mut fill = 0;
        for round in 0..2 {
            let served = Served::start(&image, &["--cache", "directsync"]);
            if round == 0 {
                clone(&mount, &image);
            }
            let log = served.daemon.stderr();
            assert!(!log.contains("page cache"), "{log}");
            let mut disk = Disk::attach(served.daemon.socket(), 1);
            for sector in [1, 8, 9, 100] {
                fill += 1;
                disk.write(0, sector + round * 512, &[fill; 512]);
                assert_eq!(disk.read(0, sector + round * 512, 512), [fill; 512]);
                assert_eq!(disk.read(0, sector + round * 512 + 1, 512), [7; 512]);
            }
            disk.flush(0);
            drop(disk);
            served.daemon.stop();
        }
        let copy = fs::read(mount.path("clone.img")).expect("the clone");
        assert!(copy.iter().all(|byte| *byte == 7), "the clone has changed");
    }
}

/// Refusing it with the advice to take larger blocks would cost its guest the partition table.
#[test]
fn an_image_whose_device_has_larger_blocks_than_the_guest_is_served_through_the_page_cache() {
    if !may_mount() {
        return;
    }
    let blocks = ["--sector-size", "4096"];
    for on_device in [true, false] {
        let device = Loop::with(32 << 20, &blocks);
        let path = device.path.clone();
        let (mount, device) = match on_device {
            true => (None, Some(device)),
            false => (Some(Mount::on("ext4", device, &[], "defaults")), None),
        };
        let image = match &mount {
            Some(mount) => mount.image(4 << 20),
            None => path,
        };
        let served = Served::start(&image, &["--cache", "directsync"]);
        let mut disk = Disk::attach(served.daemon.socket(), 1);
        let log = served.daemon.stderr();
        assert!(log.contains("in units of 4096 bytes only"), "{log}");
        assert!(!log.contains("--logical-block-size"), "{log}");
        for sector in [1, 8, 9, 4095] {
            disk.write(0, sector, &[1; 512]);
            assert_eq!(disk.read(0, sector, 512), [1; 512]);
        }
        assert_eq!(disk.read(0, 2, 512), [0; 512]);
        disk.flush(0);
        drop(disk);
        served.daemon.stop();
        // A guest with such blocks has direct I/O.
        let args = ["--logical-block-size", "4096"];
        let served = Served::start(&image, &args);
        let log = served.daemon.stderr();
        assert!(log.contains("O_DIRECT (buffers"), "{log}");
        served.daemon.stop();
        drop((mount, device));
    }
}

/// A part of a shared block is written through the page cache, whatever the image is open with. Its write-back fails for
/// want of space below the file system; the kernel says so once.
#[test]
fn no_sync_of_a_cloned_image_is_believed_after_its_write_back_has_failed() {
    if !may_mount() {
        return;
    }
    if Mount::of("xfs", 512 << 20).is_none() {
        return;
    }
    // The log is elsewhere: what is full fails data only.
    let log = Loop::new(64 << 20);
    let below = Mount::tmpfs(64 << 20);
    let device = Loop::on(below.path("medium"), 512 << 20);
    let logdev = format!("logdev={}", text(&log.path));
    let mount = Mount::on("xfs", device, &["-K", "-l", &logdev], &logdev);
    let image = mount.path("disk.img");
    fs::write(&image, vec![7; 1 << 20]).expect("an image");
    clone(&mount, &image);
    run("sync", &["-f", text(&image)]);
    let served = Served::start(&image, &[]);
    let mut disk = Disk::attach(served.daemon.socket(), 1);
    let gpa = disk.mem().alloc(512, 512);
    disk.mem().fill(gpa, 512, 1);
    let filler = crate::fill(&below, 0);
    // All pieces of blocks that are shared: they stay in the page cache until the flush.
    for nth in 0..64 {
        let done = disk.run(0, &write_at(gpa, 8 * nth + 1, 512));
        assert_eq!(done.status, status::OK);
    }
    let flush = |disk: &mut Disk| disk.run(0, &Request::flush()).status;
    assert_eq!(flush(&mut disk), status::IOERR);
    fs::remove_file(filler).expect("removed");
    // The kernel has told, and finds nothing to complain about any more.
    for _ in 0..3 {
        assert_eq!(flush(&mut disk), status::IOERR, "what was lost is lost");
    }
    let log = served.daemon.stderr();
    assert!(log.contains("could not be synced"), "{log}");
    drop(disk);
    served.daemon.stop();
}

/// The file system has no room for what the guest writes: no data of others is lost by that, and a held disk goes on.
#[test]
fn a_durable_write_that_lacks_space_is_held_and_not_the_end_of_all_syncs() {
    if !may_mount() {
        return;
    }
    for cache in ["directsync", "writethrough"] {
        let mount = Mount::of("ext4", 32 << 20).expect("made in every test");
        let image = mount.image(64 << 20);
        let args = ["--cache", cache, "--on-error", "enospc"];
        let served = Served::start(&image, &args);
        let mut disk = Disk::attach(served.daemon.socket(), 1);
        disk.write(0, 0, &[1; 4096]);
        let filler = crate::fill(&mount, 0);
        let gpa = disk.mem().alloc(1 << 20, 4096);
        disk.mem().fill(gpa, 1 << 20, 0x5a);
        write_at(gpa, 4096, 1 << 20).push(&mut disk.queues[0], 0);
        disk.queues[0].publish();
        served.wait_held();
        fs::remove_file(filler).expect("removed");
        run("sync", &["-f", text(&image)]);
        served.resume();
        assert_eq!(finish(&mut disk.queues[0]).status, status::OK, "{cache}");
        assert_eq!(disk.read(0, 4096, 1 << 20), vec![0x5a; 1 << 20]);
        disk.flush(0);
    }
}

/// A device that is full fails the write-back of a durable write, and its page is taken for clean.
#[test]
fn pages_that_a_durable_write_has_lost_for_want_of_space_are_not_forgotten() {
    if !may_mount() {
        return;
    }
    for on_device in [true, false] {
        let below = Mount::tmpfs(80 << 20);
        let device = Loop::on(below.path("medium"), 64 << 20);
        let (path, medium) = (device.path.clone(), device.file.clone());
        let mut mount = None;
        let image = match on_device {
            true => path,
            false => {
                // Without a journal, which would fail as well; the data has its place in the file system,
                // and none below it.
                let mkfs = ["-O", "^has_journal"];
                let mount = mount.insert(Mount::on("ext4", device, &mkfs, "defaults"));
                let image = mount.path("disk.img");
                fs::write(&image, vec![0; 16 << 20]).expect("an image");
                run("sync", &["-f", text(&image)]);
                run("fallocate", &["--dig-holes", text(&medium)]);
                image
            }
        };
        let served = Served::start(&image, &["--cache", "writethrough"]);
        let mut disk = Disk::attach(served.daemon.socket(), 1);
        let filler = crate::fill(&below, 0);
        let gpa = disk.mem().alloc(65536, 4096);
        disk.mem().fill(gpa, 65536, 1);
        let done = disk.run(0, &write_at(gpa, 4096, 65536));
        assert_eq!(done.status, status::IOERR);
        fs::remove_file(filler).expect("removed");
        let flush = |disk: &mut Disk| disk.run(0, &Request::flush()).status;
        assert_eq!(flush(&mut disk), status::IOERR, "on a device: {on_device}");
        let done = disk.run(0, &write_at(gpa, 8192, 65536));
        assert_eq!(done.status, status::IOERR, "nothing is durable any more");
        let log = served.daemon.stderr();
        assert!(log.contains("could not be synced"), "{log}");
        drop(disk);
        served.daemon.stop();
    }
}
