//! Firmware of another architecture: SLOF, which boots POWER guests under QEMU's pseries.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use super::guest_support::{Daemon, Disk, MIB};

/// What the program on the disk prints. The log of the firmware does not have it in one piece otherwise.
const SAID: &str = "SLOF-BOOTED-THE-DISK";
/// Where the boot partition begins, in sectors.
const PARTITION: u32 = 2048;
/// How long it is, in sectors.
const SECTORS: u32 = 64;

/// Puts a partition table on the disk, and a program in Forth into a PReP boot partition.
fn make_bootable(disk: &Disk) {
    let image = OpenOptions::new()
        .write(true)
        .open(disk.image())
        .expect("the image is there");
    // Active, type 0x41 (PReP boot), from PARTITION on.
    let mut entry = vec![0x80, 0, 2, 0, 0x41, 0, 10, 0];
    entry.extend(PARTITION.to_le_bytes());
    entry.extend(SECTORS.to_le_bytes());
    image.write_all_at(&entry, 446).expect("a partition table");
    image.write_all_at(&[0x55, 0xaa], 510).expect("its end");
    let (first, second) = SAID.split_at(4);
    let program = format!("\\ A program\n.( {first}) .( {second}) cr\n");
    let mut bytes = program.into_bytes();
    bytes.resize(SECTORS as usize * 512, b' ');
    image
        .write_all_at(&bytes, u64::from(PARTITION) * 512)
        .expect("a program");
}

/// QEMU, killed when it goes out of scope.
struct Machine(Child);

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// SLOF sets the legacy barrier bit in each request's type. It finds the partition, loads it and runs what is there.
#[test]
fn the_firmware_of_pseries_boots_from_the_disk() {
    let prepare = concat!(env!("CARGO_MANIFEST_DIR"), "/qemu/prepare");
    let prepared = Command::new(prepare).status().expect("qemu/prepare runs");
    assert!(prepared.success(), "qemu/prepare: {prepared}");
    let disk = Disk::new(4 * MIB);
    make_bootable(&disk);
    let mut daemon = Daemon::start(&disk, &[]);
    let serial = disk.image().with_extension("serial");
    File::create(&serial).expect("a log");
    let machine = Command::new("qemu-system-ppc64")
        .args(["-M", "pseries,memory-backend=mem", "-accel", "tcg"])
        .args(["-m", "256M", "-nodefaults", "-display", "none"])
        .args(["-monitor", "none", "-no-reboot", "-object"])
        .arg("memory-backend-memfd,id=mem,size=256M,share=on")
        .arg("-serial")
        .arg(format!("file:{}", serial.display()))
        .arg("-chardev")
        .arg(format!("socket,id=c,path={}", disk.socket().display()))
        .args(["-device", "vhost-user-blk-pci,chardev=c,num-queues=1"])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("qemu-system-ppc64 runs");
    let machine = Machine(machine);
    let said = || {
        let bytes = std::fs::read(&serial).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    };
    daemon.await_that(
        "the firmware runs the program",
        Duration::from_secs(180),
        |_| {
            let said = said();
            assert!(
                !said.contains("Not a bootable device") && !said.contains("transfer failed"),
                "{said}"
            );
            said.contains(SAID)
        },
    );
    drop(machine);
    let summary = daemon.stop();
    summary.assert_no_errors();
    assert!(summary.sum("read") > 0);
}
