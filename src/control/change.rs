//! What a client wants changed: read and checked as a whole before any of it is done.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use crate::config::tuning::{check_rate, parse_rate, scheduler, set_limit};
use crate::disk::registry::Roster;
use crate::disk::{Disk, Membership, Switch};
use crate::mq::elevator::Params;
use crate::mq::limits::MAX_TRACE_EVENTS;
use crate::mq::throttle::{Limits, Rate};
use crate::mq::trace::Action;

/// Events a worker keeps if nothing is said.
const DEFAULT_TRACE_EVENTS: usize = 16 * 1024;

/// The body of a PATCH of a disk. What is not there stays.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct DiskBody {
    scheduler: Option<String>,
    scheduler_params: BTreeMap<String, u64>,
    limits: BTreeMap<String, Value>,
    /// `null` is no group, and something else than nothing.
    #[serde(deserialize_with = "some")]
    group: Option<Option<String>>,
}

fn some<'de, D: Deserializer<'de>>(value: D) -> Result<Option<Option<String>>, D::Error> {
    Deserialize::deserialize(value).map(Some)
}

/// The body of a PUT of a group: its limits, all of them.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct GroupBody {
    limits: BTreeMap<String, Value>,
}

/// The body of a POST to a disk's size.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct SizeBody {
    size_bytes: Option<u64>,
}

/// The body of a POST of a trace.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct TraceBody {
    events: Option<usize>,
    actions: Option<String>,
}

/// Reads a body. None at all is an empty object.
fn body<T: DeserializeOwned + Default>(bytes: &[u8]) -> Result<T, String> {
    if bytes.iter().all(u8::is_ascii_whitespace) {
        return Ok(T::default());
    }
    serde_json::from_slice(bytes).map_err(|error| format!("the body is not understood: {error}"))
}

/// What is to be done to a disk; nothing in it can fail any more.
#[derive(Debug)]
pub(super) struct DiskChange {
    scheduler: Option<Params>,
    limits: Option<Limits>,
    group: Option<Option<Membership>>,
}

impl DiskChange {
    /// Reads and checks all that `bytes` asks for.
    pub fn read(bytes: &[u8], disk: &Disk, roster: &Roster) -> Result<DiskChange, String> {
        let DiskBody {
            scheduler,
            scheduler_params,
            limits,
            group,
        } = body(bytes)?;
        let group = match group {
            None => None,
            Some(None) => Some(None),
            Some(Some(name)) => match roster.group(&name) {
                Some(group) => Some(Some(group)),
                None => {
                    return Err(format!(
                        "there is no group '{name}'; make it with PUT /v1/groups/{name}, or use one \
                         of: {}",
                        roster.group_names().join(", ")
                    ));
                }
            },
        };
        Ok(DiskChange {
            scheduler: wanted_scheduler(disk, scheduler.as_deref(), &scheduler_params)?,
            limits: match limits.is_empty() {
                true => None,
                false => Some(changed_limits(disk.limits(), &limits)?),
            },
            group,
        })
    }

    /// Whether the disk is emptied for it: all that it has taken has to end first.
    pub fn empties(&self) -> bool {
        self.scheduler.is_some()
    }

    /// Does what is done at once.
    pub fn apply_limits(&mut self, disk: &Disk, roster: &Roster) {
        if let Some(limits) = self.limits.take() {
            roster.set_limits(disk, limits);
        }
        if let Some(group) = self.group.take() {
            disk.set_group(group);
        }
    }

    /// Does what may take as long as what is in flight.
    pub fn apply_scheduler(&self, disk: &Disk, switch: &Switch<'_>) {
        if let Some(params) = self.scheduler {
            apply_scheduler(disk, switch, params);
        }
    }
}

/// As in Linux, naming the scheduler that the disk has already changes nothing by itself.
fn wanted_scheduler(
    disk: &Disk,
    name: Option<&str>,
    params: &BTreeMap<String, u64>,
) -> Result<Option<Params>, String> {
    let current = disk.scheduler();
    let given = || params.iter().map(|(name, value)| (name.as_str(), *value));
    let fresh = match name {
        None => current,
        Some(name) => disk.choose_scheduler(scheduler(name, given())?),
    };
    if fresh.kind() != current.kind() {
        return Ok(Some(fresh));
    }
    let mut changed = current;
    for (name, value) in given() {
        changed
            .set(name, value)
            .map_err(|error| error.to_string())?;
    }
    Ok((changed != current).then_some(changed))
}

fn apply_scheduler(disk: &Disk, switch: &Switch<'_>, params: Params) {
    let current = disk.scheduler();
    if current.kind() != params.kind() {
        switch.set(params);
        return;
    }
    // The same elevator goes on: no need to stop the disk for a number.
    for (new, old) in params.list().into_iter().zip(current.list()) {
        if new.value != old.value
            && let Err(error) = switch.set_param(new.name, new.value)
        {
            log::error!(disk = disk.id.0; "disk {}: {error}", disk.config.serial);
        }
    }
}

/// `limits` with what the body says.
fn changed_limits(mut limits: Limits, changes: &BTreeMap<String, Value>) -> Result<Limits, String> {
    for (key, value) in changes {
        set_limit(&mut limits, key, rate(key, value)?)?;
    }
    Ok(limits)
}

/// A rate: a number, text as on the command line, an object, or null for no limit.
fn rate(key: &str, value: &Value) -> Result<Rate, String> {
    let no = || {
        format!(
            "{key} is {value}; use a number, \"RATE/BURST\", {{\"rate\": N, \"burst\": N}}, or null for \
             no limit"
        )
    };
    match value {
        Value::Null => Ok(Rate::default()),
        Value::Number(number) => {
            let rate = Rate::per_second(number.as_u64().ok_or_else(no)?);
            check_rate(key, rate)
        }
        Value::String(text) => parse_rate(key, text),
        Value::Object(fields) => {
            let number = |name: &str| match fields.get(name) {
                None => Ok(0),
                Some(value) => value.as_u64().ok_or_else(no),
            };
            if fields.keys().any(|name| name != "rate" && name != "burst") {
                return Err(no());
            }
            let rate = Rate {
                per_second: number("rate")?,
                burst: number("burst")?,
            };
            check_rate(key, rate)
        }
        Value::Bool(_) | Value::Array(_) => Err(no()),
    }
}

/// The limits a group is to have.
pub(super) fn group_limits(bytes: &[u8]) -> Result<Limits, String> {
    let GroupBody { limits } = body(bytes)?;
    changed_limits(Limits::default(), &limits)
}

/// The size a disk is to have; `None` is what its image has by now.
pub(super) fn new_size(bytes: &[u8]) -> Result<Option<u64>, String> {
    let SizeBody { size_bytes } = body(bytes)?;
    Ok(size_bytes)
}

/// How many events to trace on each worker, and which.
pub(super) fn trace(bytes: &[u8]) -> Result<(usize, Arc<[Action]>), String> {
    let TraceBody { events, actions } = body(bytes)?;
    let events = events.unwrap_or(DEFAULT_TRACE_EVENTS);
    if !(1..=MAX_TRACE_EVENTS).contains(&events) {
        return Err(format!("events is {events}; use 1 to {MAX_TRACE_EVENTS}"));
    }
    let Some(letters) = actions else {
        return Ok((events, Action::ALL.into()));
    };
    let actions = letters
        .chars()
        .map(|letter| {
            Action::of_letter(letter).ok_or_else(|| {
                let known: String = Action::ALL.iter().map(|action| action.letter()).collect();
                format!("there is no action '{letter}'; the actions are {known}")
            })
        })
        .collect::<Result<Arc<[Action]>, _>>()?;
    match actions.is_empty() {
        true => Err("actions is empty; leave it out for all of them".to_owned()),
        false => Ok((events, actions)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_said_in_four_ways() {
        let of = |text: &str| rate("iops", &serde_json::from_str(text).expect("JSON"));
        assert_eq!(of("100"), Ok(Rate::per_second(100)));
        assert_eq!(of("\"1K\""), Ok(Rate::per_second(1000)));
        let both = Rate {
            per_second: 100,
            burst: 5,
        };
        assert_eq!(of("\"100/5\""), Ok(both));
        assert_eq!(of(r#"{"rate": 100, "burst": 5}"#), Ok(both));
        assert_eq!(of("null"), Ok(Rate::default()));
        for bad in [
            "-1",
            "1.5",
            "true",
            "[]",
            r#"{"rates": 1}"#,
            r#"{"burst": 1}"#,
            "\"x\"",
        ] {
            assert!(of(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_group_is_nothing_null_or_a_name() {
        let group = |text: &str| body::<DiskBody>(text.as_bytes()).expect("a body").group;
        assert_eq!(group("{}"), None);
        assert_eq!(group(""), None);
        assert_eq!(group(r#"{"group": null}"#), Some(None));
        assert_eq!(group(r#"{"group": "a"}"#), Some(Some("a".to_owned())));
    }

    #[test]
    fn a_trace_has_known_actions_and_a_bounded_size() {
        let (events, actions) = trace(br#"{"events": 5, "actions": "QDC"}"#).expect("a trace");
        let letters: String = actions.iter().map(|action| action.letter()).collect();
        assert_eq!((events, &*letters), (5, "QDC"));
        assert_eq!(trace(b"").expect("all").1.len(), Action::ALL.len());
        for bad in [
            r#"{"events": 0}"#,
            r#"{"events": 100000000}"#,
            r#"{"actions": ""}"#,
            r#"{"actions": "QZ"}"#,
            r#"{"action": "Q"}"#,
            "[",
        ] {
            assert!(trace(bad.as_bytes()).is_err(), "{bad}");
        }
    }
}
