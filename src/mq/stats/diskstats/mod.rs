//! The kernel's disk statistics: the 17 numbers of /proc/diskstats and of a disk's `stat` in sysfs
//! (Documentation/admin-guide/iostats.rst), for disks the host's kernel does not know.

use std::fmt;

use serde::Serialize;

use crate::mq::request::Op;

/// What the kernel tells apart (op_stat_group, include/linux/blk_types.h): write-zeroes are writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Group {
    Read,
    Write,
    Discard,
    Flush,
}

impl Group {
    #[inline]
    fn of(op: Op) -> Self {
        match op {
            Op::Read => Group::Read,
            Op::Write | Op::WriteZeroes => Group::Write,
            Op::Discard => Group::Discard,
            Op::Flush => Group::Flush,
        }
    }
}

/// What one worker does for one disk, kept up to date by the worker.
///
/// A request is in flight from [`Self::start`] (the kernel: when it is allocated, so time spent
/// waiting for a tag or a scheduler counts) to [`Self::done`]. A requeue changes nothing here.
///
/// Time passes only where something starts or ends: between two such moments the number in flight
/// is constant, so the sums are exact to the nanosecond, where the kernel rounds to jiffies. All
/// times are of one monotonic clock, in nanoseconds.
#[derive(Clone, Copy, Debug, Default)]
pub struct Account {
    groups: [Counts; 4],
    in_flight: [u64; 4],
    total_in_flight: u64,
    busy_ns: u128,
    weighted_ns: u128,
    updated_ns: u64,
    off: bool,
}

#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    ios: u64,
    merges: u64,
    sectors: u64,
    // A million requests a second at a millisecond each fill 64 bits in half a year.
    time_ns: u128,
}

impl Account {
    /// Nothing done, nothing in flight.
    pub fn new() -> Self {
        Self::default()
    }

    #[inline]
    fn advance(&mut self, now_ns: u64) {
        let elapsed = now_ns.saturating_sub(self.updated_ns);
        if elapsed == 0 {
            // Most requests of a turn: it has one time.
            return;
        }
        self.updated_ns = now_ns;
        if self.total_in_flight != 0 {
            self.busy_ns += u128::from(elapsed);
            self.weighted_ns += u128::from(elapsed) * u128::from(self.total_in_flight);
        }
    }

    /// A request came in.
    #[inline]
    pub fn start(&mut self, now_ns: u64, op: Op) {
        self.start_many(now_ns, op, 1);
    }

    /// So many requests came in.
    #[inline]
    pub fn start_many(&mut self, now_ns: u64, op: Op, count: u64) {
        if self.off {
            return;
        }
        self.advance(now_ns);
        self.in_flight[Group::of(op) as usize] += count;
        self.total_in_flight += count;
    }

    #[inline]
    fn leave(&mut self, now_ns: u64, group: Group, count: u64) {
        self.advance(now_ns);
        let in_flight = &mut self.in_flight[group as usize];
        assert!(*in_flight >= count, "{group:?} ended that never started");
        *in_flight -= count;
        self.total_in_flight -= count;
    }

    /// A request ended, well or not, that started at `started_ns`. `sectors` are those it covered,
    /// with all that was merged into it, in units of 512 bytes; a flush's are not counted.
    #[inline]
    pub fn done(&mut self, now_ns: u64, op: Op, sectors: u64, started_ns: u64) {
        self.done_many(now_ns, op, 1, sectors, started_ns);
    }

    /// So many requests ended that all started at `started_ns` and covered so many sectors together.
    #[inline]
    pub fn done_many(&mut self, now_ns: u64, op: Op, count: u64, sectors: u64, started_ns: u64) {
        if self.off {
            return;
        }
        let group = Group::of(op);
        self.leave(now_ns, group, count);
        let counts = &mut self.groups[group as usize];
        counts.ios += count;
        counts.sectors += sectors;
        let each = now_ns.saturating_sub(started_ns);
        counts.time_ns += u128::from(each) * u128::from(count);
    }

    /// A request that was started will not be done here.
    pub fn abandoned(&mut self, now_ns: u64, op: Op) {
        if !self.off {
            self.leave(now_ns, Group::of(op), 1);
        }
    }

    /// A request was merged into another before it was started: its sectors end with the other.
    #[inline]
    pub fn merged(&mut self, op: Op) {
        self.merged_many(op, 1);
    }

    /// So many requests were.
    #[inline]
    pub fn merged_many(&mut self, op: Op, count: u64) {
        self.groups[Group::of(op) as usize].merges += count;
    }

    /// A request that was started has become a part of another and will not end by itself
    /// (blk_account_io_merge_request, block/blk-merge.c). The survivor keeps the earlier start.
    #[inline]
    pub fn merged_started(&mut self, now_ns: u64, op: Op) {
        if self.off {
            return;
        }
        self.leave(now_ns, Group::of(op), 1);
        self.merged(op);
    }

    /// Counts nothing, or everything again. Nothing may be in flight.
    pub fn set_on(&mut self, on: bool) {
        assert_eq!(self.total_in_flight, 0, "requests are in flight");
        self.off = !on;
    }

    /// Whether anything is counted.
    pub fn is_on(&self) -> bool {
        !self.off
    }

    /// What is in flight: reads, and all else (the two numbers of a disk's `inflight` in sysfs).
    pub fn in_flight(&self) -> [u64; 2] {
        let reads = self.in_flight[Group::Read as usize];
        [reads, self.total_in_flight - reads]
    }

    /// The numbers as of `now_ns`.
    pub fn at(&self, now_ns: u64) -> DiskStats {
        let mut account = *self;
        account.advance(now_ns);
        let [read, write, discard, flush] = account.groups;
        DiskStats {
            reads: read.into(),
            writes: write.into(),
            discards: discard.into(),
            flushes: flush.ios,
            flush_ns: flush.time_ns,
            in_flight: account.total_in_flight,
            busy_ns: account.busy_ns,
            weighted_ns: account.weighted_ns,
        }
    }
}

/// One direction of [`DiskStats`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Direction {
    /// Requests that ended.
    pub ios: u64,
    /// Requests that became part of another; they are not among `ios`.
    pub merges: u64,
    /// Sectors of 512 bytes, of merged requests too.
    pub sectors: u64,
    /// How long the requests that ended took together, in nanoseconds.
    #[serde(rename = "ms", serialize_with = "as_ms")]
    pub time_ns: u128,
}

impl From<Counts> for Direction {
    fn from(counts: Counts) -> Self {
        let Counts {
            ios,
            merges,
            sectors,
            time_ns,
        } = counts;
        Direction {
            ios,
            merges,
            sectors,
            time_ns,
        }
    }
}

/// The statistics of one disk at one moment. Displayed, they are the kernel's 17 numbers; in a
/// report, times are whole milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct DiskStats {
    /// Reads.
    pub reads: Direction,
    /// Writes and write-zeroes.
    pub writes: Direction,
    /// Discards.
    pub discards: Direction,
    /// Flushes that ended.
    pub flushes: u64,
    /// How long they took together, in nanoseconds.
    #[serde(rename = "flush_ms", serialize_with = "as_ms")]
    pub flush_ns: u128,
    /// Requests that started and did not end, flushes among them.
    pub in_flight: u64,
    /// How long something was in flight (the kernel's io_ticks), in nanoseconds.
    ///
    /// A sum over workers, after [`Self::add`]: while several are busy with the disk at once it
    /// grows faster than time. One busy time of the disk would take a word that all workers write.
    #[serde(rename = "busy_ms", serialize_with = "as_ms")]
    pub busy_ns: u128,
    /// The number in flight, summed over time, in nanoseconds: what the requests that ended and
    /// those still in flight have taken so far.
    #[serde(rename = "weighted_ms", serialize_with = "as_ms")]
    pub weighted_ns: u128,
}

fn ms(ns: u128) -> u64 {
    u64::try_from(ns / 1_000_000).unwrap_or(u64::MAX)
}

fn as_ms<S: serde::Serializer>(ns: &u128, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u64(ms(*ns))
}

impl DiskStats {
    /// Adds what another worker did for the same disk, or the same worker earlier.
    pub fn add(&mut self, other: &DiskStats) {
        let DiskStats {
            reads,
            writes,
            discards,
            flushes,
            flush_ns,
            in_flight,
            busy_ns,
            weighted_ns,
        } = other;
        for (sum, more) in [
            (&mut self.reads, reads),
            (&mut self.writes, writes),
            (&mut self.discards, discards),
        ] {
            sum.ios += more.ios;
            sum.merges += more.merges;
            sum.sectors += more.sectors;
            sum.time_ns += more.time_ns;
        }
        self.flushes += flushes;
        self.flush_ns += flush_ns;
        self.in_flight += in_flight;
        self.busy_ns += busy_ns;
        self.weighted_ns += weighted_ns;
    }

    /// The 17 numbers in the kernel's order, times in whole milliseconds.
    pub fn fields(&self) -> [u64; 17] {
        let [read, write, discard] = [self.reads, self.writes, self.discards]
            .map(|group| [group.ios, group.merges, group.sectors, ms(group.time_ns)]);
        let mut fields = [0; 17];
        fields[..4].copy_from_slice(&read);
        fields[4..8].copy_from_slice(&write);
        fields[8..11].copy_from_slice(&[self.in_flight, ms(self.busy_ns), ms(self.weighted_ns)]);
        fields[11..15].copy_from_slice(&discard);
        fields[15..].copy_from_slice(&[self.flushes, ms(self.flush_ns)]);
        fields
    }

    /// A line of /proc/diskstats: device number, name, and the 17 numbers.
    pub fn line(&self, major: u32, minor: u32, name: &str) -> String {
        format!("{major:4} {minor:7} {name} {self}")
    }
}

impl fmt::Display for DiskStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, field) in self.fields().iter().enumerate() {
            if at > 0 {
                f.write_str(" ")?;
            }
            field.fmt(f)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
