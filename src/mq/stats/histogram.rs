//! Histograms: plain counters of the thread that owns them, copied out when somebody asks.

use serde::ser::{Serialize, SerializeStruct, Serializer};

/// Each power of two is cut into this many linear parts, as a power of two.
const SUB_BITS: u32 = 3;
const SUBS: usize = 1 << SUB_BITS;

/// Times from 2^40 ns (18 minutes) on are no longer told apart.
const TOP_BIT: u32 = 40;

/// All buckets; the last has no upper bound.
pub const BUCKETS: usize = (TOP_BIT - SUB_BITS + 1) as usize * SUBS + 1;

/// How many nanoseconds something took, how often: a histogram with logarithmic buckets.
///
/// Times below 8 ns are exact. Above, each octave has 8 buckets of the same width, so a bucket is
/// never wider than an eighth of the least time in it. Memory is fixed ([`BUCKETS`] counters),
/// recording takes a shift and three additions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Histogram {
    buckets: [u64; BUCKETS],
    /// 64 bits hold half a year of a million requests a second at a millisecond each.
    sum_ns: u128,
    max_ns: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self::new()
    }
}

/// Up to which time how many were counted: a line of a Prometheus histogram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cumulative {
    /// The longest time counted here, in nanoseconds, itself included; `None` is the end (`+Inf`).
    pub upto_ns: Option<u64>,
    /// How many took that long or less.
    pub count: u64,
}

#[inline]
fn bucket_of(ns: u64) -> usize {
    // Below two octaves' worth of parts the number itself is the index. Above, its leading
    // SUB_BITS + 1 bits are kept, and each bit dropped is one octave further.
    let shift = (ns | (2 * SUBS as u64 - 1)).ilog2() - SUB_BITS;
    let index = (u64::from(shift) << SUB_BITS) + (ns >> shift);
    usize::try_from(index).unwrap_or(BUCKETS).min(BUCKETS - 1)
}

/// The longest time that falls into a bucket.
fn upper_bound(bucket: usize) -> Option<u64> {
    if bucket == BUCKETS - 1 {
        return None;
    }
    let next = bucket as u64 + 1;
    let sub = SUBS as u64;
    let shift = (next / sub).saturating_sub(1);
    Some(((next - shift * sub) << shift) - 1)
}

impl Histogram {
    /// An empty one.
    pub const fn new() -> Self {
        Histogram {
            buckets: [0; BUCKETS],
            sum_ns: 0,
            max_ns: 0,
        }
    }

    /// Counts something that took `ns` nanoseconds.
    #[inline]
    pub fn record(&mut self, ns: u64) {
        self.record_many(ns, 1);
    }

    /// Counts so many that took `ns` nanoseconds each; at least one.
    #[inline]
    pub fn record_many(&mut self, ns: u64, count: u64) {
        self.buckets[bucket_of(ns)] += count;
        self.sum_ns += u128::from(ns) * u128::from(count);
        self.max_ns = self.max_ns.max(ns);
    }

    /// Adds what another counted, as if all had been recorded here.
    pub fn merge(&mut self, other: &Histogram) {
        for (sum, more) in self.buckets.iter_mut().zip(&other.buckets) {
            *sum += more;
        }
        self.sum_ns += other.sum_ns;
        self.max_ns = self.max_ns.max(other.max_ns);
    }

    /// How many were recorded.
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// All times together, in nanoseconds; exact.
    pub fn sum_ns(&self) -> u128 {
        self.sum_ns
    }

    /// The longest time, in nanoseconds; exact, 0 if nothing was recorded.
    pub fn max_ns(&self) -> u64 {
        self.max_ns
    }

    /// The mean in nanoseconds, rounded down; `None` if nothing was recorded.
    pub fn mean_ns(&self) -> Option<u64> {
        let mean = self.sum_ns.checked_div(u128::from(self.count()))?;
        Some(u64::try_from(mean).expect("a mean is not above the maximum"))
    }

    /// The time that a share `q` (0 to 1) of what was recorded did not exceed, in nanoseconds;
    /// `None` if nothing was recorded.
    ///
    /// Never less than the true value, and more by less than an eighth of it. From 2^40 ns on it
    /// is the maximum.
    pub fn quantile_ns(&self, q: f64) -> Option<u64> {
        assert!((0.0..=1.0).contains(&q), "quantile {q} is not in 0..=1");
        let count = self.count();
        if count == 0 {
            return None;
        }
        #[expect(
            clippy::cast_possible_truncation,
            reason = "not negative, and clamped to the count"
        )]
        let rank = ((q * count as f64).ceil() as u64).clamp(1, count);
        let bucket = self
            .cumulative()
            .find(|bucket| bucket.count >= rank)
            .expect("the last bucket counts all");
        Some(bucket.upto_ns.map_or(self.max_ns, |ns| ns.min(self.max_ns)))
    }

    /// Every bucket with its upper bound and how many it and those below it count; the last is the
    /// total.
    pub fn cumulative(&self) -> impl Iterator<Item = Cumulative> + '_ {
        let mut count = 0;
        self.buckets.iter().enumerate().map(move |(bucket, n)| {
            count += n;
            Cumulative {
                upto_ns: upper_bound(bucket),
                count,
            }
        })
    }

    /// As [`Self::cumulative`], but only where an octave ends (7, 15, 31, ... ns) and the total: few
    /// enough for a metric that has one series for each bound.
    pub fn octaves(&self) -> impl Iterator<Item = Cumulative> + '_ {
        self.cumulative().filter(|bucket| {
            bucket
                .upto_ns
                .is_none_or(|ns| (ns + 1).is_power_of_two() && ns >= 7)
        })
    }
}

impl Serialize for Histogram {
    /// Count, mean, quantiles and maximum, and the buckets that are not empty as pairs of upper
    /// bound (null for the last) and count.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let buckets: Vec<(Option<u64>, u64)> = (0..BUCKETS)
            .filter(|&bucket| self.buckets[bucket] != 0)
            .map(|bucket| (upper_bound(bucket), self.buckets[bucket]))
            .collect();
        let mut out = serializer.serialize_struct("Histogram", 8)?;
        out.serialize_field("count", &self.count())?;
        out.serialize_field("mean_ns", &self.mean_ns())?;
        out.serialize_field("p50_ns", &self.quantile_ns(0.5))?;
        out.serialize_field("p90_ns", &self.quantile_ns(0.9))?;
        out.serialize_field("p99_ns", &self.quantile_ns(0.99))?;
        out.serialize_field("p999_ns", &self.quantile_ns(0.999))?;
        out.serialize_field("max_ns", &self.max_ns)?;
        out.serialize_field("buckets", &buckets)?;
        out.end()
    }
}

/// How many requests one run of an hctx dispatched, how often: 0, 1, 2–3, 4–7, 8–15, 16–31, more.
/// These are the classes of `hctx->dispatched[]` (queued_to_index, block/blk-mq.c of Linux 5.10).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(transparent)]
pub struct Dispatched([u64; 7]);

impl Dispatched {
    /// Counts a run that dispatched `requests`.
    #[inline]
    pub fn record(&mut self, requests: usize) {
        let bits = usize::BITS - requests.leading_zeros();
        self.0[(bits as usize).min(6)] += 1;
    }

    /// The seven counters.
    pub fn counts(&self) -> &[u64; 7] {
        &self.0
    }

    /// Adds what another counted.
    pub fn add(&mut self, other: &Dispatched) {
        for (sum, more) in self.0.iter_mut().zip(other.0) {
            *sum += more;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn buckets_are_contiguous_and_narrow() {
        let mut lower = 0;
        for bucket in 0..BUCKETS {
            assert_eq!(
                bucket_of(lower),
                bucket,
                "{lower} ns begins bucket {bucket}"
            );
            let Some(upper) = upper_bound(bucket) else {
                assert_eq!(bucket, BUCKETS - 1);
                assert_eq!(lower, 1 << TOP_BIT);
                assert_eq!(bucket_of(u64::MAX), bucket);
                return;
            };
            assert!(upper >= lower);
            assert_eq!(bucket_of(upper), bucket, "{upper} ns ends bucket {bucket}");
            assert!((upper - lower) * 8 < lower.max(1), "{lower}..={upper}");
            lower = upper + 1;
        }
        unreachable!("the last bucket has no upper bound");
    }

    #[test]
    fn nothing_recorded_has_no_quantile() {
        let hist = Histogram::new();
        assert_eq!(hist.quantile_ns(0.5), None);
        assert_eq!(hist.mean_ns(), None);
        assert_eq!(hist.octaves().last().map(|last| last.count), Some(0));
    }

    #[test]
    fn octaves_end_where_the_next_power_of_two_begins() {
        let mut hist = Histogram::new();
        for ns in [0, 7, 8, 1023, 1024, u64::MAX] {
            hist.record(ns);
        }
        let at = |ns| {
            hist.octaves()
                .find(|bucket| bucket.upto_ns == ns)
                .map(|bucket| bucket.count)
        };
        assert_eq!(hist.octaves().count(), 39);
        assert_eq!(at(Some(7)), Some(2));
        assert_eq!(at(Some(15)), Some(3));
        assert_eq!(at(Some(1023)), Some(4));
        assert_eq!(at(Some(2047)), Some(5));
        assert_eq!(at(Some((1 << TOP_BIT) - 1)), Some(5));
        assert_eq!(at(None), Some(6));
        assert_eq!(at(Some(8)), None);
    }

    #[test]
    fn the_report_names_what_is_not_empty() {
        let mut hist = Histogram::new();
        hist.record(5);
        hist.record(5);
        hist.record(1 << 41);
        let json = serde_json::to_value(&hist).unwrap();
        assert_eq!(json["count"], 3);
        assert_eq!(json["p50_ns"], 5);
        assert_eq!(json["max_ns"], 1u64 << 41);
        assert_eq!(json["buckets"], serde_json::json!([[5, 2], [null, 1]]));
    }

    /// The vectors of Linux 5.10's histogram.
    #[test]
    fn dispatched_has_the_kernels_classes() {
        for (requests, class) in [
            (0, 0),
            (1, 1),
            (2, 2),
            (3, 2),
            (4, 3),
            (7, 3),
            (8, 4),
            (15, 4),
            (16, 5),
            (31, 5),
            (32, 6),
            (1024, 6),
            (usize::MAX, 6),
        ] {
            let mut dispatched = Dispatched::default();
            dispatched.record(requests);
            let mut expected = [0; 7];
            expected[class] = 1;
            assert_eq!(dispatched.counts(), &expected, "{requests} requests");
        }
    }

    fn times() -> impl Strategy<Value = Vec<u64>> {
        // All magnitudes, not only the largest as uniform numbers would give.
        prop::collection::vec(
            (any::<u64>(), 0u32..64).prop_map(|(ns, shift)| ns >> shift),
            1..200,
        )
    }

    proptest! {
        #[test]
        fn quantiles_are_close_to_the_sorted_times(mut ns in times(), q in 0.0f64..=1.0) {
            let mut hist = Histogram::new();
            for &one in &ns {
                hist.record(one);
            }
            ns.sort_unstable();
            let rank = ((q * ns.len() as f64).ceil() as usize).clamp(1, ns.len());
            let exact = ns[rank - 1];
            let found = hist.quantile_ns(q).unwrap();
            prop_assert!(found >= exact);
            if exact < 1 << TOP_BIT {
                prop_assert!((found - exact) * 8 <= exact, "{} for {}", found, exact);
            }
            prop_assert_eq!(hist.max_ns(), *ns.last().unwrap());
            let sum: u128 = ns.iter().copied().map(u128::from).sum();
            prop_assert_eq!(hist.sum_ns(), sum);
            for bucket in hist.cumulative() {
                let upto = bucket.upto_ns.unwrap_or(u64::MAX);
                let count = ns.iter().filter(|&&one| one <= upto).count() as u64;
                prop_assert_eq!(bucket.count, count);
            }
        }

        #[test]
        fn merging_is_recording_all(left in times(), right in times()) {
            let (mut a, mut b, mut all) = (Histogram::new(), Histogram::new(), Histogram::new());
            left.iter().for_each(|&ns| a.record(ns));
            right.iter().for_each(|&ns| b.record(ns));
            left.iter().chain(&right).for_each(|&ns| all.record(ns));
            a.merge(&b);
            prop_assert_eq!(a, all);
        }
    }
}
