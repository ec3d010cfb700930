//! A daemon that may not make files, and so has no in-flight region to give.

use rustix::process::{Pid, Resource, Rlimit, prlimit};
use vhost::vhost_user::message::VhostUserProtocolFeatures;

use super::moments::{push_reads, reap_all};
use super::world::{Base, World};
use crate::support::*;

#[test]
fn a_front_end_is_served_where_files_may_not_be_made() {
    let mut world = World::new(1 << 20, 1, QueueSetup::default());
    let gpa = world.mem.alloc(4096, 4096);
    let daemon = world.daemon(&[]);
    let pid = i32::try_from(daemon.pid()).expect("process numbers have 31 bits");
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    prlimit(Pid::from_raw(pid), Resource::Fsize, none).expect("a limit can be set");
    let front = world.attach(&daemon, Base::Used);
    let offered = front.protocol;
    assert!(!offered.contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD));
    push_reads(&mut world, 0, gpa, 3);
    assert_eq!(reap_all(&mut world, 0).len(), 3);
}
