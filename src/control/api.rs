//! Which question gets which answer.

use std::fmt::Write as _;
use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, TryLockError};

use serde_json::json;

use crate::config::tuning::parse_group_name;
use crate::disk::Disk;
use crate::disk::registry::Roster;
use crate::mq::ids::HctxId;
use crate::mq::limits::MAX_GROUPS;
use crate::takeover::Giver;
use crate::worker::counts::{TraceReport, Traced};

use super::change::{self, DiskChange};
use super::http::{Request, Response};
use super::{MAX_CONNECTIONS, metrics, view};

/// Where another daemon asks for the disks.
const TAKE_OVER: &str = "/v1/take-over";

/// What is said on this connection from here on is not HTTP (see [`crate::takeover`]).
const SWITCH: &[u8] =
    b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: blkmq-take-over\r\n\r\n";

/// How many clients may wait for disks: for a scheduler to be switched, or a size to be changed. The others have
/// connections left for everything else.
const MAX_WAITING: usize = MAX_CONNECTIONS / 2;

/// Answers for the process.
#[derive(Debug)]
pub(super) struct Api {
    roster: Arc<Roster>,
    /// Read while something is changed, written while all is handed over: what were changed then would be
    /// lost.
    handing_over: RwLock<()>,
    /// Held while a group is looked for and made.
    grouping: Mutex<()>,
    /// Clients that wait for disks.
    waiting: AtomicUsize,
    giver: Giver,
}

/// Whether another daemon wants the disks.
pub(super) fn asks_to_take_over(request: &Request) -> bool {
    request.method == "POST" && request.path == TAKE_OVER
}

impl Api {
    pub fn new(roster: Arc<Roster>, giver: Giver) -> Api {
        Api {
            roster,
            handing_over: RwLock::new(()),
            grouping: Mutex::new(()),
            waiting: AtomicUsize::new(0),
            giver,
        }
    }

    /// The answer to a request.
    pub fn answer(&self, request: &Request) -> Response {
        self.route(request).unwrap_or_else(|refusal| refusal)
    }

    fn route(&self, request: &Request) -> Result<Response, Response> {
        let path = request.path.split('?').next().unwrap_or_default();
        let parts: Vec<String> = path
            .split('/')
            .filter(|part| !part.is_empty())
            .map(decode)
            .collect();
        let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
        let method = request.method.as_str();
        let roster = &*self.roster;
        match (&parts[..], method) {
            (["v1", "disks"], "GET") => Ok(Response::json(&view::overview(roster))),
            (["v1", "disks"], _) => Err(Response::method_not_allowed("GET")),
            (["v1", "disks", name], "GET") => {
                let disk = self.find(name)?;
                Ok(Response::json(&view::disk(roster, disk)))
            }
            (["v1", "disks", name], "PATCH") => {
                let disk = self.find(name)?;
                let _change = self.begin_change()?;
                self.change_disk(name, disk, &request.body)?;
                Ok(Response::json(&view::disk(roster, disk)))
            }
            (["v1", "disks", _], _) => Err(Response::method_not_allowed("GET, PATCH")),
            (["v1", "disks", name, "resize"], "POST") => {
                let disk = self.find(name)?;
                let size = change::new_size(&request.body).map_err(bad)?;
                // Beside another change: none holds up a disk's growing, nor the other way round. But not beside a
                // take-over: a call that makes the image longer must not be carried out once another process has it.
                let _change = self.begin_change()?;
                let resize = disk.begin_resize().ok_or_else(|| {
                    Response::error(
                        409,
                        "the disk's size is being changed, which takes until its storage answers; try again",
                    )
                })?;
                let _waits = self.begin_to_wait()?;
                match size {
                    None => resize.follow_image(),
                    Some(size) => resize.grow_to(size),
                }
                .map_err(|error| Response::error(409, error.to_string()))?;
                Ok(Response::json(&view::disk(roster, disk)))
            }
            (["v1", "disks", _, "resize"], _) => Err(Response::method_not_allowed("POST")),
            (["v1", "disks", name, "resume"], "POST") => {
                let disk = self.find(name)?;
                disk.resume();
                Ok(Response::json(&view::disk(roster, disk)))
            }
            (["v1", "disks", _, "resume"], _) => Err(Response::method_not_allowed("POST")),
            (["v1", "take-over"], _) => Err(Response::method_not_allowed("POST")),
            (["v1", "groups"], "GET") => {
                let names = roster.group_names();
                let groups: Vec<_> = names
                    .iter()
                    .filter_map(|name| view::group(roster, name))
                    .collect();
                Ok(Response::json(&json!({ "groups": groups })))
            }
            (["v1", "groups"], _) => Err(Response::method_not_allowed("GET")),
            (["v1", "groups", name], "GET") => self.group(name),
            (["v1", "groups", name], "PUT") => {
                let name = parse_group_name(name).map_err(bad)?;
                let limits = change::group_limits(&request.body).map_err(bad)?;
                let _change = self.begin_change()?;
                let _alone = self.grouping.lock().unwrap_or_else(PoisonError::into_inner);
                if roster.group(&name).is_none() && roster.group_names().len() >= MAX_GROUPS {
                    return Err(Response::error(
                        409,
                        format!("there are {MAX_GROUPS} groups already"),
                    ));
                }
                roster.set_group_limits(&name, limits);
                self.group(&name)
            }
            (["v1", "groups", _], _) => Err(Response::method_not_allowed("GET, PUT")),
            (["v1", "trace"], "GET") => {
                let text = trace_text(&roster.take_trace());
                Ok(Response::text(text, "text/plain; charset=utf-8"))
            }
            (["v1", "trace"], "POST") => {
                let (events, actions) = change::trace(&request.body).map_err(bad)?;
                roster.start_trace(events, &actions);
                Ok(Response::json(&json!({ "events": events })))
            }
            (["v1", "trace"], "DELETE") => {
                roster.stop_trace();
                Ok(Response::json(&json!({})))
            }
            (["v1", "trace"], _) => Err(Response::method_not_allowed("GET, POST, DELETE")),
            (["metrics"], "GET") => Ok(Response::text(
                metrics::text(roster),
                "text/plain; version=0.0.4; charset=utf-8",
            )),
            (["metrics"], _) => Err(Response::method_not_allowed("GET")),
            _ => Err(Response::error(
                404,
                format!("there is no {path}; there are /v1/disks, /v1/groups, /v1/trace, /metrics"),
            )),
        }
    }

    /// Hands the disks over to the daemon at the other end of `stream`, or goes on as before. Nothing
    /// is changed meanwhile.
    pub fn hand_over(
        &self,
        stream: UnixStream,
        request: &Request,
    ) -> Result<(), (UnixStream, Response)> {
        let alone = match self.handing_over.try_write() {
            Ok(alone) => Ok(alone),
            Err(TryLockError::Poisoned(poisoned)) => Ok(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => Err(Response::error(
                409,
                "another change is under way (a scheduler is switched when what is in flight has \
                 ended, a disk grows when its storage answers); try again",
            )),
        };
        let considered = alone.and_then(|alone| {
            let offer = self.giver.consider(&stream, &request.body);
            Ok((alone, offer.map_err(|why| Response::error(409, why))?))
        });
        match considered {
            Ok((alone, offer)) => {
                // If it has gone, that shows at the next step.
                let _ = (&stream).write_all(SWITCH);
                if self.giver.give(&offer, stream) {
                    // What would be changed from here on would be lost.
                    std::mem::forget(alone);
                }
                Ok(())
            }
            Err(refusal) => Err((stream, refusal)),
        }
    }

    /// Something is to be changed: not while the disks are handed over.
    fn begin_change(&self) -> Result<RwLockReadGuard<'_, ()>, Response> {
        match self.handing_over.try_read() {
            Ok(guard) => Ok(guard),
            Err(TryLockError::Poisoned(poisoned)) => Ok(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => Err(Response::error(
                409,
                "the disks are being handed over to another daemon; ask that one, or try again",
            )),
        }
    }

    /// A client begins to wait for a disk, until this is dropped.
    fn begin_to_wait(&self) -> Result<Waits<'_>, Response> {
        let waits = Waits(&self.waiting);
        if self.waiting.fetch_add(1, Ordering::Relaxed) >= MAX_WAITING {
            return Err(Response::error(
                409,
                format!(
                    "{MAX_WAITING} changes of other disks wait for what is in flight there, or for storage that \
                     does not answer; try again"
                ),
            ));
        }
        Ok(waits)
    }

    /// Changes a disk. Limits and group are changed at once, whatever else is under way; while the scheduler
    /// is switched, which can last as long as what is in flight, it cannot be switched again.
    fn change_disk(&self, name: &str, disk: &Disk, body: &[u8]) -> Result<(), Response> {
        let roster = &*self.roster;
        let limiting = disk.alone_with_limits();
        let read = || DiskChange::read(body, disk, roster).map_err(bad);
        let mut change = read()?;
        let switch = match change.empties() {
            false => None,
            true => {
                let switch = disk.begin_switch().ok_or_else(|| {
                    Response::error(
                        409,
                        "the disk's scheduler is being switched, which takes until what is in flight has \
                         ended; try again",
                    )
                })?;
                // It would have to end what is held, with errors for the guest.
                if roster.is_held(disk) {
                    return Err(Response::error(
                        409,
                        format!(
                            "the disk is held after an error; resume it first (blkmqctl resume {name})"
                        ),
                    ));
                }
                // A switch may have ended since it was read.
                change = read()?;
                Some((switch, self.begin_to_wait()?))
            }
        };
        change.apply_limits(disk, roster);
        drop(limiting);
        if let Some((switch, _waits)) = switch {
            change.apply_scheduler(disk, &switch);
        }
        Ok(())
    }

    /// A disk by its serial, by its index if no serial is the same, or by its index with an @.
    fn find(&self, name: &str) -> Result<&Arc<Disk>, Response> {
        let disks = self.roster.disks();
        let mut same = disks.iter().filter(|disk| disk.config.serial == name);
        match (same.next(), same.next()) {
            (Some(disk), None) => return Ok(disk),
            (Some(first), Some(second)) => {
                return Err(Response::error(
                    409,
                    format!(
                        "several disks have the serial '{name}'; use the index: @{} or @{}",
                        first.id, second.id
                    ),
                ));
            }
            (None, _) => {}
        }
        let index = name.strip_prefix('@').unwrap_or(name).parse::<usize>();
        index
            .ok()
            .and_then(|index| disks.get(index))
            .ok_or_else(|| {
                Response::error(404, format!("no disk has the serial or the index '{name}'"))
            })
    }

    fn group(&self, name: &str) -> Result<Response, Response> {
        match view::group(&self.roster, name) {
            Some(group) => Ok(Response::json(&group)),
            None => Err(Response::error(404, format!("there is no group '{name}'"))),
        }
    }
}

/// Counts a client as long as it waits.
struct Waits<'a>(&'a AtomicUsize);

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn bad(why: String) -> Response {
    Response::error(400, why)
}

/// Undoes percent-encoding; what is not well encoded stays as it is.
fn decode(part: &str) -> String {
    let bytes = part.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let hex = part.get(at + 1..at + 3).filter(|_| bytes[at] == b'%');
        match hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(byte) => {
                out.push(byte);
                at += 3;
            }
            None => {
                out.push(bytes[at]);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// The trace in the manner of blkparse.
fn trace_text(report: &TraceReport) -> String {
    let mut text =
        String::from("# disk worker queue seconds tag action operation sector + sectors\n");
    for Traced {
        ring,
        worker,
        event,
    } in &report.events
    {
        let mut event = *event;
        // Shown under the number that people know.
        event.hctx = HctxId(ring.queue.0);
        let _ = writeln!(text, "{:>4} {worker:>4} {event}", ring.disk);
    }
    if report.lost > 0 {
        let _ = writeln!(
            text,
            "# {} events were overwritten before they were taken",
            report.lost
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percent_encoding_is_undone() {
        assert_eq!(decode("a%20b%2Fc"), "a b/c");
        assert_eq!(decode("100%"), "100%");
        assert_eq!(decode("%zz%4"), "%zz%4");
        assert_eq!(decode("caf\u{e9}%"), "caf\u{e9}%");
    }
}
