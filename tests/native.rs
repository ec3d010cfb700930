//! The daemon over a real socket, driven by a front end without a virtual machine, with the data verified.

mod support;

#[path = "native/io.rs"]
mod io;
