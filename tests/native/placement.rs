//! Where workers run, and many queues and disks on few of them.

use crate::support::*;
use std::fs;
use std::path::{Path, PathBuf};

/// Of each worker's thread: the CPUs it may run on.
fn cpus_of_workers(pid: u32) -> Vec<(String, String)> {
    let mut workers: Vec<_> = fs::read_dir(format!("/proc/{pid}/task"))
        .expect("a process has threads")
        .flatten()
        .filter_map(|task| {
            let name = fs::read_to_string(task.path().join("comm")).ok()?;
            let status = fs::read_to_string(task.path().join("status")).ok()?;
            let list = status.split("Cpus_allowed_list:").nth(1)?;
            let list = list.lines().next()?.trim().to_owned();
            let name = name.trim().to_owned();
            name.starts_with("worker-").then_some((name, list))
        })
        .collect();
    workers.sort();
    workers
}

/// The last CPU that this process may use.
fn a_cpu() -> String {
    let cpus = rustix::thread::sched_getaffinity(None).expect("a mask");
    let last = (0..1024).rfind(|cpu| cpus.is_set(*cpu));
    last.expect("at least one").to_string()
}

#[test]
fn workers_run_on_the_cpus_they_were_given() {
    let cpu = a_cpu();
    let spec = Spec::image(1 << 20).args(["--workers", "3", "--worker-cpus", &cpu]);
    let daemon = Daemon::start_ours(&spec);
    let named = |nth: usize| (format!("worker-{nth}"), cpu.clone());
    assert_eq!(
        cpus_of_workers(daemon.pid()),
        (0..3).map(named).collect::<Vec<_>>()
    );
    let mut disk = Disk::attach(daemon.socket(), 3);
    for queue in 0..3 {
        disk.write(queue, 8 * queue as u64, &[7; 4096]);
        assert_eq!(disk.read(queue, 8 * queue as u64, 4096), [7; 4096]);
    }
}

/// A pattern that tells who wrote it where.
fn pattern(who: usize, block: u64) -> Vec<u8> {
    let mut rng = Rng::new((who as u64) << 32 | block);
    rng.bytes(4096)
}

/// Blocks of each queue or disk, all in flight before the first is waited for.
const BLOCKS: u64 = 8;

/// All write at once, then all read at once what another queue wrote.
fn write_and_read_all(disk: &mut Disk, from: usize, base: u64) {
    let queues = disk.queues.len();
    let gpa = disk.mem().alloc(4096 * BLOCKS as usize * queues, 4096);
    let at = |queue: usize, block: u64| gpa + (queue as u64 * BLOCKS + block) * 4096;
    let sector = |queue: usize, block: u64| base + (queue as u64 * BLOCKS + block) * 8;
    for queue in 0..queues {
        for block in 0..BLOCKS {
            disk.mem()
                .write(at(queue, block), &pattern(from + queue, block));
            let data = [Seg::readable(at(queue, block), 4096)];
            Request::write(sector(queue, block), &data).push(&mut disk.queues[queue], block);
        }
        disk.queues[queue].publish();
    }
    finish(disk, BLOCKS as usize);
    for queue in 0..queues {
        let other = (queue + 17) % queues;
        for block in 0..BLOCKS {
            disk.mem().fill(at(queue, block), 4096, 0);
            let data = [Seg::writable(at(queue, block), 4096)];
            Request::read(sector(other, block), &data).push(&mut disk.queues[queue], block);
        }
        disk.queues[queue].publish();
    }
    finish(disk, BLOCKS as usize);
    for queue in 0..queues {
        let other = (queue + 17) % queues;
        for block in 0..BLOCKS {
            let read = disk.mem().read_vec(at(queue, block), 4096);
            assert!(
                read == pattern(from + other, block),
                "queue {queue}, block {block}"
            );
        }
    }
}

fn finish(disk: &mut Disk, each: usize) {
    for queue in &mut disk.queues {
        for done in disk::finish_all(queue, each) {
            assert_eq!(done.status, disk::status::OK);
        }
    }
}

#[test]
fn sixty_four_queues_are_served_by_two_workers() {
    let spec = Spec::image(64 << 20).queues(64).args(["--workers", "2"]);
    let daemon = Daemon::start_ours(&spec);
    let mut disk = Disk::attach(daemon.socket(), 64);
    for round in 0..4 {
        write_and_read_all(&mut disk, 100 * round, 0);
    }
    drop(disk);
    let summary = daemon.stop();
    let of = |worker| {
        summary
            .queues()
            .iter()
            .filter(|q| q.worker == worker)
            .count()
    };
    assert_eq!((of(0), of(1)), (32, 32));
    assert!(
        summary
            .queues()
            .iter()
            .all(|q| q.requests == 4 * 2 * BLOCKS)
    );
}

#[test]
fn sixty_four_disks_are_served_by_two_workers() {
    let dir = tempfile::tempdir().expect("a directory");
    let socket = |nth: usize| -> PathBuf { dir.path().join(format!("{nth}.sock")) };
    let disk_of = |nth: usize| {
        let image = dir.path().join(format!("{nth}.img"));
        fs::File::create(&image)
            .expect("an image")
            .set_len(1 << 20)
            .expect("a size");
        format!(
            "socket-path={},blk-file={}",
            socket(nth).display(),
            image.display()
        )
    };
    let others = (1..64).flat_map(|nth| ["--disk".to_owned(), disk_of(nth)]);
    let spec = Spec::image(1 << 20)
        .queues(2)
        .args(["--workers", "2"])
        .args(others);
    let daemon = Daemon::start_ours(&spec);
    let sockets: Vec<PathBuf> = (1..64).map(socket).collect();
    let sockets = std::iter::once(daemon.socket().to_path_buf()).chain(sockets);
    let setup = Setup {
        memory: vec![(0, 4 << 20)],
        ..Setup::default()
    };
    let attach =
        |path: &Path| Disk::attach_with(path, &setup, 2, QueueSetup::default()).expect("a session");
    let mut disks: Vec<Disk> = sockets.map(|path| attach(&path)).collect();
    for (nth, disk) in disks.iter_mut().enumerate() {
        write_and_read_all(disk, 2 * nth, 0);
    }
    // Nobody wrote to somebody else's.
    for (nth, disk) in disks.iter_mut().enumerate() {
        assert!(disk.read(0, 8, 4096) == pattern(2 * nth, 1), "disk {nth}");
    }
    drop(disks);
    let summary = daemon.stop();
    let queues = summary.disks.iter().flat_map(|disk| &disk.queues);
    assert_eq!(queues.clone().count(), 128);
    assert_eq!(queues.filter(|queue| queue.worker == 0).count(), 64);
}

/// Pages of 2 MiB that the kernel keeps for the test, and gives back.
struct HugePages {
    before: String,
}

const RESERVED: &str = "/proc/sys/vm/nr_hugepages";

impl HugePages {
    /// `None` where they cannot be had: not root, or memory too scattered.
    fn reserve(count: u64) -> Option<HugePages> {
        let before = fs::read_to_string(RESERVED).ok()?;
        let already: u64 = before.trim().parse().ok()?;
        fs::write(RESERVED, (already + count).to_string()).ok()?;
        let pages = HugePages { before };
        let now: u64 = fs::read_to_string(RESERVED).ok()?.trim().parse().ok()?;
        (now >= already + count).then_some(pages)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = fs::write(RESERVED, self.before.trim());
    }
}

#[test]
fn guest_memory_may_be_huge_pages() {
    let Some(_pages) = HugePages::reserve(8) else {
        println!("no huge pages to be had here");
        return;
    };
    let daemon = Daemon::start_ours(&Spec::image(8 << 20));
    let setup = Setup {
        memory: vec![(0, 8 << 20), (1 << 32, 4 << 20)],
        huge_pages: true,
        ..Setup::default()
    };
    let mut disk =
        Disk::attach_with(daemon.socket(), &setup, 2, QueueSetup::default()).expect("a session");
    write_and_read_all(&mut disk, 0, 0);
    // A buffer across pages, and one in the other region.
    let bytes = Rng::new(1).bytes(1 << 20);
    for gpa in [(2 << 20) - (512 << 10), 1 << 32] {
        disk.mem().write(gpa, &bytes);
        let out = [Seg::readable(gpa, bytes.len())];
        let done = disk.run(0, &Request::write(1024, &out));
        assert_eq!(done.status, disk::status::OK);
        disk.mem().fill(gpa, bytes.len(), 0);
        let into = [Seg::writable(gpa, bytes.len())];
        let done = disk.run(1, &Request::read(1024, &into));
        assert_eq!(
            (done.status, done.len as usize),
            (disk::status::OK, bytes.len() + 1)
        );
        assert!(disk.mem().read_vec(gpa, bytes.len()) == bytes);
    }
}
