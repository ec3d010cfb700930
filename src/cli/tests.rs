use super::*;
use crate::mq::elevator::Kind;

fn argv(words: &[&str]) -> Vec<OsString> {
    std::iter::once("vhost-user-blkmq")
        .chain(words.iter().copied())
        .map(OsString::from)
        .collect()
}

fn serve(words: &[&str]) -> Arguments {
    match parse(argv(words)).expect("the command line is good") {
        Invocation::Serve(arguments) => *arguments,
        Invocation::Print(text) => panic!("printed {text:?}"),
    }
}

fn usage_error(words: &[&str]) -> String {
    let error = parse(argv(words))
        .expect_err("the command line is bad")
        .to_string();
    assert!(!error.contains('\n'), "more than one line: {error:?}");
    error
}

fn printed(words: &[&str]) -> String {
    match parse(argv(words)).expect("the command line is good") {
        Invocation::Print(text) => text,
        Invocation::Serve(arguments) => panic!("would serve {arguments:?}"),
    }
}

#[test]
fn the_definition_of_the_flags_is_sound() {
    Arguments::command().debug_assert();
    DiskOnly::command().debug_assert();
}

#[test]
fn capabilities_win_over_everything() {
    for words in [
        &["--print-capabilities"][..],
        &["--nonsense", "--print-capabilities", "--num-queues", "many"],
        &["--blk-file", "/missing", "--print-capabilities", "--help"],
        &["--fd=x", "--fd=y", "--print-capabilities"],
    ] {
        assert_eq!(
            printed(words),
            "{\"type\":\"block\",\"features\":[\"read-only\",\"blk-file\"]}\n"
        );
    }
}

#[test]
fn capabilities_are_json() {
    let value: serde_json::Value = serde_json::from_str(CAPABILITIES).expect("JSON");
    assert_eq!(value["type"], "block");
    assert_eq!(
        value["features"],
        serde_json::json!(["read-only", "blk-file"])
    );
}

#[test]
fn nothing_given_leaves_everything_open() {
    let arguments = serve(&[]);
    assert_eq!(arguments.disk, DiskArguments::default());
    assert_eq!(arguments.disks, Vec::new());
    assert_eq!((arguments.poll_us, arguments.workers), (50, None));
    assert_eq!(
        (arguments.log, arguments.summary),
        (LogLevel::Info, SummaryFormat::Text)
    );
}

#[test]
fn every_flag_is_read() {
    let arguments = serve(&[
        "--socket-path=/run/a.sock",
        "--blk-file",
        "a.img",
        "--read-only",
        "--num-queues=256",
        "--queue-size",
        "1024",
        "--workers",
        "3",
        "--vcpus=8",
        "--queue-map=0,0,1,1",
        "--serial",
        "A B",
        "--logical-block-size=4096",
        "--cache",
        "directsync",
        "--engine",
        "io_uring",
        "--size",
        "3M",
        "--discard=ignore",
        "--poll-us",
        "0",
        "--coalesce=50:8",
        "--log",
        "trace",
        "--summary",
        "json",
        "--scheduler=none",
        "--limit=iops=7",
        "--group=g",
        "--group-limit=g,iops=1",
        "--control-path=c.sock",
    ]);
    assert_eq!(
        arguments.groups,
        [parse_group("g,iops=1").expect("a group")]
    );
    assert_eq!(arguments.control_path, Some("c.sock".into()));
    let expected = DiskArguments {
        socket_path: Some("/run/a.sock".into()),
        fd: None,
        blk_file: Some("a.img".into()),
        read_only: Some(Switch::On),
        safety: DiskSafety::default(),
        serial: Some("A B".to_owned()),
        logical_block_size: Some(4096),
        discard: Some(Discard::Off),
        num_queues: Some(256),
        queue_size: Some(1024),
        vcpus: Some(8),
        queue_map: Some(MapKind::Explicit(vec![0, 0, 1, 1])),
        coalesce: Some(Coalesce {
            delay_us: 50,
            count: 8,
        }),
        engine: Some(EngineKind::IoUring),
        size: Some(3 << 20),
        cache: Some(CacheMode::Directsync),
        scheduler: Some(Scheduler::Given(Kind::None.into())),
        limit: Some(parse_limits("iops=7").expect("limits")),
        group: Some("g".to_owned()),
    };
    assert_eq!(arguments.disk, expected);
    assert_eq!((arguments.workers, arguments.poll_us), (Some(3), 0));
    assert_eq!(
        (arguments.log, arguments.summary),
        (LogLevel::Trace, SummaryFormat::Json)
    );
}

#[test]
fn a_disk_has_the_keys_of_the_flags() {
    let arguments = serve(&[
        "--disk",
        "socket-path=/run/a,,b.sock,blk-file=a=b.img,read-only=on,queue-map=0:0:1:1,\
         scheduler=mq-deadline,,fifo_batch=4,limit=iops=5/6:bps=1K",
        "--disk",
        "fd=3,engine=null,size=1G,read-only=off",
        "--disk",
        "read-only",
    ]);
    let [first, second, third] = &arguments.disks[..] else {
        panic!("{:?}", arguments.disks)
    };
    assert_eq!(first.socket_path, Some("/run/a,b.sock".into()));
    assert_eq!(first.blk_file, Some("a=b.img".into()));
    assert_eq!(first.read_only, Some(Switch::On));
    assert_eq!(first.queue_map, Some(MapKind::Explicit(vec![0, 0, 1, 1])));
    assert_eq!(
        first.scheduler,
        Some(parse_scheduler("mq-deadline,fifo_batch=4").expect("a scheduler"))
    );
    assert_eq!(
        first.limit,
        Some(parse_limits("iops=5/6,bps=1K").expect("limits"))
    );
    assert_eq!(
        (second.fd, second.size, second.read_only),
        (Some(3), Some(1 << 30), Some(Switch::Off))
    );
    assert_eq!(third.read_only, Some(Switch::On));
    assert_eq!(arguments.disk, DiskArguments::default());
}

#[test]
fn a_bad_disk_is_told_what_is_wrong_with_it() {
    for (value, part) in [
        (
            "sockt-path=/a",
            "there is no key 'sockt-path'; the keys are socket-path, fd, blk-file",
        ),
        ("blk-file", "the key 'blk-file' has no value"),
        ("workers=3", "there is no key 'workers'"),
        ("", "there is no key ''"),
        ("cache=fast", "invalid value 'fast' for '--cache <MODE>'"),
        ("fd=3,socket-path=/a", "cannot be used with"),
        ("blk-file=a,blk-file=b", "cannot be used multiple times"),
    ] {
        let error = usage_error(&["--disk", value]);
        assert!(error.contains(part), "{value}: {error}");
    }
}

#[test]
fn wrong_values_are_named_with_their_flag() {
    for (words, part) in [
        (
            &["--num-queues", "0"][..],
            "'0' for '--num-queues <N>': 0 is not in 1..=256",
        ),
        (&["--num-queues", "257"], "257 is not in 1..=256"),
        (
            &["--queue-size", "100"],
            "'100' for '--queue-size <N>': use a power of two from 4 to 1024",
        ),
        (&["--queue-size", "2"], "power of two from 4 to 1024"),
        (
            &["--logical-block-size", "8192"],
            "use 512, 1024, 2048 or 4096",
        ),
        (
            &["--serial", "123456789012345678901"],
            "it has 21 bytes, at most 20 fit",
        ),
        (
            &["--serial", "caf\u{e9}"],
            "is not a printable ASCII character",
        ),
        (&["--serial", ""], "--serial"),
        (
            &["--queue-map", "0,x"],
            "use grouping, modulo, or the queue of each vCPU",
        ),
        (&["--size", "1X"], "use a number of bytes"),
        (&["--size", "8388608T"], "larger than the 8 EiB"),
        (&["--size", "99999999999T"], "larger than the 8 EiB"),
        (&["--size", ""], "--size"),
        (
            &["--cache", "fast"],
            "possible values: writeback, none, writethrough, directsync, unsafe",
        ),
        (
            &["--engine", "aio"],
            "possible values: auto, io_uring, mmap, null",
        ),
        (&["--fd", "-1"], "--fd"),
        (&["--fd", "3", "--socket-path", "/a"], "cannot be used with"),
        (&["--num-queue", "3"], "'--num-queue'"),
        (&["--new\nline"], "--new; line"),
        (&["stray"], "'stray'"),
        (
            &["--coalesce", "5:1"],
            "behind the colon give 2 to 1024 requests",
        ),
        (&["--poll-us", "1000001"], "1000001 is not in 0..=1000000"),
    ] {
        let error = usage_error(words);
        assert!(error.contains(part), "{words:?}: {error}");
        assert!(error.ends_with("(see --help)"), "{error}");
    }
}

#[test]
fn sizes_count_in_powers_of_1024() {
    for (text, bytes) in [
        ("512", 512),
        ("1k", 1 << 10),
        ("2M", 2 << 20),
        ("3G", 3 << 30),
        ("4T", 4 << 40),
    ] {
        assert_eq!(parse_size(text), Ok(bytes));
    }
}

#[test]
fn help_and_version_are_printed() {
    let help = printed(&["--help"]);
    for heading in [DISK, GUEST, QUEUES, IO, PROCESS, "Examples"] {
        assert!(
            help.contains(&format!("{heading}:")),
            "no heading {heading:?} in:\n{help}"
        );
    }
    assert!(printed(&["--version"]).starts_with("vhost-user-blkmq "));
}
