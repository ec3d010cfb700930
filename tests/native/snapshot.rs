//! A guest that is paused for a snapshot and goes on in place.

use std::os::fd::OwnedFd;

use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{
    VhostTransferStateDirection as Direction, VhostTransferStatePhase as Phase,
    VhostUserProtocolFeatures,
};

use crate::support::disk::{finish, kind, status};
use crate::support::*;

fn attach(daemon: &Daemon, queues: usize) -> Disk {
    let setup = Setup {
        protocol: protocol::KNOWN | VhostUserProtocolFeatures::DEVICE_STATE,
        ..Setup::default()
    };
    Disk::attach_with(daemon.socket(), &setup, queues, QueueSetup::default())
        .expect("the back end serves a front end")
}

/// Pauses, stops every ring, and has the device's state saved, as Cloud Hypervisor does.
fn snapshot(disk: &mut Disk, save: bool) -> Vec<u16> {
    let queues = 0..disk.queues.len();
    for index in queues.clone() {
        disk.front
            .enable(index, false)
            .expect("a ring can be disabled");
    }
    let bases = queues
        .map(|index| disk.front.stop(index).expect("a ring can be stopped"))
        .collect();
    if save {
        let (reader, writer) = rustix::pipe::pipe().expect("a pipe");
        disk.front
            .vhost
            .set_device_state_fd(Direction::SAVE, Phase::STOPPED, OwnedFd::into(writer))
            .expect("a state can be saved");
        disk.front.vhost.check_device_state().expect("it was saved");
        drop(reader);
    }
    bases
}

fn push_read(disk: &mut Disk, queue: usize) {
    let gpa = disk.mem().alloc(512, 512);
    let data = [Seg::writable(gpa, 512)];
    let queue = &mut disk.queues[queue];
    queue.push(0, kind::IN, 0, 0, &data).expect("room");
    queue.publish();
    queue.kick();
}

/// Cloud Hypervisor v53.0 enables the rings that it has stopped, and says nothing else.
#[test]
fn rings_that_are_only_enabled_after_a_snapshot_go_on() {
    let daemon = Daemon::start_ours(&Spec::image(1 << 20));
    let mut disk = attach(&daemon, 2);
    disk.write(0, 0, &[7; 512]);
    for round in 0..3 {
        snapshot(&mut disk, true);
        // What the guest sends before all is on again is not lost.
        push_read(&mut disk, 1);
        for index in 0..2 {
            disk.front
                .enable(index, true)
                .expect("a ring can be enabled");
        }
        let done = finish(&mut disk.queues[1]);
        assert_eq!(done.status, status::OK, "round {round}");
        // By kick and by call.
        assert_eq!(disk.read(0, 0, 512), [7; 512], "round {round}");
    }
    daemon.stop();
}

/// Its main branch starts each with base, call and kick.
#[test]
fn rings_that_are_started_after_a_snapshot_go_on() {
    let daemon = Daemon::start_ours(&Spec::image(1 << 20));
    let mut disk = attach(&daemon, 2);
    disk.write(0, 0, &[7; 512]);
    for _ in 0..3 {
        let bases = snapshot(&mut disk, true);
        for (index, base) in bases.into_iter().enumerate() {
            let Disk { front, queues, .. } = &mut disk;
            front
                .vhost
                .set_vring_base(index, base)
                .expect("a base can be set");
            front
                .send_call(index, queues[index].call_fd())
                .expect("a call can be set");
            front.send_kick(&queues[index]).expect("a kick can be set");
            front.enable(index, true).expect("a ring can be enabled");
        }
        assert_eq!(disk.read(0, 0, 512), [7; 512]);
        assert_eq!(disk.read(1, 0, 512), [7; 512]);
    }
    daemon.stop();
}

/// QEMU enables every queue, also those that the driver stopped and does not use again.
#[test]
fn a_stopped_ring_stays_stopped_where_nothing_says_that_it_goes_on() {
    for save in [false, true] {
        let daemon = Daemon::start_ours(&Spec::image(1 << 20));
        let mut disk = attach(&daemon, 2);
        disk.write(0, 0, &[7; 512]);
        let bases = snapshot(&mut disk, save);
        push_read(&mut disk, 1);
        if save {
            // Another ring is set up by the front end itself.
            disk.front
                .vhost
                .set_vring_base(0, bases[0])
                .expect("a base can be set");
        }
        disk.front.enable(1, true).expect("a ring can be enabled");
        let Disk { front, queues, .. } = &mut disk;
        front.start(&queues[0]).expect("a ring can be started");
        front.enable(0, true).expect("a ring can be enabled");
        assert_eq!(disk.read(0, 0, 512), [7; 512]);
        assert!(!disk.queues[1].has_completions(), "saved: {save}");
        daemon.stop();
    }
}
