//! kyber: as many requests in the engine as the latency targets allow.
//!
//! Requests fall into four domains. Each has tokens, and a request needs one of its domain to be
//! dispatched. When the engine becomes slow, the domains that are within their targets get fewer.
//!
//! Facts and constants are those of Linux' block/kyber-iosched.c. Two things differ. Latencies of the engine
//! and in all have a window of samples each, where the kernel's share a timeout and so cut each
//! other's windows short. And targets are looked at when a request completes rather than by a timer:
//! while none is in the engine every token is free, and how many there are does not matter.

use super::super::ids::{HctxId, RequestId};
use super::super::limits::MERGE_LOOKBACK;
use super::super::merge_fit::{Fit, fit};
use super::super::request::{Op, Request};
use super::params::KyberParams;
use super::store::{List, Node, Store};
use super::{Merge, MergeSide, Queued, Times};

/// What a request competes with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Domain {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Discards.
    Discard,
    /// Everything else: write-zeroes.
    Other,
}

impl Domain {
    /// All of them, in the order in which they take turns.
    pub const ALL: [Domain; 4] = [Domain::Read, Domain::Write, Domain::Discard, Domain::Other];

    /// The domain of an operation.
    #[inline]
    pub fn of(op: Op) -> Domain {
        match op {
            Op::Read => Domain::Read,
            Op::Write => Domain::Write,
            Op::Discard => Domain::Discard,
            Op::WriteZeroes | Op::Flush => Domain::Other,
        }
    }

    /// The most tokens it can have.
    fn max_depth(self) -> u16 {
        match self {
            Domain::Read => 256,
            Domain::Write => 128,
            Domain::Discard => 64,
            Domain::Other => 16,
        }
    }

    /// How many of its requests go before the next domain has its turn.
    fn batch(self) -> u32 {
        match self {
            Domain::Read => 16,
            Domain::Write => 8,
            Domain::Discard | Domain::Other => 1,
        }
    }

    fn next(self) -> Domain {
        Domain::ALL[(self as usize + 1) % Domain::ALL.len()]
    }
}

/// The latency discards should have; Linux has no parameter for it.
const DISCARD_LAT_NS: u64 = 5_000_000_000;
/// How often latencies are compared with the targets, at most.
const UPDATE_NS: u64 = 100_000_000;
/// So many samples are enough for a percentile ...
const ENOUGH_SAMPLES: u32 = 500;
/// ... and fewer are after this time.
const WINDOW_NS: u64 = 1_000_000_000;
/// Latencies are counted in quarters of the target; the last bucket takes what is longer.
const BUCKETS: usize = 8;
/// So many of the buckets are within the target.
const GOOD_BUCKETS: u16 = 4;
/// The share of tags for requests nobody waits for, in percent.
const ASYNC_PERCENT: u64 = 75;

/// Samples since the last percentile was taken.
#[derive(Clone, Debug, Default)]
struct Window {
    buckets: [u32; BUCKETS],
    first_ns: Option<u64>,
}

impl Window {
    fn add(&mut self, latency_ns: u64, target_ns: u64, now_ns: u64) {
        let quarter = (target_ns / u64::from(GOOD_BUCKETS)).max(1);
        let bucket = latency_ns.saturating_sub(1) / quarter;
        let bucket = usize::try_from(bucket).map_or(BUCKETS - 1, |b| b.min(BUCKETS - 1));
        self.buckets[bucket] = self.buckets[bucket].saturating_add(1);
        self.first_ns.get_or_insert(now_ns);
    }

    /// The bucket the percentile falls into, if there are samples enough; then the window starts
    /// anew.
    fn percentile(&mut self, percent: u64, now_ns: u64) -> Option<u16> {
        let first_ns = self.first_ns?;
        let samples: u64 = self.buckets.iter().map(|n| u64::from(*n)).sum();
        if samples < ENOUGH_SAMPLES.into() && now_ns < first_ns + WINDOW_NS {
            return None;
        }
        let mut left = (samples * percent).div_ceil(100);
        let mut bucket = 0;
        for count in &self.buckets[..BUCKETS - 1] {
            if u64::from(*count) >= left {
                break;
            }
            left -= u64::from(*count);
            bucket += 1;
        }
        *self = Window::default();
        Some(bucket)
    }
}

#[derive(Debug)]
struct State {
    queue: List,
    /// Tokens there are.
    depth: u16,
    /// Tokens taken. More than `depth` for a while after that went down.
    taken: u16,
    device: Window,
    total: Window,
    /// What the last percentile of `total` was, for the next time the engine is congested.
    p99: Option<u16>,
}

impl State {
    #[inline]
    fn ready(&self) -> bool {
        !self.queue.is_empty() && self.taken < self.depth
    }
}

/// The `kyber` scheduler.
#[derive(Debug)]
pub struct Kyber {
    params: KyberParams,
    store: Store,
    domains: [State; 4],
    current: Domain,
    batching: u32,
    next_update_ns: Option<u64>,
}

impl Kyber {
    /// With room for `capacity` requests.
    pub fn new(params: KyberParams, capacity: usize) -> Self {
        Kyber {
            params,
            store: Store::new(capacity),
            domains: Domain::ALL.map(|domain| State {
                queue: List::default(),
                depth: domain.max_depth(),
                taken: 0,
                device: Window::default(),
                total: Window::default(),
                p99: None,
            }),
            current: Domain::Read,
            batching: 0,
            next_update_ns: None,
        }
    }

    pub(super) fn reserve(&mut self, capacity: usize) {
        self.store.reserve(capacity);
    }

    pub(super) fn params(&self) -> &KyberParams {
        &self.params
    }

    pub(super) fn set_params(&mut self, params: KyberParams) {
        self.params = params;
    }

    pub(super) fn len(&self) -> usize {
        self.store.len()
    }

    /// A domain's tokens: how many are taken, and how many there are.
    pub fn tokens(&self, domain: Domain) -> (u16, u16) {
        let state = &self.domains[domain as usize];
        (state.taken, state.depth)
    }

    /// The latency requests of a domain should have; `Other` has none.
    fn target_ns(&self, domain: Domain) -> Option<u64> {
        match domain {
            Domain::Read => Some(self.params.read_lat_ns),
            Domain::Write => Some(self.params.write_lat_ns),
            Domain::Discard => Some(DISCARD_LAT_NS),
            Domain::Other => None,
        }
    }

    #[inline]
    fn state(&mut self, domain: Domain) -> &mut State {
        &mut self.domains[domain as usize]
    }

    pub(super) fn insert(&mut self, queued: Queued, at_head: bool) {
        let op = queued.request.op;
        assert!(op != Op::Flush, "flushes are not scheduled");
        let slot = self.store.insert(queued, 0, at_head);
        let queue = &mut self.domains[Domain::of(op) as usize].queue;
        if at_head {
            queue.push_front(&mut self.store, slot);
        } else {
            queue.push_back(&mut self.store, slot);
        }
    }

    pub(super) fn requeued(&mut self, queued: Queued) {
        self.put_token(Domain::of(queued.request.op));
        self.insert(queued, true);
    }

    pub(super) fn find_merge(&self, hctx: HctxId, request: &Request) -> Option<Merge> {
        if !request.op.moves_data() || request.fua || request.bytes == 0 {
            return None;
        }
        let queue = &self.domains[Domain::of(request.op) as usize].queue;
        for slot in queue.newest_first(&self.store).take(MERGE_LOOKBACK) {
            let node = self.store.get(slot);
            if node.queued.id.hctx != hctx {
                continue;
            }
            let side = match fit(&node.queued.request, request, node.at_head) {
                Fit::Back => MergeSide::Back,
                Fit::Front => MergeSide::Front,
                Fit::Refused => return None,
                Fit::Apart => continue,
            };
            let leader = node.queued.id;
            return Some(Merge { leader, side, slot });
        }
        None
    }

    pub(super) fn merged(&mut self, merge: Merge, now: &Request) {
        self.store.leader(merge.slot, merge.leader).queued.request = *now;
    }

    #[inline]
    pub(super) fn dispatch(&mut self) -> Option<RequestId> {
        if self.batching >= self.current.batch() || !self.domains[self.current as usize].ready() {
            self.batching = 0;
            let mut turns = Domain::ALL.len();
            loop {
                self.current = self.current.next();
                if self.domains[self.current as usize].ready() {
                    break;
                }
                turns -= 1;
                if turns == 0 {
                    return None;
                }
            }
        }
        self.batching += 1;
        let current = self.current;
        self.state(current).taken += 1;
        self.pop(current)
    }

    fn pop(&mut self, domain: Domain) -> Option<RequestId> {
        let queue = &mut self.domains[domain as usize].queue;
        let slot = queue.front()?;
        queue.remove(&mut self.store, slot);
        Some(self.store.remove(slot).id)
    }

    pub(super) fn has_work(&self) -> bool {
        self.domains.iter().any(State::ready)
    }

    fn put_token(&mut self, domain: Domain) {
        let taken = &mut self.state(domain).taken;
        assert!(*taken > 0, "a token came back that nobody took");
        *taken -= 1;
    }

    pub(super) fn completed(&mut self, request: &Request, times: Times) {
        let domain = Domain::of(request.op);
        self.put_token(domain);
        let Some(target_ns) = self.target_ns(domain) else {
            return;
        };
        let now_ns = times.completed_ns;
        let state = self.state(domain);
        let since = |start_ns: u64| now_ns.saturating_sub(start_ns);
        state.device.add(since(times.started_ns), target_ns, now_ns);
        state.total.add(since(times.queued_ns), target_ns, now_ns);
        let next_ns = *self.next_update_ns.get_or_insert(now_ns + UPDATE_NS);
        if now_ns >= next_ns {
            self.next_update_ns = Some(now_ns + UPDATE_NS);
            self.update(now_ns);
        }
    }

    /// Compares the latencies with the targets and gives each domain its number of tokens.
    fn update(&mut self, now_ns: u64) {
        let targeted = Domain::Other as usize;
        let mut congested = false;
        for state in &mut self.domains[..targeted] {
            let p90 = state.device.percentile(90, now_ns);
            congested |= p90.is_some_and(|bucket| bucket >= GOOD_BUCKETS);
        }
        for (state, domain) in self.domains[..targeted].iter_mut().zip(Domain::ALL) {
            let mut p99 = state.total.percentile(99, now_ns);
            if congested {
                // What was seen last counts too, but once: without new samples a domain is not
                // throttled a second time.
                p99 = p99.or(state.p99);
                state.p99 = None;
            } else if p99.is_some() {
                state.p99 = p99;
            }
            let Some(p99) = p99 else { continue };
            if congested || p99 >= GOOD_BUCKETS {
                let depth = state.depth * (p99 + 1) / GOOD_BUCKETS;
                state.depth = depth.clamp(1, domain.max_depth());
            }
        }
    }

    pub(super) fn is_async(&self, request: &Request) -> bool {
        request.op != Op::Read && !request.fua
    }

    pub(super) fn async_limit(&self, depth: u32) -> u32 {
        let limit = u64::from(depth) * ASYNC_PERCENT / 100;
        u32::try_from(limit).unwrap_or(depth).max(1)
    }

    pub(super) fn drain(&mut self, mut each: impl FnMut(RequestId)) {
        // In turns as always, only without tokens.
        while self.store.len() > 0 {
            if self.batching < self.current.batch()
                && let Some(id) = self.pop(self.current)
            {
                self.batching += 1;
                each(id);
            } else {
                self.batching = 0;
                self.current = self.current.next();
            }
        }
    }

    pub(super) fn take_hctx(&mut self, hctx: HctxId, mut each: impl FnMut(RequestId)) {
        let of_hctx = |node: &Node| node.queued.id.hctx == hctx;
        for state in &mut self.domains {
            state.queue.take(&mut self.store, of_hctx, |store, slot| {
                each(store.remove(slot).id);
            });
        }
    }
}

#[cfg(test)]
mod tests;
