//! Front ends that are never ready to be handed over: without `--close-unready` one of them refuses the upgrade of all
//! disks, with it those sessions are closed and all others go on.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use super::support::*;
use super::{Lineage, MIB, under_load};

const SET_FEATURES: u32 = 2;
const LOG_ALL: u64 = 1 << 26;
const GET_FEATURES: [u8; 12] = [1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];

/// In the middle of a message.
fn halfway(socket: &Path) -> UnixStream {
    let mut stream = UnixStream::connect(socket).expect("it listens");
    stream.write_all(&GET_FEATURES[..7]).expect("there is room");
    stream
}

/// Asks and does not read.
fn deaf(socket: &Path) -> UnixStream {
    let mut stream = UnixStream::connect(socket).expect("it listens");
    stream
        .set_write_timeout(Some(std::time::Duration::from_millis(200)))
        .expect("a timeout");
    while stream.write_all(&GET_FEATURES).is_ok() {}
    stream
}

/// Says that its guest is being migrated.
fn migrating(socket: &Path) -> Front {
    let front = Front::connect(socket, &Setup::default()).expect("a session");
    let features = front.features | LOG_ALL;
    front
        .send_raw(SET_FEATURES, 1, &features.to_ne_bytes(), &[])
        .expect("it is sent");
    front
}

#[test]
fn front_ends_that_are_never_ready_are_closed_if_the_user_says_so() {
    let lineage = Lineage::start(Spec::image(64 * MIB), &[]);
    let sockets: Vec<PathBuf> = ["halfway", "deaf", "migrating"]
        .map(|name| lineage.dir.path().join(name))
        .to_vec();
    let mut spec = lineage.spec.clone();
    for socket in &sockets {
        let disk = format!("socket-path={},engine=null,size=1M", socket.display());
        spec = spec.args(["--disk", &disk]);
    }
    // The first one gives way to one with four disks.
    drop(lineage.daemon);
    let mut first = Daemon::start_ours(&spec);
    for socket in &sockets {
        assert!(first.wait_for_message(&format!("listening on {}", socket.display())));
    }
    let mut disk = Disk::attach(first.socket(), 2);
    let halfway = halfway(&sockets[0]);
    let deaf = deaf(&sockets[1]);
    let migrating = migrating(&sockets[2]);
    under_load(&mut disk, |progress| {
        let mut new = first.beside(&spec);
        assert_eq!(new.wait_exit().code(), Some(1), "{}", new.stderr());
        progress();
        let new = first.beside(&spec.clone().args(["--close-unready"]));
        assert!(
            new.wait_for_message("took over; the guests go on"),
            "{}",
            first.stderr()
        );
        progress();
        assert!(first.wait_exit().success());
        let said = first.stderr();
        let closed = "the session was closed: its front end was not ready to be handed over";
        assert_eq!(said.matches(closed).count(), 3, "{said}");
        assert!(said.contains("another daemon has the disks"), "{said}");
        // The wait for the three, during which the guest went on, is not counted.
        let waited = said
            .split_once("the guests waited for ")
            .map(|(_, rest)| rest);
        let ms = waited.and_then(|rest| rest.split_once(" ms at most, that of disk "));
        let ms = ms.and_then(|(ms, _)| ms.parse::<u64>().ok());
        assert!(ms.is_some_and(|ms| ms < 5000), "{said}");
        // Their disks are served by the new one.
        for socket in &sockets {
            let mut front = Disk::attach(socket, 1);
            front.read(0, 0, 4096);
        }
        first = new;
        progress();
    });
    assert!(migrating.is_closed());
    drop((halfway, deaf));
    drop(disk);
    first.stop();
}
