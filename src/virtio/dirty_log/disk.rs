//! The log of one disk: where its workers mark pages.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::DirtyLog;
use crate::mq::ids::QueueId;

/// What a disk's workers need to know to mark pages.
#[derive(Clone, Debug)]
pub struct DiskLog {
    /// The log.
    pub log: Arc<DirtyLog>,
    used: BTreeMap<u32, u64>,
}

impl DiskLog {
    /// The log, and where the used rings are logged that are logged elsewhere than where they are: by queue, a
    /// guest-physical address.
    pub fn new(log: Arc<DirtyLog>, used: BTreeMap<u32, u64>) -> DiskLog {
        DiskLog { log, used }
    }

    /// Where the used ring of `queue` is logged, if somewhere else than where it is.
    pub fn used_at(&self, queue: QueueId) -> Option<u64> {
        self.used.get(&u32::from(queue.0)).copied()
    }
}
