//! The only place that knows the disk and io_uring.

pub mod disk;
