//! What comes over the socket: nonsense, halves, floods, silence, and crowds.

use crate::stage::{DISK, Stage};
use crate::support::disk::{finish_all, kind};
use crate::support::*;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use vhost::VhostBackend;

/// GET_FEATURES, version 1, no payload.
const ASK: [u8; 12] = [1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];

fn message(request: u32, flags: u32, size: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = [request, flags, size].map(u32::to_ne_bytes).concat();
    bytes.extend_from_slice(payload);
    bytes
}

/// Whether the daemon closes the connection.
fn is_closed(mut stream: &UnixStream) -> bool {
    loop {
        match stream.read(&mut [0; 256]) {
            Ok(0) => return true,
            Ok(_) => {}
            Err(error) => return error.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }
}

/// Sends `bytes`; where the other end has had enough in the middle, that is as good.
fn pour(mut stream: &UnixStream, bytes: &[u8]) {
    let _ = stream.write_all(bytes);
}

attacks! {
    fn garbage(stage) {
        let mut rng = Rng::new(5);
        for _ in 0..50 {
            let stream = stage.connect();
            let len = rng.between(12, 4096) as usize;
            pour(&stream, &rng.bytes(len));
            assert!(is_closed(&stream));
        }
        stage.told("header flags");
    }

    fn requests_there_are_not(stage) {
        // Unknown; a reply; a wrong version; more payload than any; less than it takes; IOTLB, a log, a migration.
        for (request, flags, size) in [(0, 1, 0), (999, 1, 0), (1, 5, 0), (1, 2, 0), (1, 1, u32::MAX), (2, 1, 4), (22, 1, 0), (7, 1, 0)] {
            let stream = stage.connect();
            pour(&stream, &message(request, flags, size, &[0; 8]));
            assert!(is_closed(&stream), "request {request}");
        }
        stage.told("this daemon has no such request");
        stage.told("bytes, expected");
    }

    /// Half a header, half a payload, and then the end; or nothing at all, for as long as it likes.
    fn half_a_message(stage) {
        for bytes in [&ASK[..1], &ASK[..11], &message(2, 1, 8, &[0; 3])] {
            let stream = stage.connect();
            pour(&stream, bytes);
            stream.shutdown(Shutdown::Write).expect("that was all");
            assert!(is_closed(&stream));
        }
        for bytes in [&[][..], &ASK[..7]] {
            let stream = stage.connect();
            pour(&stream, bytes);
            stage.other.beats(16);
            drop(stream);
        }
    }

    fn a_message_byte_by_byte(stage) {
        let mut stream = stage.connect();
        for _ in 0..20 {
            for byte in ASK {
                stream.write_all(&[byte]).expect("it is taken");
            }
            let mut answer = [0; 20];
            stream.read_exact(&mut answer).expect("an answer");
            assert_eq!(answer[..12], [1, 0, 0, 0, 5, 0, 0, 0, 8, 0, 0, 0]);
        }
    }

    /// Header and payload apart, and a payload in parts, with its descriptor at the first byte: a crate's back end hangs up.
    fn a_payload_in_two_segments(stage) {
        let mut front = stage.front();
        // GET_CONFIG of eight bytes: the capacity.
        let ask = message(24, 1, 20, &[[0, 8, 0].map(u32::to_ne_bytes).concat(), vec![0; 8]].concat());
        for cut in [12, 13, 24, 31] {
            pour(front.socket(), &ask[..cut]);
            stage.other.beats(4);
            pour(front.socket(), &ask[cut..]);
            let mut answer = [0; 32];
            front.socket().read_exact(&mut answer).expect("an answer");
            assert_eq!(answer[24..], (DISK / SECTOR).to_le_bytes());
        }
        // SET_VRING_CALL, its descriptor with the first piece, and an answer to say that it was taken.
        let call = Event::new().expect("an eventfd");
        let set = message(13, 9, 8, &0_u64.to_ne_bytes());
        front.send_bytes(&set[..14], &[call.as_fd()]).expect("it is sent");
        stage.other.beats(4);
        pour(front.socket(), &set[14..]);
        let mut answer = [0; 20];
        front.socket().read_exact(&mut answer).expect("an answer");
        assert_eq!(answer[12..], [0; 8]);
        assert_eq!(front.config().expect("it goes on").capacity, DISK / SECTOR);
    }

    fn many_messages_at_once(stage) {
        let mut stream = stage.connect();
        stream.write_all(&ASK.repeat(100)).expect("it is taken");
        let mut answers = [0; 2000];
        stream.read_exact(&mut answers).expect("as many answers");
    }

    /// Asks and asks, and reads nothing: its session waits, with what it may hold, and can be left.
    fn a_front_end_that_does_not_read(stage) {
        let before = stage.daemon.stats().rss_kib;
        let stream = stage.connect();
        stream.set_nonblocking(true).expect("a flag");
        let mut sent = 0_usize;
        let quiet = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
        while poll(&mut [PollFd::new(&stream, PollFlags::OUT)], Some(&quiet)) == Ok(1) {
            sent += (&stream).write(&ASK.repeat(200)).unwrap_or(0);
            assert!(sent < 64 << 20, "the daemon takes without end");
        }
        let after = stage.daemon.stats().rss_kib;
        assert!(after < before + 4096, "from {before} to {after} KiB");
    }

    fn a_thousand_connections(stage) {
        raise_own_limit();
        let before = stage.daemon.stats();
        let mut crowd: Vec<UnixStream> = Vec::new();
        for n in 0..1000 {
            let stream = UnixStream::connect(stage.socket()).expect("it may wait");
            if n % 3 == 0 {
                pour(&stream, &ASK);
            }
            crowd.push(stream);
        }
        stage.other.beats(64);
        // They wait in the kernel: one at a time is a session.
        let during = stage.daemon.stats();
        assert!(during.fds <= before.fds + 16, "{} descriptors, {} before", during.fds, before.fds);
        assert!(during.threads <= before.threads + 2, "{} threads, {} before", during.threads, before.threads);
    }

    fn connections_that_come_and_go(stage) {
        for n in 0..300 {
            let stream = stage.connect();
            if n % 2 == 0 {
                pour(&stream, &ASK);
            }
        }
    }

    fn queues_there_are_not(stage) {
        for queue in [4, 200, 255, 256, u32::MAX] {
            for request in [8, 10, 11, 18] {
                let front = stage.front();
                let payload = [queue, 0].map(u32::to_ne_bytes).concat();
                front.send_raw(request, 1, &payload, &[]).expect("it is sent");
                assert!(front.is_closed(), "request {request}, queue {queue}");
            }
        }
        stage.told("does not exist, this disk has 4");
    }

    fn ring_sizes_there_are_not(stage) {
        for size in [0, 3, 1000, 2048, 65535, 65536, u32::MAX] {
            let front = stage.front();
            let payload = [0, size].map(u32::to_ne_bytes).concat();
            front.send_raw(8, 1, &payload, &[]).expect("it is sent");
            assert!(front.is_closed(), "size {size}");
        }
        stage.told("is no power of two from 1 to 1024");
    }

    fn features_that_were_not_offered(stage) {
        for bit in [0, 3, 34, 38, 63] {
            let front = stage.front();
            let payload = (front.features | 1 << bit).to_ne_bytes();
            front.send_raw(2, 1, &payload, &[]).expect("it is sent");
            assert!(front.is_closed(), "feature {bit}");
        }
        stage.told("were never offered");
    }

    fn config_space_there_is_not(stage) {
        for (offset, size) in [(0, 0), (0, 257), (255, 2), (256, 1), (u32::MAX, 1), (8, u32::MAX)] {
            let front = stage.front();
            let payload = [offset, size, 0].map(u32::to_ne_bytes).concat();
            front.send_raw(24, 1, &[&payload[..], &[0; 8]].concat(), &[]).expect("it is sent");
            assert!(front.is_closed(), "{size} bytes at {offset}");
        }
        let mut front = stage.front();
        let before = front.config_bytes(0, 60).expect("the config");
        // A driver that writes where nothing can be written changes nothing.
        for offset in 0..59 {
            if offset != BlkConfig::WRITEBACK_AT {
                front.set_config(offset, &[0xff]).expect("it is ignored");
            }
        }
        assert!(front.config_bytes(0, 60).expect("the config") == before);
    }

    /// Everything a ring has, changed while it runs. What it was started with holds until it is started again.
    fn a_live_ring_is_set_up_again(stage) {
        let mut disk = stage.attach(1);
        let gpa = disk.mem().alloc(512, 512);
        let elsewhere = disk.front.prepare_queue(0, QueueSetup::default()).expect("another ring");
        for round in 0..30_u32 {
            for n in 0..20 {
                disk.queues[0].push(n, kind::IN, 0, n, &[Seg::writable(gpa, 512)]).expect("room");
            }
            disk.queues[0].publish();
            let Disk { front, queues, .. } = &mut disk;
            front.set_ring(&elsewhere, round as u16 * 77).expect("other addresses");
            front.vhost.set_vring_num(0, 8).expect("another size");
            front.set_ring(&queues[0], 0).expect("and back");
            front.vhost.set_features(front.features & !features::EVENT_IDX).expect("fewer features");
            front.vhost.set_features(front.features).expect("all of them");
            assert_eq!(finish_all(&mut queues[0], 20).len(), 20);
        }
    }

    fn rings_switched_on_and_off_under_load(stage) {
        let mut disk = stage.attach(2);
        let gpa = disk.mem().alloc(4096, 4096);
        for round in 0..40 {
            for n in 0..30 {
                disk.queues[0].push(n, kind::IN, 0, n * 8, &[Seg::writable(gpa, 4096)]).expect("room");
            }
            disk.queues[0].publish();
            for _ in 0..5 {
                disk.front.enable(0, false).expect("off");
                disk.front.enable(0, true).expect("on");
            }
            if round % 4 == 0 {
                let base = disk.front.stop(0).expect("it stops");
                disk.front.stop(0).expect("and has stopped");
                let Disk { front, queues, .. } = &mut disk;
                front.set_ring(&queues[0], base).expect("the ring is set");
                front.send_call(0, queues[0].call_fd()).expect("the call");
                front.send_kick(&queues[0]).expect("the kick");
                front.enable(0, true).expect("on");
            }
            assert_eq!(finish_all(&mut disk.queues[0], 30).len(), 30);
        }
    }

    fn resets_under_load(stage) {
        for _ in 0..10 {
            let mut disk = stage.attach(2);
            let gpa = disk.mem().alloc(4096, 4096);
            for n in 0..40 {
                disk.queues[0].push(n, kind::IN, 0, n * 8, &[Seg::writable(gpa, 4096)]).expect("room");
            }
            disk.queues[0].publish();
            disk.front.reset_device().expect("it is reset");
            // Messages that make no sense now, which is nobody's harm.
            let _ = disk.front.stop(1);
            let _ = disk.front.vhost.reset_owner();
            let _ = disk.front.vhost.reset_owner();
        }
    }
}

/// A thousand connections are a thousand descriptors here too.
fn raise_own_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    setrlimit(Resource::Nofile, raised).expect("up to the hard limit");
}
