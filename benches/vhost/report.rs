//! Results as text and as JSON.

use crate::compare::{Measured, Ratio};
use crate::sample::Sample;
use serde::Serialize;
use std::fs;
use std::path::Path;

/// The machine, without a word about whose it is.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// CPUs this process may use.
    pub cpus: usize,
    /// The CPU's name.
    pub cpu: String,
    /// The kernel's release.
    pub linux: String,
}

impl Machine {
    /// This one.
    pub fn this() -> Self {
        let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let cpu = info
            .lines()
            .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
            .map_or("unknown", |(_, name)| name.trim());
        let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        Self {
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            cpu: cpu.to_owned(),
            // What a distribution appends is of no matter.
            linux: release.trim().split('-').next().unwrap_or("").to_owned(),
        }
    }
}

/// A table with the first column to the left and the others to the right.
pub fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (column, cell) in row.iter().enumerate() {
            let width = widths[column];
            if column == 0 {
                line.push_str(&format!("{cell:<width$}"));
            } else {
                line.push_str(&format!("  {cell:>width$}"));
            }
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// A number with three digits that count.
pub fn short(value: f64) -> String {
    match value {
        v if v >= 100_000.0 => format!("{:.0}k", v / 1000.0),
        v if v >= 10_000.0 => format!("{:.1}k", v / 1000.0),
        v if v >= 100.0 => format!("{v:.0}"),
        v if v >= 10.0 => format!("{v:.1}"),
        v if v >= 0.1 => format!("{v:.2}"),
        v if v > 0.0 => format!("{v:.4}"),
        _ => "0".to_owned(),
    }
}

/// A ratio and its spread.
pub fn ratio(ratio: &Ratio) -> String {
    let Ratio {
        median,
        least,
        most,
    } = ratio;
    format!("{median:.2} ({least:.2}–{most:.2})")
}

/// The medians of all contenders, one line each.
pub fn medians(measured: &[Measured]) -> String {
    let head = [
        "", "IOPS", "MiB/s", "p50 µs", "p99", "p99.9", "CPU µs", "kicks", "calls", "vol. sw.",
        "invol.", "syscalls", "others", "line ns",
    ];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    for one in measured {
        let Sample {
            iops,
            mib,
            p50,
            p99,
            p999,
            cpu,
            kicks,
            calls,
            voluntary,
            involuntary,
            syscalls,
            others,
            line,
            latency_ns: _,
        } = one.median.clone();
        let mut row = vec![one.name.clone()];
        row.extend([iops, mib, p50, p99, p999, cpu].map(short));
        if one.name == "fio" {
            row.extend(vec!["–".to_owned(); 5]);
        } else {
            row.extend([kicks, calls, voluntary, involuntary].map(short));
            row.push(syscalls.map_or_else(|| "–".to_owned(), short));
        }
        row.push(format!("{:.0} %", others * 100.0));
        row.push(line.map_or_else(|| "–".to_owned(), short));
        rows.push(row);
    }
    table(&rows)
}

/// Where the CPUs were near each other in some rounds and far in others, as happens on virtual machines: the ratio of
/// the medians of either kind; nothing where they were not.
pub fn by_line(ours: &Measured, peer: &Measured) -> String {
    let lines = |of: &Measured| -> Vec<f64> { of.rounds.iter().filter_map(|s| s.line).collect() };
    let all = [lines(ours), lines(peer)].concat();
    let least = all.iter().copied().fold(f64::INFINITY, f64::min);
    let most = all.iter().copied().fold(0.0, f64::max);
    if most < 2.0 * least {
        return String::new();
    }
    let between = (least * most).sqrt();
    let median_of = |of: &Measured, is_far: bool| {
        let rounds = of.rounds.iter();
        let kind: Vec<Sample> = rounds
            .filter(|s| s.line.is_some_and(|line| (line > between) == is_far))
            .cloned()
            .collect();
        (!kind.is_empty()).then(|| Sample::median(&kind))
    };
    let mut text = String::new();
    for (is_far, kind) in [(false, "near"), (true, "far from")] {
        if let (Some(ours), Some(peer)) = (median_of(ours, is_far), median_of(peer, is_far)) {
            let line = short(ours.line.unwrap_or(0.0));
            let (iops, cpu) = (ours.iops / peer.iops, ours.cpu / peer.cpu);
            text.push_str(&format!(
                "  CPUs {kind} each other ({line} ns a line): IOPS {iops:.2}, CPU {cpu:.2}\n"
            ));
        }
    }
    text
}

/// Writes `results` and the machine to a file.
///
/// # Errors
///
/// The file cannot be written.
pub fn write_json(path: &Path, results: &impl Serialize) -> Result<(), String> {
    #[derive(Serialize)]
    struct Document<'a, T> {
        machine: Machine,
        results: &'a T,
    }
    let document = Document {
        machine: Machine::this(),
        results,
    };
    let said = |error: String| format!("--json {}: {error}", path.display());
    let mut text =
        serde_json::to_string_pretty(&document).map_err(|error| said(error.to_string()))?;
    text.push('\n');
    fs::write(path, text).map_err(|error| said(error.to_string()))
}
