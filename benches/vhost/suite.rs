//! The table of targets: each row is measured and stands beside what it is to reach.

use crate::backend::{self, Image};
use crate::cli::{Args, Suite};
use crate::compare::{Contender, Measured, Method, Ratio, Verdict, compare};
use crate::image::{self, Made};
use crate::manners;
use crate::report;
use crate::sample::Sample;
use crate::workload::Workload;
use serde::Serialize;
use std::time::Duration;

/// Whether a figure is to be large or small.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Aim {
    AtLeast,
    AtMost,
}

/// A ratio that is to be reached.
struct Target {
    what: &'static str,
    value: fn(&Sample) -> f64,
    peer: &'static str,
    aim: Aim,
    bound: f64,
}

/// Measurements of one workload on one disk.
struct Row {
    name: &'static str,
    image: &'static str,
    contenders: Vec<Contender>,
    workload: Workload,
    targets: Vec<Target>,
}

#[derive(Default, Serialize)]
struct Results {
    verdicts: Vec<Verdict>,
    measured: Vec<(String, Vec<Measured>)>,
}

fn target(
    what: &'static str,
    value: fn(&Sample) -> f64,
    peer: &'static str,
    aim: Aim,
    bound: f64,
) -> Target {
    Target {
        what,
        value,
        peer,
        aim,
        bound,
    }
}

fn iops(peer: &'static str, bound: f64) -> Target {
    target("IOPS", |s| s.iops, peer, Aim::AtLeast, bound)
}

fn cpu(bound: f64) -> Target {
    target("CPU µs", |s| s.cpu, "qsd", Aim::AtMost, bound)
}

fn p50(bound: f64) -> Target {
    target("p50 µs", |s| s.p50, "fio", Aim::AtMost, bound)
}

fn rows(base: &Workload, args: &Args) -> Vec<Row> {
    let load = |rw: &str, queues, depth, block, spin| Workload {
        queues,
        depth,
        block,
        spin,
        segments: 1,
        indirect: true,
        pattern: rw.parse().expect("a pattern's name"),
        threads: args.threads(queues),
        ..base.clone()
    };
    let row = |name, image, workload, targets| {
        let mut contenders = vec![Contender::ours(&[]), Contender::qsd()];
        if image == "disk" {
            contenders.push(Contender::Fio);
        }
        Row {
            name,
            image,
            contenders,
            workload,
            targets,
        }
    };
    let unpolled = |row: Row| {
        let mut contenders = row.contenders;
        contenders[0] = Contender::ours(&["--poll-us", "0"]);
        Row { contenders, ..row }
    };
    let k4 = 4096;
    let k128 = 128 << 10;
    let (spin, wait) = (true, false);
    vec![
        row(
            "null QD32 polling",
            "null",
            load("randread", 1, 32, k4, spin),
            vec![iops("qsd", 3.2), cpu(0.33)],
        ),
        row(
            "null QD32 waiting",
            "null",
            load("randread", 1, 32, k4, wait),
            vec![iops("qsd", 6.0)],
        ),
        row(
            "null QD32 × 4 queues waiting",
            "null",
            load("randread", 4, 32, k4, wait),
            vec![iops("qsd", 2.5)],
        ),
        row(
            "null QD1 waiting, polling on",
            "null",
            load("randread", 1, 1, k4, wait),
            vec![iops("qsd", 2.5)],
        ),
        unpolled(row(
            "null QD1 waiting, polling off",
            "null",
            load("randread", 1, 1, k4, wait),
            vec![iops("qsd", 1.0)],
        )),
        row(
            "memory 4k randread QD32 polling",
            "memory",
            load("randread", 1, 32, k4, spin),
            vec![iops("qsd", 6.0)],
        ),
        row(
            "memory 128k randread QD16",
            "memory",
            load("randread", 1, 16, k128, wait),
            vec![iops("qsd", 1.5)],
        ),
        row(
            "disk 4k randread QD32",
            "disk",
            load("randread", 1, 32, k4, wait),
            vec![iops("fio", 0.95), cpu(0.6)],
        ),
        row(
            "disk 4k randwrite QD32",
            "disk",
            load("randwrite", 1, 32, k4, wait),
            vec![iops("fio", 0.95), cpu(0.6)],
        ),
        row(
            "disk 4k randread QD1, polling on",
            "disk",
            load("randread", 1, 1, k4, wait),
            vec![p50(1.15)],
        ),
        unpolled(row(
            "disk 4k randread QD1, polling off",
            "disk",
            load("randread", 1, 1, k4, wait),
            vec![p50(1.40)],
        )),
        row(
            "disk 128k read QD16",
            "disk",
            load("read", 1, 16, k128, wait),
            vec![iops("fio", 0.97)],
        ),
        row(
            "disk 128k write QD16",
            "disk",
            load("write", 1, 16, k128, wait),
            vec![iops("fio", 0.97)],
        ),
    ]
}

/// Measures every row that is wanted and prints the table.
///
/// # Errors
///
/// A back end failed, or one that is needed is not installed.
pub fn run(suite: Suite, args: &Args, method: &Method) -> Result<(), String> {
    for (program, there) in [
        ("qemu-storage-daemon", backend::has_qsd()),
        ("fio", backend::runs("fio")),
    ] {
        if !there {
            return Err(format!("{program} is not installed: run qemu/prepare"));
        }
    }
    let mut base = args.workload()?;
    let mut method = method.clone();
    if suite == Suite::Quick {
        base.runtime = Duration::from_secs(1);
        base.warm_up = Duration::from_millis(300);
        method.rounds = 3;
    }
    let wanted = |name: &str| {
        args.only.is_empty() || args.only.iter().any(|text| name.contains(text.as_str()))
    };
    let mut results = Results::default();
    let mut made: Option<(&str, Made)> = None;
    for row in rows(&base, args) {
        if !wanted(row.name) {
            continue;
        }
        if made.as_ref().is_none_or(|(name, _)| *name != row.image) {
            // The image before goes away first: it may be in memory.
            drop(made.take());
            let size = args.size << 20;
            made = Some((row.image, image::make(row.image, size, &args.dir)?));
        }
        let image = made.as_ref().map(|(_, made)| &made.image);
        let image = image.expect("made above");
        measure(&row, image, &method, &mut results)?;
    }
    drop(made);
    for manner in manners::all() {
        if wanted(manner.name) {
            println!("\n{}", manner.name);
            let verdict = (manner.measure)(args, &base, &method)?;
            results.verdicts.push(verdict);
        }
    }
    println!("\n{}", verdicts(&results.verdicts));
    args.json
        .as_ref()
        .map_or(Ok(()), |path| report::write_json(path, &results))
}

fn measure(row: &Row, image: &Image, method: &Method, results: &mut Results) -> Result<(), String> {
    let measured = compare(&row.contenders, image, &row.workload, method)
        .map_err(|error| format!("{}: {error}", row.name))?;
    println!("\n{}\n{}", row.name, report::medians(&measured).trim_end());
    let ours = &measured[0];
    for target in &row.targets {
        let peer = measured.iter().find(|one| one.name == target.peer);
        let peer = peer.expect("targets name a contender of their row");
        let ratio = Ratio::of(ours, peer, target.value);
        let (sign, met) = match target.aim {
            Aim::AtLeast => ("≥", ratio.median >= target.bound),
            Aim::AtMost => ("≤", ratio.median <= target.bound),
        };
        let (what, name) = (target.what, target.peer);
        println!("ours / {name}: {what} {}", report::ratio(&ratio));
        results.verdicts.push(Verdict {
            row: row.name.to_owned(),
            what: target.what.to_owned(),
            ours: (target.value)(&ours.median),
            peer: (target.value)(&peer.median),
            peer_name: peer.name.clone(),
            ratio: Some(ratio),
            target: format!("{sign} {}", target.bound),
            met,
        });
    }
    results.measured.push((row.name.to_owned(), measured));
    Ok(())
}

fn verdicts(verdicts: &[Verdict]) -> String {
    let head = [
        "",
        "figure",
        "ours",
        "peer",
        "",
        "ratio (spread)",
        "target",
        "",
    ];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    for verdict in verdicts {
        rows.push(vec![
            verdict.row.clone(),
            verdict.what.clone(),
            report::short(verdict.ours),
            report::short(verdict.peer),
            verdict.peer_name.clone(),
            verdict
                .ratio
                .as_ref()
                .map_or_else(String::new, report::ratio),
            verdict.target.clone(),
            if verdict.met { "met" } else { "MISSED" }.to_owned(),
        ]);
    }
    report::table(&rows)
}
