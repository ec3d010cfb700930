//! A vhost-user-blk benchmark: a front end without a virtual machine drives our daemon, QEMU's storage daemon or any
//! other back end, in turn, and compares them. `docs/BENCHMARKS.md` explains the options and the columns.

#[path = "../../tests/support/mod.rs"]
mod support;

mod backend;
mod cli;
mod compare;
mod fio;
mod histogram;
mod image;
mod line;
mod load;
mod manners;
mod report;
mod sample;
mod suite;
mod syscalls;
mod usage;
mod verify;
mod workload;

use clap::Parser;
use std::process::ExitCode;
use std::time::Duration;

use backend::{Backend, Image, Who};
use cli::Args;
use compare::{Contender, Method};
use report::Machine;

fn main() -> ExitCode {
    let args = Args::parse();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<(), String> {
    let workload = args.workload()?;
    let calm =
        Duration::try_from_secs_f64(args.calm).map_err(|error| format!("--calm: {error}"))?;
    let method = Method {
        rounds: args.rounds,
        calm,
        syscalls: args.syscalls,
        pin: args.pin.clone(),
    };
    sample::pin_front(args.pin.as_ref())?;
    let Machine { cpus, cpu, linux } = Machine::this();
    println!("{cpus} CPUs ({cpu}), Linux {linux}");
    if let Some(suite) = args.suite {
        return suite::run(suite, args, &method);
    }
    let made = image::make(&args.image, args.size << 20, &args.dir)?;
    let contenders = contenders(args, &made.image)?;
    if args.verify {
        for contender in &contenders {
            if let Contender::Backend { name, who } = contender {
                let backend = Backend::start(who, &made.image, workload.queues, args.pin.as_ref())?;
                let done = verify::run(backend.socket(), &made.image, &workload)
                    .map_err(|error| format!("{name}: {error}"))?;
                println!("{name}: {done}");
            }
        }
        return Ok(());
    }
    let measured = compare::compare(&contenders, &made.image, &workload, &method)?;
    print!("{}", report::medians(&measured));
    if let [ours, peers @ ..] = &measured[..] {
        for peer in peers {
            let iops = compare::Ratio::of(ours, peer, |s| s.iops);
            let cpu = compare::Ratio::of(ours, peer, |s| s.cpu);
            let (iops, cpu) = (report::ratio(&iops), report::ratio(&cpu));
            println!("{} / {}: IOPS {iops}, CPU {cpu}", ours.name, peer.name);
            print!("{}", report::by_line(ours, peer));
        }
    }
    args.json
        .as_ref()
        .map_or(Ok(()), |path| report::write_json(path, &measured))
}

/// Those whom the options name; the first is compared with the others.
fn contenders(args: &Args, image: &Image) -> Result<Vec<Contender>, String> {
    let ours = || ours(&args.args);
    let mut contenders = match &args.backend {
        cli::Backend::Ours => ours(),
        cli::Backend::Qsd => vec![Contender::qsd()],
        cli::Backend::Both => [ours(), vec![Contender::qsd()]].concat(),
        cli::Backend::Socket(path) => vec![Contender::Backend {
            name: "socket".to_owned(),
            who: Who::Socket(path.clone()),
        }],
    };
    let first = args.args.first().map_or("", String::as_str);
    let builds = args.build.iter().map(|program| Contender::Backend {
        name: program.display().to_string(),
        who: Who::Build(
            program.clone(),
            words(first).iter().map(|&arg| arg.to_owned()).collect(),
        ),
    });
    contenders.extend(builds);
    if contenders.contains(&Contender::qsd()) && !backend::has_qsd() {
        return Err(
            "qemu-storage-daemon is not installed: run qemu/prepare, or use --backend ours"
                .to_owned(),
        );
    }
    if args.fio {
        if matches!(image, Image::Null(_)) {
            return Err("--fio: the null engine has no file that fio could use".to_owned());
        }
        contenders.push(Contender::Fio);
    }
    Ok(contenders)
}

/// Our daemon with each of these sets of arguments, at least once.
fn ours(sets: &[String]) -> Vec<Contender> {
    match sets {
        [] => vec![Contender::ours(&[])],
        [only] => vec![Contender::ours(&words(only))],
        several => {
            let one = |set: &String| Contender::named(&format!("ours {set}"), &words(set));
            several.iter().map(one).collect()
        }
    }
}

fn words(set: &str) -> Vec<&str> {
    set.split_whitespace().collect()
}
