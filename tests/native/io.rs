//! Reads, writes and all that moves data.

use crate::support::*;

#[test]
fn what_is_written_is_read_back() {
    let daemon = Daemon::start(&Spec::image(16 << 20));
    let mut disk = Disk::attach(daemon.socket(), 1);
    let data = Rng::new(1).bytes(65536);
    disk.write(0, 8, &data);
    disk.flush(0);
    assert!(disk.read(0, 8, data.len()) == data);
    drop(disk);
    daemon.stop();
}
