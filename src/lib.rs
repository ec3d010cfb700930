//! A vhost-user-blk backend whose data path is Linux blk-mq, rebuilt in user space.
//!
//! A request's way:
//!
//! ```text
//!   front end (QEMU, Cloud Hypervisor, …)             guest memory
//!        │ vhost-user                                     │
//!        ▼                                                ▼
//!   vhost_user/guard ─▶ vhost_user/device ─▶ worker: one thread, one turn after another
//!                               messages           │
//!                                     virtio: ring, parse, guest_io
//!                                                  │ Request + GuestIo
//!                                     mq: plug, ctx, hctx, elevator, throttle, tags
//!                                                  │ driver tag
//!                                     engine: io_uring ─▶ image
//! ```
//!
//! The rooms, from the top floor down. Each imports from rooms below it only, and no modules import each other
//! in a circle, but a module and its children (`tests/tidy` holds both):
//!
//! | room | what it is |
//! |---|---|
//! | [`server`] | the process: start, threads, signals, end |
//! | [`control`] | the control socket: what is shown and what is changed |
//! | [`takeover`] | live upgrade: the disks of another process |
//! | [`vhost_user`] | the protocol: the guard that checks each message, and the device behind it |
//! | [`disk`] | one served disk, whichever worker serves it |
//! | [`worker`] | the data-plane thread: it owns rings, hctxs and an engine |
//! | [`image`] | what is behind a disk: opened, checked, locked |
//! | [`sandbox`] | what the process gives up |
//! | [`cli`] | the command line, and the configuration made of it |
//! | [`engine`] | I/O on an image: io_uring and copies |
//! | [`virtio`] | rings, guest memory and the layouts in it |
//! | [`config`] | what is to be served, checked |
//! | [`logging`] | the log, and the last line of a process |
//! | [`sys`] | what every room needs of the operating system |
//! | [`mq`] | blk-mq: no file descriptor, no guest address, no clock |
//! | [`error`] | errors before the first request |
//!
//! `docs/ARCHITECTURE.md` says why each part is as it is, and where to look for what.

#![warn(clippy::print_stdout, clippy::print_stderr)]
// One module style: a folder has its `mod.rs`.
#![warn(clippy::self_named_module_files)]
#![cfg_attr(test, allow(clippy::cast_possible_truncation))]

/// The atomics of structures that threads share without a lock. `tests/models` takes the files of those
/// structures and puts others in the place of these, which try every order of steps.
mod atomic {
    pub use std::sync::atomic::{
        AtomicBool, AtomicI32, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence,
    };
}

pub mod cli;
pub mod config;
pub mod control;
pub mod disk;
pub mod engine;
pub mod error;
pub mod image;
pub mod logging;
pub mod mq;
pub mod sandbox;
pub mod server;
pub mod sys;
pub mod takeover;
pub mod vhost_user;
pub mod virtio;
pub mod worker;
