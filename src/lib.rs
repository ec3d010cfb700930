//! A vhost-user-blk backend whose data path is Linux blk-mq, rebuilt in user space.

#![cfg_attr(test, allow(clippy::cast_possible_truncation))]

pub mod cli;
pub mod config;
pub mod daemon;
pub mod engine;
pub mod error;
pub mod mq;
pub mod virtio;
