//! blk-mq itself. Pure: no file descriptor, no guest address, no clock, no thread, no log.

#![forbid(unsafe_code)]

pub mod ids;
pub mod limits;
pub mod request;
