//! The control socket: looks at the disks, changes how they are served, traces requests, tells metrics.
//!
//! HTTP/1.1 with JSON on a UNIX socket, one request a connection. Nobody who connects can hold up the
//! data path: what is read are copies the workers made, what is changed are messages to them. Nor can
//! one client hold up another: each has a thread of its own, there are few of them, and each has to be
//! quick. docs/CONTROL.md is the description for users.

mod api;
mod change;
pub mod client;
mod http;
mod metrics;
pub mod show;
mod view;

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::Receiver;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::disk::registry::Roster;
use crate::sys::fds::TurnAway;
use crate::sys::listener::Stop;
use crate::takeover::Giver;

use self::api::Api;
use self::http::Response;

/// Most connections at a time; one more is told to come back.
const MAX_CONNECTIONS: usize = 8;

/// How long a client may take to send its request, and again to take the answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long what a client sends that was refused is thrown away, so that it reads why.
const DRAIN: Duration = Duration::from_secs(1);

/// Enough for a request's head, and for whatever serializing its answer needs.
const STACK_BYTES: usize = 256 * 1024;

/// Starts the thread of the control socket. It waits for `begin`, and serves until `stop` is said.
///
/// # Errors
///
/// The thread cannot be started.
pub fn serve(
    listener: UnixListener,
    roster: Arc<Roster>,
    stop: Arc<Stop>,
    giver: Giver,
    begin: Receiver<()>,
    mut away: TurnAway,
) -> io::Result<JoinHandle<()>> {
    let api = Arc::new(Api::new(roster, giver));
    let active = Arc::new(AtomicUsize::new(0));
    thread::Builder::new()
        .name("control".to_owned())
        .stack_size(STACK_BYTES)
        .spawn(move || {
            if begin.recv().is_err() {
                return;
            }
            while stop.or_readable(&listener) {
                match listener.accept() {
                    Ok((stream, _)) => admit(stream, &api, &active),
                    Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                    Err(error) => {
                        let line = match away.close_one(&error, &listener) {
                            true => away.line("a client was turned away: no descriptors are left"),
                            false => away.line(format_args!("cannot accept: {error}")),
                        };
                        if let Some(line) = line {
                            log::error!("control socket: {line}");
                        }
                        // Out of descriptors or memory: that passes, but not by trying at once.
                        thread::sleep(Duration::from_millis(100));
                    }
                }
            }
        })
}

/// Counts a connection as long as it lives.
struct Place(Arc<AtomicUsize>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn admit(stream: UnixStream, api: &Arc<Api>, active: &Arc<AtomicUsize>) {
    let others = active.fetch_add(1, Ordering::Relaxed);
    let place = Place(Arc::clone(active));
    if others >= MAX_CONNECTIONS {
        // The socket's buffer takes it, so this does not wait.
        let busy = Response::error(503, "too many connections; try again");
        let _ = stream
            .set_nonblocking(true)
            .and_then(|()| busy.write(&stream, Instant::now()));
        // What it has sent already: the accepting thread waits for no client.
        http::drain(&stream, Instant::now() + PATIENCE);
        return;
    }
    let api = Arc::clone(api);
    let spawned = thread::Builder::new()
        .name("control-client".to_owned())
        .stack_size(STACK_BYTES)
        .spawn(move || {
            let stream = answer(stream, &api);
            // A client that sees the end of its connection finds the place free.
            drop(place);
            drop(stream);
        });
    if let Err(error) = spawned {
        log::error!("control socket: cannot start a thread: {error}");
    }
}

/// Gives the connection back, unless it became something else.
fn answer(stream: UnixStream, api: &Api) -> Option<UnixStream> {
    let response = match http::read_request(&stream, Instant::now() + PATIENCE) {
        Ok(request) if api::asks_to_take_over(&request) => match api.hand_over(stream, &request) {
            Ok(()) => return None,
            Err((back, refusal)) => {
                write(&refusal, &back);
                return Some(back);
            }
        },
        Ok(request) => api.answer(&request),
        Err(Some(refusal)) => {
            write(&refusal, &stream);
            http::drain(&stream, Instant::now() + DRAIN);
            return Some(stream);
        }
        // It left without a question.
        Err(None) => return Some(stream),
    };
    write(&response, &stream);
    Some(stream)
}

fn write(response: &Response, stream: &UnixStream) {
    if let Err(error) = response.write(stream, Instant::now() + PATIENCE) {
        log::debug!("control socket: a client did not take its answer: {error}");
    }
}
