//! Disks that grow while they are served, and disks that would shrink.

use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use serde_json::{Value, json};
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserProtocolFeatures;

use super::support::disk::status;
use super::support::*;
use super::{Served, text, verify};

const MIB: u64 = 1 << 20;

/// A disk in use, whose front end listens for what the back end has to say.
struct Listening {
    disk: Disk,
    channel: UnixStream,
}

impl Listening {
    fn attach(served: &Served, queues: usize) -> Listening {
        let setup = Setup {
            protocol: protocol::KNOWN | VhostUserProtocolFeatures::BACKEND_REQ,
            ..Setup::default()
        };
        let mut disk = Disk::attach_with(
            served.daemon.socket(),
            &setup,
            queues,
            QueueSetup::default(),
        )
        .expect("the back end serves a front end");
        let (channel, theirs) = UnixStream::pair().expect("a pair");
        channel.set_read_timeout(Some(DEADLINE)).expect("a timeout");
        disk.front
            .vhost
            .set_backend_request_fd(&theirs)
            .expect("BACKEND_REQ is negotiated");
        Listening { disk, channel }
    }

    /// Waits for CONFIG_CHANGE_MSG, and reads the capacity it is about, in bytes.
    fn told(&mut self) -> u64 {
        let mut message = [0; 12];
        self.channel
            .read_exact(&mut message)
            .expect("the front end is told");
        let words: Vec<u32> = message
            .chunks(4)
            .map(|word| u32::from_ne_bytes(word.try_into().expect("four bytes")))
            .collect();
        assert_eq!(words, [2, 1, 0], "CONFIG_CHANGE_MSG, version 1, no payload");
        self.capacity()
    }

    fn capacity(&mut self) -> u64 {
        self.disk.front.config().expect("a config").capacity * SECTOR
    }

    /// The status of a read and of a write of 4 KiB at `byte`.
    fn try_at(&mut self, byte: u64) -> (u8, u8) {
        let gpa = self.disk.mem().alloc(4096, 4096);
        let queue = self.disk.queues.len() - 1;
        let read = Request::read(byte / SECTOR, &[Seg::writable(gpa, 4096)]);
        let write = Request::write(byte / SECTOR, &[Seg::readable(gpa, 4096)]);
        let [read, write] = [read, write].map(|request| self.disk.run(queue, &request).status);
        (read, write)
    }
}

/// Opens the image, gives it another size, and closes it: what `truncate` does.
fn truncate(served: &Served, bytes: u64) {
    OpenOptions::new()
        .write(true)
        .open(served.daemon.image())
        .and_then(|file| file.set_len(bytes))
        .expect("the image can be resized");
}

fn resize(served: &Served, body: &Value) -> Result<Value, String> {
    let text = served.ask("POST", "/v1/disks/s/resize", body)?;
    Ok(serde_json::from_str(&text).expect("JSON"))
}

const REFUSED: (u8, u8) = (status::IOERR, status::IOERR);
const DONE: (u8, u8) = (status::OK, status::OK);

#[test]
fn an_image_that_grows_is_noticed_and_the_front_end_told() {
    let served = Served::start(Spec::image(16 * MIB), &["--workers", "2", "--serial", "s"]);
    let mut front = Listening::attach(&served, 2);
    assert_eq!(front.try_at(16 * MIB), REFUSED, "before");
    truncate(&served, 24 * MIB);
    assert_eq!(front.told(), 24 * MIB);
    assert_eq!(
        front.try_at(24 * MIB - 4096),
        DONE,
        "the new area is served"
    );
    assert_eq!(front.try_at(24 * MIB), REFUSED, "and not more");
    let pattern = Rng::new(7).bytes(65536);
    front.disk.write(0, 20 * MIB / SECTOR, &pattern);
    assert_eq!(front.disk.read(1, 20 * MIB / SECTOR, 65536), pattern);
    assert_eq!(served.get("/v1/disks/s")["size_bytes"], 24 * MIB);

    // An end that is no whole logical block does not count; told once is told.
    truncate(&served, 32 * MIB + 1000);
    assert_eq!(front.told(), 32 * MIB + 512);
    assert!(
        served
            .daemon
            .wait_for_message("the last 488 are no whole logical block"),
        "{}",
        served.daemon.stderr()
    );
    // One that comes later finds the new size.
    drop(front);
    let mut front = Listening::attach(&served, 1);
    assert_eq!(front.capacity(), 32 * MIB + 512);
}

#[test]
fn a_disk_grows_when_told_and_its_file_with_it() {
    let served = Served::start(Spec::image(16 * MIB), &["--serial", "s"]);
    let mut front = Listening::attach(&served, 1);
    let shown = text(&served.ctl(&["resize", "s", "40M"]));
    assert!(shown.contains("disk s (@0): 40 MiB"), "{shown}");
    assert_eq!(front.told(), 40 * MIB);
    let image = File::open(served.daemon.image()).expect("the image");
    assert_eq!(image.metadata().expect("its size").len(), 40 * MIB);
    assert_eq!(front.try_at(40 * MIB - 4096), DONE);
    // Nothing to do is no error, and nobody hears of it: the next news is the next size.
    let same = resize(&served, &Value::Null).expect("nothing to do");
    assert_eq!(same["size_bytes"], 40 * MIB);
    resize(&served, &json!({ "size_bytes": 41 * MIB })).expect("it grows");
    assert_eq!(front.told(), 41 * MIB);
    front
        .channel
        .set_nonblocking(true)
        .expect("sockets can be non-blocking");
    let more = front.channel.read(&mut [0; 12]);
    assert!(more.is_err(), "one message for each size: {more:?}");
}

#[test]
fn a_disk_does_not_shrink_under_its_guest() {
    let served = Served::start(Spec::image(16 * MIB), &["--serial", "s"]);
    let mut front = Listening::attach(&served, 1);
    front.disk.write(0, 12 * MIB / SECTOR, &[7; 4096]);
    let refused = served.ctl(&["resize", "s", "8M"]);
    let error = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success());
    assert!(
        error.contains("8388608 bytes are less than the 16777216 that the guest was promised"),
        "{error}"
    );
    assert_eq!(front.disk.read(0, 12 * MIB / SECTOR, 4096), [7; 4096]);

    // Somebody takes the image away beneath it.
    truncate(&served, 8 * MIB);
    assert!(
        served
            .daemon
            .wait_for_message("has 8388608 bytes, less than the 16777216 the guest was promised"),
        "{}",
        served.daemon.stderr()
    );
    assert_eq!(
        front.capacity(),
        16 * MIB,
        "what was promised stays promised"
    );
    let gpa = front.disk.mem().alloc(4096, 4096);
    let lost = Request::read(12 * MIB / SECTOR, &[Seg::writable(gpa, 4096)]);
    assert_eq!(front.disk.run(0, &lost).status, status::IOERR);
    front.disk.write(0, 0, &[1; 4096]);
    assert_eq!(front.disk.read(0, 0, 4096), [1; 4096], "the rest is served");
    let error = resize(&served, &Value::Null).expect_err("it is still too small");
    assert!(error.contains("8388608 bytes are less"), "{error}");

    // It comes back, and grows.
    truncate(&served, 20 * MIB);
    assert_eq!(front.told(), 20 * MIB);
    assert_eq!(front.try_at(12 * MIB), DONE);
    let warnings = served.daemon.stderr();
    assert_eq!(warnings.matches("cannot be read").count(), 1, "{warnings}");
}

#[test]
fn a_disk_grows_under_load_and_while_its_scheduler_changes() {
    let served = Served::start(Spec::image(64 * MIB), &["--workers", "2", "--serial", "s"]);
    let mut front = Listening::attach(&served, 4);
    let gpas: Vec<u64> = (0..4)
        .map(|_| front.disk.mem().alloc(8 * 4096, 4096))
        .collect();
    let mut queues = std::mem::take(&mut front.disk.queues);
    let stop = &AtomicBool::new(false);
    let requests: u64 = std::thread::scope(|scope| {
        let load: Vec<_> = queues
            .iter_mut()
            .zip(gpas)
            .map(|(queue, gpa)| scope.spawn(move || verify(queue, gpa, stop)))
            .collect();
        scope.spawn(|| {
            for scheduler in ["mq-deadline", "kyber", "none"].iter().cycle() {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                served.patch("s", json!({ "scheduler": scheduler }));
            }
        });
        for round in 1..=20 {
            let size = (64 + round) * MIB;
            if round % 2 == 0 {
                truncate(&served, size);
            } else {
                resize(&served, &json!({ "size_bytes": size })).expect("it grows");
            }
            // The image's closing may be noticed by the daemon after it was told, so the news
            // may come twice; the size is the same.
            let begin = Instant::now();
            while front.told() != size {
                assert!(begin.elapsed() < DEADLINE, "{size} bytes do not come");
            }
        }
        stop.store(true, Ordering::Relaxed);
        load.into_iter()
            .map(|queue| queue.join().expect("its data is right"))
            .sum()
    });
    assert!(requests > 0);
    front.disk.queues = queues;
    assert_eq!(front.try_at(84 * MIB - 4096), DONE);
    assert_eq!(front.try_at(84 * MIB), REFUSED);
}

#[test]
fn read_only_and_null_disks_grow_as_far_as_they_can() {
    let served = Served::start(Spec::image(16 * MIB).read_only(), &["--serial", "s"]);
    let mut front = Listening::attach(&served, 1);
    let error = resize(&served, &json!({ "size_bytes": 20 * MIB })).expect_err("not ours");
    assert!(error.contains("the disk is read-only"), "{error}");
    truncate(&served, 20 * MIB);
    assert_eq!(front.told(), 20 * MIB);
    assert_eq!(front.disk.read(0, 20 * MIB / SECTOR - 8, 4096), [0; 4096]);

    let served = Served::start(Spec::null(16 * MIB), &["--serial", "s"]);
    let mut front = Listening::attach(&served, 1);
    assert_eq!(front.try_at(16 * MIB), REFUSED);
    let grown = resize(&served, &json!({ "size_bytes": 1_u64 << 40 })).expect("it costs nothing");
    assert_eq!(grown["size_bytes"], 1_u64 << 40);
    assert_eq!(front.told(), 1 << 40);
    assert_eq!(front.try_at((1 << 40) - 4096), DONE);
    let error = resize(&served, &json!({ "size_bytes": MIB })).expect_err("it would shrink");
    assert!(error.contains("does not shrink"), "{error}");
    for (body, part) in [
        (
            json!({ "size_bytes": (1_u64 << 41) + 1 }),
            "not a multiple of the logical block size 512",
        ),
        (json!({ "size_bytes": -1 }), "not understood"),
        (json!({ "size": 1 }), "unknown field `size`"),
    ] {
        let error = resize(&served, &body).expect_err("it is refused");
        assert!(error.contains(part), "{error}");
    }
}

/// A loop device over a file, while it lives.
struct Loop {
    path: String,
    backing: tempfile::NamedTempFile,
}

impl Loop {
    /// `None` where this user may not make one.
    fn new(bytes: u64) -> Option<Loop> {
        let backing = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).expect("a file");
        backing.as_file().set_len(bytes).expect("a sparse file");
        let made = Command::new("losetup")
            .args(["-f", "--show"])
            .arg(backing.path())
            .output()
            .ok()
            .filter(|made| made.status.success())?;
        let path = String::from_utf8(made.stdout).expect("a path");
        Some(Loop {
            path: path.trim().to_owned(),
            backing,
        })
    }

    fn grow(&self, bytes: u64) {
        self.backing.as_file().set_len(bytes).expect("it grows");
        let told = Command::new("losetup")
            .args(["-c", &self.path])
            .status()
            .expect("losetup runs");
        assert!(told.success());
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.path]).status();
    }
}

#[test]
fn a_block_device_that_grows_is_noticed() {
    let Some(device) = Loop::new(16 * MIB) else {
        eprintln!("skipped: no loop device for this user");
        return;
    };
    let served = Served::start(Spec::path(device.path.as_ref()), &["--serial", "s"]);
    let mut front = Listening::attach(&served, 1);
    let error = resize(&served, &json!({ "size_bytes": 24 * MIB })).expect_err("not ours");
    assert!(
        error.contains("a block device has its own size, now 16777216"),
        "{error}"
    );
    device.grow(24 * MIB);
    // Containers do not get the kernel's events; there it has to be said.
    let grown = resize(&served, &Value::Null).expect("it grew");
    assert_eq!(grown["size_bytes"], 24 * MIB);
    assert_eq!(front.told(), 24 * MIB);
    assert_eq!(front.try_at(24 * MIB - 4096), DONE);
    assert_eq!(front.try_at(24 * MIB), REFUSED);
}
