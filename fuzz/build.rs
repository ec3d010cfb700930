//! The front end that the tests share names the program's path, which cargo tells tests only. The
//! fuzz targets run the daemon in their own process.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-env=CARGO_BIN_EXE_vhost-user-blkmq=");
}
