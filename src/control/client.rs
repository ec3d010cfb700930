//! The other end of the control socket: how `blkmqctl` asks.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use serde_json::Value;
use thiserror::Error;

/// Most headers of an answer.
const MAX_HEADERS: usize = 32;

/// Why there is no answer to use.
#[derive(Debug, Error)]
pub enum ClientError {
    /// Nobody answers on the socket.
    #[error(
        "cannot connect to the control socket {path:?}: {source}; \
         is the daemon running with --control-path {path:?}, as this user?"
    )]
    Connect {
        /// The socket's path.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The connection broke.
    #[error("the daemon did not answer: {0}")]
    Io(#[from] io::Error),
    /// Something else than the daemon is on the socket.
    #[error("the answer is not understood: {0}; is this the control socket?")]
    Answer(String),
    /// The daemon refuses, and says why.
    #[error("{0}")]
    Refused(String),
}

/// Asks one question and returns the answer's body.
///
/// It waits as long as the daemon takes: switching a scheduler waits for the requests in flight.
///
/// # Errors
///
/// There is no daemon, or it refuses.
pub fn ask(
    socket: &Path,
    method: &str,
    path: &str,
    body: Option<&Value>,
) -> Result<String, ClientError> {
    let mut stream = UnixStream::connect(socket).map_err(|source| ClientError::Connect {
        path: socket.to_owned(),
        source,
    })?;
    let body = body.map(Value::to_string).unwrap_or_default();
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\nConnection: close\r\n\r\n\
         {body}",
        body.len()
    );
    stream.write_all(request.as_bytes())?;
    let mut bytes = Vec::new();
    match stream.read_to_end(&mut bytes) {
        Ok(_) => {}
        // The daemon closed without having read all we said; its answer is complete all the same.
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset && !bytes.is_empty() => {}
        Err(error) => return Err(error.into()),
    }
    let (status, body) = parse(&bytes)?;
    match status {
        200 => Ok(body),
        _ => Err(ClientError::Refused(
            serde_json::from_str::<Value>(&body)
                .ok()
                .and_then(|value| Some(value.get("error")?.as_str()?.to_owned()))
                .unwrap_or_else(|| format!("the daemon answers {status}")),
        )),
    }
}

/// Status and body of an answer.
fn parse(bytes: &[u8]) -> Result<(u16, String), ClientError> {
    let bad = |why: &str| ClientError::Answer(why.to_owned());
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut response = httparse::Response::new(&mut headers);
    let head = match response.parse(bytes) {
        Ok(httparse::Status::Complete(head)) => head,
        Ok(httparse::Status::Partial) => return Err(bad("it ends early")),
        Err(error) => return Err(bad(&error.to_string())),
    };
    let length = response
        .headers
        .iter()
        .find(|header| header.name.eq_ignore_ascii_case("content-length"))
        .and_then(|header| {
            std::str::from_utf8(header.value)
                .ok()?
                .parse::<usize>()
                .ok()
        })
        .ok_or_else(|| bad("it has no length"))?;
    let body = bytes[head..]
        .get(..length)
        .ok_or_else(|| bad("it ends early"))?;
    let body = String::from_utf8(body.to_vec()).map_err(|_| bad("it is no text"))?;
    Ok((response.code.unwrap_or_default(), body))
}

/// A part of a path, with what is not plain percent-encoded.
pub fn encode(part: &str) -> String {
    part.bytes()
        .map(|byte| match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' | b'@' => {
                char::from(byte).to_string()
            }
            byte => format!("%{byte:02X}"),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_taken_apart() {
        let answer = b"HTTP/1.1 404 Not Found\r\nContent-Length: 3\r\n\r\nabcd";
        assert_eq!(parse(answer).expect("an answer"), (404, "abc".to_owned()));
        for bad in [
            &b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabcd"[..],
            b"HTTP/1.1 200 OK\r\n\r\nabcd",
            b"HTTP/1.1 200",
            b"",
            b"SSH-2.0-x\r\n\r\n",
        ] {
            assert!(matches!(parse(bad), Err(ClientError::Answer(_))), "{bad:?}");
        }
    }

    #[test]
    fn a_serial_becomes_part_of_a_path() {
        assert_eq!(encode("a b/c"), "a%20b%2Fc");
    }
}
