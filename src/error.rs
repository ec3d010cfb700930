//! What can go wrong before the first request: each error is one line for a person, saying what is
//! wrong, with which value, and what to do about it.
//!
//! None of these types travels on the data path: a request that fails has a virtio status, not an error.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use thiserror::Error;

/// Somebody else has the image, as its locks show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Held {
    /// And writes to it, or changes its size.
    Writing,
    /// And reads it, and counts on nobody writing meanwhile.
    Reading,
}

impl fmt::Display for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Held::Writing => "another process writes to it",
            Held::Reading => "another process reads it and does not let others write",
        })
    }
}

/// Why the daemon does not start.
///
/// The text is one line: paths are printed quoted and escaped, so that a newline in a file name
/// cannot break it.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum StartError {
    /// The command line cannot be understood, or says two things that exclude each other.
    #[error("{0}")]
    Usage(String),

    /// The image could not be opened, or could not be asked for its properties.
    #[error("cannot open the image {path:?}: {}; {advice}", reason(.source))]
    ImageOpen {
        /// The image as the user named it.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
        /// What the user can do.
        advice: &'static str,
    },

    /// Somebody else uses the image in a way that excludes us.
    #[error(
        "the image {path:?} is in use: {by}; stop that process (fuser -v {path:?} names it), or give \
         --force-share if both know of each other"
    )]
    ImageInUse {
        /// The image as the user named it.
        path: PathBuf,
        /// What the other does with it.
        by: Held,
    },

    /// The image's last owner has ended, and its I/O has not.
    #[error(
        "the image {path:?} is locked by {holder}: to serve it now would let an old write land on a new one; have its \
         storage answer (a file system may be frozen), or start without this disk"
    )]
    ImageNotReleased {
        /// The image as the user named it.
        path: PathBuf,
        /// The process.
        holder: String,
    },

    /// The image is something that cannot be a disk: a directory, a terminal, a pipe.
    #[error(
        "the image {path:?} is a {kind}, which cannot be served as a disk; \
         give a regular file or a block device"
    )]
    ImageKind {
        /// The image as the user named it.
        path: PathBuf,
        /// What it is instead, in words.
        kind: &'static str,
    },

    /// The image holds no byte, so there is nothing to serve.
    #[error(
        "the image {path:?} is empty (size 0); give it a size first, for example: \
         truncate -s 10G {path:?}"
    )]
    ImageEmpty {
        /// The image as the user named it.
        path: PathBuf,
    },

    /// The image ends within a logical block. Serving it rounded down would hide its last bytes from
    /// the guest, rounded up would make the guest's writes grow it: the user decides.
    #[error(
        "the image {path:?} has {size_bytes} bytes, which is not a multiple of the logical block size \
         {block_bytes}; extend it with: truncate -s %{block_bytes} {path:?}"
    )]
    ImageSize {
        /// The image as the user named it.
        path: PathBuf,
        /// The image's size in bytes.
        size_bytes: u64,
        /// The disk's logical block size in bytes.
        block_bytes: u32,
    },

    /// A block device without a medium, or one that ends within a logical block.
    #[error(
        "the block device {path:?} has {size_bytes} bytes, and needs a multiple of the logical block size \
         {block_bytes}, not 0; set the device up, or choose another --logical-block-size"
    )]
    DeviceSize {
        /// The device as the user named it.
        path: PathBuf,
        /// The device's size in bytes.
        size_bytes: u64,
        /// The disk's logical block size in bytes.
        block_bytes: u32,
    },

    /// The image cannot be mapped, though that was asked for, or though there is no other way.
    #[error("the image {path:?} cannot be served by a mapping: {why}; {advice}")]
    NotMapped {
        /// The image as the user named it.
        path: PathBuf,
        /// What stands in the way.
        why: String,
        /// What the user can do.
        advice: &'static str,
    },

    /// The device below the image cannot be polled, though that was asked for.
    #[error(
        "the image {path:?} cannot be polled for completions: {why}; give the device such queues (for NVMe the \
         kernel's parameter nvme.poll_queues=2), or leave --io-poll out"
    )]
    NotPolled {
        /// The image as the user named it.
        path: PathBuf,
        /// What stands in the way.
        why: &'static str,
    },

    /// Somebody is listening on the socket already.
    #[error(
        "the socket {path:?} is in use: another process is listening on it; \
         stop that process or give another {option}"
    )]
    SocketInUse {
        /// The option that gave the path.
        option: &'static str,
        /// The socket's path.
        path: PathBuf,
    },

    /// The path of the socket is taken by something that is no socket, and that we will not delete.
    #[error(
        "{path:?} exists and is not a socket; give another {option}, or remove it if it is not needed"
    )]
    SocketOccupied {
        /// The option that gave the path.
        option: &'static str,
        /// The socket's path.
        path: PathBuf,
    },

    /// The socket could not be created.
    #[error(
        "cannot listen on the socket {path:?}: {}; \
         check that its directory exists and may be written to, and that the path has at most 107 bytes",
        reason(.source)
    )]
    SocketBind {
        /// The socket's path.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },

    /// The file descriptor given with `--fd` is not what it should be.
    #[error(
        "file descriptor {fd} given with --fd {why}; \
         pass a UNIX stream socket that is listening or connected, open in this process"
    )]
    BadFd {
        /// The number as given.
        fd: i32,
        /// What is wrong with it: a verb and its object ("is not open").
        why: &'static str,
    },

    /// The process may not become another user.
    #[error(
        "cannot become the user {user}: {}; start as root, or leave --user out",
        reason(.source)
    )]
    BecomeUser {
        /// As it was given.
        user: String,
        /// What the kernel said.
        source: io::Error,
    },

    /// The process is the user already and has groups that it may not give up.
    #[error(
        "cannot become the user {user}: this process has the groups {groups} as well and may not give them up; \
         start as root or without those groups, or leave the group out"
    )]
    KeepsGroups {
        /// As it was given.
        user: String,
        /// Their numbers.
        groups: String,
    },

    /// A layer of the sandbox cannot be put on.
    #[error(
        "cannot put on the sandbox ({layer}): {}; if that cannot be helped, give --sandbox {layer}=off",
        reason(.source)
    )]
    Sandbox {
        /// Its name.
        layer: &'static str,
        /// What the kernel said.
        source: io::Error,
    },

    /// Another daemon does not hand its disks over.
    #[error("cannot take over from the daemon at {path:?}: {why}")]
    TakeOver {
        /// Its control socket.
        path: PathBuf,
        /// Why not; one line.
        why: String,
    },

    /// The machine refuses something that the daemon cannot do without.
    #[error("cannot {what}: {}; {advice}", reason(.source))]
    System {
        /// What was tried: a verb and its object ("start worker 3").
        what: String,
        /// What the kernel said.
        source: io::Error,
        /// What the user can do.
        advice: &'static str,
    },

    /// The process was told to end, and the host does not finish what some disks have in flight.
    #[error(
        "ending without what is in flight of disk {}, which the host does not finish; a daemon that is started \
         again goes on with it",
        .disks.join(", ")
    )]
    Unfinished {
        /// Their serials.
        disks: Vec<String>,
    },
}

impl StartError {
    /// The status the process exits with: 2 for a command line that has to be written differently,
    /// 1 for everything else.
    pub fn exit_code(&self) -> ExitCode {
        match self {
            StartError::Usage(_) => ExitCode::from(2),
            _ => ExitCode::from(1),
        }
    }
}

/// The kernel's words for an error, without the number that std appends.
pub(crate) fn reason(error: &io::Error) -> String {
    let text = error.to_string();
    match text.find(" (os error ") {
        Some(end) => text[..end].to_owned(),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_one_line_even_with_a_newline_in_the_path() {
        let error = StartError::ImageOpen {
            path: PathBuf::from("two\nlines.img"),
            source: io::Error::from_raw_os_error(2),
            advice: "create it first",
        };
        assert_eq!(
            error.to_string(),
            r#"cannot open the image "two\nlines.img": No such file or directory; create it first"#
        );
    }

    #[test]
    fn an_error_without_a_number_keeps_its_words() {
        assert_eq!(
            reason(&io::Error::other("the ring is gone")),
            "the ring is gone"
        );
    }
}
