//! The daemon over a real socket, driven by a front end without a virtual machine, with the data verified.

#![allow(
    clippy::cast_possible_truncation,
    reason = "test code: sizes and offsets are small and known"
)]

mod support;

#[path = "native/bad_requests.rs"]
mod bad_requests;
#[path = "native/between.rs"]
mod between;
#[path = "native/coalesce.rs"]
mod coalesce;
#[path = "native/config_space.rs"]
mod config_space;
#[path = "native/in_memory.rs"]
mod in_memory;
#[path = "native/io.rs"]
mod io;
#[path = "native/load.rs"]
mod load;
#[path = "native/lost_memory.rs"]
mod lost_memory;
#[path = "native/migration.rs"]
mod migration;
#[path = "native/other_drivers.rs"]
mod other_drivers;
#[path = "native/placement.rs"]
mod placement;
#[path = "native/ranges.rs"]
mod ranges;
#[path = "native/rings.rs"]
mod rings;
#[path = "native/sessions.rs"]
mod sessions;
#[path = "native/snapshot.rs"]
mod snapshot;
#[path = "native/syscalls.rs"]
mod syscalls;
