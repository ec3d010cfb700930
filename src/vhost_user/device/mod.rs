//! What the vhost-user crate drives: the device and its rings.

pub mod backend;
pub mod noop_bitmap;
pub mod session_state;
