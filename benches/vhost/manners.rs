//! What is not a ratio of two back ends: an idle daemon, many queues, memory.

use crate::backend::{Backend, Image, Who};
use crate::cli::Args;
use crate::compare::{Contender, Measured, Method, Ratio, Verdict, compare};
use crate::load::Rig;
use crate::report;
use crate::sample::Sample;

use crate::support::ProcStats;
use crate::usage::Resident;
use crate::workload::Workload;
use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Disks of the idle daemon.
const DISKS: usize = 64;
/// How long it is watched.
const IDLE: Duration = Duration::from_secs(10);
/// How long it may take to come to rest.
const REST: Duration = Duration::from_secs(30);
/// Most queues, and requests in flight on all of them.
const QUEUES: usize = 64;
/// Most resident memory in KiB.
const RESIDENT: f64 = 8192.0;

/// A row of its own kind.
pub struct Manner {
    /// Its name.
    pub name: &'static str,
    /// Measures it.
    pub measure: fn(&Args, &Workload, &Method) -> Result<Verdict, String>,
}

/// All of them.
pub fn all() -> Vec<Manner> {
    vec![
        Manner {
            name: "idle, 64 disks connected",
            measure: idle,
        },
        Manner {
            name: "null, 1 → 64 queues, 64 requests in all, polling",
            measure: |args, base, method| many_queues(args, base, method, true),
        },
        Manner {
            name: "null, 1 → 64 queues, 64 requests in all, waiting",
            measure: |args, base, method| many_queues(args, base, method, false),
        },
        Manner {
            name: "memory of one disk with 4 queues",
            measure: memory,
        },
    ]
}

fn sparse(dir: &Path, name: &str) -> Result<std::path::PathBuf, String> {
    let path = dir.join(name);
    File::create(&path)
        .and_then(|file| file.set_len(16 << 20))
        .map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(path)
}

fn temporary(args: &Args) -> Result<TempDir, String> {
    std::fs::create_dir_all(&args.dir)
        .and_then(|()| TempDir::new_in(&args.dir))
        .map_err(|error| format!("{}: {error}", args.dir.display()))
}

fn short_run(base: &Workload, queues: usize) -> Workload {
    Workload {
        queues,
        threads: queues.min(base.threads.max(1)),
        depth: 8,
        block: 4096,
        spin: false,
        warm_up: Duration::ZERO,
        runtime: Duration::from_millis(30),
        ..base.clone()
    }
}

fn idle(args: &Args, base: &Workload, _: &Method) -> Result<Verdict, String> {
    let images = temporary(args)?;
    let sockets = TempDir::new().map_err(|error| error.to_string())?;
    let mut options = vec!["--summary".to_owned(), "none".to_owned()];
    let mut paths = Vec::new();
    for disk in 0..DISKS {
        let image = sparse(images.path(), &format!("{disk}.img"))?;
        let socket = sockets.path().join(format!("{disk}.sock"));
        options.push("--disk".to_owned());
        options.push(format!(
            "socket-path={},blk-file={},num-queues=4",
            socket.display(),
            image.display()
        ));
        paths.push(socket);
    }
    let last = paths.last().expect("there are disks").clone();
    let backend = Backend::start_ours_with(&options, last, sockets)?;
    let mut rigs = Vec::new();
    for path in &paths {
        let mut rig = Rig::connect(path, &short_run(base, 4))?;
        rig.run(|_| ())?;
        rigs.push(rig);
    }
    let switches = || -> u64 { ProcStats::of(backend.pid()).switches.values().sum() };
    let deadline = Instant::now() + REST;
    let mut before = switches();
    loop {
        std::thread::sleep(Duration::from_secs(1));
        let now = switches();
        if now == before || Instant::now() > deadline {
            break;
        }
        before = now;
    }
    let before = switches();
    std::thread::sleep(IDLE);
    let woken = switches() - before;
    for rig in rigs {
        rig.disconnect();
    }
    println!("{woken} context switches in {IDLE:?}");
    Ok(Verdict {
        row: "idle, 64 disks connected".to_owned(),
        what: "wake-ups".to_owned(),
        ours: woken as f64,
        peer: 0.0,
        peer_name: "in 10 s".to_owned(),
        ratio: None,
        target: "= 0".to_owned(),
        met: woken == 0,
    })
}

fn many_queues(
    args: &Args,
    base: &Workload,
    method: &Method,
    spin: bool,
) -> Result<Verdict, String> {
    const LEAST: f64 = 0.9;
    // QEMU's daemon beside it: a part of the fall is the front end's own, which has to look after as
    // many rings.
    let contenders = [Contender::ours(&[]), Contender::qsd()];
    let image = Image::Null(args.size << 20);
    let once = Method {
        rounds: 1,
        ..method.clone()
    };
    // The same threads for both, so that only the number of queues differs.
    let load = |queues: usize| Workload {
        queues,
        threads: 1,
        depth: QUEUES / queues,
        block: 4096,
        spin,
        ..base.clone()
    };
    let (mut one, mut many) = ([Vec::new(), Vec::new()], [Vec::new(), Vec::new()]);
    for _ in 0..method.rounds {
        for (queues, samples) in [(1, &mut one), (QUEUES, &mut many)] {
            let measured = compare(&contenders, &image, &load(queues), &once)?;
            for (samples, measured) in samples.iter_mut().zip(measured) {
                samples.push(measured.median.clone());
            }
        }
    }
    let measured = |name: &str, rounds: Vec<Sample>| Measured {
        name: name.to_owned(),
        median: Sample::median(&rounds),
        rounds,
    };
    let ([many, qsd_many], [one, qsd_one]) = (many, one);
    let both = [measured("64 queues", many), measured("1 queue", one)];
    let qsd = [
        measured("qsd, 64 queues", qsd_many),
        measured("qsd, 1 queue", qsd_one),
    ];
    print!("{}{}", report::medians(&both), report::medians(&qsd));
    let fall = Ratio::of(&qsd[0], &qsd[1], |s| s.iops);
    println!("qsd, 64 queues / 1 queue: IOPS {}", report::ratio(&fall));
    let ratio = Ratio::of(&both[0], &both[1], |s| s.iops);
    Ok(Verdict {
        row: format!(
            "null, 1 → 64 queues, {}",
            if spin { "polling" } else { "waiting" }
        ),
        what: "IOPS".to_owned(),
        ours: both[0].median.iops,
        peer: both[1].median.iops,
        peer_name: "1 queue".to_owned(),
        ratio: Some(ratio),
        target: format!("≥ {LEAST}"),
        met: ratio.median >= LEAST,
    })
}

fn memory(args: &Args, base: &Workload, _: &Method) -> Result<Verdict, String> {
    let images = temporary(args)?;
    let image = Image::File(sparse(images.path(), "disk.img")?);
    let mut own = Vec::new();
    for who in [Who::Ours(Vec::new()), Who::Qsd] {
        let backend = Backend::start(&who, &image, 4, None)?;
        let mut load = short_run(base, 4);
        load.depth = 32;
        load.runtime = Duration::from_millis(300);
        let mut rig = Rig::connect(backend.socket(), &load)?;
        rig.run(|_| ())?;
        let resident = Resident::of(backend.pid());
        println!(
            "{who:?}: {} KiB, and {} KiB shared",
            resident.own, resident.shared
        );
        own.push(resident.own as f64);
        rig.disconnect();
    }
    Ok(Verdict {
        row: "memory of one disk with 4 queues".to_owned(),
        what: "KiB".to_owned(),
        ours: own[0],
        peer: own[1],
        peer_name: "qsd".to_owned(),
        ratio: None,
        target: format!("≤ {RESIDENT}"),
        met: own[0] <= RESIDENT,
    })
}
