use std::collections::VecDeque;

use proptest::prelude::*;

use super::super::request::{IoPrio, Op};
use super::event::priority;
use super::*;

fn write(sector: u64, bytes: u64) -> Request {
    Request {
        op: Op::Write,
        sector: Sector(sector),
        bytes,
        segments: 1,
        ioprio: IoPrio(0),
        fua: false,
        unmap: false,
    }
}

fn lines(trace: &Trace) -> Vec<String> {
    trace.iter().map(Event::to_string).collect()
}

#[test]
fn an_event_takes_half_a_cache_line() {
    assert!(size_of::<Event>() <= 32, "{} bytes", size_of::<Event>());
}

#[test]
fn lines_have_blkparses_columns() {
    let mut trace = Trace::new();
    trace.start(16, &Action::ALL);
    let (hctx, tag) = (HctxId(3), RequestTag(42));
    let plain = write(2048, 4096);
    let durable = Request {
        fua: true,
        ioprio: IoPrio(2 << 13 | 4),
        ..plain
    };
    let flush = Request {
        op: Op::Flush,
        sector: Sector(0),
        bytes: 0,
        ..plain
    };
    trace.plugged(1_000_000_001, hctx);
    trace.request(1_000_000_001, Action::Queued, hctx, tag, &plain);
    trace.request(1_000_000_002, Action::Issued, hctx, tag, &durable);
    trace.unplugged(1_000_000_003, hctx, 2);
    trace.request(1_000_000_004, Action::Queued, hctx, RequestTag(7), &flush);
    trace.completed(12_000_000_000, hctx, tag, &durable, Status::IoErr);
    assert_eq!(
        lines(&trace),
        [
            "   3      1.000000001     -  P",
            "   3      1.000000001    42  Q  W  2048 + 8",
            "   3      1.000000002    42  D  WF 2048 + 8 [be/4]",
            "   3      1.000000003     -  U    [2]",
            "   3      1.000000004     7  Q  F  0 + 0",
            "   3     12.000000000    42  C  WF 2048 + 8 [be/4] [ioerr]",
        ]
    );
}

#[test]
fn priorities_are_spelled_as_by_ionice() {
    let spelled = |prio| priority(IoPrio(prio));
    assert_eq!(spelled(0), None);
    assert_eq!(spelled(1 << 13).as_deref(), Some("rt/0"));
    assert_eq!(spelled(2 << 13 | 7).as_deref(), Some("be/7"));
    // The hint bits above the level (IOPRIO_HINT_SHIFT) are no part of it.
    assert_eq!(spelled(2 << 13 | 1 << 3 | 7).as_deref(), Some("be/7"));
    assert_eq!(spelled(3 << 13).as_deref(), Some("idle"));
    assert_eq!(spelled(u16::MAX).as_deref(), Some("class 7/7"));
}

#[test]
fn letters_are_distinct_and_known() {
    let letters: String = Action::ALL.iter().map(|action| action.letter()).collect();
    assert_eq!(letters, "QGMFIDRCPUX");
    for action in Action::ALL {
        assert_eq!(Action::of_letter(action.letter()), Some(action));
        assert_eq!(Action::ALL[action as usize], action);
    }
    assert_eq!(Action::of_letter('S'), None);
}

#[test]
fn nothing_is_recorded_before_the_start_after_the_stop_or_unasked() {
    let mut trace = Trace::new();
    let (hctx, tag) = (HctxId(0), RequestTag(0));
    assert!(!trace.is_on());
    trace.request(1, Action::Queued, hctx, tag, &write(0, 512));
    assert!(trace.is_empty());
    assert_eq!(trace.lost(), 0);
    trace.start(4, &[Action::Issued, Action::Completed]);
    assert!(trace.is_on());
    trace.plugged(1, hctx);
    trace.unplugged(1, hctx, 1);
    trace.request(1, Action::Queued, hctx, tag, &write(0, 512));
    trace.request(2, Action::Issued, hctx, tag, &write(0, 512));
    trace.completed(3, hctx, tag, &write(0, 512), Status::Ok);
    trace.stop();
    trace.completed(4, hctx, tag, &write(0, 512), Status::Ok);
    let times: Vec<u64> = trace.iter().map(|event| event.time_ns).collect();
    assert_eq!(times, [2, 3]);
}

#[test]
fn a_new_start_forgets() {
    let mut trace = Trace::new();
    trace.start(1, &Action::ALL);
    trace.plugged(1, HctxId(0));
    trace.plugged(2, HctxId(0));
    assert_eq!((trace.len(), trace.lost()), (1, 1));
    trace.start(1, &Action::ALL);
    assert_eq!((trace.len(), trace.lost()), (0, 0));
}

#[test]
fn a_huge_discard_shows_the_most_that_fits() {
    let mut trace = Trace::new();
    trace.start(1, &Action::ALL);
    let huge = write(0, u64::MAX);
    trace.request(0, Action::Queued, HctxId(0), RequestTag(0), &huge);
    assert!(lines(&trace)[0].ends_with("W  0 + 4294967295"));
}

#[test]
fn a_report_spells_events_out() {
    let mut trace = Trace::new();
    trace.start(2, &Action::ALL);
    trace.unplugged(5, HctxId(1), 3);
    trace.completed(6, HctxId(1), RequestTag(9), &write(8, 512), Status::Ok);
    let events: Vec<&Event> = trace.iter().collect();
    assert_eq!(
        serde_json::to_value(events).unwrap(),
        serde_json::json!([
            {"time_ns": 5, "hctx": 1, "action": "U", "count": 3},
            {"time_ns": 6, "hctx": 1, "action": "C", "tag": 9, "rwbs": "W", "sector": 8,
             "sectors": 1, "ioprio": 0, "status": "ok"},
        ])
    );
}

proptest! {
    /// Against a queue that drops its oldest.
    #[test]
    fn the_ring_keeps_the_newest_in_order_and_counts_the_rest(
        size in 1usize..20,
        steps in prop::collection::vec(prop::bool::weighted(0.9), 0..200),
    ) {
        let mut trace = Trace::new();
        trace.start(size, &Action::ALL);
        let (mut kept, mut lost) = (VecDeque::new(), 0);
        let (mut taken, mut expected) = (Vec::new(), Vec::new());
        for (time, record) in steps.into_iter().enumerate() {
            if record {
                trace.plugged(time as u64, HctxId(0));
                kept.push_back(time as u64);
                if kept.len() > size.next_power_of_two() {
                    kept.pop_front();
                    lost += 1;
                }
            } else {
                trace.take(&mut taken);
                expected.extend(kept.drain(..));
                prop_assert!(trace.is_empty());
            }
            prop_assert_eq!(trace.len(), kept.len());
            prop_assert_eq!(trace.lost(), lost);
            prop_assert!(trace.iter().map(|event| event.time_ns).eq(kept.iter().copied()));
        }
        prop_assert!(taken.iter().map(|event| event.time_ns).eq(expected));
    }
}
