//! virtio: rings, guest memory and the virtio-blk wire format. Nothing else in the program knows a
//! guest address or a layout the guest sees.
//!
//! The way of a request through here: [`ring::Ring::pop_head`] takes a chain's head from the
//! available ring, [`parse::parse`] turns the chain into a [`crate::mq::request::Request`] and a
//! [`guest_io::GuestIo`] (its buffers and the right to answer it), and when the I/O has ended
//! [`guest_io::GuestIo::finish`] writes the status byte and gives the [`guest_io::Used`] element that
//! [`ring::Ring::put_used`] takes. Each step consumes what the step before gave, so nothing is
//! answered twice.

pub mod abi;
mod chain;
pub mod config_space;
pub mod dirty_log;
pub mod features;
pub mod geometry;
pub mod guest_io;
pub mod inflight;
pub mod memory;
pub mod parse;
pub mod pool;
pub mod ring;

mod odd_requests;
#[cfg(test)]
mod testing;
