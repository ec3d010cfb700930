//! The vhost-user protocol: one connection, from its messages to the device behind them.

pub mod loopback;
