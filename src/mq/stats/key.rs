//! What is counted together: requests of one operation and one ctx.

use crate::mq::ids::CtxId;
use crate::mq::request::Op;

/// The operation of a request and its ctx, in one word that tells at once whether two are alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::mq) struct StatKey(u32);

impl StatKey {
    #[inline]
    pub fn new(op: Op, ctx: CtxId) -> Self {
        StatKey((op as u32) << 16 | u32::from(ctx.0))
    }

    #[inline]
    pub fn ctx(self) -> CtxId {
        CtxId((self.0 & 0xffff) as u16)
    }
}
