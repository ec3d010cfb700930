//! fio on the same image without a back end: what the disk and the kernel can do.

use crate::cli::Pin;
use crate::sample::Sample;
use crate::usage::{Machine, Usage};
use crate::workload::Workload;
use serde_json::Value;
use std::path::Path;
use std::process::{Command, Stdio};

/// Runs fio once with the workload's figures, on one thread.
///
/// # Errors
///
/// fio failed, or says something unexpected.
pub fn measure(image: &Path, workload: &Workload, pin: Option<&Pin>) -> Result<Sample, String> {
    let (rw, reads) = workload.pattern.fio();
    let depth = workload.depth * workload.queues;
    let mut command = Command::new("fio");
    command
        .args([
            "--name=limit",
            "--output-format=json",
            "--thread",
            "--direct=1",
        ])
        .args([
            "--ioengine=io_uring",
            "--time_based",
            "--randrepeat=0",
            "--norandommap",
        ])
        .arg(format!("--filename={}", image.display()))
        .args([format!("--rw={rw}"), format!("--rwmixread={reads}")])
        .args([
            format!("--bs={}", workload.block),
            format!("--iodepth={depth}"),
        ])
        .arg(format!("--runtime={}ms", workload.runtime.as_millis()))
        .arg(format!("--ramp_time={}ms", workload.warm_up.as_millis()));
    if let Some(pin) = pin {
        let cpus: Vec<String> = pin.back.iter().map(usize::to_string).collect();
        command.arg(format!("--cpus_allowed={}", cpus.join(",")));
    }
    let (before, own_before) = (Machine::now(), Usage::of("self"));
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("fio: {error}"))?;
    let others = Machine::now();
    let own = Usage::of("self").since(&own_before);
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(format!("fio: {}", said.trim()));
    }
    let text = String::from_utf8_lossy(&output.stdout);
    // Notes may stand before the document.
    let json = text.find('{').map_or("", |at| &text[at..]);
    let all: Value =
        serde_json::from_str(json).map_err(|error| format!("fio's answer: {error}"))?;
    let job = &all["jobs"][0];
    let number = |value: &Value| value.as_f64().unwrap_or(0.0);
    let both = |name: &str| number(&job["read"][name]) + number(&job["write"][name]);
    let iops = both("iops");
    if iops <= 0.0 {
        return Err("fio did nothing".to_owned());
    }
    let main = if reads >= 50 { "read" } else { "write" };
    let us = |share: &str| number(&job[main]["clat_ns"]["percentile"][share]) / 1000.0;
    let busy = (number(&job["usr_cpu"]) + number(&job["sys_cpu"])) / 100.0;
    Ok(Sample {
        iops,
        mib: iops * workload.block as f64 / f64::from(1 << 20),
        p50: us("50.000000"),
        p99: us("99.000000"),
        p999: us("99.900000"),
        cpu: busy * 1e6 / iops,
        others: others.others(&before, own.user_ns + own.children_ns),
        line: None,
        ..Sample::default()
    })
}
