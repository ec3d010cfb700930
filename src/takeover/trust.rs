//! Who may be at the other end of a take-over, and what of its text may be shown.
//!
//! A process that takes over believes the other one about the connections of its guests, and gives them images that it
//! has opened with its own rights. So it first asks the kernel who listens at the path (`SO_PEERCRED`), before it sends
//! anything, and then who has sent each part of what it receives (`SO_PASSCRED`), because the process that listens need
//! not be the one that answers. Root, this process's own user and the user of `--user` are believed: each of them may
//! connect to the disks' sockets anyway.

use std::io;
use std::os::unix::net::UnixStream;

use rustix::net::sockopt::{set_socket_passcred, socket_peercred};
use rustix::process::{Uid, geteuid};

/// Most characters of a text of the other process that are shown.
const MOST_CHARS: usize = 1000;

/// The users that are believed.
#[derive(Clone, Debug)]
pub struct Trusted(Vec<Uid>);

impl Trusted {
    /// Root, the user of this process, and the one that it is to become.
    pub fn new(becomes: Option<u32>) -> Trusted {
        let becomes = becomes.map(Uid::from_raw);
        Trusted([Uid::ROOT, geteuid()].into_iter().chain(becomes).collect())
    }

    /// Only this user.
    #[cfg(test)]
    pub fn only(uid: u32) -> Trusted {
        Trusted(vec![Uid::from_raw(uid)])
    }

    /// Whether `uid` is one of them.
    ///
    /// # Errors
    ///
    /// It is not, with the user's number and what to do.
    pub fn check(&self, uid: Uid) -> Result<(), String> {
        if self.0.contains(&uid) {
            return Ok(());
        }
        let uid = uid.as_raw();
        Err(format!(
            "it is a process of user {uid}, which is neither root nor the user of this daemon; check the path, or \
             give --user {uid}"
        ))
    }
}

/// Checks who listens where `stream` is connected to, and has the kernel say from now on who sends.
///
/// # Errors
///
/// A user that is not trusted; the kernel does not say.
pub fn check_listener(stream: &UnixStream, trusted: &Trusted) -> Result<(), String> {
    let peer = socket_peercred(stream).map_err(|errno| io::Error::from(errno).to_string())?;
    trusted.check(peer.uid)?;
    set_socket_passcred(stream, true).map_err(|errno| io::Error::from(errno).to_string())
}

/// The text of another process as it may stand in a log and on a terminal: one line, without control characters, and
/// not without end.
pub fn printable(text: &str) -> String {
    let shown: String = text
        .chars()
        .take(MOST_CHARS)
        .flat_map(|c| match c {
            // Harmless, and part of names that are quoted already.
            '"' | '\'' | '\\' => either(c, None),
            c => either(c, Some(c.escape_debug())),
        })
        .collect();
    match text.chars().nth(MOST_CHARS) {
        Some(_) => shown + " ...",
        None => shown,
    }
}

fn either(c: char, escaped: Option<std::char::EscapeDebug>) -> impl Iterator<Item = char> {
    let plain = escaped.is_none().then_some(c);
    plain.into_iter().chain(escaped.into_iter().flatten())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    #[test]
    fn text_of_another_process_is_one_line_without_control_characters() {
        assert_eq!(
            printable("disk \"/run/\u{e9}\" is gone\n\x1b[2Jroot\u{202e}x\0"),
            "disk \"/run/\u{e9}\" is gone\\n\\u{1b}[2Jroot\\u{202e}x\\0"
        );
        let long = printable(&"\n".repeat(1 << 20));
        assert!(
            long.len() < 3000 && long.ends_with(" ..."),
            "{}",
            long.len()
        );
    }

    #[test]
    fn a_listener_of_another_user_is_not_trusted() {
        let directory = tempfile::TempDir::new().unwrap();
        let path = directory.path().join("socket");
        let _listener = UnixListener::bind(&path).unwrap();
        let stream = UnixStream::connect(&path).unwrap();
        let ours = geteuid().as_raw();
        check_listener(&stream, &Trusted::new(None)).unwrap();
        check_listener(&stream, &Trusted::only(ours)).unwrap();
        let error = check_listener(&stream, &Trusted::only(ours + 1)).unwrap_err();
        assert!(
            error.contains(&format!("a process of user {ours},")),
            "{error}"
        );
    }
}
