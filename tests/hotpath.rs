//! What a request costs, in instructions, held against a table: a change that makes the hot path longer
//! does not pass unseen.
//!
//! benches/hotpath.rs drives a request from the available ring to the used ring, in a release build and
//! without a system call, and valgrind counts. Two runs of different length cancel what starting costs.
//! Counts are the same each time on one machine and compiler; another compiler changes them by a few
//! per cent, which is what [`MARGIN`] is for.
//!
//! To set the table anew, after a change that is meant, or another compiler:
//!
//!     cargo nextest run --test hotpath --no-capture
//!
//! prints what it measured in the table's own form.

use std::process::Command;

/// Instructions a request, as measured (rustc 1.95, x86-64).
const TABLE: &[(&str, f64)] = &[
    ("read-qd32", 964.4),
    ("write-qd32", 973.4),
    ("read-qd1", 1785.0),
    ("merged-qd32", 655.8),
    ("read-qd32-64-regions", 966.3),
    ("read-qd32-509-regions", 967.3),
    ("read-qd32-64-regions-scattered", 1058.3),
    ("read-qd32-509-regions-scattered", 1089.3),
    ("deadline-qd32", 2191.7),
    ("read-qd32-unrecorded", 944.5),
    ("read-qd1-unrecorded", 1615.0),
];

/// How much more is taken for the same.
const MARGIN: f64 = 1.05;

/// Batches of the two runs; the difference is what is counted.
const BATCHES: [u64; 2] = [100, 600];

/// Builds the program as it is measured.
fn build() -> String {
    let output = Command::new(env!("CARGO"))
        .args(["build", "--locked", "--release", "--bench", "hotpath"])
        .args(["--message-format", "json"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo can be run");
    let text = String::from_utf8_lossy(&output.stdout);
    let program = text
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter(|message| message["target"]["name"] == "hotpath")
        .find_map(|message| Some(message["executable"].as_str()?.to_owned()));
    program.unwrap_or_else(|| {
        panic!(
            "the program was not built:\n{}",
            String::from_utf8_lossy(&output.stderr)
        )
    })
}

/// All instructions of a run.
fn instructions(program: &str, workload: &str, batches: u64) -> u64 {
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .args([program, workload, &batches.to_string()])
        .output()
        .expect("valgrind is installed, which qemu/prepare does");
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{workload}:\n{text}");
    let collected = text
        .lines()
        .find_map(|line| line.split_once("Collected : "));
    let (_, count) = collected.unwrap_or_else(|| panic!("{workload}: no count in\n{text}"));
    count.trim().parse().expect("a number")
}

fn per_request(program: &str, workload: &str) -> f64 {
    let [few, many] = BATCHES.map(|batches| instructions(program, workload, batches));
    let batch = if workload.contains("qd32") { 32 } else { 1 };
    let requests = (BATCHES[1] - BATCHES[0]) * batch;
    (many - few) as f64 / requests as f64
}

#[test]
#[cfg_attr(not(target_arch = "x86_64"), ignore = "the table is for x86-64")]
fn a_request_costs_no_more_instructions_than_the_table_says() {
    let program = build();
    let measured: Vec<f64> = TABLE
        .iter()
        .map(|(workload, _)| per_request(&program, workload))
        .collect();
    let mut longer = Vec::new();
    for ((workload, expected), measured) in TABLE.iter().zip(&measured) {
        let ratio = measured / expected;
        println!("    (\"{workload}\", {measured:.1}), // {ratio:.3} of the table");
        if ratio > MARGIN {
            longer.push(format!("{workload}: {measured:.1} instead of {expected}"));
        }
    }
    assert!(longer.is_empty(), "the hot path got longer: {longer:#?}");

    // Where the last request's region is looked at first, it does not matter how many there are.
    let of = |name: &str| {
        let at = TABLE.iter().position(|(workload, _)| *workload == name);
        measured[at.expect("a row of the table")]
    };
    let one = of("read-qd32");
    assert!(of("read-qd32-509-regions") < one * 1.02);
    // And where each request goes to another region, finding it takes a short search.
    assert!(of("read-qd32-509-regions-scattered") < one + 250.0);

    // And so much is recording.
    assert!(one < of("read-qd32-unrecorded") * 1.03);
}
