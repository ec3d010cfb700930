use proptest::prelude::*;

use super::*;

mod threads;

const SECOND: u64 = 1_000_000_000;
const US: u64 = 1_000;

fn ops(total: Rate) -> Limits {
    Limits {
        ops: Directions {
            total,
            ..Directions::default()
        },
        ..Limits::default()
    }
}

fn bytes(total: Rate) -> Limits {
    Limits {
        bytes: Directions {
            total,
            ..Directions::default()
        },
        ..Limits::default()
    }
}

fn rate(per_second: u64, burst: u64) -> Rate {
    Rate { per_second, burst }
}

/// Another with the same limits, tokens and debts.
fn copy(throttle: &Throttle) -> Throttle {
    Throttle {
        limited: AtomicU8::new(throttle.limited()),
        buckets: throttle.buckets.each_ref().map(Bucket::copy),
        limits: Mutex::new(throttle.limits()),
    }
}

/// Takes as much as it gets from `from_ns` to `to_ns`, asking again exactly when told to, and says
/// how many requests were admitted.
fn backlog(throttle: &Throttle, from_ns: u64, to_ns: u64, op: Op, bytes: u64) -> u64 {
    let (mut now, mut admitted) = (from_ns, 0);
    while now < to_ns {
        match throttle.try_take(now, op, bytes) {
            Ok(()) => admitted += 1,
            Err(RetryAt(at)) => {
                assert!(at > now);
                now = at;
            }
        }
    }
    admitted
}

#[test]
fn no_limit_admits_all() {
    let throttle = Throttle::default();
    assert!(!throttle.is_limited());
    for _ in 0..1000 {
        assert_eq!(throttle.try_take(0, Op::Write, u64::MAX), Ok(()));
    }
}

#[test]
fn the_burst_comes_at_once_and_then_the_rate() {
    let throttle = Throttle::new(ops(rate(1000, 5)));
    for _ in 0..5 {
        assert_eq!(throttle.try_take(7, Op::Read, 4096), Ok(()));
    }
    let at = RetryAt(7 + SECOND / 1000);
    assert_eq!(throttle.try_take(7, Op::Read, 4096), Err(at));
    assert_eq!(throttle.try_take(at.0 - 1, Op::Read, 4096), Err(at));
    assert_eq!(throttle.try_take(at.0, Op::Read, 4096), Ok(()));
    // However long nothing comes, no more than the burst is saved.
    assert_eq!(
        backlog(&throttle, 9 * SECOND, 9 * SECOND + 1, Op::Read, 0),
        5
    );
}

#[test]
fn the_default_burst_is_a_tenth_of_a_second() {
    let throttle = Throttle::new(ops(Rate::per_second(200)));
    assert_eq!(backlog(&throttle, 1, 2, Op::Read, 0), 20);
    let throttle = Throttle::new(ops(Rate::per_second(3)));
    assert_eq!(backlog(&throttle, 1, 2, Op::Read, 0), 1);
}

#[test]
fn a_request_larger_than_the_bucket_passes_and_owes() {
    let throttle = Throttle::new(bytes(rate(1_000_000, 1000)));
    assert_eq!(throttle.try_take(0, Op::Write, 1_001_000), Ok(()));
    // A second for the million owed, and one microsecond for the byte that admits the next.
    let at = RetryAt(SECOND + US);
    assert_eq!(throttle.try_take(1, Op::Write, 512), Err(at));
    assert_eq!(throttle.try_take(at.0, Op::Write, 512), Ok(()));
}

#[test]
fn each_op_pays_what_it_is() {
    let mut limits = Limits::default();
    limits.ops.write = rate(1, 2);
    limits.bytes.read = rate(1, 4096);
    let throttle = Throttle::new(limits);
    // Flushes are free; a discard takes an operation but no bytes, and reads are not writes.
    for _ in 0..9 {
        assert_eq!(throttle.try_take(0, Op::Flush, 0), Ok(()));
    }
    assert_eq!(throttle.try_take(0, Op::Read, 4096), Ok(()));
    assert_eq!(throttle.try_take(0, Op::Read, 1), Err(RetryAt(SECOND)));
    assert_eq!(throttle.try_take(0, Op::Discard, 1 << 40), Ok(()));
    assert_eq!(throttle.try_take(0, Op::WriteZeroes, 1), Ok(()));
    assert_eq!(throttle.try_take(0, Op::Write, 1), Err(RetryAt(SECOND)));

    let throttle = Throttle::new(bytes(rate(1, 10)));
    assert_eq!(throttle.try_take(0, Op::WriteZeroes, 10), Ok(()));
    assert!(throttle.try_take(0, Op::WriteZeroes, 10).is_err());
    assert_eq!(throttle.try_take(0, Op::Discard, 10), Ok(()));
}

#[test]
fn a_disk_and_its_group_are_charged_together_or_not_at_all() {
    let group = Throttle::new(ops(rate(10, 3)));
    let one = Throttle::new(ops(rate(1000, 2)));
    let two = Throttle::default();
    for _ in 0..2 {
        assert_eq!(one.try_take_with(&group, 0, Op::Read, 0), Ok(()));
    }
    // The disk refuses: the group keeps its token for the other disk.
    assert_eq!(
        one.try_take_with(&group, 0, Op::Read, 0),
        Err(RetryAt(SECOND / 1000))
    );
    assert_eq!(two.try_take_with(&group, 0, Op::Read, 0), Ok(()));
    // Both refuse: the later of the two. Only the group refuses: the disk keeps its token.
    let group_at = RetryAt(SECOND / 10);
    assert_eq!(one.try_take_with(&group, 0, Op::Read, 0), Err(group_at));
    assert_eq!(two.try_take_with(&group, 0, Op::Read, 0), Err(group_at));
    let now = SECOND / 1000;
    assert_eq!(one.try_take_with(&group, now, Op::Read, 0), Err(group_at));
    assert_eq!(one.try_take(now, Op::Read, 0), Ok(()));
}

#[test]
fn disks_of_a_group_share_its_rate_whatever_the_size_of_their_requests() {
    let group = Throttle::new(bytes(rate(100 << 20, 1 << 20)));
    let disks = [Throttle::default(), Throttle::default()];
    let sizes = [4096, 1 << 20];
    let mut admitted = [0u64; 2];
    // Each waits as told; those whose time has come are asked in the order they came to wait.
    let mut waiting = std::collections::VecDeque::from([(0u64, 0usize), (0, 1)]);
    let mut now = 0;
    while now < 10 * SECOND {
        waiting.make_contiguous().sort_by_key(|wait| wait.0);
        let (at, disk) = waiting.pop_front().unwrap();
        now = now.max(at);
        match disks[disk].try_take_with(&group, now, Op::Read, sizes[disk]) {
            Ok(()) => {
                admitted[disk] += 1;
                waiting.push_back((now, disk));
            }
            Err(RetryAt(at)) => waiting.push_back((at, disk)),
        }
    }
    // In turns: neither is kept out by the other.
    assert!(admitted[1] > 900, "{admitted:?}");
    assert!(admitted[0] >= admitted[1], "{admitted:?}");
}

#[test]
fn changing_limits_back_and_forth_makes_no_burst() {
    let throttle = Throttle::new(ops(rate(10, 100)));
    assert_eq!(backlog(&throttle, 0, 1, Op::Read, 0), 100);
    for step in 1..=1000 {
        throttle.set_limits(step, ops(rate(10 + step % 2, 50 + step % 50)));
        assert!(throttle.try_take(step, Op::Read, 0).is_err());
    }
    // A limit that was not there begins with nothing saved.
    throttle.set_limits(2000, Limits::default());
    throttle.set_limits(2000, ops(rate(10, 100)));
    assert_eq!(
        throttle.try_take(2000, Op::Read, 0),
        Err(RetryAt(2000 + SECOND / 10))
    );
}

#[test]
fn a_higher_rate_helps_those_who_wait() {
    let throttle = Throttle::new(ops(rate(1, 1)));
    assert_eq!(throttle.try_take(0, Op::Read, 0), Ok(()));
    assert_eq!(throttle.try_take(0, Op::Read, 0), Err(RetryAt(SECOND)));
    throttle.set_limits(SECOND / 2, ops(rate(1000, 1)));
    assert_eq!(
        throttle.try_take(SECOND / 2, Op::Read, 0),
        Err(RetryAt(SECOND / 2 + SECOND / 2000))
    );
}

#[test]
fn extreme_numbers_neither_overflow_nor_panic() {
    let most = rate(u64::MAX, u64::MAX);
    let throttle = Throttle::new(bytes(most));
    for now in [0, 1, u64::MAX, 0, u64::MAX] {
        let _ = throttle.try_take(now, Op::Write, u64::MAX);
        throttle.set_limits(now, bytes(rate(1, 1)));
        let _ = throttle.try_take(now, Op::Write, u64::MAX);
        throttle.refund(Op::Write, u64::MAX);
        throttle.set_limits(now, bytes(most));
    }
    let throttle = Throttle::new(bytes(rate(1, 1)));
    assert_eq!(throttle.try_take(0, Op::Write, u64::MAX), Ok(()));
    assert_eq!(throttle.try_take(0, Op::Write, 1), Err(RetryAt(u64::MAX)));
}

#[test]
fn limits_are_read_from_a_report() {
    let json = r#"{"ops": {"total": {"per_second": 100}}, "bytes": {"write": {"per_second": 5, "burst": 9}}}"#;
    let limits: Limits = serde_json::from_str(json).unwrap();
    assert_eq!(limits.ops.total, Rate::per_second(100));
    assert_eq!(limits.bytes.write, rate(5, 9));
    assert!(serde_json::from_str::<Limits>(r#"{"iops": {}}"#).is_err());
    let json = serde_json::to_string(&limits).unwrap();
    assert_eq!(serde_json::from_str::<Limits>(&json).unwrap(), limits);
}

fn any_rate() -> impl Strategy<Value = Rate> {
    prop_oneof![
        1 => Just(Rate::default()),
        3 => (1u64..2_000_000, 0u64..100_000).prop_map(|(per_second, burst)| rate(per_second, burst)),
    ]
}

fn any_limits() -> impl Strategy<Value = Limits> {
    prop::array::uniform6(any_rate()).prop_map(|[a, b, c, d, e, f]| Limits {
        ops: Directions {
            read: a,
            write: b,
            total: c,
        },
        bytes: Directions {
            read: d,
            write: e,
            total: f,
        },
    })
}

fn any_op() -> impl Strategy<Value = Op> {
    prop::sample::select(vec![
        Op::Read,
        Op::Write,
        Op::Flush,
        Op::Discard,
        Op::WriteZeroes,
    ])
}

/// A request after a pause in nanoseconds.
fn any_request() -> impl Strategy<Value = (u64, Op, u64)> {
    let pause = prop_oneof![Just(0), 0..SECOND / 1000, 0..SECOND];
    (pause, any_op(), 0u64..300_000)
}

/// What each of the six buckets is asked for by a request, written down independently.
fn demand(op: Op, bytes: u64) -> [u64; 6] {
    match op {
        Op::Read => [1, 0, 1, bytes, 0, bytes],
        Op::Write | Op::WriteZeroes => [0, 1, 1, 0, bytes, bytes],
        Op::Discard => [0, 1, 1, 0, 0, 0],
        Op::Flush => [0; 6],
    }
}

proptest! {
    /// Between any two admissions, both included, no bucket let through more than its rate, its
    /// burst and one request.
    #[test]
    fn no_window_gets_more_than_its_share(
        limits in any_limits(),
        requests in prop::collection::vec(any_request(), 1..120),
    ) {
        let throttle = Throttle::new(limits);
        let (mut now, mut log) = (0, Vec::new());
        for (pause, op, bytes) in requests {
            now += pause;
            if throttle.try_take(now, op, bytes).is_ok() {
                log.push((now, demand(op, bytes)));
            }
        }
        let Limits { ops, bytes } = limits;
        let rates = [ops.read, ops.write, ops.total, bytes.read, bytes.write, bytes.total];
        for (bucket, rate) in rates.into_iter().enumerate() {
            if rate.per_second == 0 {
                continue;
            }
            for first in 0..log.len() {
                let (mut sum, mut largest) = (0u128, 0u128);
                for last in first..log.len() {
                    let tokens = u128::from(log[last].1[bucket]);
                    sum += tokens;
                    largest = largest.max(tokens);
                    let window = u128::from(log[last].0 - log[first].0);
                    let gain = window * u128::from(rate.per_second) / u128::from(SECOND);
                    let most = gain + u128::from(rate.burst()) + largest;
                    prop_assert!(sum <= most, "bucket {}: {} > {}", bucket, sum, most);
                }
            }
        }
    }

    /// With rates and bursts that change, what is admitted since the beginning is at most the
    /// largest burst, what the rates gave, and one request.
    #[test]
    fn changes_never_add_to_the_sum(
        steps in prop::collection::vec(
            (1u64..1_000_000, 1u64..10_000, any_request()), 1..200),
    ) {
        let first = steps[0];
        let mut current = rate(first.0, first.1);
        let throttle = Throttle::new(bytes(current));
        let (mut now, mut sum, mut gain, mut largest) = (0, 0u128, 0u128, 0u128);
        for (per_second, burst, (pause, _, size)) in steps {
            now += pause;
            gain += u128::from(pause) * u128::from(current.per_second);
            current = rate(per_second, burst);
            throttle.set_limits(now, bytes(current));
            if throttle.try_take(now, Op::Read, size).is_ok() {
                sum += u128::from(size);
                largest = largest.max(u128::from(size));
            }
        }
        let most = gain / u128::from(SECOND) + u128::from(first.1) + largest;
        prop_assert!(sum <= most, "{} > {}", sum, most);
    }

    /// A stream that always asks when told gets its rate.
    #[test]
    fn a_backlog_gets_its_rate(per_second in 100u64..10_000_000, size in 1u64..100_000) {
        let throttle = Throttle::new(bytes(rate(per_second, 1)));
        // Long enough for a thousand requests.
        let window = u64::try_from(u128::from(size) * 1000 * u128::from(SECOND) / u128::from(per_second)).unwrap();
        let got = backlog(&throttle, 0, window, Op::Write, size) * size;
        prop_assert!(got >= size * 990, "{} of {}", got, size * 1000);
        prop_assert!(got <= size * 1002);
    }

    /// The time a refusal names is the first at which the same request is admitted.
    #[test]
    fn the_time_to_retry_is_exact(
        disk in any_limits(),
        group in any_limits(),
        requests in prop::collection::vec(any_request(), 1..60),
    ) {
        let (disk, group) = (Throttle::new(disk), Throttle::new(group));
        let mut now = 0;
        for (pause, op, bytes) in requests {
            now += pause;
            if let Err(RetryAt(at)) = disk.try_take_with(&group, now, op, bytes) {
                prop_assert!(at > now);
                for early in [now, at.saturating_sub(US).max(now), at - 1] {
                    let copies = (copy(&disk), copy(&group));
                    prop_assert_eq!(
                        copies.0.try_take_with(&copies.1, early, op, bytes),
                        Err(RetryAt(at))
                    );
                }
                prop_assert_eq!(disk.try_take_with(&group, at, op, bytes), Ok(()));
                now = at;
            }
        }
    }

    /// A request that is refunded, however much later, leaves no trace: a twin that never saw it
    /// is in the same state.
    #[test]
    fn a_refund_restores_exactly(
        limits in any_limits(),
        before in prop::collection::vec(any_request(), 0..30),
        (pause, op, bytes) in any_request(),
        later in any_request(),
    ) {
        let throttle = Throttle::new(limits);
        let mut now = 0;
        for (pause, op, bytes) in before {
            now += pause;
            let _ = throttle.try_take(now, op, bytes);
        }
        now += pause;
        let twin = copy(&throttle);
        if throttle.try_take(now, op, bytes).is_ok() {
            // Time passes, and something else asks, before the refund comes.
            now += later.0;
            let _ = throttle.check(throttle.limited(), ticks(now), Price::of(Op::Write, 1).unwrap());
            throttle.refund(op, bytes);
        }
        for (left, right) in throttle.buckets.iter().zip(&twin.buckets) {
            prop_assert_eq!(left.full_at(ticks(now)), right.full_at(ticks(now)));
        }
    }
}
