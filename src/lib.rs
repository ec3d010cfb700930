//! A vhost-user-blk backend whose data path is Linux blk-mq, rebuilt in user space.
//!
//! ```text
//!   front end (QEMU, Cloud Hypervisor, …)             guest memory
//!        │ vhost-user                                     │
//!        ▼                                                ▼
//!   daemon/session ─▶ daemon/backend, vring ─▶ daemon/worker: one thread
//!                          messages                │
//!                                     virtio: ring, parse, receipt
//!                                                  │ Request + GuestIo
//!                                     mq: plug, ctx, hctx, tags
//!                                                  │ driver tag
//!                                     engine: io_uring ─▶ image
//! ```
//!
//! Beside it, `control` answers whoever asks on the control socket: it reads copies of what workers
//! counted, and changes things by messages.
//!
//! Arrows of knowledge point one way: `control, daemon → {virtio, engine} → mq`. `sigbus` makes memory that a
//! front end can take away harmless, for whoever maps some, and knows nobody. `docs/ARCHITECTURE.md` says why
//! each part is as it is.

#![warn(clippy::print_stdout, clippy::print_stderr)]
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
