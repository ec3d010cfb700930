//! Which elevator, and its parameters, under the names and with the units Linux gives them in
//! `/sys/block/*/queue/scheduler` and `/sys/block/*/queue/iosched/`.

use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;

use thiserror::Error;

const NS_PER_MS: u64 = 1_000_000;

/// The largest value Linux keeps in an `int`.
const INT_MAX: u64 = i32::MAX as u64;

/// The schedulers there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Kind {
    /// No elevator: requests are dispatched in the order they came in, ctx by ctx.
    #[default]
    None,
    /// Deadlines, sectors and priorities.
    MqDeadline,
    /// Latency targets.
    Kyber,
}

impl Kind {
    /// All of them.
    pub const ALL: [Kind; 3] = [Kind::None, Kind::MqDeadline, Kind::Kyber];

    /// The kernel's name for it.
    pub fn name(self) -> &'static str {
        match self {
            Kind::None => "none",
            Kind::MqDeadline => "mq-deadline",
            Kind::Kyber => "kyber",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// There is no elevator of that name.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("unknown scheduler '{0}': use none, mq-deadline or kyber")]
pub struct UnknownKind(pub String);

impl FromStr for Kind {
    type Err = UnknownKind;

    fn from_str(name: &str) -> Result<Self, UnknownKind> {
        Kind::ALL
            .into_iter()
            .find(|kind| kind.name() == name)
            .ok_or_else(|| UnknownKind(name.to_owned()))
    }
}

/// A parameter that cannot be set, or not to that value.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ParamError {
    /// This elevator has no parameter of that name.
    #[error("scheduler {kind} has no parameter '{name}': {known}")]
    Unknown {
        /// The elevator.
        kind: Kind,
        /// The name that was given.
        name: String,
        /// What to use instead.
        known: String,
    },
    /// The value is outside the parameter's range.
    #[error("{name} = {value} is out of range: use a value from {min} to {max}")]
    Range {
        /// The parameter.
        name: &'static str,
        /// The value that was given.
        value: u64,
        /// The least it may be.
        min: u64,
        /// The most it may be.
        max: u64,
    },
}

/// One parameter, for those who list them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Param {
    /// Its name in sysfs.
    pub name: &'static str,
    /// What it is set to, in sysfs' unit.
    pub value: u64,
    /// What it may be set to.
    pub range: RangeInclusive<u64>,
}

/// What `mq-deadline` can be told. The defaults are the kernel's (block/mq-deadline.c).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeadlineParams {
    /// A read that waited this long goes first, at the start of the next batch. Milliseconds.
    pub read_expire_ms: u32,
    /// The same for a write, a discard, a write-zeroes. Milliseconds.
    pub write_expire_ms: u32,
    /// How many batches of reads are preferred while writes wait.
    pub writes_starved: u32,
    /// How many requests one batch has at most.
    pub fifo_batch: u32,
    /// Whether requests are merged in front of queued ones.
    pub front_merges: bool,
    /// A request of a lower class that waited this long goes although higher ones are not done.
    /// Milliseconds.
    pub prio_aging_expire_ms: u32,
    /// How many tags requests other than reads may hold; nothing for no limit but the tags' own.
    pub async_depth: Option<u16>,
}

impl Default for DeadlineParams {
    fn default() -> Self {
        DeadlineParams {
            read_expire_ms: 500,
            write_expire_ms: 5_000,
            writes_starved: 2,
            fifo_batch: 16,
            front_merges: true,
            prio_aging_expire_ms: 10_000,
            async_depth: None,
        }
    }
}

impl DeadlineParams {
    pub(super) fn read_expire_ns(&self) -> u64 {
        u64::from(self.read_expire_ms) * NS_PER_MS
    }

    pub(super) fn write_expire_ns(&self) -> u64 {
        u64::from(self.write_expire_ms) * NS_PER_MS
    }

    pub(super) fn prio_aging_expire_ns(&self) -> u64 {
        u64::from(self.prio_aging_expire_ms) * NS_PER_MS
    }
}

/// What `kyber` can be told. The defaults are the kernel's (block/kyber-iosched.c).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KyberParams {
    /// The latency reads should have. Nanoseconds.
    pub read_lat_ns: u64,
    /// The latency writes should have. Nanoseconds.
    pub write_lat_ns: u64,
}

impl Default for KyberParams {
    fn default() -> Self {
        KyberParams {
            read_lat_ns: 2_000_000,
            write_lat_ns: 10_000_000,
        }
    }
}

/// An elevator and its parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Params {
    /// No elevator, so no parameters.
    #[default]
    None,
    /// Those of `mq-deadline`.
    MqDeadline(DeadlineParams),
    /// Those of `kyber`.
    Kyber(KyberParams),
}

impl From<Kind> for Params {
    /// The defaults.
    fn from(kind: Kind) -> Self {
        match kind {
            Kind::None => Params::None,
            Kind::MqDeadline => Params::MqDeadline(DeadlineParams::default()),
            Kind::Kyber => Params::Kyber(KyberParams::default()),
        }
    }
}

impl Params {
    /// Which elevator they are for.
    pub fn kind(&self) -> Kind {
        match self {
            Params::None => Kind::None,
            Params::MqDeadline(_) => Kind::MqDeadline,
            Params::Kyber(_) => Kind::Kyber,
        }
    }

    /// All of them. An `async_depth` that was not set shows as the most it can be.
    pub fn list(&self) -> Vec<Param> {
        let param = |name, value, range| Param { name, value, range };
        match self {
            Params::None => Vec::new(),
            Params::MqDeadline(p) => vec![
                param("read_expire", p.read_expire_ms.into(), 0..=INT_MAX),
                param("write_expire", p.write_expire_ms.into(), 0..=INT_MAX),
                param("writes_starved", p.writes_starved.into(), 0..=INT_MAX),
                param("fifo_batch", p.fifo_batch.into(), 0..=INT_MAX),
                param("front_merges", p.front_merges.into(), 0..=1),
                param(
                    "prio_aging_expire",
                    p.prio_aging_expire_ms.into(),
                    0..=INT_MAX,
                ),
                param(
                    "async_depth",
                    p.async_depth.unwrap_or(u16::MAX).into(),
                    1..=u16::MAX.into(),
                ),
            ],
            Params::Kyber(p) => vec![
                param("read_lat_nsec", p.read_lat_ns, 1..=u64::MAX),
                param("write_lat_nsec", p.write_lat_ns, 1..=u64::MAX),
            ],
        }
    }

    /// Sets one by its name in sysfs.
    pub fn set(&mut self, name: &str, value: u64) -> Result<(), ParamError> {
        let list = self.list();
        let Some(param) = list.iter().find(|param| param.name == name) else {
            let names: Vec<_> = list.iter().map(|param| param.name).collect();
            return Err(ParamError::Unknown {
                kind: self.kind(),
                name: name.to_owned(),
                known: match names.as_slice() {
                    [] => "it has none".to_owned(),
                    names => format!("use one of {}", names.join(", ")),
                },
            });
        };
        if !param.range.contains(&value) {
            return Err(ParamError::Range {
                name: param.name,
                value,
                min: *param.range.start(),
                max: *param.range.end(),
            });
        }
        // The ranges above are within these types.
        let int = u32::try_from(value).unwrap_or(u32::MAX);
        match self {
            Params::None => {}
            Params::MqDeadline(p) => match param.name {
                "read_expire" => p.read_expire_ms = int,
                "write_expire" => p.write_expire_ms = int,
                "writes_starved" => p.writes_starved = int,
                "fifo_batch" => p.fifo_batch = int,
                "front_merges" => p.front_merges = value != 0,
                "prio_aging_expire" => p.prio_aging_expire_ms = int,
                "async_depth" => p.async_depth = u16::try_from(value).ok(),
                other => unreachable!("{other} is listed but cannot be set"),
            },
            Params::Kyber(p) => match param.name {
                "read_lat_nsec" => p.read_lat_ns = value,
                "write_lat_nsec" => p.write_lat_ns = value,
                other => unreachable!("{other} is listed but cannot be set"),
            },
        }
        Ok(())
    }
}
