//! Whether a durable write is one: where the flag that asks for it arrives, and what is done where it does not.

use std::fs;
use std::path::Path;

use crate::fuse::{Entry, FuseMount};
use crate::support::disk::{finish, status};
use crate::support::*;
use crate::{Loop, Mount, Served, may_mount};

const IMAGE: usize = 1 << 20;

/// A guest's write that was answered OK, and how much had reached the server then.
struct Durable {
    sector: u64,
    fill: u8,
    reached: usize,
}

/// Writes, each to a sector that it alone uses for the time being, with up to eight in flight.
fn write_through(disk: &mut Disk, fuse: &FuseMount, rng: &mut Rng, count: usize) -> Vec<Durable> {
    let mut done = Vec::new();
    let gpas: Vec<u64> = (0..8).map(|_| disk.mem().alloc(4096, 4096)).collect();
    for round in 0..count.div_ceil(8) {
        let fill = u8::try_from(round % 250 + 1).expect("a byte");
        let mut sectors = Vec::new();
        for (nth, gpa) in gpas.iter().enumerate() {
            // Each has an eighth of the image.
            let eighth = (IMAGE / 512 / 8) as u64;
            let sector = nth as u64 * eighth + rng.below(eighth - 8);
            disk.mem().fill(*gpa, 4096, fill);
            Request::write(sector, &[Seg::readable(*gpa, 4096)])
                .push(&mut disk.queues[0], nth as u64);
            sectors.push(sector);
        }
        disk.queues[0].publish();
        for _ in 0..8 {
            let completion = finish(&mut disk.queues[0]);
            assert_eq!(completion.status, status::OK);
            let sector = sectors[usize::try_from(completion.token).expect("small")];
            let reached = fuse.reached();
            done.push(Durable {
                sector,
                fill,
                reached,
            });
        }
    }
    done
}

/// Cuts the power of the server at moments of the seed's: what was answered by then is there, unless it was
/// overwritten later.
fn check_power_cuts(fuse: &FuseMount, done: &[Durable], rng: &mut Rng, cuts: usize) {
    for _ in 0..cuts {
        let at = usize::try_from(rng.below(fuse.reached() as u64 + 1)).expect("in memory");
        let content = fuse.after_power_cut(0, IMAGE, at, rng);
        for (nth, write) in done.iter().enumerate() {
            if write.reached > at {
                continue;
            }
            for sector in write.sector..write.sector + 8 {
                let byte = content[usize::try_from(sector).expect("in memory") * 512];
                let later = done[nth..]
                    .iter()
                    .filter(|other| (other.sector..other.sector + 8).contains(&sector));
                assert!(
                    later.clone().any(|other| other.fill == byte),
                    "sector {sector} has {byte} after a power cut at {at}, and its guest was told {}",
                    write.fill
                );
            }
        }
    }
}

fn syncs(fuse: &FuseMount) -> usize {
    let journal = fuse.journal();
    let is_sync = |entry: &&Entry| matches!(entry, Entry::Sync { .. });
    journal.iter().filter(is_sync).count()
}

fn number(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).map_or(otherwise, |text| text.parse().expect("a number"))
}

/// FUSE accepts RWF_DSYNC with an asynchronous direct write and drops it. `BLKMQ_ROUNDS=n` for more than one round of each
/// kind, `BLKMQ_SEED=n` for one again.
#[test]
fn a_durable_write_on_fuse_survives_a_power_cut_of_its_server() {
    let now = std::time::SystemTime::UNIX_EPOCH.elapsed();
    let seed = number("BLKMQ_SEED", now.map_or(0, |time| time.as_secs()));
    println!("BLKMQ_SEED={seed}");
    let mut sessions = 0;
    for round in 0..number("BLKMQ_ROUNDS", 1) {
        for (cache, through) in [
            ("directsync", ""),
            ("writethrough", ""),
            ("none", "by the guest's choice"),
            ("none", "for a driver that cannot flush"),
        ] {
            if !power_cuts((cache, through), seed + round) {
                return;
            }
            sessions += 1;
        }
    }
    println!(
        "{sessions} sessions, {} durable writes, {} power cuts",
        sessions * WRITES,
        sessions * CUTS
    );
}

/// Durable writes of a session, and power cuts of its server after them.
const WRITES: usize = 200;
const CUTS: usize = 100;

/// False where FUSE cannot be mounted.
fn power_cuts((cache, through): (&str, &str), seed: u64) -> bool {
    let Some(fuse) = FuseMount::new(&[("disk.img", IMAGE as u64)]) else {
        return false;
    };
    let mut rng = Rng::new(seed);
    let served = Served::start(&fuse.path("disk.img"), &["--cache", cache]);
    let mut setup = Setup::default();
    if through == "for a driver that cannot flush" {
        setup.features &= !(features::FLUSH | features::CONFIG_WCE);
    }
    let queue = QueueSetup::default();
    let attached = Disk::attach_with(served.daemon.socket(), &setup, 1, queue);
    let mut disk = attached.expect("a session");
    if through == "by the guest's choice" {
        let chosen = disk.front.set_config(BlkConfig::WRITEBACK_AT, &[0]);
        chosen.expect("write-through");
    }
    let before = fuse.reached();
    let done = write_through(&mut disk, &fuse, &mut rng, WRITES);
    assert!(fuse.reached() - before >= WRITES);
    assert!(syncs(&fuse) > 0, "{cache} {through}: no sync came");
    check_power_cuts(&fuse, &done, &mut rng, CUTS);
    drop(disk);
    served.daemon.stop();
    true
}

/// How many flushes a block device has done: field 16 of its statistics (Documentation/block/stat.rst).
fn flushes_of(device: &Path) -> u64 {
    let name = device.file_name().expect("a name").to_str().expect("text");
    let stat = fs::read_to_string(format!("/sys/block/{name}/stat")).expect("statistics");
    let field = stat.split_whitespace().nth(15).expect("16 fields");
    field.parse().expect("a number")
}

/// A loop device has a volatile cache and no FUA, so each durable write is one flush of it. Which file systems are
/// relied on is written in src/sys/filesystem.rs.
#[test]
fn a_durable_write_reaches_the_device() {
    if !may_mount() {
        return;
    }
    let writes = |image: &Path, device: &Path, cache: &str| {
        let served = Served::start(image, &["--cache", cache]);
        let mut disk = Disk::attach(served.daemon.socket(), 1);
        // Allocated first, so that no journal's commit flushes for it later.
        disk.write(0, 0, &[1; 1 << 20]);
        let before = flushes_of(device);
        for nth in 0..32_u8 {
            disk.write(0, u64::from(nth) * 8, &[nth; 4096]);
        }
        let flushes = flushes_of(device) - before;
        drop(disk);
        served.daemon.stop();
        flushes
    };
    for cache in ["directsync", "writethrough"] {
        let device = Loop::new(4 << 20);
        let flushes = writes(&device.path, &device.path, cache);
        assert!(flushes >= 32, "{cache} on a device: {flushes} flushes");
        for kind in ["ext4", "xfs", "btrfs"] {
            let Some(mount) = Mount::of(kind, 512 << 20) else {
                continue;
            };
            let device = mount.device.as_ref().expect("it has one").path.clone();
            let flushes = writes(&mount.image(4 << 20), &device, cache);
            assert!(flushes >= 32, "{cache} on {kind}: {flushes} flushes");
        }
    }
    // None of these flushes if it is not asked to.
    let mount = Mount::of("ext4", 64 << 20).expect("made in every test");
    let device = mount.device.as_ref().expect("it has one").path.clone();
    let flushes = writes(&mount.image(4 << 20), &device, "none");
    assert!(flushes < 32, "{flushes} flushes without a reason");
}
