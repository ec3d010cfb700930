//! What a snapshot keeps of a disk, beside its image and its guest (vhost-user, "Back-end state";
//! SET_DEVICE_STATE_FD and CHECK_DEVICE_STATE).
//!
//! Rings and what is in them are the guest's, and their positions travel with them. What is left is the one
//! thing that a guest can tell the disk: its cache mode. A guest that has chosen write-through no longer
//! flushes, and relies on it wherever it wakes up.
//!
//! ```text
//! bytes 0..8    "BLKMQDEV"
//!       8..12   version, 1
//!       12..16  bytes that follow, 4
//!       16..20  bit 0: the guest chose write-through
//! ```
//!
//! All numbers are little-endian. A snapshot that was taken without a state, by another back end perhaps,
//! is restored by an empty one, which changes nothing.
//!
//! The state fits into any pipe, so neither direction ever waits: what cannot be written at once is an
//! error, and so is what has not come when the front end says that it has.

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, SpliceFlags, pipe_with, splice};

const MAGIC: [u8; 8] = *b"BLKMQDEV";
const VERSION: u32 = 1;
const BODY_BYTES: u32 = 4;
const STATE_BYTES: usize = 20;
const WRITE_THROUGH: u32 = 1 << 0;

/// The front end has closed its end before it asks; whoever does so for it may be a little late.
const PATIENCE: Timespec = Timespec {
    tv_sec: 1,
    tv_nsec: 0,
};

/// The state of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceState {
    /// The guest, or the user before it, chose write-through.
    pub write_through: bool,
}

/// A state that cannot be restored. Nothing has changed.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// It does not begin as ours do.
    #[error("it is not this daemon's")]
    Foreign,
    /// It comes from a later version of this program, or from none.
    #[error("its version is {0}, this daemon's is {VERSION}")]
    Version(u32),
    /// It is shorter or longer than it says, or has bits that mean nothing.
    #[error("it is damaged")]
    Damaged,
}

impl DeviceState {
    /// The bytes of a snapshot.
    pub fn to_bytes(self) -> [u8; STATE_BYTES] {
        let flags = if self.write_through { WRITE_THROUGH } else { 0 };
        let mut bytes = [0; STATE_BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        for (at, word) in [(8, VERSION), (12, BODY_BYTES), (16, flags)] {
            bytes[at..at + 4].copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// The state in the bytes of a snapshot; `None` if there are none.
    pub fn from_bytes(bytes: &[u8]) -> Result<Option<DeviceState>, StateError> {
        if bytes.is_empty() {
            return Ok(None);
        }
        let word = |at: usize| {
            let word = bytes.get(at..at + 4).ok_or(StateError::Damaged)?;
            Ok(u32::from_le_bytes(word.try_into().expect("four bytes")))
        };
        if bytes.get(..8) != Some(&MAGIC) {
            return Err(StateError::Foreign);
        }
        let version = word(8)?;
        if version != VERSION {
            return Err(StateError::Version(version));
        }
        let (length, flags) = (word(12)?, word(16)?);
        if length != BODY_BYTES || bytes.len() != STATE_BYTES || flags & !WRITE_THROUGH != 0 {
            return Err(StateError::Damaged);
        }
        Ok(Some(DeviceState {
            write_through: flags & WRITE_THROUGH != 0,
        }))
    }

    /// Writes it to the front end's `channel`, or fails; never waits.
    ///
    /// The descriptor's flags belong to the front end as well, so a plain write might block. A `splice`
    /// from a pipe of our own can be told not to.
    pub fn save(self, channel: &impl AsFd) -> io::Result<()> {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        File::from(writer).write_all(&self.to_bytes())?;
        let moved = splice_now(&reader, channel, STATE_BYTES)?;
        if moved < STATE_BYTES {
            return Err(io::Error::new(
                io::ErrorKind::WriteZero,
                "the channel has no room for it",
            ));
        }
        Ok(())
    }

    /// Reads what the front end has written to `channel` before it closed it. An empty state is `None`.
    pub fn load(channel: &impl AsFd) -> io::Result<Option<DeviceState>> {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        let mut reader = File::from(reader);
        let mut bytes = Vec::new();
        loop {
            match splice_now(channel, &writer, STATE_BYTES) {
                Ok(0) => break,
                Ok(moved) => {
                    let at = bytes.len();
                    bytes.resize(at + moved, 0);
                    reader.read_exact(&mut bytes[at..])?;
                    if bytes.len() > STATE_BYTES {
                        break;
                    }
                }
                Err(Errno::AGAIN) => await_more(channel)?,
                Err(errno) => return Err(errno.into()),
            }
        }
        DeviceState::from_bytes(&bytes).map_err(io::Error::other)
    }
}

impl fmt::Display for DeviceState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.write_through {
            "write-through"
        } else {
            "write-back"
        })
    }
}

fn splice_now(from: &impl AsFd, to: &impl AsFd, bytes: usize) -> Result<usize, Errno> {
    loop {
        match splice(from, None, to, None, bytes, SpliceFlags::NONBLOCK) {
            Err(Errno::INTR) => {}
            outcome => return outcome,
        }
    }
}

fn await_more(channel: &impl AsFd) -> io::Result<()> {
    let mut fds = [PollFd::new(channel, PollFlags::IN)];
    match poll(&mut fds, Some(&PATIENCE)) {
        Ok(0) => Err(io::Error::new(
            io::ErrorKind::TimedOut,
            format!(
                "its channel was not closed within {:?}",
                Duration::from_secs(1)
            ),
        )),
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::net::UnixStream;

    const STATES: [DeviceState; 2] = [
        DeviceState {
            write_through: true,
        },
        DeviceState {
            write_through: false,
        },
    ];

    #[test]
    fn a_state_survives_a_pipe_a_socket_and_a_file() {
        for state in STATES {
            let (reader, writer) = rustix::pipe::pipe().unwrap();
            state.save(&writer).unwrap();
            drop(writer);
            assert_eq!(DeviceState::load(&reader).unwrap(), Some(state));

            let (ours, theirs) = UnixStream::pair().unwrap();
            state.save(&ours).unwrap();
            drop(ours);
            assert_eq!(DeviceState::load(&theirs).unwrap(), Some(state));

            let path = tempfile::NamedTempFile::new().unwrap();
            state.save(path.as_file()).unwrap();
            assert_eq!(std::fs::read(path.path()).unwrap(), state.to_bytes());
            let reader = File::open(path.path()).unwrap();
            assert_eq!(DeviceState::load(&reader).unwrap(), Some(state));
        }
    }

    #[test]
    fn nobody_is_waited_for() {
        // Full: a plain write would block.
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let room = rustix::pipe::fcntl_getpipe_size(&writer).unwrap();
        File::from(writer.try_clone().unwrap())
            .write_all(&vec![0; room])
            .unwrap();
        assert!(STATES[0].save(&writer).is_err());
        // Open for ever, whether something has come or not.
        let (open, writer) = rustix::pipe::pipe().unwrap();
        let error = DeviceState::load(&open).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        STATES[0].save(&writer).unwrap();
        let error = DeviceState::load(&open).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        drop(reader);
    }

    #[test]
    fn an_endless_state_is_not_read_to_its_end() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let mut bytes = STATES[0].to_bytes().to_vec();
        bytes.resize(4096, 1);
        File::from(writer.try_clone().unwrap())
            .write_all(&bytes)
            .unwrap();
        let error = DeviceState::load(&reader).unwrap_err();
        assert_eq!(error.to_string(), "it is damaged");
    }

    #[test]
    fn what_is_not_a_state_of_ours_says_why() {
        let good = STATES[0].to_bytes();
        let with = |at: usize, byte: u8| {
            let mut bytes = good;
            bytes[at] = byte;
            DeviceState::from_bytes(&bytes)
        };
        assert_eq!(DeviceState::from_bytes(&[]), Ok(None));
        assert_eq!(with(0, b'X'), Err(StateError::Foreign));
        assert_eq!(with(8, 2), Err(StateError::Version(2)));
        assert_eq!(with(12, 5), Err(StateError::Damaged));
        assert_eq!(with(16, 2), Err(StateError::Damaged));
        assert_eq!(
            DeviceState::from_bytes(&good[..19]),
            Err(StateError::Damaged)
        );
        assert_eq!(
            DeviceState::from_bytes(&good[..7]),
            Err(StateError::Foreign)
        );
    }

    proptest! {
        #[test]
        fn only_what_was_saved_is_restored(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            if let Ok(Some(state)) = DeviceState::from_bytes(&bytes) {
                prop_assert_eq!(&state.to_bytes()[..], &bytes);
            }
        }
    }
}
