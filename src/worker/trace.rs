//! The trace of a worker, with hctxs named by what the world outside calls them.
//!
//! An hctx's number means a virtqueue only as long as the ring runs; the next ring may get the same.
//! So events are named when they are handed out, and before a ring is let go of.

use crate::mq::trace::Action;

use super::Worker;
use crate::worker::counts::{TraceReport, Traced};

/// Events of rings that have ended since, until somebody takes them.
#[derive(Debug, Default)]
pub(super) struct Named {
    events: Vec<Traced>,
    /// The most that are kept: what the trace was started with.
    limit: usize,
    lost: u64,
}

impl Worker {
    #[cold]
    pub(super) fn start_trace(&mut self, events: usize, actions: &[Action]) {
        self.mq.trace().start(events, actions);
        self.named = Named {
            limit: events,
            ..Named::default()
        };
    }

    /// Names what was traced so far.
    #[cold]
    pub(super) fn name_traced(&mut self) {
        let trace = self.mq.trace();
        if trace.is_empty() {
            return;
        }
        let mut events = Vec::with_capacity(trace.len());
        trace.take(&mut events);
        let Worker {
            named, ports, id, ..
        } = self;
        named.events.extend(events.into_iter().map(|event| {
            let port = ports[event.hctx.index()].as_ref();
            Traced {
                ring: port.expect("traced rings are named before they end").id,
                worker: *id,
                event,
            }
        }));
        let above = named.events.len().saturating_sub(named.limit);
        named.events.drain(..above);
        named.lost += above as u64;
    }

    #[cold]
    pub(super) fn take_trace(&mut self) -> TraceReport {
        self.name_traced();
        TraceReport {
            events: std::mem::take(&mut self.named.events),
            lost: self.mq.trace().lost() + self.named.lost,
        }
    }
}
