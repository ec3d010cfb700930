//! What the front end asks for.

use crate::support::QueueSetup;
use std::str::FromStr;
use std::time::Duration;

/// Which blocks, and how many of the requests are reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pattern {
    /// Any block, instead of one after the other.
    pub random: bool,
    /// Reads in a hundred requests.
    pub read_percent: u64,
}

impl FromStr for Pattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (random, read_percent) = match text {
            "randread" => (true, 100),
            "randwrite" => (true, 0),
            "read" => (false, 100),
            "write" => (false, 0),
            _ => {
                let percent = text.strip_prefix("mix:").and_then(|p| p.parse().ok());
                let percent = percent.filter(|percent| *percent <= 100);
                (
                    true,
                    percent.ok_or("randread, randwrite, read, write or mix:PERCENT (of reads)")?,
                )
            }
        };
        Ok(Self {
            random,
            read_percent,
        })
    }
}

impl Pattern {
    /// The same in fio's words: `rw` and `rwmixread`.
    pub fn fio(self) -> (&'static str, u64) {
        let name = match (self.random, self.read_percent) {
            (true, 100) => "randread",
            (true, 0) => "randwrite",
            (true, _) => "randrw",
            (false, 100) => "read",
            (false, 0) => "write",
            (false, _) => "rw",
        };
        (name, self.read_percent)
    }
}

/// What one session does.
#[derive(Clone, Debug)]
pub struct Workload {
    /// Virtqueues.
    pub queues: usize,
    /// Requests in flight on each queue.
    pub depth: usize,
    /// Bytes of a request.
    pub block: usize,
    /// Data descriptors of a request.
    pub segments: usize,
    /// Chains in indirect tables, as Linux guests make them.
    pub indirect: bool,
    /// Which blocks, read or written.
    pub pattern: Pattern,
    /// The front end looks at the used ring all the time instead of sleeping until it is called.
    pub spin: bool,
    /// Threads of the front end; queues are dealt out to them in turn.
    pub threads: usize,
    /// Time before anything is counted.
    pub warm_up: Duration,
    /// Time that is counted.
    pub runtime: Duration,
}

impl Workload {
    /// Checks what depends on each other.
    ///
    /// # Errors
    ///
    /// One line that says which value does not fit.
    pub fn check(&self) -> Result<(), String> {
        if self.block == 0 || !self.block.is_multiple_of(512 * self.segments) {
            return Err(format!(
                "--bs {}: must be {} segments of a multiple of 512 bytes",
                self.block, self.segments
            ));
        }
        if self.ring_size() > 1024 {
            return Err(format!(
                "--depth {}: does not fit into a ring of 1024 entries",
                self.depth
            ));
        }
        Ok(())
    }

    fn ring_size(&self) -> usize {
        let entries = if self.indirect { 1 } else { self.segments + 2 };
        (self.depth * entries).next_power_of_two().max(128)
    }

    /// How its queues are made.
    pub fn queue_setup(&self) -> QueueSetup {
        let bits16 = |n: usize| u16::try_from(n).expect("checked in `check`");
        QueueSetup {
            size: bits16(self.ring_size()),
            indirect: self.indirect,
            indirect_len: bits16(self.segments + 2),
            ..QueueSetup::default()
        }
    }

    /// Bytes of guest memory for buffers and rings.
    pub fn memory(&self) -> usize {
        let ring = self.ring_size() * (16 + 2 + 8 + 64 + 16 * (self.segments + 2)) + (64 << 10);
        let buffers = self.depth * self.block.next_multiple_of(4096);
        (self.queues * (ring + buffers) + (1 << 20)).next_multiple_of(2 << 20)
    }
}
