//! The glue between front ends, threads, file descriptors and sockets.

pub mod backend;
pub mod dirty;
pub mod files;
pub mod placement;
pub mod serve;
pub mod server;
pub mod session;
pub mod signals;
pub mod takeover;
pub mod vring;
