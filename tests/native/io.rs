//! Reads and writes of every shape.

use crate::support::disk::{finish, kind, status};
use crate::support::*;
use std::fs;

#[test]
fn what_is_written_is_read_back() {
    let daemon = Daemon::start(&Spec::image(16 << 20));
    let mut disk = Disk::attach(daemon.socket(), 1);
    let data = Rng::new(1).bytes(65536);
    disk.write(0, 8, &data);
    disk.flush(0);
    assert!(disk.read(0, 8, data.len()) == data);
    drop(disk);
    let image = fs::read(daemon.image()).expect("the image can be read");
    assert!(image[4096..4096 + data.len()] == data, "in the image too");
    daemon.stop();
}

/// Cuts `len` bytes into up to `most` pieces of any length, each somewhere in the `room` bytes at `gpa`, in order and
/// without overlap.
fn scatter(rng: &mut Rng, gpa: u64, room: usize, len: usize, most: usize) -> Vec<(u64, usize)> {
    let pieces = rng.between(1, (most as u64).min(len as u64)) as usize;
    let mut cuts: Vec<usize> = (1..pieces)
        .map(|_| rng.below(len as u64) as usize)
        .collect();
    cuts.extend([0, len]);
    cuts.sort_unstable();
    cuts.dedup();
    let mut at = gpa;
    let mut slack = (room - len) as u64;
    cuts.windows(2)
        .map(|cut| {
            let gap = rng.below(slack.min(5000) + 1);
            slack -= gap;
            at += gap;
            let piece = (at, cut[1] - cut[0]);
            at += piece.1 as u64;
            piece
        })
        .collect()
}

/// Room for the buffers of random requests, in bytes.
const ROOM: usize = 7 << 19;

/// Reads and writes of random sizes and shapes against a copy of the disk in memory.
fn random_io(disk: &mut Disk, area: u64, model: &mut [u8], rounds: usize, seed: u64) {
    let queue = 0;
    let mut rng = Rng::new(seed);
    let room = ROOM;
    let sectors = model.len() as u64 / SECTOR;
    for round in 0..rounds {
        let most = if rng.one_in(2) { 8 } else { 2048 };
        let count = rng.between(1, most.min(sectors));
        let sector = rng.below(sectors - count + 1);
        let len = (count * SECTOR) as usize;
        let at = (sector * SECTOR) as usize;
        let pieces = scatter(&mut rng, area, room - 1, len, 60);
        let has_tables = disk.queues[queue].setup().indirect_len >= 64
            && disk.front.features & features::INDIRECT_DESC != 0;
        disk.queues[queue].set_indirect(has_tables && rng.one_in(2));
        let parts: &[usize] = match rng.below(3) {
            0 => &[16],
            1 => &[4, 4, 8],
            _ => &[1, 15],
        };
        if rng.one_in(2) {
            let bytes = rng.bytes(len);
            let mut from = 0;
            let mut data = Vec::new();
            for (gpa, piece) in &pieces {
                disk.mem().write(*gpa, &bytes[from..from + piece]);
                from += piece;
                data.push(Seg::readable(*gpa, *piece));
            }
            let mut request = Request::write(sector, &data).split_header(parts);
            if rng.one_in(4) {
                request = request.header_with_data();
            }
            let done = disk.run(queue, &request);
            assert_eq!(
                (done.status, done.len),
                (status::OK, 1),
                "round {round}: write of {len} at sector {sector} from {pieces:?}"
            );
            model[at..at + len].copy_from_slice(&bytes);
        } else {
            disk.mem().fill(area, room, 0xa5);
            let data: Vec<Seg> = pieces
                .iter()
                .map(|(gpa, piece)| Seg::writable(*gpa, *piece))
                .collect();
            let mut request = Request::read(sector, &data).split_header(parts);
            if rng.one_in(4) {
                request = request.status_with_data();
            }
            let done = disk.run(queue, &request);
            assert_eq!(
                (done.status, done.len as usize),
                (status::OK, len + 1),
                "round {round}: read of {len} at sector {sector} into {pieces:?}"
            );
            let bytes: Vec<u8> = pieces
                .iter()
                .flat_map(|(gpa, piece)| disk.mem().read_vec(*gpa, *piece))
                .collect();
            assert!(
                bytes == model[at..at + len],
                "round {round}: read of {len} at sector {sector} gave other bytes"
            );
        }
    }
}

fn random_io_on(setup: &Setup, queue: QueueSetup, seed: u64) {
    let model = Rng::new(seed).bytes(8 << 20);
    random_io_against(
        Daemon::start(&Spec::image_of(&model)),
        model,
        setup,
        queue,
        seed,
    );
}

/// The same for a daemon whose image has the content of `model`.
pub fn random_io_against(
    daemon: Daemon,
    mut model: Vec<u8>,
    setup: &Setup,
    queue: QueueSetup,
    seed: u64,
) {
    let mut disk =
        Disk::attach_with(daemon.socket(), setup, 1, queue).expect("a session with a queue");
    // Where the first region is too small, the buffers fill all but the last one.
    let regions = disk.mem().regions().len();
    let area = if regions == 1 {
        disk.mem().alloc(ROOM, 4096)
    } else {
        (0..regions - 1)
            .map(|index| disk.mem().alloc_in(index, ROOM / (regions - 1), 4096))
            .min()
            .expect("there are several regions")
    };
    random_io(&mut disk, area, &mut model, 300, seed);
    disk.flush(0);
    assert!(disk.read_all(0) == model, "the whole disk, read back");
    drop(disk);
    let image = fs::read(daemon.image()).expect("the image can be read");
    assert!(image == model, "the image");
    daemon.stop();
}

#[test]
fn random_shapes_read_and_write_what_they_should() {
    random_io_on(&Setup::default(), QueueSetup::default(), 10);
}

#[test]
fn random_shapes_without_indirect_and_event_idx() {
    let setup = Setup {
        features: features::KNOWN & !features::INDIRECT_DESC & !features::EVENT_IDX,
        ..Setup::default()
    };
    random_io_on(&setup, QueueSetup::default(), 11);
}

#[test]
fn random_shapes_over_many_memory_regions() {
    // Eight regions, as many as SET_MEM_TABLE takes: neighbours without a gap, so that buffers cross from one region into the next, and one above 4 GiB.
    let small = ROOM as u64 / 7;
    let mut memory: Vec<(u64, usize)> = (0..7)
        .map(|n| (0x10_0000 + n * small, small as usize))
        .collect();
    memory.push((1 << 32, 64 << 20));
    for add_regions in [false, true] {
        let setup = Setup {
            memory: memory.clone(),
            add_regions,
            ..Setup::default()
        };
        random_io_on(
            &setup,
            QueueSetup {
                region: 7,
                ..QueueSetup::default()
            },
            12,
        );
    }
}

#[test]
fn a_buffer_may_cross_memory_regions() {
    let half = 8 << 20;
    let setup = Setup {
        memory: vec![(0, half), (half as u64, half), (2 * half as u64, half)],
        ..Setup::default()
    };
    let content = Rng::new(3).bytes(12 << 20);
    let daemon = Daemon::start(&Spec::image_of(&content));
    let mut disk = Disk::attach_with(daemon.socket(), &setup, 1, QueueSetup::default())
        .expect("a session with a queue");
    // The first buffer covers two regions, the second all three; both start and end at odd addresses.
    for (gpa, len) in [(half as u64 - 777, 8192), (half as u64 - 333, half + 1024)] {
        let data = [Seg::writable(gpa, len)];
        let done = disk.run(0, &Request::read(5, &data));
        assert_eq!((done.status, done.len as usize), (status::OK, len + 1));
        let at = 5 * SECTOR as usize;
        assert!(disk.mem().read_vec(gpa, len) == content[at..at + len]);
        let done = disk.run(0, &Request::write(9, &[Seg::readable(gpa, len)]));
        assert_eq!((done.status, done.len), (status::OK, 1));
        disk.flush(0);
        let image = fs::read(daemon.image()).expect("the image can be read");
        let to = 9 * SECTOR as usize;
        assert!(image[to..to + len] == content[at..at + len]);
        disk.mem().write(gpa, &content[to..to + len]);
        let done = disk.run(0, &Request::write(9, &[Seg::readable(gpa, len)]));
        assert_eq!(done.status, status::OK, "the image as it was");
    }
}

#[test]
fn chains_as_long_as_the_ring_are_served() {
    let content = Rng::new(4).bytes(1 << 20);
    let daemon = Daemon::start(&Spec::image_of(&content).queue_size(128));
    let setup = QueueSetup {
        size: 128,
        ..QueueSetup::default()
    };
    let mut disk = Disk::attach_with(daemon.socket(), &Setup::default(), 1, setup)
        .expect("a session with a queue");
    let seg_max = disk.front.config().expect("a config space").seg_max as usize;
    assert_eq!(seg_max, 126);
    let area = disk.mem().alloc(256 * 4096, 4096);
    for indirect in [false, true] {
        disk.queues[0].set_indirect(indirect);
        // 128 descriptors: header, 127 buffers, the status byte in the last of them.
        let data: Vec<Seg> = (0..127)
            .map(|n| Seg::writable(area + n * 4096 + 1, 512))
            .collect();
        let request = Request::read(3, &data).status_with_data();
        let done = disk.run(0, &request);
        assert_eq!((done.status, done.len), (status::OK, 127 * 512 + 1));
        for (n, seg) in data.iter().enumerate() {
            let at = (3 + n) * SECTOR as usize;
            assert!(disk.mem().read_vec(seg.gpa, 512) == content[at..at + 512]);
        }
        // 128 again: header with the first buffer, 126 more, status.
        let bytes = Rng::new(5 + u64::from(indirect)).bytes(127 * 512);
        let data: Vec<Seg> = (0..127)
            .map(|n| Seg::readable(area + n * 4096 + 1, 512))
            .collect();
        for (seg, bytes) in data.iter().zip(bytes.chunks(512)) {
            disk.mem().write(seg.gpa, bytes);
        }
        let request = Request::write(300, &data).header_with_data();
        let done = disk.run(0, &request);
        assert_eq!((done.status, done.len), (status::OK, 1));
        assert!(disk.read(0, 300, bytes.len()) == bytes);
    }
}

/// Keeps `depth` requests in flight on one queue. Each has its own part of the disk, writes it and reads it back.
fn churn(queue: &mut Queue, area: u64, first_sector: u64, depth: usize, rounds: usize, seed: u64) {
    const SECTORS: u64 = 64;
    let len = (SECTORS * SECTOR) as usize;
    let mut rng = Rng::new(seed);
    let mut expected: Vec<Option<(u64, Vec<u8>)>> = vec![None; depth];
    let mut left = vec![rounds; depth];
    let mut running = 0;
    let submit =
        |queue: &mut Queue, rng: &mut Rng, slot: usize, expected: &mut Option<(u64, Vec<u8>)>| {
            let gpa = area + (slot * (len + 64)) as u64 + rng.below(64);
            let base = first_sector + slot as u64 * SECTORS;
            let (kind, sector, data) = match expected {
                Some((sector, bytes)) => {
                    queue.mem.fill(gpa, bytes.len(), 0xa5);
                    (kind::IN, *sector, Seg::writable(gpa, bytes.len()))
                }
                None => {
                    let count = rng.between(1, SECTORS);
                    let sector = base + rng.below(SECTORS - count + 1);
                    let bytes = rng.bytes((count * SECTOR) as usize);
                    queue.mem.write(gpa, &bytes);
                    let data = Seg::readable(gpa, bytes.len());
                    *expected = Some((sector, bytes));
                    (kind::OUT, sector, data)
                }
            };
            // The token tells slot, direction and buffer.
            let token = (slot as u64) << 48 | u64::from(kind) << 47 | gpa;
            queue
                .push(token, kind, 0, sector, &[data])
                .expect("the ring has room");
        };
    for (slot, expected) in expected.iter_mut().enumerate() {
        submit(queue, &mut rng, slot, expected);
        running += 1;
    }
    queue.publish();
    while running > 0 {
        let done = finish(queue);
        let slot = (done.token >> 48) as usize;
        let was_write = done.token >> 47 & 1 == 1;
        let gpa = done.token & ((1 << 47) - 1);
        assert_eq!(
            done.status,
            status::OK,
            "queue {}, slot {slot}",
            queue.index
        );
        let (sector, bytes) = expected[slot].clone().expect("a request was in flight");
        if was_write {
            assert_eq!(done.len, 1);
        } else {
            assert_eq!(done.len as usize, bytes.len() + 1);
            assert!(
                queue.mem.read_vec(gpa, bytes.len()) == bytes,
                "queue {}: sector {sector} gave other bytes",
                queue.index
            );
            expected[slot] = None;
            left[slot] -= 1;
        }
        if left[slot] == 0 {
            running -= 1;
        } else {
            submit(queue, &mut rng, slot, &mut expected[slot]);
            queue.publish();
        }
    }
}

fn churn_on_all_queues(queues: usize, depth: usize, rounds: usize, call: bool) {
    let daemon = Daemon::start(&Spec::image(64 << 20).queues(queues));
    let setup = QueueSetup {
        size: 64,
        indirect_len: 64,
        call,
        ..QueueSetup::default()
    };
    let setup_front = Setup {
        memory: vec![(0, 128 << 20)],
        ..Setup::default()
    };
    let disk = Disk::attach_with(daemon.socket(), &setup_front, queues, setup)
        .expect("a session with its queues");
    let Disk {
        front, mut queues, ..
    } = disk;
    let step = (64 << 20) / SECTOR / queues.len() as u64;
    std::thread::scope(|scope| {
        for (index, queue) in queues.iter_mut().enumerate() {
            let area = front.mem.alloc(depth * 33000, 4096);
            scope.spawn(move || {
                let first = index as u64 * step;
                churn(queue, area, first, depth, rounds, index as u64);
            });
        }
    });
    let summary = {
        drop(queues);
        drop(front);
        daemon.stop()
    };
    if !Daemon::is_peer() {
        for queue in summary.queues() {
            let each = (depth * rounds) as u64;
            assert_eq!(queue.read, each, "reads of queue {}", queue.queue);
            assert_eq!(queue.write, each, "writes of queue {}", queue.queue);
            assert_eq!(queue.requests, 2 * each);
            assert_eq!(queue.errors, 0);
            assert_eq!(queue.bytes_read, queue.bytes_written);
        }
    }
}

#[test]
fn all_queues_work_at_once_from_several_threads() {
    churn_on_all_queues(4, 16, 100, true);
}

#[test]
fn all_queues_work_at_once_for_a_polling_driver() {
    churn_on_all_queues(2, 16, 100, false);
}

#[test]
fn sixty_four_queues_work_at_once() {
    churn_on_all_queues(64, 4, 5, true);
}

#[test]
fn a_full_ring_of_requests_is_served() {
    let daemon = Daemon::start(&Spec::image(8 << 20));
    let setup = QueueSetup {
        size: 1024,
        indirect_len: 8,
        ..QueueSetup::default()
    };
    let mut disk = Disk::attach_with(daemon.socket(), &Setup::default(), 1, setup)
        .expect("a session with a queue");
    let bytes = Rng::new(6).bytes(1024 * 512);
    let gpa = disk.mem().alloc(bytes.len(), 4096);
    disk.mem().write(gpa, &bytes);
    let queue = &mut disk.queues[0];
    for n in 0..1024_u64 {
        // Every other sector, so that neighbours in the ring are no neighbours on the disk.
        let data = [Seg::readable(gpa + n * 512, 512)];
        queue
            .push(n, kind::OUT, 0, 2 * n, &data)
            .expect("the ring takes as many requests as it has entries");
    }
    queue.publish();
    let mut seen = vec![false; 1024];
    for _ in 0..1024 {
        let done = finish(queue);
        assert_eq!((done.status, done.len), (status::OK, 1));
        assert!(!std::mem::replace(&mut seen[done.token as usize], true));
    }
    assert!(queue.reap().is_none(), "nothing comes twice");
    let image = fs::read(daemon.image()).expect("the image can be read");
    for (n, sector) in bytes.chunks(512).enumerate() {
        assert!(
            image[n * 1024..n * 1024 + 512] == *sector,
            "sector {}",
            2 * n
        );
    }
}

#[test]
fn neighbouring_writes_of_one_batch_are_merged() {
    let daemon = Daemon::start(&Spec::image(8 << 20));
    let mut disk = Disk::attach(daemon.socket(), 1);
    let bytes = Rng::new(7).bytes(64 * 4096);
    let gpa = disk.mem().alloc(bytes.len(), 4096);
    disk.mem().write(gpa, &bytes);
    for round in 0..8_u64 {
        let queue = &mut disk.queues[0];
        for n in 0..64 {
            let data = [Seg::readable(gpa + n * 4096, 4096)];
            queue
                .push(n, kind::OUT, 0, (round * 64 + n) * 8, &data)
                .expect("the ring has room");
        }
        queue.publish();
        let mut tokens: Vec<u64> = disk::finish_all(queue, 64)
            .into_iter()
            .inspect(|done| assert_eq!((done.status, done.len), (status::OK, 1)))
            .map(|done| done.token)
            .collect();
        tokens.sort_unstable();
        assert!(
            tokens.into_iter().eq(0..64),
            "each has an answer of its own"
        );
    }
    disk.flush(0);
    drop(disk);
    let image = fs::read(daemon.image()).expect("the image can be read");
    for round in image[..8 * bytes.len()].chunks(bytes.len()) {
        assert!(round == bytes);
    }
    let summary = daemon.stop();
    if !Daemon::is_peer() {
        assert_eq!(summary.total(|queue| queue.write), 8 * 64);
        assert!(summary.total(|queue| queue.merged) > 0, "{summary:?}");
    }
}
