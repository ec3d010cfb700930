//! Latencies, counted in classes that grow with the value.

/// Classes in each power of two: the value of a percentile is right to about one part in this.
const CLASSES: u64 = 64;
const CLASS_BITS: u32 = CLASSES.trailing_zeros();
const POWERS: u64 = 64 - CLASS_BITS as u64 + 1;

/// Counts of values in nanoseconds.
#[derive(Clone, Debug)]
pub struct Histogram {
    counts: Vec<u64>,
    total: u64,
}

impl Histogram {
    /// One without values.
    pub fn new() -> Self {
        let classes = usize::try_from(POWERS * CLASSES).expect("a few thousand");
        Self {
            counts: vec![0; classes],
            total: 0,
        }
    }

    /// Counts `value` `times` times.
    #[inline]
    pub fn add(&mut self, value: u64, times: u64) {
        self.counts[class_of(value)] += times;
        self.total += times;
    }

    /// Forgets all values.
    pub fn clear(&mut self) {
        self.counts.fill(0);
        self.total = 0;
    }

    /// Adds the values of another.
    pub fn merge(&mut self, other: &Self) {
        for (mine, theirs) in self.counts.iter_mut().zip(&other.counts) {
            *mine += theirs;
        }
        self.total += other.total;
    }

    /// All values as (nanoseconds, count), in classes of a sixteenth of a power of two, empty ones left out.
    pub fn classes(&self) -> Vec<(f64, u64)> {
        let coarse = self
            .counts
            .chunks(usize::try_from(CLASSES / 16).expect("a few"));
        let counts = coarse.map(|counts| counts.iter().sum()).enumerate();
        counts
            .filter(|(_, count)| *count > 0)
            .map(|(nth, count)| (middle_of(nth * 4 + 2), count))
            .collect()
    }

    /// The value that `share` (0 to 1) of all values do not exceed, in nanoseconds; 0 without values.
    pub fn percentile(&self, share: f64) -> f64 {
        let mut seen = 0;
        for (class, count) in self.counts.iter().enumerate() {
            seen += count;
            if *count > 0 && seen as f64 >= share * self.total as f64 {
                return middle_of(class);
            }
        }
        0.0
    }
}

#[inline]
fn class_of(value: u64) -> usize {
    let power = value.max(1).ilog2().saturating_sub(CLASS_BITS);
    // The top bit of what is left is set from the second power on, so the classes follow each other.
    let class = u64::from(power) * CLASSES + (value >> power);
    usize::try_from(class).expect("a few thousand")
}

fn middle_of(class: usize) -> f64 {
    let class = class as u64;
    let power = (class / CLASSES).saturating_sub(1);
    let low = (class - power * CLASSES) << power;
    low as f64 + ((1_u64 << power) - 1) as f64 / 2.0
}
