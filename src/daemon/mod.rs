//! The glue between front ends, threads, file descriptors and sockets.

pub mod files;
pub mod placement;
pub mod server;
pub mod signals;
