//! A native vhost-user-blk front end: what a virtual machine monitor and a guest's driver do, in one process, without
//! a virtual machine. The tests in `tests/` use it against the daemon, and the benchmarks take it in with `#[path]`.
//!
//! From the bottom: [`memory`] is the guest's memory, [`driver`] a split-ring virtio driver for one queue, [`front`]
//! the vhost-user side of a session, [`disk`] both together with the virtio-blk requests, [`config`] the disk's
//! configuration space. [`daemon`] starts and stops the program, [`summary`] reads what it says about itself and
//! [`proc_stats`] what the kernel says about it.
//!
//! With `BLKMQ_TEST_BACKEND=qemu-storage-daemon` the same tests run against QEMU's storage daemon. It does not do all
//! that is asked here, so not all of them pass; it is there to tell a fault of the front end from one of the daemon.

#![allow(
    dead_code,
    unused_imports,
    unreachable_pub,
    reason = "each test and benchmark takes in the whole module and uses a part of it"
)]
#![allow(
    clippy::cast_possible_truncation,
    reason = "test code: sizes and offsets are small and known, and an assertion in memory.rs catches the rest"
)]

pub mod config;
pub mod daemon;
pub mod disk;
pub mod driver;
pub mod enter;
pub mod event;
pub mod front;
pub mod full;
pub mod group;
pub mod memory;
pub mod proc_stats;
pub mod rng;
pub mod summary;

pub use config::BlkConfig;
pub use daemon::{Daemon, Spec};
pub use disk::{Disk, Request};
pub use driver::{Completion, Queue, QueueSetup, Seg};
pub use event::Event;
pub use front::{Front, Setup, features, protocol};
pub use group::Group;
pub use memory::GuestMemory;
pub use proc_stats::ProcStats;
pub use rng::Rng;
pub use summary::Summary;

use std::time::Duration;

/// How long anything is waited for before a test gives up. Far longer than anything takes, for slow machines.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// Bytes in one virtio-blk sector, whatever the disk's logical block size is (virtio 1.3, 5.2.4).
pub const SECTOR: u64 = 512;
