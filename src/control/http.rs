//! Just as much HTTP as the control socket needs: one request a connection, bounded in size and time.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde::Serialize;

/// Most bytes of a request line and its headers.
const MAX_HEAD_BYTES: usize = 8 * 1024;

/// Most headers.
const MAX_HEADERS: usize = 32;

/// Most bytes of a request's body.
pub(super) const MAX_BODY_BYTES: usize = 64 * 1024;

/// A request.
#[derive(Debug)]
pub(super) struct Request {
    pub method: String,
    /// As it was sent: percent-encoded.
    pub path: String,
    pub body: Vec<u8>,
}

/// An answer.
#[derive(Debug)]
pub(super) struct Response {
    pub status: u16,
    content_type: &'static str,
    /// The methods there are, if the one that was used is not among them.
    allow: Option<&'static str>,
    pub body: Vec<u8>,
}

impl Response {
    /// JSON.
    pub fn json(value: &impl Serialize) -> Response {
        let mut body = serde_json::to_vec(value).expect("plain values always serialize");
        body.push(b'\n');
        Response {
            status: 200,
            content_type: "application/json",
            allow: None,
            body,
        }
    }

    /// Text for people, or for Prometheus.
    pub fn text(body: String, content_type: &'static str) -> Response {
        Response {
            status: 200,
            content_type,
            allow: None,
            body: body.into_bytes(),
        }
    }

    /// An error: one line that says what is wrong.
    pub fn error(status: u16, why: impl Into<String>) -> Response {
        Response {
            status,
            ..Response::json(&serde_json::json!({ "error": why.into() }))
        }
    }

    /// There is something at that path, but it cannot be used that way.
    pub fn method_not_allowed(allow: &'static str) -> Response {
        Response {
            allow: Some(allow),
            ..Response::error(405, format!("use {allow} here"))
        }
    }

    fn reason(&self) -> &'static str {
        match self.status {
            200 => "OK",
            400 => "Bad Request",
            404 => "Not Found",
            405 => "Method Not Allowed",
            408 => "Request Timeout",
            409 => "Conflict",
            411 => "Length Required",
            413 => "Content Too Large",
            431 => "Request Header Fields Too Large",
            503 => "Service Unavailable",
            _ => "Error",
        }
    }

    /// Sends it, before `deadline`.
    pub fn write(&self, mut stream: &UnixStream, deadline: Instant) -> io::Result<()> {
        let mut out = format!(
            "HTTP/1.1 {} {}\r\nContent-Type: {}\r\nContent-Length: {}\r\nConnection: close\r\n",
            self.status,
            self.reason(),
            self.content_type,
            self.body.len()
        )
        .into_bytes();
        if let Some(allow) = self.allow {
            out.extend_from_slice(format!("Allow: {allow}\r\n").as_bytes());
        }
        out.extend_from_slice(b"\r\n");
        out.extend_from_slice(&self.body);
        let mut rest = &out[..];
        while !rest.is_empty() {
            // A deadline that has passed still lets one write through: of what fits at once.
            stream.set_write_timeout(Some(left_until(deadline).max(Duration::from_millis(1))))?;
            match stream.write(rest) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(sent) => rest = &rest[sent..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
            if !rest.is_empty() && left_until(deadline).is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
        Ok(())
    }
}

/// Takes what a client that was refused goes on to send, as far as it comes before `deadline`, and throws it away: a
/// socket that is closed with something unread is reset, and the client may never read why.
pub(super) fn drain(mut stream: &UnixStream, deadline: Instant) {
    /// No client has as much to say that means well.
    const MOST: usize = 4 << 20;
    let _ = stream.shutdown(Shutdown::Write);
    let mut buffer = [0; 4096];
    let mut left = MOST;
    while left > 0 {
        let patience = left_until(deadline);
        if patience.is_zero() || stream.set_read_timeout(Some(patience)).is_err() {
            return;
        }
        match stream.read(&mut buffer) {
            Ok(0) => return,
            Ok(read) => left = left.saturating_sub(read),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

fn left_until(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now())
}

/// Reads a request that has to be complete before `deadline`. The error is what to answer, or nothing
/// if nobody is left to be answered.
pub(super) fn read_request(
    stream: &UnixStream,
    deadline: Instant,
) -> Result<Request, Option<Response>> {
    let refuse = |status, why: &str| Err(Some(Response::error(status, why)));
    let mut bytes = Vec::with_capacity(1024);
    let (mut request, head_bytes, body_bytes) = loop {
        read_some(
            stream,
            &mut bytes,
            MAX_HEAD_BYTES + MAX_BODY_BYTES,
            deadline,
        )?;
        let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
        let mut parsed = httparse::Request::new(&mut headers);
        match parsed.parse(&bytes) {
            Ok(httparse::Status::Complete(head_bytes)) => {
                let request = Request {
                    method: parsed.method.unwrap_or_default().to_owned(),
                    path: parsed.path.unwrap_or_default().to_owned(),
                    body: Vec::new(),
                };
                break (request, head_bytes, body_length(parsed.headers)?);
            }
            Ok(httparse::Status::Partial) if bytes.len() < MAX_HEAD_BYTES => {}
            Ok(httparse::Status::Partial) | Err(httparse::Error::TooManyHeaders) => {
                return refuse(431, "the headers are too long");
            }
            Err(error) => return refuse(400, &format!("this is not HTTP: {error}")),
        }
    };
    while bytes.len() < head_bytes + body_bytes {
        read_some(stream, &mut bytes, head_bytes + body_bytes, deadline)?;
    }
    request.body = bytes[head_bytes..head_bytes + body_bytes].to_vec();
    Ok(request)
}

fn body_length(headers: &[httparse::Header<'_>]) -> Result<usize, Option<Response>> {
    let find = |name: &'static str| {
        let same = move |header: &&httparse::Header<'_>| header.name.eq_ignore_ascii_case(name);
        headers.iter().filter(same)
    };
    if find("transfer-encoding").next().is_some() {
        return Err(Some(Response::error(
            411,
            "a body in chunks is not read; send Content-Length",
        )));
    }
    let mut lengths = find("content-length");
    let Some(length) = lengths.next() else {
        return Ok(0);
    };
    if lengths.any(|other| other.value != length.value) {
        return Err(Some(Response::error(
            400,
            "there are several Content-Length headers",
        )));
    }
    let length = std::str::from_utf8(length.value)
        .ok()
        .and_then(|text| text.trim().parse::<usize>().ok());
    match length {
        Some(length) if length <= MAX_BODY_BYTES => Ok(length),
        Some(_) => Err(Some(Response::error(
            413,
            format!("the body is longer than {MAX_BODY_BYTES} bytes"),
        ))),
        None => Err(Some(Response::error(400, "Content-Length is no number"))),
    }
}

/// Reads what is there, so that `bytes` has `most` bytes at most.
fn read_some(
    mut stream: &UnixStream,
    bytes: &mut Vec<u8>,
    most: usize,
    deadline: Instant,
) -> Result<(), Option<Response>> {
    let late = || {
        Err(Some(Response::error(
            408,
            "the request did not come in time",
        )))
    };
    let mut buffer = [0; 4096];
    let room = buffer.len().min(most - bytes.len());
    loop {
        let left = left_until(deadline);
        if left.is_zero() {
            return late();
        }
        stream.set_read_timeout(Some(left)).map_err(|_| None)?;
        match stream.read(&mut buffer[..room]) {
            Ok(0) => return Err(None),
            Ok(read) => {
                bytes.extend_from_slice(&buffer[..read]);
                return Ok(());
            }
            Err(error) => match error.kind() {
                io::ErrorKind::Interrupted => {}
                io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => return late(),
                _ => return Err(None),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(10)
    }

    fn read(pieces: &[&[u8]]) -> Result<Request, Option<Response>> {
        let (mut client, server) = UnixStream::pair().expect("a pair");
        for piece in pieces {
            client.write_all(piece).expect("it fits the socket");
        }
        client.shutdown(Shutdown::Write).expect("open");
        read_request(&server, soon())
    }

    fn refused(bytes: &[u8]) -> u16 {
        match read(&[bytes]) {
            Err(Some(response)) => response.status,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_request_is_read() {
        let request = read(&[b"PATCH /v1/x HTTP/1.1\r\nHost: a\r\ncontent-length: 3\r\n\r\nabcd"])
            .expect("a request");
        assert_eq!((&*request.method, &*request.path), ("PATCH", "/v1/x"));
        assert_eq!(request.body, b"abc");
    }

    #[test]
    fn what_is_no_request_is_refused() {
        assert_eq!(refused(b"hello\x01\r\n\r\n"), 400);
        assert_eq!(refused(b"GET / HTTP/1.1\r\nContent-Length: x\r\n\r\n"), 400);
        assert_eq!(
            refused(b"GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n"),
            400
        );
        assert_eq!(
            refused(b"PUT / HTTP/1.1\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nabc"),
            400
        );
        assert_eq!(
            refused(b"PUT / HTTP/1.1\r\nContent-Length: 65537\r\n\r\n"),
            413
        );
        assert_eq!(
            refused(b"PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"),
            411
        );
        let many = "a: b\r\n".repeat(MAX_HEADERS + 1);
        assert_eq!(
            refused(format!("GET / HTTP/1.1\r\n{many}\r\n").as_bytes()),
            431
        );
        let long = "a".repeat(MAX_HEAD_BYTES);
        assert_eq!(
            refused(format!("GET / HTTP/1.1\r\na: {long}").as_bytes()),
            431
        );
    }

    #[test]
    fn a_client_that_leaves_is_not_answered() {
        assert!(matches!(read(&[b""]), Err(None)));
        assert!(matches!(read(&[b"GET / HT"]), Err(None)));
        let half = b"PUT / HTTP/1.1\r\nContent-Length: 9\r\n\r\nab";
        assert!(matches!(read(&[half]), Err(None)));
    }

    #[test]
    fn a_client_that_sends_too_much_reads_why_it_is_refused() {
        let (mut client, server) = UnixStream::pair().expect("a pair");
        let sends = std::thread::spawn(move || {
            let long = "a: b\r\n".repeat(100_000);
            client
                .write_all(format!("GET / HTTP/1.1\r\n{long}\r\n").as_bytes())
                .expect("all of it is taken");
            let mut answer = String::new();
            client.read_to_string(&mut answer).expect("no reset");
            answer
        });
        let Err(Some(refusal)) = read_request(&server, soon()) else {
            panic!("it is refused");
        };
        refusal.write(&server, soon()).expect("it fits");
        drain(&server, soon());
        drop(server);
        let answer = sends.join().expect("it is answered");
        assert!(answer.starts_with("HTTP/1.1 431 "), "{answer}");
    }

    #[test]
    fn a_client_that_is_silent_is_late() {
        let (_client, server) = UnixStream::pair().expect("a pair");
        let outcome = read_request(&server, Instant::now() + Duration::from_millis(20));
        assert!(matches!(outcome, Err(Some(Response { status: 408, .. }))));
    }

    #[test]
    fn a_client_that_takes_nothing_is_given_up() {
        let (_client, server) = UnixStream::pair().expect("a pair");
        let response = Response::text("x".repeat(16 << 20), "text/plain");
        let outcome = response.write(&server, Instant::now() + Duration::from_millis(20));
        assert!(outcome.is_err());
    }
}
