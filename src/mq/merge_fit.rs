//! Whether two requests that are neighbours on the disk may travel as one.

use super::limits::{IOV_MAX, MAX_MERGED_BYTES, MAX_RANGES};
use super::request::{Op, Request};

/// Whether, and on which side, a request became a part of another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Merged {
    Back,
    Front,
    No,
}

/// How two requests lie to each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fit {
    /// The late one begins where the early one ends.
    Back,
    /// The late one ends where the early one begins.
    Front,
    /// Neighbours, but not allowed to merge.
    Refused,
    /// No neighbours.
    Apart,
}

/// Discards have nothing to be neighbours for: each brings its own ranges, as many as the engine
/// takes in one request (`max_discard_segments`, blk_discard_mergable).
fn fit_ranges(early: &Request, late: &Request, started: bool) -> Fit {
    let allowed = early.op == late.op
        && early.ioprio == late.ioprio
        && !early.fua
        && !late.fua
        && !started
        && early.segments + late.segments <= MAX_RANGES;
    if allowed { Fit::Back } else { Fit::Apart }
}

/// How `late` lies to `early`, and whether the two may travel as one.
pub(super) fn fit(early: &Request, late: &Request, started: bool) -> Fit {
    if early.op == Op::Discard && late.op == Op::Discard {
        return fit_ranges(early, late, started);
    }
    let place = if early.end() == late.sector {
        Fit::Back
    } else if late.end() == early.sector {
        Fit::Front
    } else {
        return Fit::Apart;
    };
    let allowed = early.op == late.op
        && early.op.moves_data()
        && early.ioprio == late.ioprio
        && !early.fua
        && !late.fua
        && !started
        && early.bytes + late.bytes <= MAX_MERGED_BYTES
        && early.segments + late.segments <= IOV_MAX;
    if allowed { place } else { Fit::Refused }
}

#[cfg(test)]
mod tests {
    use super::super::ids::Sector;
    use super::super::request::{IoPrio, Op};
    use super::*;

    fn request(op: Op, sector: u64, sectors: u64) -> Request {
        Request {
            op,
            sector: Sector(sector),
            bytes: sectors * 512,
            segments: 1,
            ioprio: IoPrio(0x4004),
            fua: false,
            unmap: false,
        }
    }

    #[test]
    fn neighbours_fit_on_their_side() {
        let at = request(Op::Read, 8, 8);
        assert_eq!(fit(&at, &request(Op::Read, 16, 8), false), Fit::Back);
        assert_eq!(fit(&at, &request(Op::Read, 0, 8), false), Fit::Front);
        assert_eq!(fit(&at, &request(Op::Read, 17, 8), false), Fit::Apart);
        assert_eq!(fit(&at, &request(Op::Read, 8, 8), false), Fit::Apart);
    }

    #[test]
    fn discards_bring_their_ranges_wherever_they_are() {
        let at = request(Op::Discard, 8, 8);
        for sector in [0, 16, 9000] {
            assert_eq!(fit(&at, &request(Op::Discard, sector, 8), false), Fit::Back);
        }
        let full = Request {
            segments: MAX_RANGES,
            ..at
        };
        assert_eq!(fit(&full, &at, false), Fit::Apart);
        assert_eq!(fit(&at, &at, true), Fit::Apart, "started");
    }

    #[test]
    fn what_differs_or_is_durable_or_started_or_large_is_refused() {
        let at = request(Op::Write, 8, 8);
        let next = request(Op::Write, 16, 8);
        let differing = [
            Request {
                op: Op::Read,
                ..next
            },
            Request { fua: true, ..next },
            Request {
                ioprio: IoPrio(0),
                ..next
            },
            Request {
                segments: IOV_MAX,
                ..next
            },
            Request {
                bytes: MAX_MERGED_BYTES,
                ..next
            },
        ];
        for late in differing {
            assert_eq!(fit(&at, &late, false), Fit::Refused, "{late:?}");
        }
        assert_eq!(fit(&at, &next, true), Fit::Refused, "started");
        assert_eq!(fit(&at, &next, false), Fit::Back);
        for op in [Op::Flush, Op::WriteZeroes] {
            let (early, late) = (request(op, 8, 8), request(op, 16, 8));
            assert_eq!(fit(&early, &late, false), Fit::Refused, "{op:?}");
        }
    }
}
