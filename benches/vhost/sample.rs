//! One measurement of one back end, and the middle of several.

use crate::backend::{self, Backend};
use crate::cli::Pin;
use crate::load::Rig;
use crate::syscalls;
use crate::usage::{Machine, Usage};
use crate::workload::Workload;
use serde::Serialize;
use std::time::{Duration, Instant};

/// What was measured. Times are in microseconds; what is counted is counted for each request.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Sample {
    /// Requests in a second.
    pub iops: f64,
    /// MiB in a second.
    pub mib: f64,
    /// Half of the requests took no longer.
    pub p50: f64,
    /// 99 % of the requests took no longer.
    pub p99: f64,
    /// 99.9 % of the requests took no longer.
    pub p999: f64,
    /// CPU time of the back end.
    pub cpu: f64,
    /// Kicks.
    pub kicks: f64,
    /// Calls.
    pub calls: f64,
    /// Context switches of the back end because it waited.
    pub voluntary: f64,
    /// Context switches of the back end because another process was to run.
    pub involuntary: f64,
    /// System calls of the back end, if they were counted.
    pub syscalls: Option<f64>,
    /// Share of the machine's CPU time that other processes took, 0 to 1.
    pub others: f64,
    /// Nanoseconds that a cache line took from a CPU to another and back, the longer of before and after.
    pub line: Option<f64>,
    /// The latencies as a histogram: (nanoseconds, requests); of one round, not of a median.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub latency_ns: Vec<(f64, u64)>,
}

impl Sample {
    /// Measures `backend` once.
    ///
    /// # Errors
    ///
    /// The session failed.
    pub fn take(backend: &Backend, workload: &Workload, count: bool) -> Result<Self, String> {
        let mut rig = Rig::connect(backend.socket(), workload)?;
        let pid = backend.pid_text();
        let look = || (Usage::of(&pid), Usage::of("self"), Machine::now());
        let mut looks = Vec::new();
        let outcome = rig.run(|_| looks.push(look()))?;
        let [
            (backend_before, self_before, machine_before),
            (backend_after, self_after, machine_after),
        ] = &looks[..]
        else {
            return Err("the run has no beginning or no end".to_owned());
        };
        let used = backend_after.since(backend_before);
        let own = self_after.since(self_before);
        let requests = outcome.requests as f64;
        let us = |share| outcome.latency.percentile(share) / 1000.0;
        let mut sample = Self {
            iops: outcome.iops,
            mib: outcome.iops * workload.block as f64 / f64::from(1 << 20),
            p50: us(0.5),
            p99: us(0.99),
            p999: us(0.999),
            cpu: used.cpu_ns as f64 / 1000.0 / requests,
            kicks: outcome.kicks as f64 / requests,
            calls: outcome.calls as f64 / requests,
            voluntary: used.voluntary as f64 / requests,
            involuntary: used.involuntary as f64 / requests,
            syscalls: None,
            others: machine_after.others(machine_before, used.user_ns + own.user_ns),
            line: None,
            latency_ns: outcome.latency.classes(),
        };
        if count {
            let mut counter = None;
            let outcome = rig.run(|begins| {
                if begins {
                    counter = Some(syscalls::Counter::attach(backend.pid(), workload.runtime));
                }
            })?;
            // The counter stops by itself after the runtime, about when the run does.
            sample.syscalls = counter
                .and_then(syscalls::Counter::finish)
                .map(|calls| calls as f64 / outcome.requests as f64);
        }
        rig.disconnect();
        Ok(sample)
    }

    /// The median of each value, each for itself.
    pub fn median(samples: &[Self]) -> Self {
        let of = |value: fn(&Self) -> f64| median(samples.iter().map(value).collect());
        let known = |value: fn(&Self) -> Option<f64>| {
            let known: Vec<f64> = samples.iter().filter_map(value).collect();
            (!known.is_empty()).then(|| median(known))
        };
        Self {
            iops: of(|s| s.iops),
            mib: of(|s| s.mib),
            p50: of(|s| s.p50),
            p99: of(|s| s.p99),
            p999: of(|s| s.p999),
            cpu: of(|s| s.cpu),
            kicks: of(|s| s.kicks),
            calls: of(|s| s.calls),
            voluntary: of(|s| s.voluntary),
            involuntary: of(|s| s.involuntary),
            syscalls: known(|s| s.syscalls),
            others: of(|s| s.others),
            line: known(|s| s.line),
            latency_ns: Vec::new(),
        }
    }
}

/// The middle value, or the mean of the two in the middle; 0 of none.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let half = values.len() / 2;
    match values.len() {
        0 => 0.0,
        n if n % 2 == 1 => values[half],
        _ => f64::midpoint(values[half - 1], values[half]),
    }
}

/// Keeps the front end on its CPUs.
///
/// # Errors
///
/// There are no such CPUs.
pub fn pin_front(pin: Option<&Pin>) -> Result<(), String> {
    pin.map_or(Ok(()), |pin| backend::pin(None, &pin.front))
}

/// Other processes that take less of the machine than this (0 to 1) do not disturb.
pub const CALM: f64 = 0.05;

/// Waits until other processes leave the machine alone, but not longer than `patience`.
pub fn wait_for_calm(patience: Duration) {
    const LOOK: Duration = Duration::from_millis(250);
    let deadline = Instant::now() + patience;
    let mut calm = 0;
    // Twice in a row: compilers pause, too.
    while calm < 2 && Instant::now() < deadline {
        let before = Machine::now();
        std::thread::sleep(LOOK);
        let others = Machine::now().others(&before, 0);
        calm = if others < CALM { calm + 1 } else { 0 };
    }
}
