//! A vhost-user-blk backend whose data path is Linux blk-mq, rebuilt in user space.

pub mod engine;
pub mod mq;
