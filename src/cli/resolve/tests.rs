use std::ffi::OsString;

use crate::cli::{Invocation, parse};
use crate::config::tuning::{parse_group, parse_limits};
use log::LevelFilter;

use super::*;
use crate::config::*;
use crate::mq::elevator::{KyberParams, Params};
use crate::mq::throttle::Limits;

fn config(words: &[&str]) -> Result<Config, StartError> {
    let argv = std::iter::once("vhost-user-blkmq")
        .chain(words.iter().copied())
        .map(OsString::from);
    match parse(argv).expect("the words themselves are good") {
        Invocation::Serve(arguments) => arguments.resolve(),
        Invocation::Print(text) => panic!("printed {text:?}"),
    }
}

fn good(words: &[&str]) -> Config {
    config(words).unwrap_or_else(|error| panic!("{words:?}: {error}"))
}

#[test]
fn two_flags_are_enough() {
    let config = good(&[
        "--socket-path",
        "/run/a.sock",
        "--blk-file",
        "dir/disk one.img",
    ]);
    let expected = DiskConfig {
        socket: SocketSource::Path("/run/a.sock".into()),
        image: ImageSource::File {
            path: "dir/disk one.img".into(),
        },
        read_only: false,
        engine: EngineKind::Auto,
        lock: LockWhen::Always,
        force_share: false,
        socket_mode: None,
        socket_group: None,
        on_error: OnError::Report,
        io_poll: PollDevice::Auto,
        cache: CacheMode::None,
        discard: true,
        serial: "disk_one.img".to_owned(),
        logical_block_size: 512,
        num_queues: 64,
        queue_size: 128,
        vcpus: None,
        queue_map: MapKind::Grouping,
        coalesce: None,
        scheduler: Scheduler::Auto,
        limits: Limits::default(),
        group: None,
    };
    assert_eq!(config.disks, [expected]);
    assert!(config.workers >= 1);
    assert_eq!(
        (config.poll_us, config.log, config.summary),
        (50, LevelFilter::Info, SummaryFormat::Text)
    );
}

#[test]
fn what_is_said_is_taken() {
    let config = good(&[
        "--fd",
        "3",
        "--engine",
        "null",
        "--size",
        "1M",
        "--read-only",
        "--discard",
        "off",
        "--vcpus",
        "8",
        "--queue-map",
        "modulo",
        "--num-queues",
        "4",
        "--queue-size",
        "256",
        "--workers",
        "2",
        "--log",
        "warn",
        "--serial",
        "S1",
        "--cache",
        "unsafe",
        "--logical-block-size",
        "4096",
        "--scheduler",
        "kyber",
        "--limit",
        "iops=100",
        "--group",
        "g",
        "--group-limit",
        "g,bps=1M",
        "--control-path",
        "/run/c.sock",
    ]);
    let expected = DiskConfig {
        socket: SocketSource::Fd(3),
        image: ImageSource::Null {
            size_bytes: 1 << 20,
        },
        read_only: true,
        engine: EngineKind::Null,
        lock: LockWhen::Always,
        force_share: false,
        socket_mode: None,
        socket_group: None,
        on_error: OnError::Report,
        io_poll: PollDevice::Auto,
        cache: CacheMode::Unsafe,
        discard: false,
        serial: "S1".to_owned(),
        logical_block_size: 4096,
        num_queues: 4,
        queue_size: 256,
        vcpus: Some(8),
        queue_map: MapKind::Modulo,
        coalesce: None,
        scheduler: Scheduler::Given(Params::Kyber(KyberParams::default())),
        limits: parse_limits("iops=100").expect("limits"),
        group: Some("g".to_owned()),
    };
    assert_eq!(config.disks, [expected]);
    assert_eq!((config.workers, config.log), (2, LevelFilter::Warn));
    assert_eq!(config.groups, [parse_group("g,bps=1M").expect("a group")]);
    assert_eq!(config.control_path, Some("/run/c.sock".into()));
}

#[test]
fn groups_and_the_control_socket_are_checked_against_the_disks() {
    let disk = ["--socket-path", "/a", "--blk-file", "a.img"];
    for (more, part) in [
        (
            &["--group", "g"][..],
            "a disk is in the group 'g', which has no limits",
        ),
        (
            &["--group-limit", "g,iops=1", "--group-limit", "g,bps=1"],
            "names the group 'g' twice",
        ),
        (
            &["--control-path", "/a"],
            "is given for a disk and for --control-path",
        ),
    ] {
        let words = [&disk[..], more].concat();
        let error = config(&words).expect_err("a contradiction").to_string();
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn disks_do_not_inherit_from_the_flags() {
    let config = good(&[
        "--socket-path",
        "/a",
        "--blk-file",
        "a.img",
        "--read-only",
        "--num-queues",
        "2",
        "--disk",
        "socket-path=/b,blk-file=b.img",
    ]);
    assert_eq!(config.disks.len(), 2);
    assert_eq!(
        (config.disks[1].read_only, config.disks[1].num_queues),
        (false, 64)
    );
}

#[test]
fn disks_alone_are_enough() {
    let config = good(&[
        "--disk",
        "socket-path=/b,blk-file=b.img",
        "--disk",
        "fd=4,blk-file=b.img",
    ]);
    assert_eq!(config.disks.len(), 2);
    assert_eq!(config.disks[0].socket, SocketSource::Path("/b".into()));
}

#[test]
fn an_explicit_map_says_how_many_vcpus_there_are() {
    let words = [
        "--socket-path",
        "/a",
        "--blk-file",
        "a",
        "--queue-map",
        "0,0,1,1",
    ];
    assert_eq!(good(&words).disks[0].vcpus, Some(4));
    assert_eq!(
        good(&[&words[..], &["--vcpus", "4"]].concat()).disks[0].vcpus,
        Some(4)
    );
}

#[test]
fn a_serial_from_a_file_name_fits_and_is_printable() {
    for (path, serial) in [
        ("/images/a-very-long-file-name.img", "a-very-long-file-nam"),
        ("/images/caf\u{e9}.img", "caf_.img"),
        ("/", "_"),
    ] {
        assert_eq!(
            default_serial(&ImageSource::File { path: path.into() }),
            serial
        );
    }
    assert_eq!(
        default_serial(&ImageSource::Null { size_bytes: 512 }),
        "null"
    );
}

#[test]
fn contradictions_are_told_in_one_line() {
    let image = ["--socket-path", "/a", "--blk-file", "a.img"];
    let null = ["--socket-path", "/a", "--engine", "null"];
    for (base, more, part) in [
        (
            &[][..],
            &[][..],
            "there is no image to serve; give --blk-file PATH",
        ),
        (
            &[],
            &["--blk-file", "a.img"],
            "give --socket-path PATH or --fd N",
        ),
        (&[], &["--socket-path", "/a"], "there is no image"),
        (
            &[],
            &["--socket-path", "/a", "--size", "1G"],
            "--size is only for the null engine",
        ),
        (&image, &["--size", "1G"], "an image has its own size"),
        (
            &image,
            &["--engine", "null"],
            "the null engine has no image, but --blk-file is \"a.img\"",
        ),
        (&null, &[], "give --size 100G"),
        (&null, &["--size", "0"], "--size is 0 bytes"),
        (
            &null,
            &["--size", "1000"],
            "--size is 1000 bytes; give a multiple of the logical block size 512",
        ),
        (
            &null,
            &["--size", "512", "--logical-block-size", "4096"],
            "a multiple of the logical block size 4096",
        ),
        (
            &image,
            &["--queue-map", "0,4", "--num-queues", "4"],
            "--queue-map names queue 4, but the 4 queues",
        ),
        (
            &image,
            &["--queue-map", "0,1", "--vcpus", "3"],
            "--vcpus is 3, but --queue-map lists 2 vCPUs",
        ),
        (
            &image,
            &["--disk", "socket-path=/a,blk-file=b"],
            "the socket \"/a\" is given for two disks",
        ),
        (
            &[],
            &["--disk", "fd=3,blk-file=a", "--disk", "fd=3,blk-file=b"],
            "file descriptor 3 is given for two",
        ),
        (
            &["--read-only"],
            &["--disk", "fd=3,blk-file=a"],
            "there is no image to serve",
        ),
        (
            &image,
            &["--disk", "socket-path=/b"],
            "give blk-file (in --disk number 1) PATH",
        ),
        (
            &[],
            &["--socket-path", "", "--blk-file", "a"],
            "--socket-path",
        ),
        (
            &[],
            &["--socket-path", "/a", "--blk-file", ""],
            "--blk-file",
        ),
    ] {
        let words = [base, more].concat();
        // An empty value may be refused by the parser of the words already.
        if words.contains(&"") {
            continue;
        }
        let error = config(&words).expect_err("contradictory").to_string();
        assert!(error.contains(part), "{words:?}: {error}");
        assert!(
            !error.contains('\n') && error.ends_with("(see --help)"),
            "{error}"
        );
    }
}

#[test]
fn cache_modes_mean_what_they_mean_in_qemu() {
    let table = [
        (CacheMode::Writeback, false, false, false),
        (CacheMode::None, true, false, false),
        (CacheMode::Writethrough, false, true, false),
        (CacheMode::Directsync, true, true, false),
        (CacheMode::Unsafe, false, false, true),
    ];
    for (mode, direct, through, ignores) in table {
        assert_eq!(
            (
                mode.is_direct(),
                mode.is_write_through(),
                mode.ignores_flush()
            ),
            (direct, through, ignores),
            "{mode:?}"
        );
    }
}
