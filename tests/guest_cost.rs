//! How many signals a guest's request takes, of the guest to the daemon (kicks) and back (calls). Measurements, not
//! tests: `docs/PERFORMANCE.md` has the figures. Each job has a guest and a daemon of its own, whose counts at its end
//! are the job's and, with a few hundred requests, those of the boot.
//!
//! `BLKMQ_DAEMON=PATH` measures another build of the daemon, `BLKMQ_JOB=NAME` one job alone, `BLKMQ_DIR=PATH` with an
//! image in another directory than `/dev/shm`.

mod guest_support;

use guest_support::{Daemon, Disk, Guest, MIB};

/// Its name, jobs, and depth of each.
type Job = (&'static str, u32, u32);

/// Four CPUs and four queues; the jobs are on one CPU each.
const QEMU: [Job; 3] = [
    ("qemu-depth-1", 1, 1),
    ("qemu-depth-32", 1, 32),
    ("qemu-4-jobs", 4, 32),
];
/// One CPU and one queue.
const UML: [Job; 2] = [("uml-depth-1", 1, 1), ("uml-depth-32", 1, 32)];

/// Random reads of 4 KiB.
fn measure((name, jobs, depth): Job, guest: Guest) {
    if std::env::var("BLKMQ_JOB").is_ok_and(|only| only != name) {
        return;
    }
    let dir = std::env::var("BLKMQ_DIR").unwrap_or("/dev/shm".to_owned());
    let disk = Disk::new_in(dir, 64 * MIB);
    disk.fill();
    let last = jobs - 1;
    let daemon = Daemon::start(&disk, &[]);
    let out = guest.disk(&disk).run(&format!(
        r#"
        fio --name=cost --filename=/dev/vda --direct=1 --ioengine=libaio --iodepth={depth} --rw=randread --bs=4k \
            --number_ios=16000 --size=62m --numjobs={jobs} --cpus_allowed=0-{last} --cpus_allowed_policy=split \
            --group_reporting --minimal --terse-version=3 >/tmp/out 2>&1 || {{ cat /tmp/out; exit 1; }}
        awk -F';' '$1 == 3 {{ print "@@iops", $8 }}' /tmp/out
        "#
    ));
    let summary = daemon.stop();
    summary.assert_no_errors();
    let requests = summary.sum("read");
    let each = |counter| summary.sum(counter) as f64 / requests as f64;
    println!(
        "| {name} | {requests} | {} | {:.3} | {:.3} |",
        out.value("@@iops"),
        each("kicks"),
        each("calls")
    );
}

#[test]
#[ignore = "measures for a minute; run it alone, with --nocapture"]
fn signals_of_a_guest() {
    println!(
        "| job | requests | IOPS | kicks a request | calls a request |\n|---|---|---|---|---|"
    );
    for job in QEMU {
        measure(job, Guest::qemu(4, 4));
    }
    for job in UML {
        measure(job, Guest::uml());
    }
}
