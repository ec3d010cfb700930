//! A front end that takes its in-flight region from daemon to daemon, and what its guest has chosen.

use vhost::vhost_user::message::VhostUserProtocolFeatures;

use super::Lineage;
use super::support::front::Inflight;
use super::support::*;

pub fn setup() -> Setup {
    Setup {
        protocol: protocol::KNOWN | VhostUserProtocolFeatures::INFLIGHT_SHMFD,
        ..Setup::default()
    }
}

/// A session with a region and queues of 128 entries.
pub fn attach(daemon: &Daemon, queues: usize) -> (Front, Inflight, Vec<Queue>) {
    let mut front = Front::connect(daemon.socket(), &setup()).expect("a session");
    let region = front.new_inflight(queues, 128).expect("a region");
    front.set_inflight(&region).expect("it is taken");
    let queue = |index| front.queue(index, QueueSetup::default()).expect("a queue");
    let queues = (0..queues).map(queue).collect();
    (front, region, queues)
}

/// The front end goes to another daemon, and the guest goes on.
pub fn come_back(front: Front, daemon: &Daemon, region: &Inflight, queues: &[Queue]) -> Front {
    assert!(
        daemon.wait_for_message("listening on"),
        "{}",
        daemon.stderr()
    );
    let mem = std::sync::Arc::clone(&front.mem);
    drop(front);
    let mut front = Front::connect_with(daemon.socket(), &setup(), mem).expect("it is served");
    front.set_inflight(region).expect("it is taken");
    for queue in queues {
        front.start(queue).expect("it starts");
        front.enable(queue.index, true).expect("it is enabled");
    }
    front
}

/// The guest chooses its cache mode.
pub fn choose(front: &mut Front, writeback: u8) {
    let written = front.set_config(BlkConfig::WRITEBACK_AT, &[writeback]);
    written.expect("the guest chooses");
}

/// Whether writes of disk `s` are durable when they complete.
pub fn is_write_through(lineage: &Lineage) -> bool {
    let shown = lineage.ask("GET", "/v1/disks/s", None);
    shown["write_through"] == serde_json::json!(true)
}
