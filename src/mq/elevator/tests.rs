use super::super::ids::{RequestTag, Sector};
use super::super::request::{IoPrio, Op};
use super::*;

fn queued(hctx: u16, tag: u16, op: Op, sector: u64, ioprio: u16) -> Queued {
    Queued {
        id: RequestId {
            hctx: HctxId(hctx),
            tag: RequestTag(tag),
        },
        request: Request {
            op,
            sector: Sector(sector),
            bytes: 4096,
            segments: 1,
            ioprio: IoPrio(ioprio),
            fua: false,
            unmap: false,
        },
        queued_ns: 0,
    }
}

fn both(capacity: usize) -> [Elevator; 2] {
    [Kind::MqDeadline, Kind::Kyber]
        .map(|kind| Elevator::new(kind.into(), capacity).expect("an elevator"))
}

#[test]
fn kinds_have_the_kernels_names() {
    for kind in Kind::ALL {
        assert_eq!(kind.to_string().parse(), Ok(kind));
        assert_eq!(Params::from(kind).kind(), kind);
    }
    let error = "bfq".parse::<Kind>().expect_err("there is none");
    assert_eq!(
        error.to_string(),
        "unknown scheduler 'bfq': use none, mq-deadline or kyber"
    );
    assert!(Elevator::new(Params::None, 8).is_none());
}

#[test]
fn every_parameter_takes_the_ends_of_its_range_and_nothing_beyond() {
    for mut elevator in both(8) {
        for param in elevator.params().list() {
            for value in [*param.range.start(), *param.range.end()] {
                elevator.set_param(param.name, value).expect("in range");
                let list = elevator.params().list();
                let now = list.iter().find(|p| p.name == param.name).map(|p| p.value);
                assert_eq!(now, Some(value), "{}", param.name);
            }
            let beyond = [
                param.range.start().checked_sub(1),
                param.range.end().checked_add(1),
            ];
            for value in beyond.into_iter().flatten() {
                let before = elevator.params();
                let error = elevator.set_param(param.name, value);
                assert!(matches!(error, Err(ParamError::Range { .. })), "{error:?}");
                assert_eq!(elevator.params(), before);
            }
        }
    }
}

#[test]
fn the_defaults_are_the_kernels() {
    let values = |kind: Kind| {
        let list = Params::from(kind).list();
        list.iter()
            .map(|p| (p.name, p.value))
            .collect::<Vec<(&str, u64)>>()
    };
    assert_eq!(
        values(Kind::MqDeadline),
        [
            ("read_expire", 500),
            ("write_expire", 5000),
            ("writes_starved", 2),
            ("fifo_batch", 16),
            ("front_merges", 1),
            ("prio_aging_expire", 10_000),
            ("async_depth", 65_535),
        ]
    );
    assert_eq!(
        values(Kind::Kyber),
        [("read_lat_nsec", 2_000_000), ("write_lat_nsec", 10_000_000)]
    );
    assert!(values(Kind::None).is_empty());
}

#[test]
fn a_parameter_error_says_what_to_do() {
    let [mut deadline, mut kyber] = both(8);
    let text = |e: Result<(), ParamError>| e.expect_err("refused").to_string();
    assert_eq!(
        text(deadline.set_param("front_merges", 2)),
        "front_merges = 2 is out of range: use a value from 0 to 1"
    );
    assert_eq!(
        text(kyber.set_param("fifo_batch", 2)),
        "scheduler kyber has no parameter 'fifo_batch': use one of read_lat_nsec, write_lat_nsec"
    );
    assert_eq!(
        text(Params::None.set("fifo_batch", 2)),
        "scheduler none has no parameter 'fifo_batch': it has none"
    );
}

#[test]
fn asynchronous_requests_leave_tags_to_those_somebody_waits_for() {
    let [mut deadline, kyber] = both(8);
    let of = |op, fua| Request {
        fua,
        ..queued(0, 0, op, 0, 0).request
    };
    let kinds = |e: &Elevator| {
        [
            of(Op::Read, false),
            of(Op::Write, false),
            of(Op::Write, true),
            of(Op::Discard, false),
        ]
        .map(|request| e.is_async(&request))
    };
    assert_eq!(kinds(&deadline), [false, true, true, true]);
    assert_eq!(kinds(&kyber), [false, true, false, true]);
    let limits = |e: &Elevator| [1, 2, 128].map(|depth| e.async_limit(depth));
    assert_eq!(limits(&deadline), [1, 2, 128], "no limit by default");
    assert_eq!(limits(&kyber), [1, 1, 96]);
    deadline.set_param("async_depth", 48).expect("in range");
    assert_eq!(limits(&deadline), [1, 2, 48]);
}

#[test]
fn draining_leaves_nothing_and_forgets_nothing() {
    for mut elevator in both(200) {
        let ops = [Op::Read, Op::Write, Op::Discard, Op::WriteZeroes];
        for tag in 0..200u16 {
            let ioprio = (tag % 5) << 13;
            let op = ops[usize::from(tag % 4)];
            let sector = u64::from(tag.wrapping_mul(7919)) * 64;
            elevator.insert(queued(tag % 3, tag, op, sector, ioprio), tag % 11 == 0);
        }
        let mut taken = Vec::new();
        elevator.take_hctx(HctxId(1), |id| taken.push(id));
        assert!(taken.len() > 60 && taken.iter().all(|id| id.hctx == HctxId(1)));
        elevator.drain(0, |id| taken.push(id));
        assert!(elevator.is_empty() && !elevator.has_work(u64::MAX / 2));
        let mut tags: Vec<u16> = taken.iter().map(|id| id.tag.0).collect();
        tags.sort_unstable();
        assert_eq!(tags, (0..200).collect::<Vec<_>>());
        // Nobody is taken for unfinished: the lowest class goes at once.
        elevator.insert(queued(0, 0, Op::Read, 0, 3 << 13), false);
        assert!(elevator.dispatch(0).is_some());
    }
}

#[test]
fn a_drain_is_in_the_order_of_dispatch() {
    for (mut one, mut other) in both(64).into_iter().zip(both(64)) {
        for tag in 0..64u16 {
            let op = if tag % 3 == 0 { Op::Write } else { Op::Read };
            let request = queued(0, tag, op, u64::from(tag * 37 % 64) * 100, 0);
            one.insert(request, false);
            other.insert(request, false);
        }
        let mut drained = Vec::new();
        one.drain(0, |id| drained.push(id));
        let dispatched: Vec<_> = std::iter::from_fn(|| other.dispatch(0)).collect();
        assert_eq!(drained, dispatched);
    }
}
