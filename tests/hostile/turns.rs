//! What a worker takes in a turn is bounded for each disk, not only for each ring.

use crate::support::disk::kind;
use crate::support::*;
use tempfile::TempDir;

const QUEUES: usize = 64;
const CHAINS: u64 = 128;
const DESCRIPTORS: usize = 126;

/// Chains of the hostile disk that are answered while one request of the other is: a few turns' share of two disks,
/// 2048 descriptors each. It was all rings' part of a turn, 64 times 4096 descriptors.
const BESIDE_ONE: u64 = 10 * 2048 / 128;

fn answered(disk: &Disk) -> u64 {
    let rings = disk.queues.iter();
    rings.map(|queue| u64::from(queue.device_used_idx())).sum()
}

#[test]
fn full_rings_of_long_chains_on_64_queues_leave_other_disks_their_part_of_each_turn() {
    let dir = TempDir::new().expect("a directory");
    let socket = dir.path().join("other.sock");
    let other = format!("socket-path={},engine=null,size=8M", socket.display());
    let spec = Spec::null(8 << 20)
        .queues(QUEUES)
        .args(["--workers", "1", "--disk", &other]);
    let daemon = Daemon::start_ours(&spec);
    let memory = Setup {
        memory: vec![(0, 128 << 20)],
        ..Setup::default()
    };
    let setup = QueueSetup::default();
    let mut hostile =
        Disk::attach_with(daemon.socket(), &memory, QUEUES, setup).expect("a session");
    let mut quick = Disk::attach(&socket, 1);
    quick.read(0, 0, 4096);
    // Odd lengths, so that each is refused when it has been looked at.
    let gpa = hostile.mem().alloc(512, 512);
    let segs = vec![Seg::writable(gpa, 1); DESCRIPTORS - 2];
    // The rings are idle, so the worker looks at them when they kick, which they do one right after the other.
    for queue in &mut hostile.queues {
        for n in 0..CHAINS {
            queue.push(n, kind::IN, 0, 0, &segs).expect("room");
        }
        queue.publish_quietly();
    }
    for queue in &mut hostile.queues {
        queue.kick();
    }
    let all = QUEUES as u64 * CHAINS;
    let mut beside = Vec::new();
    let mut before = answered(&hostile);
    while before < all {
        quick.read(0, 0, 4096);
        let now = answered(&hostile);
        beside.push(now - before);
        before = now;
    }
    beside.sort_unstable();
    let median = beside[beside.len() / 2];
    assert!(median <= BESIDE_ONE, "{median} chains: {beside:?}");
    // Each ring has its turn: none is forgotten.
    for queue in &mut hostile.queues {
        disk::finish_all(queue, CHAINS as usize);
    }
}
