//! blk-mq, rebuilt: pure, without file descriptors, guest addresses, clocks, threads or logs.

#![forbid(unsafe_code)]

pub mod map;
