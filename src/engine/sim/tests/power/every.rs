//! Every order in which a few requests can be sent and can end, every outcome of a sync, and after each
//! step every image a power cut can leave.

use super::*;

/// Replays a run with other choices, until there are no others.
#[derive(Default)]
struct Choices {
    /// What was chosen, of how many.
    made: Vec<(usize, usize)>,
    at: usize,
}

impl Choices {
    fn choose(&mut self, of: usize) -> usize {
        assert!(of > 0);
        if self.at == self.made.len() {
            self.made.push((0, of));
        }
        let (chosen, before) = self.made[self.at];
        assert_eq!(before, of, "a run is not the same when it is repeated");
        self.at += 1;
        chosen
    }

    /// The next run; false after the last.
    fn next(&mut self) -> bool {
        self.at = 0;
        while let Some((chosen, of)) = self.made.pop() {
            if chosen + 1 < of {
                self.made.push((chosen + 1, of));
                return true;
            }
        }
        false
    }
}

/// What a guest does on one ring.
#[derive(Clone, Copy)]
enum Do {
    /// Write so many sectors from here on.
    Write(usize, usize),
    /// Two writes of a sector each that are neighbours, in one drain.
    Neighbours(usize),
    Zero(usize),
    Discard(usize),
    Flush,
    /// Change between write-back and write-through.
    Toggle,
}
use Do::{Discard, Flush, Neighbours, Toggle, Write, Zero};

impl Do {
    fn requests(self) -> Vec<(Op, std::ops::Range<usize>)> {
        match self {
            Write(first, count) => vec![(Op::Write, first..first + count)],
            Neighbours(at) => vec![(Op::Write, at..at + 1), (Op::Write, at + 1..at + 2)],
            Zero(at) => vec![(Op::WriteZeroes, at..at + 1)],
            Discard(at) => vec![(Op::Discard, at..at + 1)],
            Flush => vec![(Op::Flush, 0..0)],
            Toggle => vec![],
        }
    }
}

/// For each ring what it does, in this order.
type Script = &'static [&'static [Do]];

const SCRIPTS: &[Script] = &[
    // From one cache mode to the other, and back.
    &[&[Write(0, 1), Toggle, Write(0, 1), Toggle, Write(0, 1)]],
    &[&[Write(0, 1), Write(1, 1)], &[Toggle]],
    // Flushes that come while one runs.
    &[&[Write(0, 1), Flush, Flush, Flush]],
    &[&[Write(0, 1), Flush, Write(0, 1)], &[Flush]],
    // Zeroes are writes; a discard may be done or not.
    &[&[Write(0, 1), Zero(0), Flush], &[Discard(1)]],
    // A flush covers what had ended when it came, on whichever ring, and nothing it does not.
    &[&[Write(0, 1), Flush], &[Write(1, 1), Flush]],
    &[&[Flush, Write(0, 1), Flush], &[Flush]],
    // Neighbours travel as one, and are durable as two.
    &[&[Neighbours(0), Flush, Write(0, 2)]],
];

/// Where each write takes three steps (refused, written, synced), fewer of them make as many orders.
const SHORT: &[Script] = &[
    &[&[Write(0, 1), Flush], &[Write(1, 1)]],
    &[&[Neighbours(0)], &[Flush]],
    &[&[Write(0, 1), Zero(0)], &[Discard(1)]],
    &[&[Write(0, 1), Toggle, Write(0, 1), Toggle]],
];

fn scripts(setup: &Setup) -> &'static [Script] {
    match (setup.write_through, setup.faults.unknown) {
        (true, 1..) => SHORT,
        _ => SCRIPTS,
    }
}

struct Run {
    world: World,
    at: Vec<usize>,
    /// Syncs that may still fail.
    failures: usize,
    images: u64,
}

impl Run {
    /// Does one thing that can be done now; false if there is none.
    fn step(&mut self, script: Script, choices: &mut Choices, now_ns: u64) -> bool {
        let world = &mut self.world;
        let sendable: Vec<usize> = (0..script.len())
            .filter(|ring| {
                script[*ring].get(self.at[*ring]).is_some_and(|what| {
                    let mut requests = what.requests().into_iter();
                    !world.toggling && requests.all(|(op, range)| world.may_send(*ring, op, range))
                })
            })
            .collect();
        let syncs = world.engine.in_kernel();
        let in_kernel = syncs.len();
        let settles = world.toggling && world.is_drained();
        let ways = sendable.len() + in_kernel + usize::from(settles);
        if ways == 0 {
            return false;
        }
        let way = choices.choose(ways);
        // The worst of it: what is asked for next may fail, or be unknown.
        let fails = |left: &mut usize, choices: &mut Choices| {
            let fails = *left > 0 && choices.choose(2) == 1;
            *left -= usize::from(fails);
            fails
        };
        if let Some(&ring) = sendable.get(way) {
            let what = script[ring][self.at[ring]];
            self.at[ring] += 1;
            for (op, range) in what.requests() {
                world.send(ring, op, range);
            }
            match what {
                Toggle => world.toggle(),
                _ => world.unplug(ring),
            }
            world.run();
        } else if way < sendable.len() + in_kernel {
            let nth = way - sendable.len();
            let fails = syncs[nth] && fails(&mut self.failures, choices);
            world.engine.faults.flush_fails = if fails { 1000 } else { 0 };
            world.turn(Kernel::Ends(nth), now_ns);
        } else {
            let works = !fails(&mut self.failures, choices);
            world.settle(works);
        }
        // What needs no kernel is over at once.
        world.turn(Kernel::Waits, now_ns);
        true
    }

    fn look(&mut self) -> Option<String> {
        let whole = self.world.complaint();
        let media = self.world.engine.disks[0].media.as_ref().expect("has one");
        let images = media.images();
        self.images += images;
        let each = (0..images).find_map(|nth| self.world.complaint_of(&media.nth_image(nth)));
        assert_eq!(whole.is_some(), each.is_some(), "{whole:?}, {each:?}");
        each
    }
}

/// How many runs there are, and how many images; or what a power cut broke.
fn all_runs(
    script: Script,
    setup: Setup,
    seen: &mut BTreeMap<&'static str, u64>,
) -> Result<(u64, u64), String> {
    let mut choices = Choices::default();
    let (mut runs, mut images) = (0, 0);
    loop {
        let mut run = Run {
            world: World::new(format!("{setup:?}"), 1, setup),
            at: vec![0; script.len()],
            failures: 1,
            images: 0,
        };
        let mut now_ns = 0;
        // Up to here the last run went the same way, and what it left there was looked at.
        let known = choices.made.len();
        while run.step(script, &mut choices, now_ns) {
            now_ns += 1_000_000;
            if choices.at >= known
                && let Some(complaint) = run.look()
            {
                return Err(complaint);
            }
        }
        let done: Vec<usize> = script.iter().map(|ring| ring.len()).collect();
        assert_eq!(
            (run.at.clone(), run.world.asked.len()),
            (done, 0),
            "it got stuck"
        );
        runs += 1;
        images += run.images;
        for (what, times) in std::mem::take(&mut run.world.seen) {
            *seen.entry(what).or_insert(0) += times;
        }
        if !choices.next() {
            return Ok((runs, images));
        }
    }
}

fn setups() -> Vec<Setup> {
    let mut setups = Vec::new();
    for direct in [true, false] {
        for unknown in [0, 1000] {
            for write_through in [false, true] {
                setups.push(Setup {
                    sectors: 2,
                    rings: 2,
                    tags: 4,
                    direct,
                    block_device: false,
                    bad: 0,
                    write_through,
                    elevator: match unknown {
                        0 => Params::None,
                        _ => Params::MqDeadline(Default::default()),
                    },
                    faults: Faults {
                        refused: 0,
                        again: 0,
                        short: 0,
                        // RWF_DSYNC and every way to discard or zero, each time it is tried.
                        unknown,
                        flush_fails: 0,
                    },
                    broken: Broken::Nothing,
                });
            }
        }
    }
    setups
}

#[test]
fn every_order_of_a_few_requests_survives_every_power_cut() {
    let mut seen = BTreeMap::new();
    let (mut runs, mut images) = (0, 0);
    for setup in setups() {
        for script in scripts(&setup) {
            match all_runs(script, setup, &mut seen) {
                Ok((more_runs, more_images)) => {
                    runs += more_runs;
                    images += more_images;
                }
                Err(complaint) => panic!("after a power cut, {complaint} ({setup:?})"),
            }
        }
    }
    println!("{runs} runs, {images} images, {seen:?}");
    assert!(runs > 1000, "{runs} runs");
    for what in [
        "refused",
        "flush failed",
        "write failed",
        "flushed",
        "to write-back",
    ] {
        assert!(seen.contains_key(what), "never: {what}");
    }
}

#[test]
fn a_few_requests_are_enough_to_find_what_is_broken() {
    for broken in [
        Broken::SyncIgnored,
        Broken::DsyncIgnored,
        Broken::FuaDropped,
        Broken::FlushJoinsRunning,
        Broken::FlushSkipped,
        Broken::ToggleWithoutSync,
        Broken::ToggleWithoutDrain,
        Broken::FaultForgotten,
    ] {
        let found = SCRIPTS.iter().any(|script| {
            let mut setups = setups().into_iter();
            setups.any(|setup| {
                let setup = Setup { broken, ..setup };
                all_runs(script, setup, &mut BTreeMap::new()).is_err()
            })
        });
        assert!(found, "{broken:?} was not found");
    }
}
