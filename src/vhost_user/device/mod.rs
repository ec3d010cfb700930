//! What the vhost-user crate drives: the device and its rings.

pub mod backend;
pub mod dirty_log;
mod session_end;
mod session_state;
pub mod vring;
