//! The glue between front ends, threads, file descriptors and sockets.

pub mod session;
