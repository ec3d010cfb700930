//! A guest that breaks its rings. Nothing of this crosses the socket: only memory is written.

use crate::stage::{DISK, Stage};
use crate::support::disk::{finish, finish_all, kind, status};
use crate::support::driver::{INDIRECT, NEXT, RawDesc, WRITE, write_table};
use crate::support::front::request::SET_VRING_ERR;
use crate::support::*;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use vhost::{VhostBackend, VringConfigData};

/// A disk with two queues and the first one's error eventfd.
fn attach(stage: &Stage) -> (Disk, Event) {
    let mut disk = stage.attach(2);
    let err = watch(&mut disk);
    (disk, err)
}

fn watch(disk: &mut Disk) -> Event {
    let err = Event::new().expect("an eventfd");
    disk.front
        .send_vring_fd(SET_VRING_ERR, 0, Some(err.as_fd()))
        .expect("the error eventfd is set");
    err
}

/// The first queue has been broken by `how`: its driver is told by the eventfd, the log says `text`, its sibling goes
/// on, and it works again when it was stopped and started.
fn stops(stage: &Stage, text: &str, how: impl FnOnce(&mut Disk)) {
    let (mut disk, err) = attach(stage);
    disk.read(0, 0, 512);
    how(&mut disk);
    disk.queues[0].kick();
    assert_eq!(err.wait(DEADLINE), 1, "the front end is told");
    stage.told(text);
    disk.read(1, 0, 4096);
    disk.front.stop(0).expect("the ring stops");
    disk.queues[0].reset(0);
    disk.front.start(&disk.queues[0]).expect("the ring starts");
    disk.front.enable(0, true).expect("the ring is enabled");
    disk.read(0, 0, 4096);
}

/// Writes `chain` to the first descriptors of the first queue's table and makes descriptor 0 available.
fn put(disk: &mut Disk, chain: &[RawDesc]) {
    let queue = &mut disk.queues[0];
    for (index, desc) in (0..).zip(chain) {
        queue.poke_desc(index, *desc);
    }
    queue.poke_head(0, None);
    let index = queue.avail_idx();
    queue.poke_avail_idx(index);
}

fn desc(addr: u64, len: u32, flags: u16, next: u16) -> RawDesc {
    RawDesc {
        addr,
        len,
        flags,
        next,
    }
}

/// A header of a read of sector 0 in guest memory.
fn header(disk: &Disk) -> u64 {
    disk.mem().alloc(16, 16)
}

/// Sets up queue 3 with its parts at these offsets from the start of the last region; whether it is taken.
fn place(stage: &Stage, size: u16, offsets: [u64; 3]) -> bool {
    let setup = Setup {
        memory: vec![(0, 32 << 20), (1 << 30, 1 << 20)],
        ..Setup::default()
    };
    let mut disk =
        Disk::attach_with(stage.socket(), &setup, 1, QueueSetup::default()).expect("a session");
    let base = disk.mem().user_address(1 << 30);
    let [desc, avail, used] = offsets.map(|offset| base + offset);
    let config = VringConfigData {
        queue_max_size: size,
        queue_size: size,
        flags: 0,
        desc_table_addr: desc,
        avail_ring_addr: avail,
        used_ring_addr: used,
        log_addr: None,
    };
    let front = &mut disk.front;
    let kick = Event::new().expect("an eventfd");
    let taken = front
        .vhost
        .set_vring_num(3, size)
        .and_then(|()| front.vhost.set_vring_base(3, 0))
        .and_then(|()| front.vhost.set_vring_addr(3, &config))
        .and_then(|()| front.send_vring_fd(12, 3, Some(kick.as_fd())))
        .and_then(|()| front.enable(3, true))
        .is_ok();
    if taken {
        disk.read(0, 0, 4096);
    }
    taken
}

attacks! {
    /// Up to the last byte of its region, but not a byte further.
    fn a_ring_at_the_edge_of_its_region(stage) {
        let end = 1 << 20;
        // 16 entries with event index: 256, 38 and 134 bytes.
        assert!(place(stage, 16, [end - 256, 0, 4096]));
        assert!(place(stage, 16, [0, end - 38, 4096]));
        // The used ring is a multiple of four bytes in, so its last two are left over.
        assert!(place(stage, 16, [0, 4096, end - 136]));
        // A byte too far is found by who maps the ring: it is not started, and the log says why.
        assert!(place(stage, 16, [end - 240, 0, 4096]));
        stage.told("disk 0 queue 3: not started: descriptor table");
        assert!(place(stage, 16, [0, end - 36, 4096]));
        stage.told("not started: available ring");
        assert!(place(stage, 16, [0, 4096, end - 132]));
        stage.told("not started: used ring");
    }

    fn a_ring_that_is_not_aligned(stage) {
        assert!(!place(stage, 16, [8, 4096, 8192]));
        stage.told("is not aligned to 16 bytes");
        assert!(!place(stage, 16, [0, 4097, 8192]));
        stage.told("is not aligned to 2 bytes");
        assert!(!place(stage, 16, [0, 4096, 8194]));
        stage.told("is not aligned to 4 bytes");
        // Outside all memory.
        assert!(!place(stage, 16, [0, 4096, 1 << 30]));
        stage.told("is in no memory region");
    }

    fn a_ring_of_one_entry(stage) {
        assert!(place(stage, 1, [0, 4096, 8192]));
    }

    /// All three parts in one place, and two queues on one ring.
    fn rings_that_lie_on_each_other(stage) {
        assert!(place(stage, 16, [0, 0, 0]));
        let (mut disk, _err) = attach(stage);
        let gpa = disk.mem().alloc(512, 512);
        let Disk { front, queues, .. } = &mut disk;
        front.stop(1).expect("it stops");
        let kick = queues[0].kick_fd().duplicate().expect("the same eventfd");
        let [desc, avail, used] = queues[0].ring_addresses().map(|gpa| front.mem.user_address(gpa));
        let config = VringConfigData {
            queue_max_size: 128,
            queue_size: 128,
            flags: 0,
            desc_table_addr: desc,
            avail_ring_addr: avail,
            used_ring_addr: used,
            log_addr: None,
        };
        front.vhost.set_vring_num(1, 128).expect("a size");
        front.vhost.set_vring_base(1, 0).expect("a base");
        front.vhost.set_vring_addr(1, &config).expect("the other one's addresses");
        front.send_vring_fd(12, 1, Some(kick.as_fd())).expect("its kick too");
        front.enable(1, true).expect("it is enabled");
        for n in 0..50 {
            if queues[0].push(n, kind::IN, 0, n, &[Seg::writable(gpa, 512)]).is_none() {
                break;
            }
            queues[0].publish_quietly();
            queues[0].kick();
        }
        stage.other.beats(16);
    }

    fn an_available_index_that_jumps(stage) {
        for by in [129, 1000, 0x8000, 0xffff] {
            stops(stage, "is more than the ring's 128 entries after", |disk| {
                let queue = &mut disk.queues[0];
                let index = queue.avail_idx().wrapping_add(by);
                queue.poke_avail_idx(index);
            });
        }
    }

    fn a_head_that_does_not_exist(stage) {
        for head in [128, 129, 0x7fff, 0xffff] {
            stops(stage, "is outside the ring's 128 descriptors", |disk| {
                let queue = &mut disk.queues[0];
                queue.poke_head(head, None);
                let index = queue.avail_idx();
                queue.poke_avail_idx(index);
            });
        }
    }

    /// The same chain twice in one batch: the first is still in flight when the second is looked at.
    fn a_head_in_flight_twice(stage) {
        stops(stage, "was made available again while it is in flight", |disk| {
            let gpa = disk.mem().alloc(1 << 20, 4096);
            let queue = &mut disk.queues[0];
            let head = queue.push(0, kind::IN, 0, 0, &[Seg::writable(gpa, 1 << 20)]).expect("room");
            queue.poke_head(head, None);
            let index = queue.avail_idx();
            queue.poke_avail_idx(index);
        });
    }

    fn a_chain_that_loops(stage) {
        stops(stage, "loops: more than 128 descriptors", |disk| {
            let gpa = header(disk);
            put(disk, &[desc(gpa, 16, NEXT, 1), desc(gpa, 16, NEXT, 0)]);
        });
        stops(stage, "goes on at descriptor 128 of a table of 128", |disk| {
            let gpa = header(disk);
            put(disk, &[desc(gpa, 16, NEXT, 128)]);
        });
    }

    fn indirect_tables_that_are_wrong(stage) {
        // A loop inside, and a way out of the table.
        stops(stage, "loops: more than 2 descriptors", |disk| {
            let (gpa, table) = (header(disk), disk.mem().alloc(4096, 16));
            write_table(disk.mem(), table, &[desc(gpa, 16, NEXT, 1), desc(gpa, 16, NEXT, 0)]);
            put(disk, &[desc(table, 32, INDIRECT, 0)]);
        });
        stops(stage, "goes on at descriptor 9 of a table of 2", |disk| {
            let (gpa, table) = (header(disk), disk.mem().alloc(4096, 16));
            write_table(disk.mem(), table, &[desc(gpa, 16, NEXT, 9), desc(gpa, 16, 0, 0)]);
            put(disk, &[desc(table, 32, INDIRECT, 0)]);
        });
        // A table in a table; a table and a next one.
        stops(stage, "has an indirect table within an indirect table", |disk| {
            let table = disk.mem().alloc(4096, 16);
            write_table(disk.mem(), table, &[desc(table, 16, INDIRECT, 0)]);
            put(disk, &[desc(table, 16, INDIRECT, 0)]);
        });
        stops(stage, "is both INDIRECT and NEXT", |disk| {
            let table = disk.mem().alloc(4096, 16);
            put(disk, &[desc(table, 16, INDIRECT | NEXT, 1)]);
        });
        // Of no length, of a broken one, and of far too great a one.
        for len in [0, 15, 17, 16 * 1025, u32::MAX] {
            stops(stage, "has an indirect table of", |disk| {
                let table = disk.mem().alloc(4096, 16);
                put(disk, &[desc(table, len, INDIRECT, 0)]);
            });
        }
        // Outside memory, over its end, and at the end of all addresses.
        for table in [1 << 50, (64 << 20) - 16, u64::MAX - 15] {
            stops(stage, "stopped", |disk| put(disk, &[desc(table, 32, INDIRECT, 0)]));
        }
    }

    /// There is nowhere the answer could be written.
    fn a_status_that_cannot_be_written(stage) {
        stops(stage, "stopped", |disk| {
            let gpa = header(disk);
            put(disk, &[desc(gpa, 16, NEXT, 1), desc(gpa, 1, 0, 0)]);
        });
        for address in [1 << 50, u64::MAX] {
            stops(stage, "stopped", |disk| {
                let gpa = header(disk);
                put(disk, &[desc(gpa, 16, NEXT, 1), desc(address, 1, WRITE, 0)]);
            });
        }
        stops(stage, "stopped", |disk| {
            let gpa = header(disk);
            put(disk, &[desc(gpa, 16, NEXT, 1), desc(gpa, 0, WRITE, 0)]);
        });
    }

    /// Data, status and header on the rings and on each other: the guest harms itself.
    fn requests_that_overwrite_the_rings(stage) {
        for part in 0..3 {
            let (mut disk, _err) = attach(stage);
            let noise = Rng::new(part).bytes(4096);
            disk.write(1, 0, &noise);
            let at = disk.queues[0].ring_addresses()[part as usize];
            for n in 0..16 {
                let to = [Seg::writable(at & !511, 4096)];
                if disk.queues[0].push(n, kind::IN, 0, 0, &to).is_none() {
                    break;
                }
            }
            disk.queues[0].publish_quietly();
            disk.queues[0].kick();
            // What comes of it is the guest's; its other queue has its own ring, which may be hit as well.
            stage.other.beats(32);
        }
        let mut disk = stage.attach(1);
        let gpa = disk.mem().alloc(4096, 4096);
        // A header that is its own data and status.
        let request = Request::read(0, &[Seg::writable(gpa, 512), Seg::writable(gpa, 512)]);
        assert_eq!(request.run(&mut disk.queues[0]).status, status::OK);
    }

    /// As viostor sends them: 126 segments are offered on a ring of 128, and its tables have more.
    fn longer_chains_than_offered(stage) {
        let daemon = Daemon::start_ours(&Spec::image(DISK).queue_size(128));
        let setup = QueueSetup { indirect_len: 256, ..QueueSetup::default() };
        let mut disk = Disk::attach_with(daemon.socket(), &Setup::default(), 1, setup).expect("a session");
        assert_eq!(disk.front.config().expect("a config").seg_max, 126);
        let data = Rng::new(9).bytes(250 * 512);
        disk.write(0, 8, &data);
        let gpa = disk.mem().alloc(data.len(), 512);
        for count in [126, 127, 129, 250] {
            let len = count * 512;
            let segs: Vec<Seg> = (0..count).map(|n| Seg::writable(gpa + n as u64 * 512, 512)).collect();
            disk.mem().fill(gpa, len, 0);
            let done = Request::read(8, &segs).run(&mut disk.queues[0]);
            assert_eq!((done.status, done.len as usize), (status::OK, len + 1), "{count} buffers");
            assert!(disk.mem().read_vec(gpa, len) == data[..len]);
        }
        stage.other.beats(16);
    }

    /// More bytes than 32 bits can count, all of them there.
    fn more_data_than_a_request_can_have(stage) {
        let mut disk = stage.attach(1);
        let segs = vec![Seg::writable(0, 32 << 20); 125];
        let done = Request::read(0, &segs).run(&mut disk.queues[0]);
        assert_eq!((done.status, done.len), (status::IOERR, 1));
        let huge = vec![Seg::writable(0, u32::MAX as usize); 3];
        let done = Request::read(0, &huge).run(&mut disk.queues[0]);
        assert_eq!((done.status, done.len), (status::IOERR, 1));
    }

    /// The most work a batch can be: a full ring of the longest tables.
    fn a_full_ring_of_the_longest_chains(stage) {
        let setup = QueueSetup { size: 1024, indirect_len: 1024, ..QueueSetup::default() };
        let memory = Setup { memory: vec![(0, 96 << 20)], ..Setup::default() };
        let mut disk = Disk::attach_with(stage.socket(), &memory, 1, setup).expect("a session");
        let gpa = disk.mem().alloc(512, 512);
        let segs = vec![Seg::writable(gpa, 1); 1000];
        {
            for n in 0..1024 {
                disk.queues[0].push(n, kind::IN, 0, 0, &segs).expect("room");
            }
            disk.queues[0].publish();
            for done in finish_all(&mut disk.queues[0], 1024) {
                assert_ne!(done.status, 0xff, "each has its answer");
            }
        }
    }

    fn events_and_flags_at_random(stage) {
        let mut disk = stage.attach(1);
        let gpa = disk.mem().alloc(512, 512);
        let mut rng = Rng::new(12);
        for n in 0..500 {
            let queue = &mut disk.queues[0];
            queue.poke_used_event(rng.next() as u16);
            queue.poke_avail_flags(rng.next() as u16);
            queue.push(n, kind::IN, 0, n % 64, &[Seg::writable(gpa, 512)]).expect("room");
            queue.publish();
            let done = queue.spin(DEADLINE).expect("it is served");
            assert_eq!(done.status, 0);
        }
    }

    /// Descriptors, the header and the available ring change while they are read. Whatever the device saw, it saw it
    /// once: each chain is answered, or its ring stops.
    fn descriptors_changed_while_they_are_read(stage) {
        let mut torn = 0;
        for round in 0..4 {
            let (mut disk, err) = attach(stage);
            let gpa = disk.mem().alloc(64 << 10, 4096);
            let [table, avail, _] = disk.queues[0].ring_addresses();
            let mem = std::sync::Arc::clone(&disk.front.mem);
            let over = AtomicBool::new(false);
            std::thread::scope(|scope| {
                let over = &over;
                scope.spawn(move || {
                    let mut rng = Rng::new(round);
                    let (table, ring) = (mem.window(table, 128 * 16), mem.window(avail, 4 + 2 * 128));
                    while !over.load(Ordering::Relaxed) {
                        let at = rng.below(128) as usize * 16;
                        match rng.below(8) {
                            // Lengths and addresses near what they were, and far from it.
                            0 => table.store_u32(at + 8, rng.next() as u32, Ordering::Relaxed),
                            1 => table.store_u32(at + 8, 512 * rng.below(64) as u32, Ordering::Relaxed),
                            2 => table.store_u64(at, rng.next(), Ordering::Relaxed),
                            3 => table.store_u64(at, gpa + rng.below(64 << 10), Ordering::Relaxed),
                            4 => table.store_u16(at + 12, rng.below(8) as u16, Ordering::Relaxed),
                            5 => table.store_u16(at + 14, rng.below(130) as u16, Ordering::Relaxed),
                            6 => ring.store_u16(4 + 2 * rng.below(128) as usize, rng.below(128) as u16, Ordering::Relaxed),
                            _ => std::hint::spin_loop(),
                        }
                    }
                });
                let begun = std::time::Instant::now();
                let (mut tries, mut stopped) = (0, 0);
                // Until it was stopped a few times, or for a while where luck would have it that it goes on.
                while stopped < 10 && begun.elapsed() < std::time::Duration::from_secs(2) {
                    let queue = &mut disk.queues[0];
                    queue.set_indirect(tries % 2 == 0);
                    tries += 1;
                    for n in 0..24 {
                        let segs = [Seg::writable(gpa, 512), Seg::writable(gpa + 4096, 1024)];
                        queue.push(n, kind::IN, 0, n, &segs).expect("a fresh ring has room");
                    }
                    queue.publish_quietly();
                    queue.kick();
                    if err.wait(std::time::Duration::from_millis(3)) > 0 {
                        stopped += 1;
                    }
                    disk.front.stop(0).expect("the ring stops");
                    disk.queues[0].reset(0);
                    disk.front.start(&disk.queues[0]).expect("the ring starts");
                    disk.front.enable(0, true).expect("the ring is enabled");
                }
                over.store(true, Ordering::Relaxed);
                torn += stopped;
            });
            disk.read(1, DISK / SECTOR - 8, 4096);
        }
        assert!(torn > 0, "nothing was ever torn");
    }

    /// Every request there is not, and sectors beyond the end: an answer each, see the tests of requests.
    fn a_storm_of_bad_requests(stage) {
        let mut disk = stage.attach(1);
        let gpa = disk.mem().alloc(4096, 4096);
        let mut rng = Rng::new(3);
        for _ in 0..20 {
            for n in 0..32 {
                let op = [kind::IN, kind::OUT, kind::DISCARD, kind::WRITE_ZEROES, 99, rng.next() as u32][n as usize % 6];
                let seg = match rng.below(2) {
                    0 => Seg::readable(gpa, rng.below(5000) as usize),
                    _ => Seg::writable(gpa, rng.below(5000) as usize),
                };
                let sector = DISK / SECTOR + rng.next() / 2;
                disk.queues[0].push(n, op, 0, sector, &[seg]).expect("room");
            }
            disk.queues[0].publish();
            for _ in 0..32 {
                let done = finish(&mut disk.queues[0]);
                assert!([status::IOERR, status::UNSUPP].contains(&done.status), "{done:?}");
            }
        }
    }
}
