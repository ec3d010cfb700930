//! Looks at a running daemon and changes how it serves its disks: the control socket, for people.

#![warn(clippy::print_stdout, clippy::print_stderr)]

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use clap::{Parser, Subcommand};
use serde_json::{Map, Value, json};

use vhost_user_blkmq::cli::parse_size;
use vhost_user_blkmq::config::tuning::{parse_limit, parse_param};
use vhost_user_blkmq::control::client::{ClientError, ask, encode};
use vhost_user_blkmq::control::show;

const EXAMPLES: &str = "\
Examples:
  blkmqctl --control-path /run/blkmq.sock status
  blkmqctl scheduler vm1 mq-deadline read_expire=100
  blkmqctl limit vm1 iops=500/2000 bps=50M
  blkmqctl limit vm1 iops=0                  (no such limit any more)
  blkmqctl group set tenant7 iops=2000
  blkmqctl group join tenant7 vm1
  blkmqctl resize vm1 40G
  blkmqctl resume vm1
  blkmqctl trace --seconds 5 --actions QDC

A disk is its serial, or its index as `status` shows it: @0, @1 and so on.
The daemon has to run with --control-path. Everything is described in docs/CONTROL.md.";

/// Look at a running vhost-user-blkmq, and change how it serves its disks.
#[derive(Debug, Parser)]
#[command(name = "blkmqctl", version, after_help = EXAMPLES, next_line_help = true)]
struct Arguments {
    /// The daemon's control socket
    #[arg(long, value_name = "PATH", env = "BLKMQ_CONTROL_PATH", global = true)]
    control_path: Option<PathBuf>,

    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show the disks, their settings and their queues
    Status {
        /// As JSON, with all there is
        #[arg(long)]
        json: bool,
    },
    /// Give a disk another scheduler, or its scheduler other parameters
    Scheduler {
        /// The disk
        disk: String,
        /// none, mq-deadline, kyber or auto
        name: String,
        /// As in /sys/block/*/queue/iosched
        #[arg(value_name = "PARAM=VALUE", value_parser = parse_param)]
        params: Vec<(String, u64)>,
    },
    /// Limit a disk: iops, iops-rd, iops-wr, bps, bps-rd, bps-wr; what is not named stays
    Limit {
        /// The disk
        disk: String,
        /// A rate of 0 takes a limit away
        #[arg(value_name = "KEY=RATE[/BURST]", required = true, value_parser = limit_word)]
        limits: Vec<(String, String)>,
    },
    /// Have a disk grow: to the size its image has by now, or to the size given
    Resize {
        /// The disk
        disk: String,
        /// In bytes, or with K, M, G or T behind it; a regular file is extended to that
        #[arg(value_parser = parse_size)]
        size: Option<u64>,
    },
    /// Go on with a disk that is held after an error: what failed is tried again
    Resume {
        /// The disk
        disk: String,
    },
    /// Look at groups of disks that share limits, and change them
    Group {
        #[command(subcommand)]
        command: GroupCommand,
    },
    /// Print what requests go through while it happens, one line an event
    Trace {
        /// How long; until Ctrl-C if not given
        #[arg(long, value_name = "N")]
        seconds: Option<u64>,
        /// Which events, by their letters: Q G M F I D R C P U X
        #[arg(long, value_name = "LETTERS")]
        actions: Option<String>,
        /// How many events a worker keeps until they are fetched
        #[arg(long, value_name = "N")]
        events: Option<u64>,
    },
    /// Print the counters in Prometheus' text format
    Metrics,
}

#[derive(Debug, Subcommand)]
enum GroupCommand {
    /// Show all groups
    List,
    /// Make a group, or change its limits: those given are all it has
    Set {
        /// The group
        name: String,
        /// As for `limit`
        #[arg(value_name = "KEY=RATE[/BURST]", value_parser = limit_word)]
        limits: Vec<(String, String)>,
    },
    /// Put a disk into a group
    Join {
        /// The group
        name: String,
        /// The disk
        disk: String,
    },
    /// Take a disk out of its group
    Leave {
        /// The disk
        disk: String,
    },
}

/// A limit that has been checked, as the daemon gets it.
fn limit_word(text: &str) -> Result<(String, String), String> {
    let (key, _) = parse_limit(text)?;
    let rate = text.split_once('=').map_or("", |(_, rate)| rate);
    Ok((key, rate.to_owned()))
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let Some(socket) = arguments.control_path else {
        complain(
            "where is the daemon's control socket? give --control-path PATH, or set BLKMQ_CONTROL_PATH",
        );
        return ExitCode::from(2);
    };
    let daemon = Daemon(socket);
    match daemon.run(arguments.command) {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read our output has gone.
        Err(ClientError::Io(error)) if error.kind() == io::ErrorKind::BrokenPipe => {
            ExitCode::SUCCESS
        }
        Err(error) => {
            complain(&error.to_string());
            ExitCode::FAILURE
        }
    }
}

/// Says what is wrong; whether that can be written changes nothing.
fn complain(what: &str) {
    let _ = writeln!(io::stderr(), "blkmqctl: {what}");
}

/// The daemon behind a control socket.
struct Daemon(PathBuf);

impl Daemon {
    fn run(&self, command: Command) -> Result<(), ClientError> {
        match command {
            Command::Status { json: true } => print(&self.ask("GET", "/v1/disks", None)?),
            Command::Status { json: false } => {
                print(&show::status(&self.json("GET", "/v1/disks", None)?))
            }
            Command::Scheduler { disk, name, params } => {
                let params: Map<String, Value> = params
                    .into_iter()
                    .map(|(name, value)| (name, value.into()))
                    .collect();
                let change = json!({ "scheduler": name, "scheduler_params": params });
                self.change(&disk, &change)
            }
            Command::Limit { disk, limits } => {
                self.change(&disk, &json!({ "limits": object(limits) }))
            }
            Command::Resize { disk, size } => {
                let path = format!("/v1/disks/{}/resize", encode(&disk));
                let body = size.map(|size_bytes| json!({ "size_bytes": size_bytes }));
                let disk = self.json("POST", &path, body.as_ref())?;
                print(&show::status(&json!({ "disks": [disk] })))
            }
            Command::Resume { disk } => {
                let path = format!("/v1/disks/{}/resume", encode(&disk));
                let disk = self.json("POST", &path, None)?;
                print(&show::status(&json!({ "disks": [disk] })))
            }
            Command::Group { command } => self.group(command),
            Command::Trace {
                seconds,
                actions,
                events,
            } => self.trace(seconds.map(Duration::from_secs), actions, events),
            Command::Metrics => print(&self.ask("GET", "/metrics", None)?),
        }
    }

    fn ask(&self, method: &str, path: &str, body: Option<&Value>) -> Result<String, ClientError> {
        ask(&self.0, method, path, body)
    }

    fn json(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Value, ClientError> {
        let text = self.ask(method, path, body)?;
        serde_json::from_str(&text).map_err(|error| ClientError::Answer(error.to_string()))
    }

    /// Changes a disk, and shows it as it is now.
    fn change(&self, disk: &str, change: &Value) -> Result<(), ClientError> {
        let path = format!("/v1/disks/{}", encode(disk));
        let disk = self.json("PATCH", &path, Some(change))?;
        print(&show::status(&json!({ "disks": [disk] })))
    }

    fn group(&self, command: GroupCommand) -> Result<(), ClientError> {
        let groups = match command {
            GroupCommand::List => self.json("GET", "/v1/groups", None)?,
            GroupCommand::Set { name, limits } => {
                let path = format!("/v1/groups/{}", encode(&name));
                let group = self.json("PUT", &path, Some(&json!({ "limits": object(limits) })))?;
                json!({ "groups": [group] })
            }
            GroupCommand::Join { name, disk } => {
                return self.change(&disk, &json!({ "group": name }));
            }
            GroupCommand::Leave { disk } => return self.change(&disk, &json!({ "group": null })),
        };
        for group in groups["groups"].as_array().into_iter().flatten() {
            let disks: Vec<String> = group["disks"]
                .as_array()
                .into_iter()
                .flatten()
                .map(|index| format!("@{index}"))
                .collect();
            print(&format!(
                "group {}: limits {}; disks {}\n",
                group["name"].as_str().unwrap_or("-"),
                show::limits(&group["limits"]),
                if disks.is_empty() {
                    "none".to_owned()
                } else {
                    disks.join(", ")
                }
            ))?;
        }
        Ok(())
    }

    /// Traces until the time is over or somebody presses Ctrl-C; then the daemon traces no more.
    fn trace(
        &self,
        time: Option<Duration>,
        actions: Option<String>,
        events: Option<u64>,
    ) -> Result<(), ClientError> {
        const INTERVAL: Duration = Duration::from_millis(100);
        let interrupted = Arc::new(AtomicBool::new(false));
        for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
            signal_hook::flag::register(signal, Arc::clone(&interrupted))?;
        }
        let mut wanted = Map::new();
        wanted.extend(actions.map(|letters| ("actions".to_owned(), letters.into())));
        wanted.extend(events.map(|count| ("events".to_owned(), count.into())));
        self.ask("POST", "/v1/trace", Some(&wanted.into()))?;
        let end = time.map(|time| Instant::now() + time);
        let mut shown = Ok(());
        let mut notes = Vec::new();
        let mut take = || -> Result<(), ClientError> {
            let text = self.ask("GET", "/v1/trace", None)?;
            let mut fresh = String::with_capacity(text.len());
            for line in text.lines() {
                // The heading, and how many were lost: once, until there is something else to say.
                if line.starts_with('#') {
                    if notes.iter().any(|note| note == line) {
                        continue;
                    }
                    notes.push(line.to_owned());
                }
                fresh.push_str(line);
                fresh.push('\n');
            }
            print(&fresh)
        };
        while shown.is_ok()
            && !interrupted.load(Ordering::Relaxed)
            && end.is_none_or(|end| Instant::now() < end)
        {
            let left = end.map(|end| end.saturating_duration_since(Instant::now()));
            thread::sleep(left.unwrap_or(INTERVAL).min(INTERVAL));
            shown = take();
        }
        // However it ended, nobody is going to look at more.
        self.ask("DELETE", "/v1/trace", None)?;
        shown?;
        take()
    }
}

fn object(pairs: Vec<(String, String)>) -> Map<String, Value> {
    pairs
        .into_iter()
        .map(|(key, value)| (key, value.into()))
        .collect()
}

fn print(text: &str) -> Result<(), ClientError> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()?;
    Ok(())
}
