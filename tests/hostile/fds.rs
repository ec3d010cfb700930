//! File descriptors that are not what they should be, or do not stay so.

use crate::stage::Stage;
use crate::support::disk::{finish, finish_all, kind};
use crate::support::front::request::{SET_VRING_CALL, SET_VRING_ERR, SET_VRING_KICK};
use crate::support::front::send_with_fds;
use crate::support::*;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::{read, write};
use rustix::pipe::{PipeFlags, pipe_with};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};

const SET_MEM_TABLE: u32 = 5;
const SET_LOG_BASE: u32 = 6;
const SET_BACKEND_REQ_FD: u32 = 21;
const SET_INFLIGHT_FD: u32 = 32;
const ADD_MEM_REG: u32 = 37;
const SET_DEVICE_STATE_FD: u32 = 42;
/// The directions of SET_DEVICE_STATE_FD.
const SAVE: u32 = 0;
const LOAD: u32 = 1;
/// The largest count an eventfd can have.
const FULL: u64 = u64::MAX - 1;

/// Reads `count` sectors on a queue, one by one and without waiting for calls.
fn served(queue: &mut Queue, gpa: u64, count: u64) {
    for n in 0..count {
        queue
            .push(n, kind::IN, 0, n, &[Seg::writable(gpa, 512)])
            .expect("room");
        queue.publish();
        let done = queue.spin(DEADLINE).expect("it is served");
        assert_eq!((done.status, done.len), (0, 513));
    }
}

/// A session whose queue has this call descriptor, and 20 requests on it.
fn with_call(stage: &Stage, call: &OwnedFd) -> Disk {
    let mut disk = stage.attach(2);
    let flags = fcntl_getfl(call).expect("flags");
    disk.front
        .send_vring_fd(SET_VRING_CALL, 0, Some(call.as_fd()))
        .expect("it is taken");
    let gpa = disk.mem().alloc(512, 512);
    disk.queues[0].arm(0);
    for _ in 0..20 {
        served(&mut disk.queues[0], gpa, 1);
        disk.queues[0].arm(0);
    }
    let after = fcntl_getfl(call).expect("flags");
    assert_eq!(after, flags, "the flags are the front end's own");
    disk
}

/// The ring stops, the session ends, and nothing of it hangs.
fn leaves(mut disk: Disk) {
    disk.read(1, 0, 4096);
    disk.front.stop(0).expect("the ring stops");
    disk.front.stop(1).expect("and the other one");
}

fn full_eventfd(flags: EventfdFlags) -> OwnedFd {
    let event = eventfd(0, flags | EventfdFlags::CLOEXEC).expect("an eventfd");
    write(&event, &FULL.to_ne_bytes()).expect("up to its end");
    event
}

/// Sends `what` on `socket`.
fn hide(socket: &UnixStream, what: &UnixStream) -> rustix::io::Result<()> {
    send_with_fds(socket, &[0], &[what.as_fd()]).map(drop)
}

attacks! {
    fn a_kick_that_is_no_eventfd(stage) {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).expect("a pipe");
        let (socket, _peer) = UnixStream::pair().expect("sockets");
        let file = std::fs::File::open(stage.daemon.image()).expect("a file");
        let directory = std::fs::File::open(stage.daemon.dir()).expect("a directory");
        for fd in [reader.as_fd(), writer.as_fd(), socket.as_fd(), file.as_fd(), directory.as_fd()] {
            let mut front = stage.front();
            assert!(front.send_vring_fd(SET_VRING_KICK, 0, Some(fd)).is_err());
            assert!(front.is_closed());
        }
        stage.told("the kick descriptor is the reading end of a pipe, expected an eventfd");
        // At its end, which reads as an endless kick.
        drop(writer);
        let mut disk = stage.attach(1);
        assert!(disk.front.send_vring_fd(SET_VRING_KICK, 0, Some(reader.as_fd())).is_err());
        assert!(disk.front.is_closed());
    }

    fn a_call_or_an_error_that_cannot_be_written(stage) {
        let (reader, _writer) = pipe_with(PipeFlags::CLOEXEC).expect("a pipe");
        let file = std::fs::File::open(stage.daemon.image()).expect("a file");
        for fd in [reader.as_fd(), file.as_fd()] {
            for request in [SET_VRING_CALL, SET_VRING_ERR] {
                let mut front = stage.front();
                assert!(front.send_vring_fd(request, 0, Some(fd)).is_err());
                assert!(front.is_closed());
            }
        }
        stage.told("the call descriptor is the reading end of a pipe, expected an eventfd, a pipe to write");
    }

    /// A front end that does not read its calls. Whoever polls finds its requests done all the same.
    fn a_call_eventfd_that_is_full(stage) {
        leaves(with_call(stage, &full_eventfd(EventfdFlags::NONBLOCK)));
    }

    /// Writing to it would wait for ever: the worker does not.
    fn a_call_eventfd_that_is_full_and_blocks(stage) {
        let call = full_eventfd(EventfdFlags::empty());
        let mut disk = with_call(stage, &call);
        // It is read after all, and then there is a call again.
        let mut count = [0; 8];
        read(&call, &mut count).expect("it is full");
        assert_eq!(read(&call, &mut count).expect("a call that waited"), 8);
        let gpa = disk.mem().alloc(512, 512);
        served(&mut disk.queues[0], gpa, 20);
        leaves(disk);
        // Full again, and the front end is gone without a word.
        drop(with_call(stage, &full_eventfd(EventfdFlags::empty())));
    }

    /// The flag belongs to the open file, so it can change at any time.
    fn a_call_eventfd_that_blocks_later(stage) {
        let call = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).expect("an eventfd");
        let mut disk = with_call(stage, &call);
        // Whether there were calls is the daemon's to say: who looks at the ring all the time may need none.
        let mut count = [0; 8];
        while write(&call, &FULL.to_ne_bytes()).is_err() {
            let _ = read(&call, &mut count);
        }
        let flags = fcntl_getfl(&call).expect("flags");
        fcntl_setfl(&call, flags - OFlags::NONBLOCK).expect("it is full, and blocks now");
        let gpa = disk.mem().alloc(512, 512);
        for _ in 0..100 {
            disk.queues[0].arm(0);
            served(&mut disk.queues[0], gpa, 1);
        }
        leaves(disk);
    }

    fn a_call_pipe_that_is_full(stage) {
        for flags in [PipeFlags::empty(), PipeFlags::NONBLOCK] {
            let (_reader, writer) = pipe_with(flags | PipeFlags::CLOEXEC).expect("a pipe");
            let before = fcntl_getfl(&writer).expect("flags");
            fcntl_setfl(&writer, before | OFlags::NONBLOCK).expect("flags");
            while write(&writer, &[0; 4096]).is_ok() {}
            fcntl_setfl(&writer, before).expect("flags");
            leaves(with_call(stage, &writer));
        }
    }

    fn a_call_pipe_nobody_reads_any_more(stage) {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).expect("a pipe");
        drop(reader);
        leaves(with_call(stage, &writer));
        stage.told("the call fd cannot be written");
    }

    fn a_call_socket_that_is_not_connected(stage) {
        let socket = rustix::net::socket(rustix::net::AddressFamily::UNIX, rustix::net::SocketType::STREAM, None);
        leaves(with_call(stage, &socket.expect("a socket")));
    }

    /// Calls that are kicks: each answer asks to look again. It ends, because there is nothing more to find.
    fn a_call_that_is_the_kick(stage) {
        let mut disk = stage.attach(1);
        let kick = disk.queues[0].kick_fd().duplicate().expect("the same eventfd");
        disk.front.send_vring_fd(SET_VRING_CALL, 0, Some(kick.as_fd())).expect("it is taken");
        let gpa = disk.mem().alloc(512, 512);
        for _ in 0..100 {
            disk.queues[0].arm(0);
            served(&mut disk.queues[0], gpa, 1);
        }
        disk.front.stop(0).expect("the ring stops");
    }

    /// One eventfd kicks two queues; both are looked at.
    fn one_kick_for_two_queues(stage) {
        let mut disk = stage.attach(2);
        let kick = disk.queues[1].kick_fd().duplicate().expect("the same eventfd");
        disk.front.send_vring_fd(SET_VRING_KICK, 0, Some(kick.as_fd())).expect("it is taken");
        let gpa = disk.mem().alloc(512, 512);
        for _ in 0..50 {
            for queue in &mut disk.queues {
                queue.push(0, kind::IN, 0, 0, &[Seg::writable(gpa, 512)]).expect("room");
                queue.publish_quietly();
            }
            disk.queues[1].kick();
            for queue in &mut disk.queues {
                assert_eq!(finish(queue).status, 0);
            }
        }
    }

    /// Kicks for nothing, as fast as they can be written.
    fn a_flood_of_kicks(stage) {
        let mut disk = stage.attach(1);
        for _ in 0..50_000 {
            disk.queues[0].kick();
        }
        disk.read(0, 0, 4096);
    }

    /// A kick descriptor that comes again while the ring runs, the same one and others.
    fn a_second_kick_on_a_live_ring(stage) {
        let mut disk = stage.attach(1);
        let gpa = disk.mem().alloc(512, 512);
        for round in 0..20 {
            for n in 0..20 {
                disk.queues[0].push(n, kind::IN, 0, n, &[Seg::writable(gpa, 512)]).expect("room");
            }
            disk.queues[0].publish();
            let same = disk.queues[0].kick_fd().duplicate().expect("an eventfd");
            let other = Event::new().expect("an eventfd");
            disk.front.send_vring_fd(SET_VRING_KICK, 0, Some(same.as_fd())).expect("the same");
            disk.front.send_vring_fd(SET_VRING_KICK, 0, Some(other.as_fd())).expect("another");
            if round % 2 == 0 {
                disk.front.send_vring_fd(SET_VRING_KICK, 0, None).expect("none: look yourself");
            }
            disk.front.send_vring_fd(SET_VRING_KICK, 0, Some(same.as_fd())).expect("back again");
            assert_eq!(finish_all(&mut disk.queues[0], 20).len(), 20);
        }
    }

    /// "Look yourself" is what a kick message without a descriptor says; such a ring is served from its start.
    fn a_ring_without_a_kick(stage) {
        let mut front = stage.front();
        let mut queue = front.prepare_queue(0, QueueSetup::default()).expect("a queue");
        front.set_ring(&queue, 0).expect("its ring");
        front.send_call(0, queue.call_fd()).expect("its call");
        front.send_vring_fd(SET_VRING_KICK, 0, None).expect("no kick");
        front.enable(0, true).expect("it is enabled");
        let gpa = front.mem.alloc(512, 512);
        for n in 0..50 {
            queue.push(n, kind::IN, 0, n, &[Seg::writable(gpa, 512)]).expect("room");
            queue.publish_quietly();
            assert_eq!(finish(&mut queue).status, 0);
        }
        front.stop(0).expect("the ring stops");
    }

    fn descriptors_that_nobody_asked_for(stage) {
        let event = Event::new().expect("an eventfd");
        let front = stage.front();
        front.send_raw(1, 1, &[], &[event.as_fd()]).expect("GET_FEATURES and an eventfd");
        assert!(front.is_closed());
        stage.told("1 file descriptors attached, expected 0");
        let front = stage.front();
        front.send_raw(SET_VRING_KICK, 1, &0_u64.to_ne_bytes(), &[]).expect("a kick without one");
        assert!(front.is_closed());
        let front = stage.front();
        front.send_raw(SET_VRING_KICK, 1, &0_u64.to_ne_bytes(), &[event.as_fd(); 2]).expect("and with two");
        assert!(front.is_closed());
        stage.told("2 file descriptors attached, expected 1");
        let front = stage.front();
        front.send_raw(SET_VRING_KICK, 1, &0_u64.to_ne_bytes(), &[event.as_fd(); 64]).expect("and with 64");
        assert!(front.is_closed());
        stage.told("more than 32 file descriptors attached");
    }

    /// A descriptor of the session's own connection, which would keep it open after the front end has left, and the disk
    /// from ever being served again.
    fn its_own_connection_as_a_descriptor(stage) {
        let own = || {
            let setup = Setup {
                protocol: protocol::KNOWN | vhost::vhost_user::message::VhostUserProtocolFeatures::BACKEND_REQ,
                ..Setup::default()
            };
            Front::connect(stage.socket(), &setup).expect("a session")
        };
        for request in [SET_BACKEND_REQ_FD, SET_VRING_CALL, SET_VRING_ERR] {
            let payload: &[u8] = if request == SET_BACKEND_REQ_FD { &[] } else { &[0; 8] };
            let front = own();
            front.send_raw(request, 1, payload, &[front.socket().as_fd()]).expect("it is sent");
            assert!(front.is_closed());
            // One that waits for its turn is ours as well.
            let (front, waiting) = (own(), stage.connect());
            front.send_raw(request, 1, payload, &[waiting.as_fd()]).expect("it is sent");
            assert!(front.is_closed());
        }
        stage.told("the back-end channel's descriptor is a connection to this daemon");
        stage.told("the call descriptor is a connection to this daemon");
    }

    /// Each request that brings a descriptor, whatever it is for.
    fn its_own_connection_with_any_request_that_brings_a_descriptor(stage) {
        use vhost::vhost_user::message::VhostUserProtocolFeatures as P;
        let setup = Setup {
            protocol: protocol::KNOWN | P::BACKEND_REQ | P::LOG_SHMFD | P::INFLIGHT_SHMFD | P::DEVICE_STATE
                | P::CONFIGURE_MEM_SLOTS,
            ..Setup::default()
        };
        let u32s = |words: &[u32]| words.iter().flat_map(|word| word.to_ne_bytes()).collect::<Vec<u8>>();
        let u64s = |words: &[u64]| words.iter().flat_map(|word| word.to_ne_bytes()).collect::<Vec<u8>>();
        let far = 1 << 40;
        for (request, payload) in [
            (SET_MEM_TABLE, u64s(&[1, far, 4096, far, 0])),
            (ADD_MEM_REG, u64s(&[0, far, 4096, far, 0])),
            (SET_LOG_BASE, u64s(&[1 << 20, 0])),
            (SET_INFLIGHT_FD, [u64s(&[1 << 20, 0]), vec![1, 0, 128, 0], u32s(&[0])].concat()),
            (SET_BACKEND_REQ_FD, Vec::new()),
            (SET_VRING_KICK, u64s(&[0])),
            (SET_VRING_CALL, u64s(&[0])),
            (SET_VRING_ERR, u64s(&[0])),
            (SET_DEVICE_STATE_FD, u32s(&[SAVE, 0])),
            (SET_DEVICE_STATE_FD, u32s(&[LOAD, 0])),
        ] {
            let front = Front::connect(stage.socket(), &setup).expect("a session");
            front.send_raw(request, 1, &payload, &[front.socket().as_fd()]).expect("it is sent");
            assert!(front.is_closed(), "request {request}");
        }
        stage.told("SET_DEVICE_STATE_FD: the device state's descriptor is a connection to this daemon");
        stage.told("SET_DEVICE_STATE_FD: the channel of the device's state is a Unix stream socket");
        // In a socket whose message waits there until the state is loaded.
        let front = Front::connect(stage.socket(), &setup).expect("a session");
        let (ours, theirs) = UnixStream::pair().expect("sockets");
        hide(&ours, front.socket()).expect("there is room");
        front.send_raw(SET_DEVICE_STATE_FD, 1, &u32s(&[LOAD, 0]), &[theirs.as_fd()]).expect("it is sent");
        drop((front, ours, theirs));
        stage.attach(1).read(0, 0, 4096);
    }

    /// The same, as a message that nobody reads in a socket that may be sent: put there before, or afterwards.
    fn its_own_connection_hidden_in_another_socket(stage) {
        for request in [SET_BACKEND_REQ_FD, SET_VRING_CALL, SET_VRING_ERR] {
            let payload: &[u8] = if request == SET_BACKEND_REQ_FD { &[] } else { &[0; 8] };
            for before in [true, false] {
                let setup = Setup {
                    protocol: protocol::KNOWN | vhost::vhost_user::message::VhostUserProtocolFeatures::BACKEND_REQ,
                    ..Setup::default()
                };
                let mut front = Front::connect(stage.socket(), &setup).expect("a session");
                let (ours, theirs) = UnixStream::pair().expect("sockets");
                if before {
                    hide(&ours, front.socket()).expect("there is room");
                }
                front.send_raw(request, 1, payload, &[theirs.as_fd()]).expect("it is sent");
                // What is answered has been taken.
                front.config_bytes(0, 8).expect("it is served");
                // Once taken it cannot be put there any more; where it can, the session would not end.
                let _ = hide(&ours, front.socket());
            }
            // The one before has to end for this one to be served.
            stage.attach(1).read(0, 0, 4096);
        }
    }

    /// The same on a connection that waits for its turn, which nobody reads before the session has ended.
    fn its_own_connection_on_one_that_waits(stage) {
        let release = rustix::system::uname();
        let release = release.release().to_string_lossy();
        let mut numbers = release.split('.').map_while(|text| text.parse::<u32>().ok());
        if (numbers.next(), numbers.next()) < (Some(6), Some(16)) {
            println!("skipped: Linux {release} cannot keep descriptors from a socket");
            return;
        }
        let (front, waiting) = (stage.front(), stage.connect());
        hide(&waiting, front.socket()).expect_err("it is kept out");
        drop((front, waiting));
        // A front end that had to wait sends its memory when it is served.
        let front = stage.front();
        let attached = std::thread::scope(|scope| {
            let waits = scope.spawn(|| stage.attach(1));
            drop(front);
            waits.join()
        });
        attached.expect("it is served").read(0, 0, 4096);
    }

    /// A socket that listens holds the connections that wait there, with what was sent on them.
    fn a_socket_that_listens_as_a_call(stage) {
        let path = stage.daemon.dir().join("listener");
        let listener = UnixListener::bind(&path).expect("it listens");
        let front = stage.front();
        let waiting = UnixStream::connect(&path).expect("it waits");
        hide(&waiting, front.socket()).expect("there is room");
        front.send_raw(SET_VRING_CALL, 1, &[0; 8], &[listener.as_fd()]).expect("it is sent");
        assert!(front.is_closed());
        stage.told("the call descriptor is a socket that listens");
        std::fs::remove_file(&path).expect("its file");
    }

    /// A back-end channel whose other end is closed, or never read.
    fn a_channel_nobody_listens_to(stage) {
        let setup = Setup {
            protocol: protocol::KNOWN | vhost::vhost_user::message::VhostUserProtocolFeatures::BACKEND_REQ,
            ..Setup::default()
        };
        let (ours, theirs) = UnixStream::pair().expect("sockets");
        let mut disk = Disk::attach_with(stage.socket(), &setup, 1, QueueSetup::default()).expect("a session");
        disk.front.send_raw(SET_BACKEND_REQ_FD, 1, &[], &[theirs.as_fd()]).expect("it is sent");
        drop((ours, theirs));
        disk.read(0, 0, 4096);
    }
}
