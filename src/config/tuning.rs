//! Schedulers, limits and groups as a person writes them: on the command line, in a request to the
//! control socket, in a word to `blkmqctl`. All take the same words and say the same when they are wrong.

use std::collections::BTreeMap;

use crate::mq::elevator::{Kind, Params};
use crate::mq::throttle::{Limits, Rate};

/// Most bytes of a group's name.
pub const GROUP_NAME_MAX_BYTES: usize = 64;

/// The keys of limits, QEMU's names for them (`throttling.iops-total` and so on) shortened.
pub const LIMIT_KEYS: [&str; 6] = ["iops", "iops-rd", "iops-wr", "bps", "bps-rd", "bps-wr"];

/// Which elevator a disk is to have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Scheduler {
    /// The one that suits the disk.
    #[default]
    Auto,
    /// This one.
    Given(Params),
}

/// A group of disks that share limits, as the command line describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    /// Its name.
    pub name: String,
    /// What its disks may do together.
    pub limits: Limits,
}

/// Items of a list: between commas, or between colons where a comma is awkward (in `--disk`).
fn items(text: &str) -> impl Iterator<Item = &str> {
    text.split([',', ':']).map(str::trim)
}

/// A scheduler: `NAME[,PARAM=VALUE...]`.
///
/// # Errors
///
/// No such scheduler, no such parameter, or a value that it cannot have, in words.
pub fn parse_scheduler(text: &str) -> Result<Scheduler, String> {
    let mut items = items(text);
    let name = items.next().unwrap_or_default();
    let params = items
        .map(parse_param)
        .collect::<Result<BTreeMap<_, _>, _>>()?;
    let params = params.iter().map(|(name, value)| (name.as_str(), *value));
    scheduler(name, params)
}

/// One parameter of a scheduler: `PARAM=VALUE`.
///
/// # Errors
///
/// It is not of that form, or the value is no number.
pub fn parse_param(text: &str) -> Result<(String, u64), String> {
    let Some((name, value)) = text.split_once('=') else {
        return Err(format!("'{text}' is no parameter; write NAME=VALUE"));
    };
    match value.parse() {
        Ok(value) => Ok((name.to_owned(), value)),
        Err(_) => Err(format!("{name} is '{value}', and has to be a number")),
    }
}

/// A scheduler by its name, with these parameters and else the defaults.
///
/// # Errors
///
/// As for [`parse_scheduler`].
pub fn scheduler<'a>(
    name: &str,
    params: impl IntoIterator<Item = (&'a str, u64)>,
) -> Result<Scheduler, String> {
    let mut params = params.into_iter();
    if name == "auto" {
        return match params.next() {
            None => Ok(Scheduler::Auto),
            Some((param, _)) => Err(format!(
                "auto may be any scheduler, so it has no parameter '{param}'; name the scheduler"
            )),
        };
    }
    let kind: Kind = name.parse().map_err(|_| {
        format!("there is no scheduler '{name}'; use none, mq-deadline, kyber or auto")
    })?;
    let mut given = Params::from(kind);
    for (param, value) in params {
        given.set(param, value).map_err(|error| error.to_string())?;
    }
    Ok(Scheduler::Given(given))
}

/// Limits: `KEY=RATE[/BURST],...`.
///
/// # Errors
///
/// An unknown key, one given twice, or a rate that is none, in words.
pub fn parse_limits(text: &str) -> Result<Limits, String> {
    let mut limits = Limits::default();
    let mut seen = Vec::new();
    for item in items(text) {
        let (key, rate) = parse_limit(item)?;
        if seen.contains(&key) {
            return Err(format!("{key} is given twice"));
        }
        set_limit(&mut limits, &key, rate)?;
        seen.push(key);
    }
    Ok(limits)
}

/// One limit: `KEY=RATE[/BURST]`.
///
/// # Errors
///
/// As for [`parse_limits`].
pub fn parse_limit(text: &str) -> Result<(String, Rate), String> {
    let Some((key, rate)) = text.split_once('=') else {
        return Err(format!(
            "'{text}' is no limit; write KEY=RATE or KEY=RATE/BURST"
        ));
    };
    if !LIMIT_KEYS.contains(&key) {
        return Err(unknown_key(key));
    }
    Ok((key.to_owned(), parse_rate(key, rate)?))
}

fn unknown_key(key: &str) -> String {
    format!(
        "there is no limit '{key}'; the limits are {}",
        LIMIT_KEYS.join(", ")
    )
}

/// The rate of one key: `RATE` or `RATE/BURST`, each with K, M or G behind it if need be: thousands and
/// so on of operations, powers of 1024 of bytes.
///
/// # Errors
///
/// It is no such thing.
pub fn parse_rate(key: &str, text: &str) -> Result<Rate, String> {
    let unit: u64 = if key.starts_with("bps") { 1024 } else { 1000 };
    let number = |text: &str| {
        let (digits, power) = match text.chars().last().map(|c| c.to_ascii_uppercase()) {
            Some('K') => (&text[..text.len() - 1], 1),
            Some('M') => (&text[..text.len() - 1], 2),
            Some('G') => (&text[..text.len() - 1], 3),
            _ => (text, 0),
        };
        // Without a sign, which parse would take.
        let plain = digits.chars().all(|c| c.is_ascii_digit());
        let value = digits.parse::<u64>().ok().filter(|_| plain);
        value
            .and_then(|value| value.checked_mul(unit.pow(power)))
            .filter(|value| *value <= RATE_MAX)
            .ok_or_else(|| {
                format!(
                    "{key} is '{text}'; use a number up to 10^15, or one with K, M or G behind it"
                )
            })
    };
    let (rate, burst) = match text.split_once('/') {
        Some((rate, burst)) => (number(rate)?, number(burst)?),
        None => (number(text)?, 0),
    };
    check_rate(
        key,
        Rate {
            per_second: rate,
            burst,
        },
    )
}

/// Far above what a disk can do, and far below where the buckets' arithmetic ends.
const RATE_MAX: u64 = 1_000_000_000_000_000;

/// A rate as numbers.
///
/// # Errors
///
/// It is beyond all reason, or a burst without a rate.
pub fn check_rate(key: &str, rate: Rate) -> Result<Rate, String> {
    if rate.per_second.max(rate.burst) > RATE_MAX {
        return Err(format!("{key} is above 10^15; leave it out for no limit"));
    }
    if rate.per_second == 0 && rate.burst != 0 {
        return Err(format!(
            "{key} has a burst and no rate; give both, or 0 for no limit"
        ));
    }
    Ok(rate)
}

/// Sets one limit by its key.
///
/// # Errors
///
/// There is no such key.
pub fn set_limit(limits: &mut Limits, key: &str, rate: Rate) -> Result<(), String> {
    let Limits { ops, bytes } = limits;
    let place = match key {
        "iops" => &mut ops.total,
        "iops-rd" => &mut ops.read,
        "iops-wr" => &mut ops.write,
        "bps" => &mut bytes.total,
        "bps-rd" => &mut bytes.read,
        "bps-wr" => &mut bytes.write,
        other => return Err(unknown_key(other)),
    };
    *place = rate;
    Ok(())
}

/// The limits that are set, by key, in the keys' order.
pub fn list_limits(limits: &Limits) -> Vec<(&'static str, Rate)> {
    let Limits { ops, bytes } = limits;
    let rates = [
        ops.total,
        ops.read,
        ops.write,
        bytes.total,
        bytes.read,
        bytes.write,
    ];
    LIMIT_KEYS
        .into_iter()
        .zip(rates)
        .filter(|(_, rate)| rate.per_second != 0)
        .collect()
}

/// The name of a group: something that can stand in a URL and on a command line as it is.
///
/// # Errors
///
/// It is empty, too long, or has other characters.
pub fn parse_group_name(text: &str) -> Result<String, String> {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if text.is_empty() || text.len() > GROUP_NAME_MAX_BYTES || !text.chars().all(fits) {
        return Err(format!(
            "the name of a group is 1 to {GROUP_NAME_MAX_BYTES} letters, digits, '-', '_' or '.', \
             not '{text}'"
        ));
    }
    Ok(text.to_owned())
}

/// A group with its limits: `NAME,KEY=RATE[/BURST],...`.
///
/// # Errors
///
/// As for [`parse_group_name`] and [`parse_limits`].
pub fn parse_group(text: &str) -> Result<Group, String> {
    let (name, limits) = text
        .split_once([',', ':'])
        .ok_or("it has no limit; write NAME,KEY=RATE")?;
    Ok(Group {
        name: parse_group_name(name)?,
        limits: parse_limits(limits)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mq::elevator::{DeadlineParams, KyberParams};

    fn given(text: &str) -> Params {
        match parse_scheduler(text) {
            Ok(Scheduler::Given(params)) => params,
            other => panic!("{text}: {other:?}"),
        }
    }

    #[test]
    fn a_scheduler_is_a_name_and_parameters() {
        assert_eq!(parse_scheduler("auto"), Ok(Scheduler::Auto));
        assert_eq!(given("none"), Params::None);
        let expected = DeadlineParams {
            read_expire_ms: 50,
            fifo_batch: 4,
            ..DeadlineParams::default()
        };
        for text in [
            "mq-deadline,read_expire=50,fifo_batch=4",
            "mq-deadline:read_expire=50:fifo_batch=4",
        ] {
            assert_eq!(given(text), Params::MqDeadline(expected));
        }
        assert_eq!(given("kyber"), Params::Kyber(KyberParams::default()));
    }

    #[test]
    fn a_scheduler_that_is_none_says_why() {
        for (text, part) in [
            ("bfq", "there is no scheduler 'bfq'"),
            ("", "there is no scheduler ''"),
            ("kyber,fifo_batch=4", "no parameter 'fifo_batch'"),
            (
                "mq-deadline,front_merges=2",
                "front_merges = 2 is out of range",
            ),
            ("mq-deadline,fifo_batch", "write NAME=VALUE"),
            ("mq-deadline,fifo_batch=few", "has to be a number"),
            ("auto,fifo_batch=4", "name the scheduler"),
            ("none,fifo_batch=4", "it has none"),
        ] {
            let error = parse_scheduler(text).expect_err(text);
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn limits_have_keys_rates_and_bursts() {
        let limits = parse_limits("iops=10K/20,bps-rd=1M,bps-wr=2G/3K").expect("limits");
        let rate = |per_second, burst| Rate { per_second, burst };
        assert_eq!(limits.ops.total, rate(10_000, 20));
        assert_eq!(limits.bytes.read, rate(1 << 20, 0));
        assert_eq!(limits.bytes.write, rate(2 << 30, 3 << 10));
        assert_eq!(
            parse_limits("iops=10K/20:bps-rd=1M:bps-wr=2G/3K"),
            Ok(limits)
        );
        let listed: Vec<_> = list_limits(&limits)
            .into_iter()
            .map(|(key, _)| key)
            .collect();
        assert_eq!(listed, ["iops", "bps-rd", "bps-wr"]);
    }

    #[test]
    fn every_key_has_its_own_place() {
        let mut limits = Limits::default();
        for (key, n) in LIMIT_KEYS.into_iter().zip(1..) {
            set_limit(&mut limits, key, Rate::per_second(n)).expect(key);
        }
        let rates: Vec<u64> = list_limits(&limits)
            .iter()
            .map(|(_, r)| r.per_second)
            .collect();
        assert_eq!(rates, [1, 2, 3, 4, 5, 6]);
    }

    #[test]
    fn limits_that_are_none_say_why() {
        for (text, part) in [
            ("", "'' is no limit"),
            ("iops", "'iops' is no limit"),
            ("speed=3", "there is no limit 'speed'"),
            ("iops=fast", "iops is 'fast'"),
            ("iops=-1", "iops is '-1'"),
            ("iops=+1", "iops is '+1'"),
            ("iops=1/", "iops is ''"),
            ("iops=0/5", "burst and no rate"),
            ("iops=99999999999G", "up to 10^15"),
            ("iops=1,iops=2", "given twice"),
        ] {
            let error = parse_limits(text).expect_err(text);
            assert!(error.contains(part), "{text}: {error}");
        }
        assert_eq!(
            parse_limits("iops=0"),
            Ok(Limits::default()),
            "0 is no limit"
        );
    }

    #[test]
    fn a_group_has_a_name_and_limits() {
        let group = parse_group("tenant-1,iops=100").expect("a group");
        assert_eq!(group.name, "tenant-1");
        assert_eq!(group.limits.ops.total, Rate::per_second(100));
        assert!(parse_group("tenant").is_err());
        assert!(parse_group(",iops=1").is_err());
        assert!(parse_group("a/b,iops=1").is_err());
    }
}
