//! The glue between front ends, threads, file descriptors and sockets.

pub mod backend;
pub mod clock;
pub mod disk;
pub mod faults;
pub mod growth;
pub mod message;
pub mod report;
pub mod roster;
pub mod sandbox;
pub mod server;
pub mod session;
pub mod socket;
pub mod vring;
pub mod worker;
