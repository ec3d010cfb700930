//! The vhost-user protocol: one connection, from its messages to the device behind them.

pub mod device;
pub mod guard;
pub mod handover;
pub mod loopback;
pub mod session;
