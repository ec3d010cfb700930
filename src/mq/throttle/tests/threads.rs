//! Several threads, one throttle. The clock is theirs: it moves on when they say so.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use super::*;

const THREADS: u64 = 4;

/// Sums what `work` says on each of several threads.
fn hammer(work: impl Fn(u64) -> u64 + Sync) -> u64 {
    thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|index| {
                scope.spawn({
                    let work = &work;
                    move || work(index)
                })
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).sum()
    })
}

/// All threads ask until they are refused, and only then time goes on, to when they are to ask
/// again: none of it is wasted. They get the rate, all of it and no more.
fn together(limits: Limits, size: u64, end: u64) -> u64 {
    let throttle = Throttle::new(limits);
    let clock = AtomicU64::new(0);
    hammer(|_| {
        let mut admitted = 0;
        loop {
            let now = clock.load(Ordering::Acquire);
            if now >= end {
                return admitted;
            }
            match throttle.try_take(now, Op::Read, size) {
                Ok(()) => admitted += 1,
                Err(RetryAt(at)) => {
                    clock.fetch_max(at, Ordering::AcqRel);
                }
            }
        }
    })
}

#[test]
fn threads_share_one_rate_of_operations() {
    let admitted = together(ops(rate(50_000, 100)), 4096, 4 * SECOND);
    // Each may have read the clock just before the end.
    assert!(admitted <= 200_000 + 100 + THREADS, "{admitted}");
    assert!(admitted >= 200_000 + 100 - THREADS, "{admitted}");
}

#[test]
fn threads_share_one_rate_of_bytes() {
    // 2.3 GB/s in requests of 4 kB: 1781 ns each, not a whole number of ticks.
    let admitted = together(bytes(rate(2_300_000_000, 1 << 20)), 4096, SECOND / 4);
    let most = (2_300_000_000 / 4 + (1 << 20)) / 4096 + 1;
    assert!(admitted <= most + THREADS, "{admitted} of {most}");
    assert!(admitted >= most * 99 / 100, "{admitted} of {most}");
}

/// Two disks and their group at a time that stands still: what one disk is refused for the group's
/// sake it gets back, so that in the end exactly what there was has been given out.
#[test]
fn threads_leave_nothing_behind_in_a_bucket_that_refused_together_with_another() {
    for _ in 0..20 {
        let disks = [(); 2].map(|()| Throttle::new(ops(rate(10, 4000))));
        let group = Throttle::new(ops(rate(10, 5000)));
        let refusals = 500;
        let take = |disk: u64| {
            let disk = &disks[usize::try_from(disk % 2).unwrap()];
            disk.try_take_with(&group, 0, Op::Read, 0).is_ok()
        };
        let hammered = hammer(|index| {
            let (mut admitted, mut refused) = (0, 0);
            while refused < refusals {
                match take(index) {
                    true => admitted += 1,
                    false => refused += 1,
                }
            }
            admitted
        });
        // A thread may have seen refusals that were taken back a moment later, and have left early.
        let rest: u64 = (0..2)
            .map(|disk| {
                (0..)
                    .take_while(|_| take(disk))
                    .map(|_: u64| 1)
                    .sum::<u64>()
            })
            .sum();
        assert_eq!(hammered + rest, 5000);
        let charged: u64 = disks.iter().map(|d| d.buckets[2].full_at(0)).sum();
        assert_eq!(charged, group.buckets[2].full_at(0));
    }
}

/// Taken and given back on all threads, at a time that stands still: nothing remains.
#[test]
fn threads_give_back_exactly() {
    let throttle = Throttle::new(bytes(rate(123_456_789, 1 << 30)));
    assert_eq!(throttle.try_take(5, Op::Write, 777), Ok(()));
    let before = throttle.buckets[5].full_at(0);
    hammer(|index| {
        for round in 0..20_000 {
            let size = 1 + index * 512 + round % 4096;
            assert_eq!(throttle.try_take(5, Op::Write, size), Ok(()));
            throttle.refund(Op::Write, size);
        }
        0
    });
    assert_eq!(throttle.buckets[5].full_at(0), before);
}

/// A request that costs 4 µs at one rate and more than an hour at the other, on all threads, while
/// the rate goes back and forth. Were one charged what it costs at the other rate, or only half of a
/// change seen, the debt would be terabytes and never paid, or the limit gone.
#[test]
fn threads_that_take_while_limits_change_are_charged_the_right_price() {
    const FAST: u64 = 1_000_000_000;
    const STEP: u64 = SECOND / 1000;
    const SIZE: u64 = 4096;
    const BURST: u64 = 2_000_000;
    let throttle = Throttle::new(bytes(rate(FAST, BURST)));
    let clock = AtomicU64::new(0);
    let done = AtomicBool::new(false);
    let steps = 2000;
    let admitted = hammer(|index| {
        let mut admitted = 0;
        if index > 0 {
            while !done.load(Ordering::Acquire) {
                let now = clock.load(Ordering::Acquire);
                admitted += u64::from(throttle.try_take(now, Op::Read, SIZE).is_ok());
            }
            return admitted;
        }
        for step in 0..steps {
            let now = step * STEP;
            clock.store(now, Ordering::Release);
            // The others are taking what came since the last step while the rate changes.
            let slow = step % 2 == 0;
            throttle.set_limits(now, bytes(rate(if slow { 1 } else { FAST }, BURST)));
            // Everything there is at this time is taken before it goes on.
            while throttle.try_take(now, Op::Read, SIZE).is_ok() {
                admitted += 1;
            }
        }
        done.store(true, Ordering::Release);
        admitted
    });
    // The rate was fast in every second step, and at the beginning there was the burst.
    let gain = (steps / 2 - 1) * STEP / 1000 * (FAST / 1_000_000);
    let (got, most) = (admitted * SIZE, gain + BURST + SIZE);
    assert!(got <= most + THREADS * SIZE, "{got} of {most}");
    assert!(got >= gain / 100 * 99, "{got} of {most}");
    // And nobody is left with a debt of more than what was just taken.
    let end = steps * STEP;
    match throttle.try_take(end, Op::Read, SIZE) {
        Ok(()) => {}
        Err(RetryAt(at)) => assert!(at - end <= THREADS * SIZE, "{at} at {end}"),
    }
}
