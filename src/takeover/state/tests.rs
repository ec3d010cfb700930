use std::os::fd::AsRawFd;

use serde_json::Value;

use super::*;
use crate::mq::elevator::Kind as Elevator;
use crate::vhost_user::guard::{CarriedInflight, CarriedRegion, CarriedRing, Negotiated};

/// A descriptor, and which file it is.
fn fd() -> (OwnedFd, u64) {
    let file = tempfile::tempfile().unwrap();
    let inode = rustix::fs::fstat(&file).unwrap().st_ino;
    (file.into(), inode)
}

fn inode(fd: &OwnedFd) -> u64 {
    assert!(fd.as_raw_fd() > 2);
    rustix::fs::fstat(fd).unwrap().st_ino
}

/// A disk with something in every field, and the files of its descriptors in the order of [`files`].
fn sample() -> (CarriedDisk, Vec<u64>) {
    let mut inodes = Vec::new();
    let mut fd = || {
        let (fd, inode) = fd();
        inodes.push(inode);
        fd
    };
    let mut scheduler: Params = Elevator::Kyber.into();
    scheduler.set("read_lat_nsec", 12345).unwrap();
    let mut limits = Limits::default();
    let rate = Rate {
        per_second: 100,
        burst: 7,
    };
    set_limit(&mut limits, "bps-wr", rate).unwrap();
    let disk = CarriedDisk {
        socket: "the socket \"/run/a\"".to_owned(),
        size_bytes: 1 << 40,
        was_write_through: true,
        changes: Changes {
            scheduler: Some(scheduler),
            limits: Some(limits),
            group: Some(None),
            write_through: Some(false),
            cautious: true,
            known: false,
            sync_fault: Some(5),
        },
        listener: Some(CarriedListener {
            socket: fd(),
            file: Some((3, 4)),
        }),
        session: Some(CarriedSession {
            front_end: fd(),
            channel: Some(fd()),
            negotiated: Negotiated {
                owned: true,
                features: u64::MAX,
                protocol_features: 0x1234,
            },
            regions: vec![CarriedRegion {
                guest: 1,
                size: 2,
                user: 3,
                offset: u64::MAX,
                file: fd(),
            }],
            inflight: Some(CarriedInflight {
                payload: vec![0, 255],
                file: fd(),
            }),
            rings: vec![CarriedRing {
                index: 255,
                size: 1024,
                base: 65535,
                addresses: Some([1, 2, u64::MAX]),
                enabled: true,
                kicked: true,
                running: true,
                kick: Some(fd()),
                call: Some(fd()),
                err: Some(fd()),
            }],
        }),
    };
    (disk, inodes)
}

fn files(disk: &CarriedDisk) -> Vec<u64> {
    let session = disk.session.as_ref().unwrap();
    let ring = &session.rings[0];
    [
        &disk.listener.as_ref().unwrap().socket,
        &session.front_end,
        session.channel.as_ref().unwrap(),
        &session.regions[0].file,
        &session.inflight.as_ref().unwrap().file,
        ring.kick.as_ref().unwrap(),
        ring.call.as_ref().unwrap(),
        ring.err.as_ref().unwrap(),
    ]
    .map(inode)
    .to_vec()
}

#[test]
fn what_is_written_is_read_again_with_every_descriptor_in_its_place() {
    let (disk, inodes) = sample();
    let text = format!("{:?}", disk.changes);
    let frame = disk.write();
    assert_eq!(frame.fds.len(), inodes.len());
    let json: Value = serde_json::from_slice(&frame.json).unwrap();
    let read = CarriedDisk::read(frame).unwrap();
    assert_eq!(files(&read), inodes);
    assert_eq!(format!("{:?}", read.changes), text);
    // And once more: nothing was lost on the way.
    let again: Value = serde_json::from_slice(&read.write().json).unwrap();
    assert_eq!(json, again);
    let common = Common {
        groups: [("g".to_owned(), Limits::default())].into(),
        disks: 3,
        control: Some(CarriedListener {
            socket: fd().0,
            file: None,
        }),
    };
    let common = Common::read(common.write()).unwrap();
    assert_eq!((common.groups.len(), common.disks), (1, 3));
    assert!(common.control.is_some());
}

#[test]
fn fields_of_other_versions_are_passed_over_and_made_up_for() {
    let (disk, _) = sample();
    let mut frame = disk.write();
    let mut json: Value = serde_json::from_slice(&frame.json).unwrap();
    json["invented_later"] = 1.into();
    json["session"]["invented_later"] = 1.into();
    for (place, field) in [("/session", "inflight"), ("", "sync_fault")] {
        let object = json.pointer_mut(place).unwrap().as_object_mut().unwrap();
        object.remove(field).unwrap();
    }
    frame.json = serde_json::to_vec(&json).unwrap();
    let disk = CarriedDisk::read(frame).unwrap();
    assert!(disk.session.unwrap().inflight.is_none());
    assert_eq!(disk.changes.sync_fault, None);
}

/// Of a daemon that does not say, it is assumed only if the guest's rings ran there.
#[test]
fn what_the_guest_chose_is_known_if_the_daemon_before_knew_it() {
    for (said, rings, expected) in [
        (Some(false), Some(true), false),
        (Some(true), None, true),
        (None, Some(true), true),
        (None, Some(false), false),
        (None, None, false),
    ] {
        let (mut disk, _) = sample();
        match (rings, &mut disk.session) {
            (Some(running), Some(session)) => session.rings[0].running = running,
            (_, session) => *session = None,
        }
        let mut frame = disk.write();
        let mut json: Value = serde_json::from_slice(&frame.json).unwrap();
        let object = json.as_object_mut().unwrap();
        match said {
            Some(known) => object.insert("known".to_owned(), known.into()),
            None => object.remove("known"),
        };
        frame.json = serde_json::to_vec(&json).unwrap();
        let read = CarriedDisk::read(frame).unwrap();
        assert_eq!(read.changes.known, expected, "{said:?} {rings:?}");
    }
}

#[test]
fn a_descriptor_that_is_missing_or_named_twice_is_refused() {
    for change in [0, 99] {
        let (disk, _) = sample();
        let mut frame = disk.write();
        let mut json: Value = serde_json::from_slice(&frame.json).unwrap();
        json["session"]["front_end"] = change.into();
        frame.json = serde_json::to_vec(&json).unwrap();
        let error = CarriedDisk::read(frame).unwrap_err().to_string();
        assert!(error.contains("a file descriptor is missing"), "{error}");
    }
    let refused = refusal("two\nlines");
    assert_eq!(read_refusal(&refused), "two\\nlines");
}
