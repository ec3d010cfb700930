//! What a worker has counted, for whoever asks.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::mq::ids::{DiskId, HctxId, RingId, WorkerId};

use super::Worker;
use crate::worker::counts::{QueueReport, WorkerReport};

impl Worker {
    /// Counts of the rings that were stopped and of those that run.
    pub(super) fn report(&mut self) -> WorkerReport {
        let mut reports = self.reports.clone();
        for (port, index) in self.ports.iter().zip(0..) {
            let Some(port) = port else { continue };
            let hctx = HctxId(index);
            let ctx = self.mq.ctx_stats(hctx).to_vec();
            let stats = *self.mq.stats(hctx);
            let times = self.mq.times(hctx);
            report_of(&mut reports, port.id, self.id).add(ctx, &stats, times, &port.stats);
        }
        let disks = (0..self.disks.len())
            .map(|index| DiskId(u16::try_from(index).expect("disks are bounded")))
            .map(|disk| (disk, self.mq.disk_stats(disk)))
            .collect();
        WorkerReport {
            worker: self.id,
            stuck: false,
            queues: reports,
            disks,
            faults: self.faults(),
            oldest: self.oldest(),
            engine: self.engine.counters(),
        }
    }

    /// For how long the engine has had the oldest request of each disk.
    fn oldest(&self) -> Vec<(DiskId, Duration)> {
        let mut oldest = BTreeMap::new();
        for issued in self.mq.overdue(0) {
            let age = oldest.entry(issued.ring.disk).or_insert(issued.age_ns);
            *age = issued.age_ns.max(*age);
        }
        let ages = oldest.into_iter();
        ages.map(|(disk, ns)| (disk, Duration::from_nanos(ns)))
            .collect()
    }
}

/// The report of a ring; a new one if there is none yet.
pub(super) fn report_of(
    reports: &mut Vec<QueueReport>,
    ring: RingId,
    worker: WorkerId,
) -> &mut QueueReport {
    let index = reports.iter().position(|report| report.ring == ring);
    let index = index.unwrap_or_else(|| {
        reports.push(QueueReport::new(ring, worker.0));
        reports.len() - 1
    });
    &mut reports[index]
}
