//! Several back ends, measured in turn: A B A B.

use crate::backend::{Backend, Image, Who};
use crate::cli::Pin;
use crate::fio;
use crate::line;
use crate::sample::{self, Sample, median};
use crate::workload::Workload;
use serde::Serialize;
use std::time::{Duration, Instant};

/// Who takes part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Contender {
    /// A back end.
    Backend {
        /// Its name in tables.
        name: String,
        /// Which.
        who: Who,
    },
    /// fio without a back end.
    Fio,
}

impl Contender {
    /// Our daemon with these arguments.
    pub fn ours(args: &[&str]) -> Self {
        Self::named("ours", args)
    }

    /// The same under a name that tells it from others with other arguments.
    pub fn named(name: &str, args: &[&str]) -> Self {
        Self::Backend {
            name: name.to_owned(),
            who: Who::Ours(args.iter().map(|&arg| arg.to_owned()).collect()),
        }
    }

    /// QEMU's storage daemon.
    pub fn qsd() -> Self {
        Self::Backend {
            name: "qsd".to_owned(),
            who: Who::Qsd,
        }
    }

    /// Its name in tables.
    pub fn name(&self) -> &str {
        match self {
            Self::Backend { name, .. } => name,
            Self::Fio => "fio",
        }
    }
}

/// How measurements are made, whatever is measured.
#[derive(Clone, Debug)]
pub struct Method {
    /// Times everybody is measured.
    pub rounds: usize,
    /// Longest time that each measurement waits for other processes, and is repeated because of them.
    pub calm: Duration,
    /// Count system calls too.
    pub syscalls: bool,
    /// Where threads may run.
    pub pin: Option<Pin>,
}

/// What came out for one contender.
#[derive(Clone, Debug, Serialize)]
pub struct Measured {
    /// Whose it is.
    pub name: String,
    /// One of each round.
    pub rounds: Vec<Sample>,
    /// Medians.
    pub median: Sample,
}

/// A ratio of medians, and the least and the greatest ratio within one round.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Ratio {
    /// Median of one by the median of the other.
    pub median: f64,
    /// The smallest of all rounds.
    pub least: f64,
    /// The greatest of all rounds.
    pub most: f64,
}

impl Ratio {
    /// `ours` by `peer`.
    pub fn of(ours: &Measured, peer: &Measured, value: fn(&Sample) -> f64) -> Self {
        let rounds: Vec<f64> = ours
            .rounds
            .iter()
            .zip(&peer.rounds)
            .map(|(ours, peer)| value(ours) / value(peer))
            .collect();
        let middle = |measured: &Measured| median(measured.rounds.iter().map(value).collect());
        Self {
            median: middle(ours) / middle(peer),
            least: rounds.iter().copied().fold(f64::INFINITY, f64::min),
            most: rounds.iter().copied().fold(0.0, f64::max),
        }
    }
}

/// Measures all of them in turn, `rounds` times. A back end runs only while it is measured: one that polls would
/// disturb the others.
///
/// # Errors
///
/// One of them failed.
pub fn compare(
    contenders: &[Contender],
    image: &Image,
    workload: &Workload,
    method: &Method,
) -> Result<Vec<Measured>, String> {
    let mut samples: Vec<Vec<Sample>> = vec![Vec::new(); contenders.len()];
    for _ in 0..method.rounds {
        for (contender, samples) in contenders.iter().zip(&mut samples) {
            let once = || measure_once(contender, image, workload, method);
            let taken = calmest(method.calm, once);
            samples.push(taken.map_err(|error| format!("{}: {error}", contender.name()))?);
        }
    }
    Ok(contenders
        .iter()
        .zip(samples)
        .map(|(contender, rounds)| Measured {
            name: contender.name().to_owned(),
            median: Sample::median(&rounds),
            rounds,
        })
        .collect())
}

fn measure_once(
    contender: &Contender,
    image: &Image,
    workload: &Workload,
    method: &Method,
) -> Result<Sample, String> {
    let pin = method.pin.as_ref();
    let before = line::round_trip_ns(pin);
    let sample = match (contender, image) {
        (Contender::Fio, Image::File(path)) => fio::measure(path, workload, pin),
        (Contender::Fio, Image::Null(_)) => Err("fio needs a file".to_owned()),
        (Contender::Backend { who, .. }, _) => Backend::start(who, image, workload.queues, pin)
            .and_then(|backend| Sample::take(&backend, workload, method.syscalls)),
    }?;
    let line = before
        .into_iter()
        .chain(line::round_trip_ns(pin))
        .reduce(f64::max);
    Ok(Sample { line, ..sample })
}

/// Measures when other processes are quiet, and again if they did not stay so, but begins nothing after `patience`.
/// The measurement that was disturbed least counts, whatever it says.
fn calmest(
    patience: Duration,
    mut once: impl FnMut() -> Result<Sample, String>,
) -> Result<Sample, String> {
    let deadline = Instant::now() + patience;
    let mut best: Option<Sample> = None;
    loop {
        sample::wait_for_calm(deadline.saturating_duration_since(Instant::now()));
        let taken = once()?;
        let best = best.get_or_insert_with(|| taken.clone());
        if taken.others < best.others {
            *best = taken;
        }
        if best.others < sample::CALM || Instant::now() >= deadline {
            return Ok(best.clone());
        }
    }
}

/// What came out of a target.
#[derive(Debug, Serialize)]
pub struct Verdict {
    /// The row.
    pub row: String,
    /// What was compared.
    pub what: String,
    /// Our median.
    pub ours: f64,
    /// The peer's median, or what ours is measured by.
    pub peer: f64,
    /// Whose it is.
    pub peer_name: String,
    /// Ours by the peer's.
    pub ratio: Option<Ratio>,
    /// The target in words.
    pub target: String,
    /// Whether it was reached.
    pub met: bool,
}
