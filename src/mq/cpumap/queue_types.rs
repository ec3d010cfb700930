//! Queue types: which virtqueues are for what, and which map each kind of request goes by.
//!
//! A tag set has up to three maps, default, read and poll, over queues that lie one after the other
//! in this order. A type without queues of its own goes by the default map
//! (blk_mq_map_queue_type and blk_mq_map_swqueue, block/blk-mq.c). virtio-blk has default and poll
//! queues, the poll queues last, and no read queues (drivers/block/virtio_blk.c).

use super::{MapError, MapKind, QueueMap, Topology};
use crate::mq::request::Op;

/// What a queue is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum QueueType {
    /// Everything that has no queue of its own.
    Default,
    /// Reads.
    Read,
    /// Requests whose completion the guest polls for.
    Poll,
}

impl QueueType {
    /// The type a request goes by: polled, else read, else default (blk_mq_get_hctx_type).
    pub fn of(op: Op, polled: bool) -> QueueType {
        match op {
            _ if polled => QueueType::Poll,
            Op::Read => QueueType::Read,
            _ => QueueType::Default,
        }
    }
}

/// How many queues there are of each type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts {
    /// At least one.
    pub default: u16,
    /// May be none.
    pub read: u16,
    /// May be none.
    pub poll: u16,
}

/// The maps of all types.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueueMaps {
    counts: Counts,
    default: QueueMap,
    read: Option<QueueMap>,
    poll: Option<QueueMap>,
}

impl QueueMaps {
    /// Maps the CPUs of `topology` to the queues of each type, each by the same algorithm.
    ///
    /// # Errors
    ///
    /// What [`QueueMap::build`] says of any of them.
    pub fn build(
        kind: &MapKind,
        topology: &Topology,
        counts: Counts,
    ) -> Result<QueueMaps, MapError> {
        let own = |queues: u16| {
            (queues > 0)
                .then(|| QueueMap::build(kind, topology, queues))
                .transpose()
        };
        Ok(QueueMaps {
            counts,
            default: QueueMap::build(kind, topology, counts.default)?,
            read: own(counts.read)?,
            poll: own(counts.poll)?,
        })
    }

    /// All queues.
    pub fn queues(&self) -> u16 {
        self.counts.default + self.counts.read + self.counts.poll
    }

    /// The queue `cpu` uses for requests of a type.
    ///
    /// # Panics
    ///
    /// If there is no such CPU.
    pub fn queue_of(&self, cpu: u16, kind: QueueType) -> u16 {
        let (map, offset) = match kind {
            QueueType::Read => (self.read.as_ref(), self.counts.default),
            QueueType::Poll => (self.poll.as_ref(), self.counts.default + self.counts.read),
            QueueType::Default => (None, 0),
        };
        match map {
            Some(map) => offset + map.queue_of(cpu),
            None => self.default.queue_of(cpu),
        }
    }

    /// What a queue is for.
    ///
    /// # Panics
    ///
    /// If there is no such queue.
    pub fn type_of(&self, queue: u16) -> QueueType {
        assert!(queue < self.queues(), "queue {queue} of {}", self.queues());
        if queue < self.counts.default {
            QueueType::Default
        } else if queue < self.counts.default + self.counts.read {
            QueueType::Read
        } else {
            QueueType::Poll
        }
    }

    /// The CPUs that use a queue, in ascending order.
    ///
    /// # Panics
    ///
    /// If there is no such queue.
    pub fn cpus_of(&self, queue: u16) -> &[u16] {
        let Counts { default, read, .. } = self.counts;
        let (map, queue) = match self.type_of(queue) {
            QueueType::Default => (Some(&self.default), queue),
            QueueType::Read => (self.read.as_ref(), queue - default),
            QueueType::Poll => (self.poll.as_ref(), queue - default - read),
        };
        map.expect("a type with queues has a map").cpus_of(queue)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn maps(cpus: u16, default: u16, read: u16, poll: u16) -> QueueMaps {
        let counts = Counts {
            default,
            read,
            poll,
        };
        QueueMaps::build(&MapKind::Grouping, &Topology::flat(cpus), counts).unwrap()
    }

    #[test]
    fn poll_queues_come_after_the_default_ones() {
        // A Linux guest with 2 CPUs and poll_queues=2 of 4.
        let maps = maps(2, 2, 0, 2);
        let types: Vec<_> = (0..4).map(|queue| maps.type_of(queue)).collect();
        use QueueType::{Default, Poll};
        assert_eq!(types, [Default, Default, Poll, Poll]);
        for (queue, cpu) in [(0, 0), (1, 1), (2, 0), (3, 1)] {
            assert_eq!(maps.cpus_of(queue), [cpu]);
        }
        assert_eq!(maps.queue_of(1, Poll), 3);
        assert_eq!(maps.queue_of(1, Default), 1);
    }

    #[test]
    fn a_type_without_queues_goes_by_the_default_map() {
        let maps = maps(4, 2, 0, 0);
        for cpu in 0..4 {
            let default = maps.queue_of(cpu, QueueType::Default);
            assert_eq!(default, cpu / 2);
            assert_eq!(maps.queue_of(cpu, QueueType::Read), default);
            assert_eq!(maps.queue_of(cpu, QueueType::Poll), default);
        }
    }

    #[test]
    fn every_type_maps_every_cpu() {
        let maps = maps(8, 3, 2, 1);
        assert_eq!(maps.queues(), 6);
        let mut seen = [0; 6];
        for cpu in 0..8 {
            for kind in [QueueType::Default, QueueType::Read, QueueType::Poll] {
                let queue = maps.queue_of(cpu, kind);
                assert_eq!(maps.type_of(queue), kind);
                assert!(maps.cpus_of(queue).contains(&cpu));
                seen[usize::from(queue)] += 1;
            }
        }
        assert_eq!(seen, [3, 3, 2, 4, 4, 8]);
    }

    #[test]
    fn requests_go_by_their_type() {
        assert_eq!(QueueType::of(Op::Read, false), QueueType::Read);
        assert_eq!(QueueType::of(Op::Read, true), QueueType::Poll);
        for op in [Op::Write, Op::Flush, Op::Discard, Op::WriteZeroes] {
            assert_eq!(QueueType::of(op, false), QueueType::Default);
        }
    }

    #[test]
    fn without_default_queues_there_is_no_map() {
        let counts = Counts {
            default: 0,
            read: 1,
            poll: 0,
        };
        let built = QueueMaps::build(&MapKind::Modulo, &Topology::flat(2), counts);
        assert_eq!(built, Err(MapError::NoQueues));
    }
}
