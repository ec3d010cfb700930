//! Numbers and texts at the ends of what a client of the control socket can send: each is taken or refused, and the
//! disk goes on.

use serde_json::{Value, json};
use vhost_user_blkmq::control::client::{ClientError, ask};

use super::support::*;

const NUMBERS: [u64; 10] = [
    0,
    1,
    u16::MAX as u64,
    i32::MAX as u64,
    u32::MAX as u64,
    1 << 32,
    i64::MAX as u64,
    1 << 63,
    u64::MAX - 511,
    u64::MAX,
];

#[test]
fn extreme_values_from_a_client_are_taken_or_refused() {
    let dir = tempfile::tempdir().expect("a directory");
    let socket = dir.path().join("control");
    let path = socket.to_str().expect("text");
    let spec = Spec::null(1 << 20).args(["--control-path", path, "--group-limit", "g,iops=1G"]);
    let mut daemon = Daemon::start_ours(&spec);
    let mut disk = Disk::attach(daemon.socket(), 2);
    let send = |method: &str, path: &str, body: &Value| match ask(&socket, method, path, Some(body))
    {
        Ok(_) | Err(ClientError::Refused(_)) => {}
        Err(error) => panic!("{method} {path} {body}: {error}"),
    };
    let change = |body: Value| send("PATCH", "/v1/disks/@0", &body);
    let mut works = |what: &str| {
        for queue in 0..2 {
            for sector in [0, 8, 16] {
                disk.write(queue, sector, &[1; 4096]);
                disk.read(queue, sector, 4096);
            }
        }
        assert!(daemon.is_running(), "{what}");
    };
    let params: [(&str, &[&str]); 2] = [
        (
            "mq-deadline",
            &[
                "read_expire",
                "write_expire",
                "writes_starved",
                "fifo_batch",
                "front_merges",
                "prio_aging_expire",
                "async_depth",
            ],
        ),
        ("kyber", &["read_lat_nsec", "write_lat_nsec"]),
    ];
    for (scheduler, names) in params {
        for name in names {
            for number in NUMBERS {
                change(json!({ "scheduler": scheduler, "scheduler_params": { *name: number } }));
                works(name);
            }
        }
    }
    change(json!({ "scheduler": "none" }));
    // Small rates do what they say, which takes its time.
    let large = NUMBERS.iter().filter(|number| **number > 1 << 20);
    for limit in ["iops", "iops-rd", "bps", "bps-wr"] {
        for rate in large.clone() {
            for burst in NUMBERS {
                let limits = json!({ limit: { "rate": rate, "burst": burst } });
                change(json!({ "limits": limits }));
                send("PUT", "/v1/groups/g", &json!({ "limits": limits }));
            }
            works(limit);
        }
        change(json!({ "limits": { limit: null } }));
    }
    for events in NUMBERS {
        send("POST", "/v1/trace", &json!({ "events": events }));
    }
    works("a trace");
    send("DELETE", "/v1/trace", &Value::Null);
    for path in [
        "/v1/disks/%",
        "/v1/disks/%ff",
        "/v1/disks/@99999999999999999999",
        "/v1/groups/%00",
    ] {
        send("PATCH", path, &json!({}));
    }
    let deep = "[".repeat(10_000);
    send("PATCH", "/v1/disks/@0", &Value::String(deep));
    // Last, because a disk does not shrink.
    for size in NUMBERS {
        send(
            "POST",
            "/v1/disks/@0/resize",
            &json!({ "size_bytes": size }),
        );
        works("a size");
    }
    drop(disk);
    daemon.stop();
}
