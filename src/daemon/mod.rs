//! The glue between front ends, threads, file descriptors and sockets.

pub mod backend;
pub mod device_state;
pub mod dirty;
pub mod disk;
pub mod files;
pub mod growth;
pub mod placement;
pub mod report;
pub mod roster;
pub mod serve;
pub mod server;
pub mod session;
pub mod signals;
pub mod takeover;
pub mod vring;
