use proptest::prelude::*;

use super::*;

const MS: u64 = 1_000_000;

#[test]
fn two_overlapping_requests() {
    let mut account = Account::new();
    account.start(10 * MS, Op::Read);
    account.start(12 * MS, Op::Write);
    assert_eq!(account.in_flight(), [1, 1]);
    account.done(15 * MS, Op::Read, 8, 10 * MS);
    account.done(20 * MS, Op::Write, 16, 12 * MS);
    account.merged(Op::Write);
    // Nothing in flight: neither busy nor weighted time goes on.
    assert_eq!(
        account.at(99 * MS).to_string(),
        "1 0 8 5 1 1 16 8 0 10 13 0 0 0 0 0 0"
    );
}

#[test]
fn what_is_in_flight_counts_up_to_now() {
    let mut account = Account::new();
    account.start(0, Op::Flush);
    account.start(0, Op::Discard);
    assert_eq!(account.in_flight(), [0, 2]);
    let stats = account.at(3 * MS);
    assert_eq!(stats.fields()[8..11], [2, 3, 6]);
    // Asking changed nothing.
    assert_eq!(account.at(3 * MS), stats);
    account.done(4 * MS, Op::Discard, 2048, 0);
    account.done(5 * MS, Op::Flush, 0, 0);
    assert_eq!(
        account.at(5 * MS).to_string(),
        "0 0 0 0 0 0 0 0 0 5 9 1 0 2048 4 1 5"
    );
}

#[test]
fn a_started_request_that_merges_leaves_the_flight() {
    let mut account = Account::new();
    account.start(0, Op::Read);
    account.start(MS, Op::Read);
    account.merged_started(3 * MS, Op::Read);
    account.done(4 * MS, Op::Read, 16, 0);
    assert_eq!(
        account.at(4 * MS).to_string(),
        "1 1 16 4 0 0 0 0 0 4 6 0 0 0 0 0 0"
    );
}

#[test]
fn the_line_is_the_kernels() {
    let mut account = Account::new();
    account.start(0, Op::WriteZeroes);
    account.done(MS, Op::WriteZeroes, 8, 0);
    assert_eq!(
        account.at(MS).line(252, 16, "vdb"),
        " 252      16 vdb 0 0 0 0 1 0 8 1 0 1 1 0 0 0 0 0 0"
    );
}

#[test]
fn a_report_has_milliseconds() {
    let mut account = Account::new();
    account.start(0, Op::Read);
    account.done(3 * MS + 999_999, Op::Read, 8, 0);
    let json = serde_json::to_value(account.at(4 * MS)).unwrap();
    assert_eq!(json["reads"]["ms"], 3);
    assert_eq!(json["busy_ms"], 3);
    assert!(json["reads"].get("time_ns").is_none());
}

#[test]
#[should_panic(expected = "Read ended that never started")]
fn an_end_without_a_start_is_our_bug() {
    let mut account = Account::new();
    account.start(0, Op::Write);
    account.done(1, Op::Read, 8, 0);
}

#[derive(Clone, Copy, Debug)]
struct Life {
    op: Op,
    start_ns: u64,
    end_ns: u64,
    sectors: u64,
    merged: bool,
}

fn life() -> impl Strategy<Value = Life> {
    let op = prop::sample::select(vec![
        Op::Read,
        Op::Write,
        Op::Flush,
        Op::Discard,
        Op::WriteZeroes,
    ]);
    (
        op,
        0u64..2000,
        0u64..300,
        0u64..64,
        prop::bool::weighted(0.2),
    )
        .prop_map(|(op, start_ns, length, sectors, merged)| Life {
            op,
            start_ns,
            end_ns: start_ns + length,
            sectors,
            merged,
        })
}

/// The statistics from the whole log, one nanosecond after the other.
fn oracle(lives: &[Life], now_ns: u64) -> DiskStats {
    let mut stats = DiskStats::default();
    let alive = |at: u64| {
        lives
            .iter()
            .filter(|life| life.start_ns <= at && at < life.end_ns)
            .count() as u64
    };
    for at in 0..now_ns {
        stats.busy_ns += u128::from(alive(at) > 0);
        stats.weighted_ns += u128::from(alive(at));
    }
    for life in lives {
        if life.start_ns <= now_ns && now_ns < life.end_ns {
            stats.in_flight += 1;
        }
        if life.end_ns > now_ns {
            continue;
        }
        let group = match life.op {
            Op::Read => &mut stats.reads,
            Op::Write | Op::WriteZeroes => &mut stats.writes,
            Op::Discard => &mut stats.discards,
            Op::Flush => {
                if !life.merged {
                    stats.flushes += 1;
                    stats.flush_ns += u128::from(life.end_ns - life.start_ns);
                }
                continue;
            }
        };
        if life.merged {
            group.merges += 1;
        } else {
            group.ios += 1;
            group.sectors += life.sectors;
            group.time_ns += u128::from(life.end_ns - life.start_ns);
        }
    }
    stats
}

fn replay(lives: &[Life], now_ns: u64) -> DiskStats {
    let mut log: Vec<(u64, bool, usize)> = Vec::new();
    for (index, life) in lives.iter().enumerate() {
        // Starts sort before ends at the same time: a life of no length starts first.
        log.push((life.start_ns, false, index));
        log.push((life.end_ns, true, index));
    }
    log.sort_unstable();
    let mut account = Account::new();
    for (at, ends, index) in log.into_iter().filter(|event| event.0 <= now_ns) {
        let life = lives[index];
        match (ends, life.merged) {
            (false, _) => account.start(at, life.op),
            (true, true) => account.merged_started(at, life.op),
            (true, false) => account.done(at, life.op, life.sectors, life.start_ns),
        }
    }
    account.at(now_ns)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn sums_at_transitions_are_what_the_log_says(
        lives in prop::collection::vec(life(), 0..40),
        now_ns in 0u64..2500,
    ) {
        prop_assert_eq!(replay(&lives, now_ns), oracle(&lives, now_ns));
    }

    /// Two workers share a disk: all but the busy time is as if one had done everything, and that
    /// is at least the disk's and at most the sum of both.
    #[test]
    fn workers_add_up(
        left in prop::collection::vec(life(), 0..20),
        right in prop::collection::vec(life(), 0..20),
    ) {
        let all: Vec<Life> = left.iter().chain(&right).copied().collect();
        let mut sum = replay(&left, 2500);
        sum.add(&replay(&right, 2500));
        let whole = replay(&all, 2500);
        prop_assert!(sum.busy_ns >= whole.busy_ns);
        prop_assert_eq!(DiskStats { busy_ns: whole.busy_ns, ..sum }, whole);
    }
}
