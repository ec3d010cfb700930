//! A disk on a file system that is frozen, and disks of the same worker that are not.

use super::*;
use serde_json::json;

/// Requests in flight on the frozen disk: twice the tags of its worker.
const STUCK: usize = 512;

/// A file system that is frozen until this ends.
struct Frozen<'a>(&'a Mount);

impl Frozen<'_> {
    fn freeze(mount: &Mount) -> Frozen<'_> {
        run("fsfreeze", &["--freeze", text(mount.dir.path())]);
        Frozen(mount)
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        let path = text(self.0.dir.path());
        let _ = Command::new("fsfreeze").args(["--unfreeze", path]).status();
    }
}

/// A daemon with a disk in `mount` and one in memory, on one worker.
fn beside_memory(mount: &Mount, memory: &Mount) -> (Served, PathBuf) {
    let image = mount.image(32 << 20);
    let socket = memory.path("other.sock");
    let other = memory.path("other.img");
    fs::write(&other, vec![7; 1 << 20]).expect("an image");
    let other = format!(
        "socket-path={},blk-file={},serial=other",
        text(&socket),
        text(&other)
    );
    let dir = tempfile::tempdir().expect("a directory");
    let control = dir.path().join("control.sock");
    let spec = Spec::path(&image)
        .queues(64)
        .args(["--control-path", text(&control), "--workers", "1"])
        .args(["--disk", &other]);
    let served = Served {
        daemon: Daemon::start_ours(&spec),
        _dir: dir,
        control: control.clone(),
    };
    (served, socket)
}

/// Writes on all queues, as many as [`STUCK`] together, far from each other.
fn stuck_writes(disk: &mut Disk) {
    let gpa = disk.mem().alloc(4096, 4096);
    let each = STUCK / disk.queues.len();
    for (at, queue) in disk.queues.iter_mut().enumerate() {
        for n in 0..each {
            let sector = ((at * each + n) * 16) as u64;
            write_at(gpa, sector, 4096).push(queue, n as u64);
        }
        queue.publish();
    }
}

fn wait_in_flight(served: &Served, count: u64) {
    let deadline = Instant::now() + DEADLINE;
    while served.disk(0)["stats"]["in_flight"] != json!(count) {
        let shown = served.disk(0);
        assert!(Instant::now() < deadline, "{}", shown["stats"]);
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

/// The neighbour was idle, and has not even connected, while the frozen disk took what there was.
fn neighbour_is_served(queues: usize) {
    if !may_mount() {
        return;
    }
    let (mount, memory) = (Mount::ext4("defaults"), Mount::tmpfs(4 << 20));
    let (served, socket) = beside_memory(&mount, &memory);
    let setup = QueueSetup {
        size: if queues == 1 { 1024 } else { 128 },
        ..QueueSetup::default()
    };
    let mut stuck = Disk::attach_with(served.daemon.socket(), &Setup::default(), queues, setup)
        .expect("a session");
    let frozen = Frozen::freeze(&mount);
    stuck_writes(&mut stuck);
    wait_in_flight(&served, STUCK as u64);
    let mut other = Disk::attach(&socket, 2);
    for sector in 0..100 {
        assert_eq!(other.read(sector % 2, sector as u64 * 8, 4096), [7; 4096]);
    }
    drop(frozen);
    let each = STUCK / queues;
    for queue in &mut stuck.queues {
        let done = finish_all(queue, each);
        assert!(done.iter().all(|done| done.status == status::OK));
    }
}

#[test]
fn a_frozen_disk_with_one_deep_queue_leaves_its_neighbour_its_tags() {
    neighbour_is_served(1);
}

#[test]
fn a_frozen_disk_with_64_queues_leaves_its_neighbour_its_tags() {
    neighbour_is_served(64);
}

/// More clients than the control socket answers at a time.
#[test]
fn while_a_size_waits_for_a_frozen_disk_everything_else_can_be_changed() {
    if !may_mount() {
        return;
    }
    let (mount, memory) = (Mount::ext4("defaults"), Mount::tmpfs(4 << 20));
    let (served, _) = beside_memory(&mount, &memory);
    let ask = |method: &str, path: &str, body: Value| {
        let answer = client::ask(&served.control, method, path, Some(&body));
        answer.map_err(|error| error.to_string())
    };
    let resize = |disk: &str, bytes: u64| {
        ask(
            "POST",
            &format!("/v1/disks/{disk}/resize"),
            json!({ "size_bytes": bytes }),
        )
    };
    let frozen = Frozen::freeze(&mount);
    std::thread::scope(|scope| {
        let (tell, told) = std::sync::mpsc::channel();
        // As many as may be connected at a time, but for one.
        for _ in 0..7 {
            let (tell, resize) = (tell.clone(), &resize);
            scope.spawn(move || tell.send(resize("@0", 33 << 20)));
        }
        // One of them waits for the storage, and the others are not made to.
        for _ in 0..6 {
            let refused = told
                .recv_timeout(DEADLINE)
                .expect("all others are answered");
            let refused = refused.expect_err("another is under way");
            assert!(
                refused.contains("the disk's size is being changed"),
                "{refused}"
            );
        }
        ask(
            "PATCH",
            "/v1/disks/@0",
            json!({ "limits": { "iops": 100 } }),
        )
        .expect("limits are");
        ask("PATCH", "/v1/disks/@0", json!({ "scheduler": "kyber" }))
            .expect("nothing is in flight");
        resize("@1", 2 << 20).expect("the other disk's is");
        assert_eq!(served.disk(0)["size_bytes"], json!(32_u64 << 20));
        drop(frozen);
        let last = told.recv_timeout(DEADLINE).expect("it is answered, too");
        last.expect("it has grown");
    });
    assert_eq!(served.disk(0)["size_bytes"], json!(33_u64 << 20));
}

/// A client waits that holds the control socket, for a disk that holds the end of the process up.
#[test]
fn the_control_sockets_path_goes_when_the_end_begins() {
    if !may_mount() {
        return;
    }
    let (mount, memory) = (Mount::ext4("defaults"), Mount::tmpfs(4 << 20));
    let (served, _) = beside_memory(&mount, &memory);
    let mut stuck = Disk::attach(served.daemon.socket(), 1);
    let frozen = Frozen::freeze(&mount);
    let gpa = stuck.mem().alloc(4096, 4096);
    write_at(gpa, 4096, 4096).push(&mut stuck.queues[0], 7);
    stuck.queues[0].publish();
    wait_in_flight(&served, 1);
    std::thread::scope(|scope| {
        let control = &served.control;
        let (tell, told) = std::sync::mpsc::channel();
        for _ in 0..2 {
            let tell = tell.clone();
            scope.spawn(move || {
                let kyber = json!({ "scheduler": "kyber" });
                tell.send(client::ask(control, "PATCH", "/v1/disks/@0", Some(&kyber)).is_ok())
            });
        }
        assert_eq!(
            told.recv_timeout(DEADLINE),
            Ok(false),
            "another is under way"
        );
        served.daemon.signal(Signal::TERM);
        let deadline = Instant::now() + DEADLINE;
        while control.exists() {
            assert!(Instant::now() < deadline, "its path stays");
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        assert!(
            !stuck.queues[0].has_completions(),
            "it does not wait for the disk"
        );
        drop(frozen);
        let _ = told.recv_timeout(DEADLINE).expect("the other is answered");
    });
    assert_eq!(finish(&mut stuck.queues[0]).status, status::OK);
    let Served { mut daemon, .. } = served;
    assert!(daemon.wait_exit().success());
}

#[test]
fn while_a_scheduler_waits_for_a_frozen_disk_everything_else_can_be_changed() {
    if !may_mount() {
        return;
    }
    let (mount, memory) = (Mount::ext4("defaults"), Mount::tmpfs(4 << 20));
    let (served, _) = beside_memory(&mount, &memory);
    let patch = |disk: &str, body: Value| {
        let path = format!("/v1/disks/{disk}");
        client::ask(&served.control, "PATCH", &path, Some(&body)).map_err(|error| error.to_string())
    };
    let mut stuck = Disk::attach(served.daemon.socket(), 1);
    stuck.write(0, 0, &[1; 4096]);
    let frozen = Frozen::freeze(&mount);
    let gpa = stuck.mem().alloc(4096, 4096);
    write_at(gpa, 4096, 4096).push(&mut stuck.queues[0], 7);
    stuck.queues[0].publish();
    wait_in_flight(&served, 1);
    std::thread::scope(|scope| {
        let (tell, told) = std::sync::mpsc::channel();
        for _ in 0..2 {
            let (tell, patch) = (tell.clone(), &patch);
            scope.spawn(move || tell.send(patch("@0", json!({ "scheduler": "kyber" }))));
        }
        // One of them waits for what is in flight, and the other is not made to.
        let first = told.recv_timeout(DEADLINE).expect("one is answered");
        let refused = first.expect_err("the other is under way");
        assert!(refused.contains("is being switched"), "{refused}");
        for disk in ["@0", "@1"] {
            patch(disk, json!({ "limits": { "iops": 100 } })).expect("limits are");
        }
        patch("@1", json!({ "scheduler": "kyber" })).expect("the other disk's is");
        let group = json!({ "limits": { "iops": 100 } });
        client::ask(&served.control, "PUT", "/v1/groups/g", Some(&group)).expect("a group is");
        patch("@0", json!({ "group": "g" })).expect("and the disk can join it");
        drop(frozen);
        let second = told.recv_timeout(DEADLINE).expect("the other is too");
        second.expect("it is switched");
    });
    assert_eq!(served.disk(0)["scheduler"], "kyber");
    assert_eq!(finish(&mut stuck.queues[0]).status, status::OK);
}
