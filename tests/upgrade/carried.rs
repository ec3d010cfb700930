//! What goes along with the disks: sessions in every state, settings changed meanwhile, sockets.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;

use rustix::process::Signal;
use serde_json::json;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserProtocolFeatures;

use super::region::{attach, choose, come_back};
use super::support::disk::{finish, kind, status};
use super::support::front::request::SET_VRING_CALL;
use super::support::*;
use super::{Lineage, MIB, under_load};

const SET_BACKEND_REQ_FD: u32 = 21;

#[test]
fn a_disk_without_a_front_end_is_taken_over_with_its_socket() {
    let mut lineage = Lineage::start(Spec::image(8 * MIB), &[]);
    let inode = |path: &std::path::Path| std::fs::metadata(path).expect("a socket").ino();
    let before = [lineage.daemon.socket(), &lineage.control()].map(inode);
    for round in 0..3_u8 {
        lineage.upgrade(&[]);
        let mut disk = Disk::attach(lineage.daemon.socket(), 2);
        disk.write(1, 0, &[round; 4096]);
        assert_eq!(disk.read(0, 0, 4096), [round; 4096]);
    }
    let after = [lineage.daemon.socket(), &lineage.control()].map(inode);
    assert_eq!(before, after, "they are the same sockets");
    let mode = std::fs::metadata(lineage.control()).expect("a socket");
    assert_eq!(mode.permissions().mode() & 0o777, 0o600);
    let (socket, control) = (lineage.daemon.socket().to_owned(), lineage.control());
    lineage.daemon.stop();
    assert!(
        !socket.exists() && !control.exists(),
        "the last one removes them"
    );
}

#[test]
fn a_daemon_that_was_taken_over_from_says_so() {
    let mut lineage = Lineage::start(Spec::null(MIB), &[]);
    for _ in 0..5 {
        let mut old = lineage.daemon;
        lineage.daemon = old.beside(&lineage.spec);
        assert!(old.wait_exit().success());
        let (_, _, said) = old.terminate();
        assert!(said.contains("another daemon has the disks"), "{said}");
        assert!(lineage.daemon.wait_for_message("listening on"));
    }
}

#[test]
fn a_front_end_that_connects_meanwhile_is_served_by_the_new_daemon() {
    const ASK: [u8; 12] = [1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];
    let mut lineage = Lineage::start(Spec::image(8 * MIB), &[]);
    let mut first = Disk::attach(lineage.daemon.socket(), 1);
    // It waits for its turn, in the socket's queue.
    let mut second = UnixStream::connect(lineage.daemon.socket()).expect("it listens");
    second.set_read_timeout(Some(DEADLINE)).expect("a timeout");
    second.write_all(&ASK).expect("a message");
    lineage.upgrade(&[]);
    first.write(0, 0, &[1; 512]);
    drop(first);
    let mut answer = [0; 20];
    second.read_exact(&mut answer).expect("it has its turn");
    assert_eq!(answer[..4], [1, 0, 0, 0]);
}

#[test]
fn sessions_of_every_shape_go_on() {
    let queue = QueueSetup::default();
    let many = (0..40).map(|n| (n * 0x10_0000, 0x10_0000)).collect();
    let shapes = [
        ("as usual", Setup::default(), queue),
        (
            "no event index, direct chains",
            Setup {
                features: features::KNOWN & !features::EVENT_IDX,
                ..Setup::default()
            },
            QueueSetup {
                indirect: false,
                ..queue
            },
        ),
        (
            "polled",
            Setup::default(),
            QueueSetup {
                call: false,
                ..queue
            },
        ),
        (
            "no acknowledgements",
            Setup {
                protocol: protocol::KNOWN & !VhostUserProtocolFeatures::REPLY_ACK,
                ..Setup::default()
            },
            queue,
        ),
        (
            "two regions, apart",
            Setup {
                memory: vec![(0, 32 << 20), (1 << 32, 32 << 20)],
                early_calls: 4,
                ..Setup::default()
            },
            QueueSetup { region: 1, ..queue },
        ),
        (
            "more regions than one table takes, a ring that has gone round",
            Setup {
                memory: many,
                add_regions: true,
                ..Setup::default()
            },
            QueueSetup {
                size: 16,
                base: 65530,
                indirect_len: 16,
                ..queue
            },
        ),
    ];
    for (name, setup, queue) in shapes {
        println!("{name}");
        let mut lineage = Lineage::start(Spec::null(8 * MIB), &["--workers", "2"]);
        let mut front = Front::connect(lineage.daemon.socket(), &setup).expect("a session");
        let mut queues: Vec<Queue> = (0..3)
            .map(|index| front.queue(index, queue).expect("a queue"))
            .collect();
        let gpa = front.mem.alloc(4096, 4096);
        for round in 0..3 {
            for queue in &mut queues {
                for n in 0..20 {
                    let done = Request::read(n * 8, &[Seg::writable(gpa, 4096)]).run(queue);
                    assert_eq!(done.status, status::OK, "{name}, round {round}");
                }
            }
            lineage.upgrade(&["--workers", "3"]);
        }
        // The front end's own messages go on as well: rings stop, start, and get other eventfds.
        for queue in &mut queues {
            let base = front.stop(queue.index).expect("it stops");
            assert_eq!(base, queue.device_used_idx(), "{name}");
        }
        lineage.upgrade(&[]);
        for queue in &mut queues {
            front.start(queue).expect("it starts");
            front.enable(queue.index, true).expect("it is enabled");
            let done = Request::read(0, &[Seg::writable(gpa, 4096)]).run(queue);
            assert_eq!(done.status, status::OK, "{name}, started again");
        }
        let queue = &mut queues[0];
        front.enable(0, false).expect("it is disabled");
        lineage.upgrade(&[]);
        Request::read(0, &[Seg::writable(gpa, 4096)]).push(queue, 7);
        queue.publish();
        let early = queue.wait(std::time::Duration::from_millis(100));
        assert!(early.is_none(), "{name}: a disabled ring stays disabled");
        front.enable(0, true).expect("it is enabled");
        assert_eq!(finish(queue).token, 7, "{name}");
    }
}

#[test]
fn a_session_that_has_only_begun_goes_on() {
    let mut lineage = Lineage::start(Spec::image(8 * MIB), &[]);
    // Nothing was said at all.
    let silent = UnixStream::connect(lineage.daemon.socket()).expect("it listens");
    lineage.upgrade(&[]);
    let setup = Setup::default();
    let mem = GuestMemory::new(&setup.memory).expect("memory").into();
    let mut front = Front::negotiate(silent, &setup, mem).expect("it is answered");
    // Memory, and no queue.
    lineage.upgrade(&[]);
    let mut queue = front
        .prepare_queue(0, QueueSetup::default())
        .expect("memory");
    front.set_ring(&queue, 0).expect("it is described");
    // A ring described and not started.
    lineage.upgrade(&[]);
    front.send_call(0, queue.call_fd()).expect("a call");
    lineage.upgrade(&[]);
    front.send_kick(&queue).expect("a kick");
    front.enable(0, true).expect("it is enabled");
    let gpa = front.mem.alloc(4096, 4096);
    let done = Request::read(0, &[Seg::writable(gpa, 4096)]).run(&mut queue);
    assert_eq!(done.status, status::OK);
}

#[test]
fn what_was_changed_while_it_ran_is_still_so() {
    let args = ["--serial", "s", "--group-limit", "g,iops=1000"];
    let mut lineage = Lineage::start(Spec::null(8 * MIB), &args);
    let mut disk = Disk::attach(lineage.daemon.socket(), 2);
    assert_eq!(disk.front.config().expect("a config").writeback, 1);
    choose(&mut disk.front, 0);
    let change = json!({
        "scheduler": "kyber", "scheduler_params": { "read_lat_nsec": 123_456 },
        "limits": { "iops": "90000/77" }, "group": "g",
    });
    lineage.ask("PATCH", "/v1/disks/s", Some(&change));
    let limits = json!({ "limits": { "iops": 50_000 } });
    lineage.ask("PUT", "/v1/groups/new", Some(&limits));
    lineage.ask("PUT", "/v1/groups/g", Some(&limits));
    let size = json!({ "size_bytes": 16 * MIB });
    lineage.ask("POST", "/v1/disks/s/resize", Some(&size));
    for _ in 0..2 {
        lineage.upgrade(&args);
        let shown = lineage.ask("GET", "/v1/disks/s", None);
        assert_eq!(shown["scheduler"], "kyber");
        assert_eq!(shown["scheduler_params"]["read_lat_nsec"], 123_456);
        assert_eq!(
            shown["limits"]["iops"],
            json!({ "rate": 90_000, "burst": 77 })
        );
        assert_eq!(shown["group"], "g");
        assert_eq!(shown["size_bytes"], 16 * MIB);
        assert_eq!(
            (&shown["connected"], &shown["write_through"]),
            (&json!(true), &json!(true))
        );
        let groups = lineage.ask("GET", "/v1/groups", None);
        for group in groups["groups"].as_array().expect("groups") {
            assert_eq!(group["limits"]["iops"]["rate"], 50_000, "{group}");
        }
        let config = disk.front.config().expect("a config");
        assert_eq!((config.writeback, config.capacity), (0, 16 * MIB / SECTOR));
        for queue in 0..2 {
            disk.write(queue, 0, &[3; 8192]);
        }
    }
    // What nobody changed is as the new command line has it, and a guest keeps what it was promised.
    let more = [&args[..], &["--cache", "directsync"]].concat();
    let mut lineage = Lineage::start(Spec::image(8 * MIB), &more);
    let _disk = Disk::attach(lineage.daemon.socket(), 1);
    let less = [&args[..], &["--scheduler", "kyber", "--limit", "iops=5000"]].concat();
    lineage.upgrade(&less);
    let shown = lineage.ask("GET", "/v1/disks/s", None);
    assert_eq!(shown["scheduler"], "kyber");
    assert_eq!(shown["limits"]["iops"]["rate"], 5000);
    assert_eq!(shown["cache"], "none");
    assert_eq!(
        shown["write_through"], true,
        "the guest does not know better"
    );
}

#[test]
fn the_new_daemon_tells_the_front_end_when_the_disk_grows() {
    let mut lineage = Lineage::start(Spec::image(8 * MIB), &["--serial", "s"]);
    let setup = Setup {
        protocol: protocol::KNOWN | VhostUserProtocolFeatures::BACKEND_REQ,
        ..Setup::default()
    };
    let mut disk = Disk::attach_with(lineage.daemon.socket(), &setup, 2, QueueSetup::default())
        .expect("the back end serves a front end");
    let (mut channel, theirs) = UnixStream::pair().expect("a pair");
    channel.set_read_timeout(Some(DEADLINE)).expect("a timeout");
    disk.front
        .vhost
        .set_backend_request_fd(&theirs)
        .expect("BACKEND_REQ is negotiated");
    drop(theirs);
    lineage.upgrade(&["--serial", "s"]);
    let size = json!({ "size_bytes": 12 * MIB });
    lineage.ask("POST", "/v1/disks/s/resize", Some(&size));
    let mut message = [0; 12];
    channel.read_exact(&mut message).expect("it is told");
    assert_eq!(message[..4], [2, 0, 0, 0], "CONFIG_CHANGE_MSG");
    let config = disk.front.config().expect("a config");
    assert_eq!(config.capacity * SECTOR, 12 * MIB);
    disk.write(0, 12 * MIB / SECTOR - 8, &[1; 4096]);
    channel.set_nonblocking(true).expect("a flag");
    let open = channel.read(&mut message).expect_err("it is open");
    assert_eq!(open.kind(), std::io::ErrorKind::WouldBlock);
}

#[test]
fn a_limited_disk_does_not_keep_its_guest_waiting() {
    // Two a second, and thirty that wait: they go out with the upgrade.
    let limit = ["--limit", "iops=2/1"];
    let mut lineage = Lineage::start(Spec::null(8 * MIB), &limit);
    let mut disk = Disk::attach(lineage.daemon.socket(), 1);
    let gpa = disk.mem().alloc(4096, 4096);
    let queue = &mut disk.queues[0];
    for n in 0..30 {
        let data = [Seg::writable(gpa, 4096)];
        queue.push(n, kind::IN, 0, n * 64, &data).expect("room");
    }
    queue.publish();
    finish(queue);
    let before = std::time::Instant::now();
    lineage.upgrade(&limit);
    let mut done = 1;
    while queue.reap().is_some() {
        done += 1;
    }
    println!("{done} of 30 after {:?}", before.elapsed());
    assert_eq!(done, 30, "nothing is left for the new daemon");
    let shown = lineage.ask("GET", "/v1/disks/0", None);
    assert_eq!(shown["limits"]["iops"], json!({ "rate": 2, "burst": 1 }));
}

#[test]
fn another_control_socket_is_made_and_the_old_one_removed() {
    let mut lineage = Lineage::start(Spec::image(64 * MIB), &[]);
    let mut disk = Disk::attach(lineage.daemon.socket(), 4);
    let old = lineage.control();
    let new = lineage.dir.path().join("new.sock");
    under_load(&mut disk, |progress| {
        let spec = Spec::image(64 * MIB).args([
            "--take-over",
            old.to_str().expect("a name"),
            "--control-path",
            new.to_str().expect("a name"),
        ]);
        lineage.spec = spec;
        lineage.upgrade(&[]);
        progress();
        assert!(!old.exists(), "nobody listens there any more");
        let shown = super::ask(&new, "GET", "/v1/disks/0", None);
        assert_eq!(shown["connected"], true);
    });
}

#[test]
fn a_crash_after_an_upgrade_loses_nothing() {
    // Two a second, so that most of what is asked is in flight when the daemon dies.
    let limit = ["--limit", "iops=2/1"];
    let mut lineage = Lineage::start(Spec::image(8 * MIB), &limit);
    let (front, region, mut queues) = attach(&lineage.daemon, 1);
    let queue = &mut queues[0];
    let gpa = front.mem.alloc(4096, 4096);
    let done = Request::write(0, &[Seg::readable(gpa, 4096)]).run(queue);
    assert_eq!(done.status, status::OK);
    for _ in 0..2 {
        lineage.upgrade(&limit);
    }
    for n in 0..30 {
        let data = [Seg::readable(gpa, 4096)];
        queue.push(n, kind::OUT, 0, n * 64, &data).expect("room");
    }
    queue.publish();
    let mut seen = vec![finish(queue).token];
    lineage.daemon.signal(Signal::KILL);
    lineage.daemon.wait_exit();
    let in_region = || {
        let mut record = vec![0; 16 + 16 * 128];
        region
            .file
            .read_exact_at(&mut record, region.records_at())
            .expect("the region has a record");
        record[16..].chunks(16).filter(|e| e[0] != 0).count()
    };
    assert!(in_region() > 0, "the new daemon kept the account");
    // Another one, started afresh, to which the front end comes back.
    let next = lineage.daemon.beside(&lineage.spec);
    let _front = come_back(front, &next, &region, &queues);
    let queue = &mut queues[0];
    while queue.in_flight() > 0 {
        let done = finish(queue);
        assert_eq!(done.status, status::OK);
        seen.push(done.token);
    }
    seen.sort_unstable();
    assert_eq!(seen, (0..30).collect::<Vec<_>>(), "each exactly once");
    assert_eq!(in_region(), 0);
}

/// The same where the connection is older than the daemon: the kernel names the first one as its other end. A session
/// that is carried along, one that waits for its turn, and after a second upgrade.
#[test]
fn a_carried_session_that_sends_its_own_connection_is_refused() {
    let mut lineage = Lineage::start(Spec::image(8 * MIB), &[]);
    let setup = Setup {
        protocol: protocol::KNOWN | VhostUserProtocolFeatures::BACKEND_REQ,
        ..Setup::default()
    };
    let front = Front::connect(lineage.daemon.socket(), &setup).expect("a session");
    let waiting = UnixStream::connect(lineage.daemon.socket()).expect("it waits");
    lineage.upgrade(&[]);
    front
        .send_raw(SET_BACKEND_REQ_FD, 1, &[], &[front.socket().as_fd()])
        .expect("it is sent");
    assert!(front.is_closed(), "its own");
    drop(waiting);

    let front = Front::connect(lineage.daemon.socket(), &setup).expect("a session");
    let waiting = UnixStream::connect(lineage.daemon.socket()).expect("it waits");
    lineage.upgrade(&[]);
    lineage.upgrade(&[]);
    front
        .send_raw(SET_VRING_CALL, 1, &[0; 8], &[waiting.as_fd()])
        .expect("it is sent");
    assert!(front.is_closed(), "one that waits");
    let told = "the call descriptor is a connection to this daemon";
    assert!(lineage.daemon.wait_for_message(told));
}

/// A front end that sends its own connection would keep it open after it has left.
#[test]
fn a_daemon_that_took_over_knows_connections_to_itself() {
    let mut lineage = Lineage::start(Spec::image(8 * MIB), &[]);
    lineage.upgrade(&[]);
    let setup = Setup {
        protocol: protocol::KNOWN | VhostUserProtocolFeatures::BACKEND_REQ,
        ..Setup::default()
    };
    let front = Front::connect(lineage.daemon.socket(), &setup).expect("a session");
    let own = [front.socket().as_fd()];
    front
        .send_raw(SET_BACKEND_REQ_FD, 1, &[], &own)
        .expect("it is sent");
    assert!(front.is_closed());
    let told = "the back-end channel's descriptor is a connection to this daemon";
    assert!(lineage.daemon.wait_for_message(told));
}
