//! What every room needs of the operating system.

#[cfg(test)]
pub mod child;
pub mod clock;
pub mod cpu_list;
pub mod dying;
pub mod fds;
pub mod filesystem;
pub mod holders;
pub mod listener;
pub mod own_sockets;
pub mod sigbus;
