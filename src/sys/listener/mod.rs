//! The sockets front ends connect to, and the one inside the process.

mod owner;
mod turn;

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{AtFlags, Mode};
use rustix::io::{Errno, FdFlags, fcntl_getfd, fcntl_setfd};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};
use rustix::process::{Gid, Uid};

use self::owner::{Knock, knock};
pub use self::turn::Turns;
use crate::error::StartError;
use crate::sys::own_sockets::remember_socket;

/// Connections that may wait to be accepted: as many as the system allows (net.core.somaxconn), which is
/// what the standard library takes for its listeners.
const BACKLOG: i32 = i32::MAX;

/// Where one disk's front ends come from.
#[derive(Debug)]
pub enum Door {
    /// They connect; one after another is served.
    Listening(UnixListener, Option<SocketFile>),
    /// One was handed over connected.
    Connected(UnixStream),
}

/// Who may connect to a socket: its file's mode and owners.
#[derive(Clone, Copy, Debug, Default)]
pub struct Access {
    /// As the umask says if it is `None`.
    pub mode: Option<u32>,
    /// The process's if it is `None`.
    pub uid: Option<u32>,
    /// The process's if it is `None`.
    pub gid: Option<u32>,
}

/// A socket's file, removed with it, unless somebody has put another in its place.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
    /// Not while it is still another process's.
    ours: bool,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if !self.ours {
            return;
        }
        let removed = match fs::symlink_metadata(&self.path) {
            Ok(now) if (now.dev(), now.ino()) == self.identity => fs::remove_file(&self.path),
            // Another socket, or none.
            Ok(_) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        };
        if let Err(error) = removed {
            log::warn!("the socket {:?} cannot be removed: {error}", self.path);
        }
    }
}

impl SocketFile {
    /// The file at `path` of a process that has not handed it over yet, known by its device and inode. It stays where
    /// it is until [`SocketFile::adopt`].
    pub fn inherited(path: &Path, identity: (u64, u64)) -> SocketFile {
        SocketFile {
            path: path.to_owned(),
            identity,
            ours: false,
        }
    }

    /// The file is this process's from now on; whether it was another's until now.
    pub fn adopt(&mut self) -> bool {
        !std::mem::replace(&mut self.ours, true)
    }

    /// Its device and inode.
    pub fn identity(&self) -> (u64, u64) {
        self.identity
    }

    /// Leaves the file where it is: it is another process's from now on.
    pub fn leave(self) {
        std::mem::forget(self);
    }
}

impl Door {
    /// Listens on `path`. A socket nobody listens on any more, left by a process that was killed,
    /// is replaced.
    ///
    /// # Errors
    ///
    /// Somebody listens there; something else is there; the kernel refuses.
    pub fn bind(path: &Path) -> Result<Door, StartError> {
        Door::bind_for(path, Access::default(), &mut Turns::default())
    }

    /// The same, for those that `access` says.
    ///
    /// # Errors
    ///
    /// As for [`Door::bind`]; or the file cannot be given to them.
    pub fn bind_for(path: &Path, access: Access, turns: &mut Turns) -> Result<Door, StartError> {
        let (listener, file) = listen(path, "--socket-path", access, turns)?;
        Ok(Door::Listening(listener, Some(file)))
    }

    /// Serves a descriptor that the parent process left open and [`claim`] has found: a listening socket, or a
    /// connected one.
    ///
    /// # Errors
    ///
    /// It is not a UNIX stream socket that is listening or connected.
    pub fn inherit(socket: OwnedFd) -> Result<Door, StartError> {
        let fd = socket.as_raw_fd();
        let bad = |why| StartError::BadFd { fd, why };
        let outcome = classify(&socket);
        match outcome {
            Ok(listening) => {
                if listening {
                    listen_ourselves(&socket).map_err(|_| bad("cannot be listened on"))?;
                }
                Ok(if listening {
                    Door::Listening(socket.into(), None)
                } else {
                    Door::Connected(socket.into())
                })
            }
            Err(why) => Err(bad(why)),
        }
    }
}

/// Takes the descriptor `fd`, which the parent process left open for us. To be called before the process opens anything:
/// later a number that the parent did not use may be one of ours.
///
/// # Errors
///
/// It is not open, or not the parent's to pass.
pub fn claim(fd: i32) -> Result<OwnedFd, StartError> {
    let bad = |why| StartError::BadFd { fd, why };
    if fd < 0 {
        return Err(bad("is negative"));
    }
    if (0..=2).contains(&fd) {
        return Err(bad("is a standard stream"));
    }
    // SAFETY: the number is only asked about. Unsafe because it may be no open descriptor, which the call says.
    let flags = fcntl_getfd(unsafe { BorrowedFd::borrow_raw(fd) });
    match flags {
        Err(_) => return Err(bad("is not open")),
        // It would have been closed on the way from the parent.
        Ok(flags) if flags.contains(FdFlags::CLOEXEC) => {
            return Err(bad("was not passed by the parent process"));
        }
        Ok(_) => {}
    }
    // SAFETY: the descriptor is open, is none of the standard streams and none that this process opened. The
    // command line names it once, so nothing else owns it. Unsafe because only the parent process knows that it
    // is meant for us.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let _ = fcntl_setfd(&socket, FdFlags::CLOEXEC);
    Ok(socket)
}

/// Listens on `path` for one user only, the process's or `uid`. What is there already is treated as by [`Door::bind`];
/// `option` is the one that gave the path.
///
/// # Errors
///
/// As for [`Door::bind`].
pub fn listen_privately(
    path: &Path,
    option: &'static str,
    uid: Option<u32>,
    turns: &mut Turns,
) -> Result<(UnixListener, SocketFile), StartError> {
    let access = Access {
        mode: Some(0o600),
        uid,
        gid: None,
    };
    listen(path, option, access, turns)
}

/// Listens once more on a socket that another process listened on, so that the kernel names us as the
/// ones who listen: that is how a session knows a connection to this process.
///
/// # Errors
///
/// It is not a socket that can be listened on.
pub fn listen_ourselves(socket: &impl AsFd) -> io::Result<()> {
    rustix::net::listen(socket, BACKLOG)?;
    // Those who connected before that are known by the name.
    remember_socket(socket)
}

/// Says whether descriptors can be sent to `socket` (`SO_PASSRIGHTS`, since Linux 6.16; kernels before let them pass).
/// A connection has what its listener had when it was made.
pub fn pass_descriptors(socket: &impl AsFd, pass: bool) {
    /// include/uapi/asm-generic/socket.h; the crates do not have it yet.
    const SO_PASSRIGHTS: libc::c_int = 83;
    let value = libc::c_int::from(pass);
    // SAFETY: the kernel reads one int from `value`, which outlives the call, and keeps no reference to it. The
    // descriptor is open as long as `socket` is borrowed. An error, of a kernel that does not know of it, changes nothing.
    let _ = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PASSRIGHTS,
            (&raw const value).cast(),
            4,
        )
    };
}

/// A handle of the process that had its socket listen when `stream` was made (`SO_PEERPIDFD`, since Linux 6.5). It
/// cannot mean another process that has the same number later.
fn peer_process(stream: &UnixStream) -> io::Result<OwnedFd> {
    let mut fd: libc::c_int = -1;
    let mut length: libc::socklen_t = 4;
    // SAFETY: the kernel writes one int to `fd` and its length to `length`; both outlive the call. The descriptor of
    // `stream` is open.
    let outcome = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERPIDFD,
            (&raw mut fd).cast(),
            &raw mut length,
        )
    };
    if outcome != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us, so nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn listen(
    path: &Path,
    option: &'static str,
    access: Access,
    turns: &mut Turns,
) -> Result<(UnixListener, SocketFile), StartError> {
    let fail = |source| StartError::SocketBind {
        path: path.to_owned(),
        source,
    };
    let _turn = turns.take(path);
    match fs::symlink_metadata(path) {
        Ok(there) if there.file_type().is_socket() => match knock(path) {
            Knock::Refused => fs::remove_file(path).map_err(fail)?,
            Knock::Dying(process) => {
                log::warn!("the socket {path:?} is replaced: it still belongs to {process}");
                fs::remove_file(path).map_err(fail)?;
            }
            Knock::Gone => {}
            Knock::InUse => {
                return Err(StartError::SocketInUse {
                    option,
                    path: path.to_owned(),
                });
            }
        },
        Ok(_) => {
            return Err(StartError::SocketOccupied {
                option,
                path: path.to_owned(),
            });
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(fail(error)),
    }
    let listener = bind(path, access).map_err(fail)?;
    let bound = fs::symlink_metadata(path).map_err(fail)?;
    let file = SocketFile {
        path: path.to_owned(),
        identity: (bound.dev(), bound.ino()),
        ours: true,
    };
    Ok((listener, file))
}

fn bind(path: &Path, access: Access) -> io::Result<UnixListener> {
    let address = SocketAddrUnix::new(path)?;
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    match access.mode {
        None => rustix::net::bind(&socket, &address)?,
        // The file is made with the mode of the socket less the umask (unix_bind_bsd,
        // net/unix/af_unix.c), so that it never has another.
        Some(mode) => {
            rustix::fs::fchmod(&socket, Mode::from_raw_mode(mode))?;
            let umask = rustix::process::umask(Mode::empty());
            let outcome = rustix::net::bind(&socket, &address);
            rustix::process::umask(umask);
            outcome?;
        }
    }
    if access.uid.is_some() || access.gid.is_some() {
        let outcome = rustix::fs::chownat(
            rustix::fs::CWD,
            path,
            access.uid.map(Uid::from_raw),
            access.gid.map(Gid::from_raw),
            AtFlags::SYMLINK_NOFOLLOW,
        );
        if let Err(errno) = outcome {
            let _ = fs::remove_file(path);
            return Err(errno.into());
        }
    }
    // Nobody can connect before this.
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

/// Whether a UNIX stream socket listens (true) or is connected (false).
fn classify(socket: &OwnedFd) -> Result<bool, &'static str> {
    match sockopt::socket_domain(socket) {
        Ok(AddressFamily::UNIX) => {}
        Ok(_) => return Err("is not a UNIX socket"),
        Err(_) => return Err("is not a socket"),
    }
    if sockopt::socket_type(socket) != Ok(SocketType::STREAM) {
        return Err("is not a stream socket");
    }
    if sockopt::socket_acceptconn(socket) == Ok(true) {
        return Ok(true);
    }
    match rustix::net::getpeername(socket) {
        Ok(_) => Ok(false),
        Err(_) => Err("is neither listening nor connected"),
    }
}

/// Says to everybody who waits that the process is ending. Once said it stays said.
#[derive(Debug)]
pub struct Stop(OwnedFd);

impl Stop {
    /// Not said yet.
    ///
    /// # Errors
    ///
    /// No descriptor to be had.
    pub fn new() -> io::Result<Stop> {
        Ok(Stop(eventfd(
            0,
            EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK,
        )?))
    }

    /// Says it.
    pub fn signal(&self) {
        // Fails only when the counter is full, which says the same.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    /// Whether it was said.
    pub fn is_signalled(&self) -> bool {
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let mut fds = [PollFd::new(&self.0, PollFlags::IN)];
        poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0)
    }

    /// A descriptor that becomes readable when it is said.
    ///
    /// # Errors
    ///
    /// No descriptor to be had.
    pub fn watch(&self) -> io::Result<OwnedFd> {
        self.0.try_clone()
    }

    /// Waits until `fd` is readable; false when the process is ending.
    pub fn or_readable(&self, fd: &impl AsFd) -> bool {
        loop {
            let mut both = [
                PollFd::new(&self.0, PollFlags::IN),
                PollFd::new(fd, PollFlags::IN),
            ];
            match poll(&mut both, None) {
                Ok(_) if !both[0].revents().is_empty() => return false,
                Ok(_) if !both[1].revents().is_empty() => return true,
                Ok(_) | Err(Errno::INTR) => {}
                Err(_) => return false,
            }
        }
    }
}

impl AsFd for Stop {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Barrier;
    use std::thread;

    use vmm_sys_util::tempdir::TempDir;

    #[test]
    fn of_daemons_that_start_on_one_path_one_listens() {
        const DAEMONS: usize = 6;
        let directory = TempDir::new().unwrap();
        for round in 0..100 {
            let path = directory.as_path().join(round.to_string());
            // What a killed process left.
            drop(UnixListener::bind(&path).unwrap());
            let start = Barrier::new(DAEMONS);
            let doors: Vec<_> = thread::scope(|scope| {
                let starting: Vec<_> = (0..DAEMONS)
                    .map(|_| {
                        scope.spawn(|| {
                            start.wait();
                            Door::bind(&path)
                        })
                    })
                    .collect();
                starting
                    .into_iter()
                    .map(|one| one.join().unwrap())
                    .collect()
            });
            let listening = doors.iter().filter(|door| door.is_ok()).count();
            assert_eq!(listening, 1, "round {round}");
            UnixStream::connect(&path).expect("it can be reached");
        }
    }

    #[test]
    fn a_socket_file_is_removed_with_its_door_but_not_a_successors() {
        let directory = TempDir::new().unwrap();
        let path = directory.as_path().join("s");
        drop(Door::bind(&path).unwrap());
        assert!(!path.exists());
        let door = Door::bind(&path).unwrap();
        fs::remove_file(&path).unwrap();
        fs::write(&path, "another").unwrap();
        drop(door);
        assert!(path.exists());
    }

    #[test]
    fn a_file_that_is_not_handed_over_yet_is_left_where_it_is() {
        let directory = tempfile::TempDir::new().unwrap();
        let path = directory.path().join("s");
        let (_listener, file) =
            listen_privately(&path, "--control-path", None, &mut Turns::default()).unwrap();
        drop(SocketFile::inherited(&path, file.identity()));
        assert!(path.exists(), "the take-over failed");
        let mut theirs = SocketFile::inherited(&path, file.identity());
        file.leave();
        theirs.adopt();
        drop(theirs);
        assert!(!path.exists());
    }

    #[test]
    fn a_private_socket_is_its_users_from_the_start() {
        let directory = TempDir::new().unwrap();
        let path = directory.as_path().join("s");
        let (_listener, file) =
            listen_privately(&path, "--control-path", None, &mut Turns::default()).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        UnixStream::connect(&path).expect("it listens");
        let error = listen_privately(&path, "--control-path", None, &mut Turns::default())
            .unwrap_err()
            .to_string();
        assert!(error.contains("give another --control-path"), "{error}");
        drop(file);
        assert!(!path.exists());
    }

    #[test]
    fn a_socket_has_the_mode_and_the_group_that_were_asked_for() {
        let directory = TempDir::new().unwrap();
        let path = directory.as_path().join("s");
        let gid = rustix::process::getegid().as_raw();
        let access = Access {
            mode: Some(0o660),
            uid: None,
            gid: Some(gid),
        };
        let _door = Door::bind_for(&path, access, &mut Turns::default()).unwrap();
        let found = fs::metadata(&path).unwrap();
        assert_eq!((found.mode() & 0o777, found.gid()), (0o660, gid));
    }

    #[test]
    fn what_is_at_the_sockets_path_decides() {
        let directory = TempDir::new().unwrap();
        let path = directory.as_path().join("s");
        let listening = UnixListener::bind(&path).unwrap();
        assert!(matches!(
            Door::bind(&path),
            Err(StartError::SocketInUse { .. })
        ));
        drop(listening);
        assert!(path.exists(), "a stale socket");
        drop(Door::bind(&path).expect("taken over"));
        fs::write(&path, "text").unwrap();
        assert!(matches!(
            Door::bind(&path),
            Err(StartError::SocketOccupied { .. })
        ));
    }

    #[test]
    fn an_inherited_descriptor_is_taken_for_what_it_is() {
        let directory = TempDir::new().unwrap();
        let listener = UnixListener::bind(directory.as_path().join("s")).unwrap();
        let (connected, _other) = UnixStream::pair().unwrap();
        let file = fs::File::open("/dev/null").unwrap();
        assert!(matches!(
            Door::inherit(listener.into()),
            Ok(Door::Listening(_, None))
        ));
        assert!(matches!(
            Door::inherit(connected.into()),
            Ok(Door::Connected(_))
        ));
        let why = |outcome: Result<(), StartError>| match outcome {
            Err(StartError::BadFd { why, .. }) => why,
            outcome => panic!("{outcome:?}"),
        };
        assert_eq!(why(Door::inherit(file.into()).map(drop)), "is not a socket");
        let claimed = |fd: i32| why(claim(fd).map(drop));
        assert_eq!(claimed(-1), "is negative");
        assert_eq!(claimed(1), "is a standard stream");
        assert_eq!(claimed(1_000_000), "is not open");
        let ours = fs::File::open("/dev/null").unwrap();
        assert_eq!(
            claimed(ours.as_raw_fd()),
            "was not passed by the parent process"
        );
    }
}
