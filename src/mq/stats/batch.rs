//! Runs of requests that are alike: what a hctx has counted and not yet added to its statistics.

use super::key::StatKey;
use crate::mq::ids::CtxId;
use crate::mq::request::Op;

/// Requests a plug has taken.
#[derive(Debug)]
pub(in crate::mq) struct ArrivedRun {
    pub key: StatKey,
    pub op: Op,
    pub count: u32,
    /// Those that became parts of others in the plug.
    pub merged: u32,
}

/// Requests of one ctx that were handed to the engine one after the other, for as long as they are.
#[derive(Debug)]
pub(in crate::mq) struct SentRun {
    pub ctx: CtxId,
    pub count: u64,
}

impl SentRun {
    pub const NONE: SentRun = SentRun {
        ctx: CtxId(0),
        count: 0,
    };

    pub fn one(ctx: CtxId) -> SentRun {
        SentRun { ctx, count: 1 }
    }
}

/// Requests that ended well, each by itself.
#[derive(Debug)]
pub(in crate::mq) struct EndedRun {
    pub key: StatKey,
    pub op: Op,
    pub queued_ns: u64,
    pub started_ns: u64,
    pub count: u32,
    pub bytes: u64,
}

/// The runs of one hctx.
#[derive(Debug)]
pub(in crate::mq) struct StatBatch {
    /// Nothing is counted.
    pub off: bool,
    pub arrived: ArrivedRun,
    pub ended: EndedRun,
}

impl StatBatch {
    pub fn new() -> Self {
        let op = Op::Read;
        let key = StatKey::new(op, CtxId(0));
        StatBatch {
            off: false,
            arrived: ArrivedRun {
                key,
                op,
                count: 0,
                merged: 0,
            },
            ended: EndedRun {
                key,
                op,
                queued_ns: 0,
                started_ns: 0,
                count: 0,
                bytes: 0,
            },
        }
    }
}
