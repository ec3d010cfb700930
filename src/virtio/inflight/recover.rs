//! What the process before left in a queue's record.

use std::sync::atomic::Ordering;

use super::{InflightQueue, Tracker, VERSION, at, kill_point};

/// What is wrong with a queue's record. All of it is the front end's doing: it gave a region that no back
/// end has written, or one of another ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InflightError {
    /// A layout of the future.
    #[error("the in-flight region has version {0}, this daemon knows {VERSION}")]
    Version(u16),
    /// A layout of the future.
    #[error("the in-flight region has feature bits {0:#x}, this daemon knows none")]
    Features(u64),
    /// The record is of a ring of another size than the front end says.
    #[error("the in-flight region has {found} entries a queue, the front end said {said}")]
    Entries {
        /// What the record says.
        found: u16,
        /// What the front end said with the region.
        said: u16,
    },
    /// A flag is neither set nor clear.
    #[error("the in-flight region says {value} of head {head}, neither 0 nor 1")]
    Flag {
        /// The entry.
        head: u16,
        /// Its flag.
        value: u8,
    },
    /// A chain is in flight whose head the ring does not have.
    #[error("the in-flight region has head {head} in flight, the ring has {size} descriptors")]
    Head {
        /// The entry.
        head: u16,
        /// The ring's size.
        size: u16,
    },
    /// The used indices are further apart than a batch can be.
    #[error("the in-flight region is of used index {recorded}, the ring of {size} is at {used}")]
    UsedIndex {
        /// What the record says.
        recorded: u16,
        /// What the ring says.
        used: u16,
        /// The ring's size.
        size: u16,
    },
    /// The list of the last batch leads out of the ring, or to a head it has led to already.
    #[error("the in-flight region's last batch leads to head {head} after {steps} steps")]
    Batch {
        /// Where it leads.
        head: u16,
        /// How many heads it led to before.
        steps: u16,
    },
}

/// Where a ring goes on.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::virtio) struct Recovered {
    /// Chains to be taken again, in the order in which they were taken first.
    pub(in crate::virtio) heads: Vec<u16>,
    /// The available index of the next chain after them.
    pub(in crate::virtio) next_avail: u16,
}

impl Tracker {
    /// Takes up the record for a ring of `ring_size` entries whose used index is `used`: a new one is
    /// initialized, and one that was used before says what is in flight. In both cases all that the driver
    /// waits for and that is not in flight has yet to be taken: nobody else will. On an error the record stays
    /// as it was.
    pub(in crate::virtio) fn recover(
        queue: InflightQueue,
        ring_size: u16,
        used: u16,
    ) -> Result<(Tracker, Recovered), InflightError> {
        let (counter, recovered) = match queue.u16(at::VERSION).load(Ordering::Acquire) {
            0 => {
                initialize(&queue, used);
                let recovered = Recovered {
                    heads: Vec::new(),
                    next_avail: used,
                };
                (0, recovered)
            }
            VERSION => take_up(&queue, ring_size, used)?,
            other => return Err(InflightError::Version(other)),
        };
        let tracker = Tracker {
            queue,
            counter,
            last: 0,
        };
        Ok((tracker, recovered))
    }
}

/// Makes a record of one that was never used. The version comes last: until then it counts as never used.
fn initialize(queue: &InflightQueue, used: u16) {
    for head in 0..queue.size {
        kill_point();
        queue.inflight(head).store(0, Ordering::Relaxed);
        queue.next(head).store(0, Ordering::Relaxed);
        queue.counter(head).store(0, Ordering::Relaxed);
    }
    queue.features().store(0, Ordering::Relaxed);
    queue.u16(at::DESC_NUM).store(queue.size, Ordering::Relaxed);
    queue.u16(at::LAST_BATCH_HEAD).store(0, Ordering::Relaxed);
    queue.u16(at::USED_IDX).store(used, Ordering::Relaxed);
    kill_point();
    queue.u16(at::VERSION).store(VERSION, Ordering::Release);
}

/// Reads a record once, checks it, and clears the flags that the last batch has left. Returns the next
/// counter beside what was found.
fn take_up(
    queue: &InflightQueue,
    ring_size: u16,
    used: u16,
) -> Result<(u64, Recovered), InflightError> {
    let features = queue.features().load(Ordering::Relaxed);
    if features != 0 {
        return Err(InflightError::Features(features));
    }
    let entries = queue.u16(at::DESC_NUM).load(Ordering::Relaxed);
    if entries != queue.size {
        return Err(InflightError::Entries {
            found: entries,
            said: queue.size,
        });
    }
    let mut flagged = Vec::with_capacity(usize::from(ring_size));
    for head in 0..entries {
        match queue.inflight(head).load(Ordering::Relaxed) {
            0 => {}
            1 if head < ring_size => flagged.push(head),
            1 => {
                return Err(InflightError::Head {
                    head,
                    size: ring_size,
                });
            }
            value => return Err(InflightError::Flag { head, value }),
        }
    }
    let recorded = queue.u16(at::USED_IDX).load(Ordering::Relaxed);
    // A ring with nothing in flight may also have been reset since, and its index begun anew.
    if used != recorded && !flagged.is_empty() {
        let batch = last_batch(queue, ring_size, recorded, used)?;
        flagged.retain(|head| !batch.contains(head));
        for head in batch {
            kill_point();
            queue.inflight(head).store(0, Ordering::Release);
        }
    }
    kill_point();
    queue.u16(at::USED_IDX).store(used, Ordering::Release);

    let mut chains: Vec<(u64, u16)> = flagged
        .into_iter()
        .map(|head| (queue.counter(head).load(Ordering::Relaxed), head))
        .collect();
    chains.sort_unstable();
    let counter = chains.last().map_or(0, |(last, _)| last.wrapping_add(1));
    let heads: Vec<u16> = chains.into_iter().map(|(_, head)| head).collect();
    let count = u16::try_from(heads.len()).expect("at most the ring's size");
    let next_avail = used.wrapping_add(count);
    Ok((counter, Recovered { heads, next_avail }))
}

/// The heads that were published with `used` while the record still says `recorded`.
fn last_batch(
    queue: &InflightQueue,
    ring_size: u16,
    recorded: u16,
    used: u16,
) -> Result<Vec<u16>, InflightError> {
    let count = used.wrapping_sub(recorded);
    if count > ring_size {
        return Err(InflightError::UsedIndex {
            recorded,
            used,
            size: ring_size,
        });
    }
    let mut seen = vec![false; usize::from(ring_size)];
    let mut batch = Vec::with_capacity(usize::from(count));
    let mut head = queue.u16(at::LAST_BATCH_HEAD).load(Ordering::Relaxed);
    for steps in 0..count {
        match seen.get_mut(usize::from(head)) {
            Some(seen) if !*seen => *seen = true,
            _ => return Err(InflightError::Batch { head, steps }),
        }
        batch.push(head);
        head = queue.next(head).load(Ordering::Relaxed);
    }
    Ok(batch)
}
