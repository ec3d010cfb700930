//! Merging against a slow oracle that keeps lists of requests and follows the stated rules word by
//! word.

use proptest::prelude::*;

use super::*;

/// Requests that travel as one.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Group {
    request: Request,
    parts: Vec<u32>,
    ctx: u16,
}

/// The newest `lookback` of `list` are looked at, newest first; a neighbour that may not be merged
/// with ends the search. What is merged keeps the place of the older one.
fn add(list: &mut Vec<Group>, late: Group, lookback: usize) {
    let fits = |early: &Request, late: &Request| {
        early.op == late.op
            && matches!(early.op, Op::Read | Op::Write)
            && early.ioprio == late.ioprio
            && !(early.fua || late.fua)
            && early.bytes + late.bytes <= 1024 * 1024
            && early.segments + late.segments <= 1024
    };
    let mergeable = matches!(late.request.op, Op::Read | Op::Write | Op::Discard);
    let candidate = mergeable && !late.request.fua;
    let newest = list.iter_mut().rev().take(lookback);
    for early in newest.filter(|_| candidate) {
        // Discards need not touch: each brings its ranges, 32 at most in one request.
        if early.request.op == Op::Discard && late.request.op == Op::Discard {
            if early.request.ioprio != late.request.ioprio
                || early.request.fua
                || early.request.segments + late.request.segments > 32
            {
                continue;
            }
            early.request.bytes += late.request.bytes;
            early.request.segments += late.request.segments;
            early.parts.extend(late.parts);
            return;
        }
        let back = early.request.end() == late.request.sector;
        let front = late.request.end() == early.request.sector;
        if !back && !front {
            continue;
        }
        if !fits(&early.request, &late.request) {
            break;
        }
        early.request.bytes += late.request.bytes;
        early.request.segments += late.request.segments;
        if back {
            early.parts.extend(late.parts);
        } else {
            early.request.sector = late.request.sector;
            early.parts.splice(..0, late.parts);
        }
        return;
    }
    list.push(late);
}

/// What is dispatched, in order, of drains that came while nothing went out.
fn oracle(drains: &[Vec<Request>], ctxs: u16) -> Vec<Group> {
    let of = hctx::ctx::Ctxs::new(ctxs);
    let mut staged = vec![Vec::new(); usize::from(ctxs)];
    let mut tag = 0;
    for drain in drains {
        let mut plug: Vec<Group> = Vec::new();
        let mut flush = |plug: &mut Vec<Group>| {
            for group in plug.drain(..) {
                add(&mut staged[usize::from(group.ctx)], group, 8);
            }
        };
        for request in drain {
            let late = Group {
                request: *request,
                parts: vec![tag],
                ctx: of.of(request).0,
            };
            tag += 1;
            let before = plug.clone();
            add(&mut plug, late.clone(), 1);
            let large = before
                .last()
                .is_some_and(|newest| newest.request.bytes >= 128 * 1024);
            if plug.len() > before.len() && (before.len() >= 32 || large) {
                plug = before;
                flush(&mut plug);
                plug.push(late);
            }
        }
        flush(&mut plug);
    }
    staged.concat()
}

fn any_request() -> impl Strategy<Value = Request> {
    let op = prop_oneof![
        8 => Just(Op::Read),
        4 => Just(Op::Write),
        3 => Just(Op::Discard),
        1 => Just(Op::WriteZeroes),
    ];
    let sectors = prop_oneof![12 => 1u64..4, 1 => Just(256u64), 1 => 1000u64..1500];
    let segments = prop_oneof![12 => 1u16..4, 1 => 300u16..700];
    (op, 0u64..24, sectors, segments, 0u16..12, 0u16..20).prop_map(
        |(op, sector, sectors, segments, ioprio, fua)| Request {
            segments,
            ioprio: IoPrio(u16::from(ioprio == 0)),
            fua: fua == 0 && op == Op::Write,
            // Some lie in another flow.
            ..request(op, sector + 4096 * u64::from(sectors % 3 == 0), sectors)
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn what_merges_is_what_the_rules_say(
        drains in prop::collection::vec(prop::collection::vec(any_request(), 1..50), 1..5),
        ctxs in 1u16..4,
    ) {
        let mut bench = Bench::new(300);
        let id = bench.mq.add_hctx(HctxConfig {
            disk: DiskId(0),
            queue: QueueId(0),
            ring_size: 256,
            ctxs,
        });
        bench.mq.quiesce(id);
        let mut tags = 0..;
        for drain in &drains {
            let drain: Vec<_> = tags.by_ref().zip(drain.iter().copied()).take(drain.len()).collect();
            bench.drain(id, &drain);
        }
        bench.mq.unquiesce(id);
        bench.run();
        let expected = oracle(&drains, ctxs);
        let taken: Vec<_> = bench.below.taken.iter().map(|t| (t.1, t.2.clone())).collect();
        let merged = bench.mq.stats(id).merged as usize;
        let requests: usize = drains.iter().map(Vec::len).sum();
        prop_assert_eq!(requests - merged, expected.len());
        let expected: Vec<_> = expected.into_iter().map(|g| (g.request, g.parts)).collect();
        prop_assert_eq!(taken, expected);
    }
}
