//! Guest memory that is not what the front end says, or does not stay so.

use crate::stage::{DISK, Stage};
use crate::support::disk::kind;
use crate::support::*;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use vhost::vhost_user::VhostUserFrontend;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};

const PAGE: u64 = 4096;
const GONE: &str = "disk attacked: the session was closed: the guest's memory is gone";

fn memfd(len: u64) -> OwnedFd {
    let file =
        memfd_create("memory", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).expect("a memfd");
    ftruncate(&file, len).expect("of any size");
    file
}

fn region(file: &impl AsFd, gpa: u64, size: u64) -> VhostUserMemoryRegionInfo {
    VhostUserMemoryRegionInfo {
        guest_phys_addr: gpa,
        memory_size: size,
        userspace_addr: 0x7000_0000_0000 + gpa % (1 << 40),
        mmap_offset: 0,
        mmap_handle: file.as_fd().as_raw_fd(),
    }
}

/// A session without memory of its own, that gives these regions in one table and then one by one: both are refused, and
/// the log says `text`.
fn refused(stage: &Stage, regions: &[VhostUserMemoryRegionInfo], text: &str) {
    let front = stage.front();
    assert!(front.vhost.set_mem_table(regions).is_err());
    assert!(front.is_closed());
    stage.told(text);

    let mut front = stage.front();
    // Makes room for whatever comes.
    for region in front.region_infos() {
        front.vhost.remove_mem_region(&region).expect("it is there");
    }
    let added = regions
        .iter()
        .try_for_each(|region| front.vhost.add_mem_region(region).map(drop));
    assert!(added.is_err());
    assert!(front.is_closed());
    stage.told(text);
}

/// Fills the queue with reads and writes all over the disk and the guest's memory.
fn load(queue: &mut Queue, gpa: u64, span: u64) {
    for n in 0..60 {
        let at = gpa + n * 8192 % span;
        let (op, seg) = match n % 2 {
            0 => (kind::OUT, Seg::readable(at, 4096)),
            _ => (kind::IN, Seg::writable(at, 4096)),
        };
        if queue.push(n, op, 0, n * 8, &[seg]).is_none() {
            break;
        }
    }
    queue.publish();
}

attacks! {
    fn a_region_longer_than_its_file(stage) {
        let file = memfd(PAGE);
        refused(stage, &[region(&file, 0, 2 * PAGE)], "bytes of a file that has 0x1000");
        let beyond = VhostUserMemoryRegionInfo { mmap_offset: PAGE, ..region(&file, 0, PAGE) };
        refused(stage, &[beyond], "bytes of a file that has 0x1000");
    }

    /// Memory goes away while requests are read from it and written to it: SIGBUS, at the ring, at a header, at a
    /// status byte or in a system call, whatever comes first.
    fn memory_truncated_under_load(stage) {
        for keep in [0, 4096, 64 << 10, 32 << 20] {
            let mut disk = stage.attach(2);
            let gpa = disk.mem().alloc(1 << 20, 4096);
            for queue in &mut disk.queues {
                load(queue, gpa, 1 << 20);
            }
            disk.queues[0].wait(DEADLINE).expect("it is served");
            // Whatever is left of the mapping here must not be touched any more either.
            let Disk { front, mut queues, .. } = disk;
            let file = front.mem.regions()[0].fd();
            ftruncate(file, keep).expect("a memfd shrinks");
            for queue in &mut queues {
                queue.kick();
            }
            if keep == 0 {
                assert!(front.is_closed(), "a session without memory ends");
                stage.told(GONE);
            }
        }
    }

    /// The truncated file is found by whoever looks at the ring first, which is the control plane.
    fn memory_truncated_before_the_ring_starts(stage) {
        let mut front = stage.front();
        let queue = front.prepare_queue(0, QueueSetup::default()).expect("a queue");
        ftruncate(front.mem.regions()[0].fd(), 0).expect("a memfd shrinks");
        // The ring's used index is read here, or when it starts.
        let [desc, avail, used] = queue.ring_addresses().map(|gpa| front.mem.user_address(gpa));
        let config = vhost::VringConfigData {
            queue_max_size: queue.size(),
            queue_size: queue.size(),
            flags: 0,
            desc_table_addr: desc,
            used_ring_addr: used,
            avail_ring_addr: avail,
            log_addr: None,
        };
        front.vhost.set_vring_num(0, queue.size()).expect("a good size");
        front.vhost.set_vring_base(0, 0).expect("a good base");
        // Whether this is answered or not is a matter of time.
        let _ = front.vhost.set_vring_addr(0, &config);
        let _ = front.send_kick(&queue);
        assert!(front.is_closed());
        stage.told(GONE);
    }

    fn overlapping_regions(stage) {
        let file = memfd(8 * PAGE);
        let text = "overlap";
        refused(stage, &[region(&file, 0, 2 * PAGE), region(&file, PAGE, 2 * PAGE)], text);
        refused(stage, &[region(&file, PAGE, PAGE), region(&file, 0, 8 * PAGE)], text);
    }

    /// Not an attack after all: the order means nothing.
    fn regions_in_any_order(stage) {
        let setup = Setup {
            memory: vec![(0, 16 << 20), (64 << 20, 16 << 20), (256 << 20, 16 << 20)],
            ..Setup::default()
        };
        let mut front = Front::connect(stage.socket(), &setup).expect("a session");
        let mut regions = front.region_infos();
        regions.reverse();
        front.vhost.set_mem_table(&regions).expect("the last region first");
        for region in &regions {
            front.vhost.remove_mem_region(region).expect("it is there");
        }
        for at in [1, 2, 0] {
            front.vhost.add_mem_region(&regions[at]).expect("one by one, in no order");
        }
        let mut queue = front.queue(0, QueueSetup { region: 2, ..QueueSetup::default() }).expect("a queue");
        let gpa = front.mem.alloc_in(1, 4096, 4096);
        let done = Request::read(0, &[Seg::writable(gpa, 4096)]).run(&mut queue);
        assert_eq!((done.status, done.len), (0, 4097));
    }

    fn regions_that_wrap(stage) {
        let file = memfd(PAGE);
        let text = "run past the end";
        refused(stage, &[region(&file, u64::MAX - PAGE + 1, 2 * PAGE)], text);
        refused(stage, &[region(&file, 0, u64::MAX)], text);
        let user = VhostUserMemoryRegionInfo { userspace_addr: u64::MAX - 5, ..region(&file, 0, PAGE) };
        refused(stage, &[user], text);
        let offset = VhostUserMemoryRegionInfo { mmap_offset: u64::MAX - 5, ..region(&file, 0, PAGE) };
        refused(stage, &[offset], text);
    }

    fn an_empty_region(stage) {
        let file = memfd(PAGE);
        let mut front = stage.front();
        // The crate's front end refuses to say such things.
        let words = [1_u64, 0, 0, 0, 0].map(u64::to_ne_bytes).concat();
        front.send_raw(5, 1, &words, &[file.as_fd()]).expect("it is sent");
        assert!(front.is_closed());
        stage.told("memory region at guest address 0x0 is empty");
        front = stage.front();
        let words = [0_u64; 5].map(u64::to_ne_bytes).concat();
        front.send_raw(37, 1, &words, &[file.as_fd()]).expect("it is sent");
        assert!(front.is_closed());
    }

    fn more_regions_than_slots(stage) {
        let file = memfd(PAGE);
        let mut front = stage.front();
        let mut added = 1;
        let refused = loop {
            let region = region(&file, (1 << 40) + added * PAGE, PAGE);
            match front.vhost.add_mem_region(&region) {
                Ok(_) => added += 1,
                Err(_) => break added,
            }
        };
        assert_eq!(refused, 509);
        assert!(front.is_closed());
        stage.told("510 memory regions, expected 1 to 509");
    }

    fn memory_that_is_no_file(stage) {
        let (socket, _peer) = UnixStream::pair().expect("sockets");
        let event = Event::new().expect("an eventfd");
        let directory = std::fs::File::open(stage.daemon.dir()).expect("a directory");
        let read_only = std::fs::File::open(stage.daemon.image()).expect("a file");
        for fd in [socket.as_fd(), event.as_fd(), directory.as_fd(), read_only.as_fd()] {
            refused(stage, &[region(&fd, 0, PAGE)], "expected a file open for");
        }
    }

    /// What only the mapping itself finds out.
    fn memory_that_cannot_be_mapped(stage) {
        let file = memfd(8 * PAGE);
        let text = "the device closed the session because it could not carry out a request";
        let odd = VhostUserMemoryRegionInfo { mmap_offset: 5, ..region(&file, 0, PAGE) };
        refused(stage, &[odd], text);
        let sealed = memfd(PAGE);
        fcntl_add_seals(&sealed, SealFlags::WRITE).expect("a seal");
        refused(stage, &[region(&sealed, 0, PAGE)], text);
        let device = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null").expect("it is there");
        refused(stage, &[region(&device, 0, PAGE)], text);
    }

    /// A TiB that is not there costs nothing.
    fn a_region_of_a_tebibyte(stage) {
        let before = stage.daemon.stats().rss_kib;
        let mut disk = stage.attach(1);
        let file = memfd(1 << 40);
        disk.front.vhost.add_mem_region(&region(&file, 1 << 41, 1 << 40)).expect("sparse is fine");
        let mut queue = disk.queues.remove(0);
        let last = (1 << 41) + (1 << 40) - 4096;
        let done = Request::read(0, &[Seg::writable(last, 4096)]).run(&mut queue);
        assert_eq!((done.status, done.len), (0, 4097));
        let after = stage.daemon.stats().rss_kib;
        assert!(after < before + 8192, "from {before} to {after} KiB");
    }

    /// The region with the rings goes while they are used: they stop, and their driver is told.
    fn the_rings_memory_is_removed_under_load(stage) {
        let mut disk = stage.attach(1);
        let err = Event::new().expect("an eventfd");
        disk.front
            .send_vring_fd(front::request::SET_VRING_ERR, 0, Some(err.as_fd()))
            .expect("the error eventfd is set");
        let gpa = disk.mem().alloc(1 << 20, 4096);
        load(&mut disk.queues[0], gpa, 1 << 20);
        let regions = disk.front.region_infos();
        disk.front.vhost.remove_mem_region(&regions[0]).expect("it goes");
        assert_eq!(err.wait(DEADLINE), 1, "the front end is told");
        stage.told("is not in one region of guest memory");
        // It may come back, and the ring with it.
        disk.front.vhost.add_mem_region(&regions[0]).expect("it returns");
        disk.front.stop(0).expect("the ring stops");
        disk.queues[0].reset(0);
        disk.front.start(&disk.queues[0]).expect("the ring starts");
        disk.front.enable(0, true).expect("the ring is enabled");
        disk.read(0, 0, 4096);
    }

    /// Regions come and go as fast as they can, under load.
    fn memory_changes_all_the_time(stage) {
        let mut disk = stage.attach(1);
        let gpa = disk.mem().alloc(1 << 20, 4096);
        let file = memfd(16 * PAGE);
        for round in 0..50 {
            load(&mut disk.queues[0], gpa, 1 << 20);
            let more = region(&file, (1 << 40) + round % 3 * PAGE, PAGE);
            disk.front.vhost.add_mem_region(&more).expect("one more");
            disk.front.send_memory(false).expect("all at once, again");
            while disk.queues[0].in_flight() > 0 {
                let done = disk.queues[0].wait(DEADLINE).expect("it is served");
                assert_eq!(done.status, 0);
            }
        }
        assert_eq!(disk.read(0, DISK / SECTOR - 8, 4096).len(), 4096);
    }
}
