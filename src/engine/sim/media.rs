//! What is really on a disk: what a power cut could leave of it.
//!
//! Between two syncs a disk, its cache and the host's page cache may write what they were given in any
//! order, in part, or not at all; a sector is the unit that is written whole or not. So at every moment
//! each sector holds one of several contents, independently of all others: the one that was made
//! durable last, or anything that was sent to it since, done or not. A crash leaves one of the
//! combinations.

use std::ops::Range;
use std::rc::Rc;

use io_uring::opcode;

use super::Sqe;

const SECTOR: usize = 512;

/// What a sector holds.
pub(in crate::engine) type Content = Rc<[u8; SECTOR]>;

/// What a command that was sent will do to the media, to be handed back when it ended.
#[derive(Debug, Default)]
pub(super) enum Effect {
    /// Nothing.
    #[default]
    None,
    /// Writes these sectors.
    Write {
        id: u64,
        sectors: Range<usize>,
        durable: bool,
    },
    /// Zeroes these.
    Zero { id: u64, sectors: Range<usize> },
    /// Makes durable what was done by the time it was sent.
    Sync { sent: u64 },
}

/// Something that was sent to a sector after what is durable there.
struct Sent {
    id: u64,
    content: Content,
    /// When the kernel said that it is done.
    done: Option<u64>,
    /// Given up by the page cache, which takes it for clean: no later sync writes it.
    dropped: bool,
}

struct Track {
    durable: Content,
    /// In the order in which they were sent.
    since: Vec<Sent>,
}

/// How a disk keeps its promises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::engine) enum Honesty {
    Honest,
    /// A sync does nothing.
    IgnoresSync,
    /// `RWF_DSYNC` does nothing.
    IgnoresDsync,
}

/// See the module.
pub(in crate::engine) struct Media {
    sectors: Vec<Track>,
    zeroes: Content,
    events: u64,
    honesty: Honesty,
    /// Sectors that changed since somebody asked.
    changed: Vec<usize>,
}

impl Media {
    pub fn new(sectors: usize, honesty: Honesty) -> Media {
        let zeroes: Content = Rc::new([0; SECTOR]);
        let track = || Track {
            durable: Rc::clone(&zeroes),
            since: Vec::new(),
        };
        Media {
            sectors: (0..sectors).map(|_| track()).collect(),
            zeroes,
            events: 0,
            honesty,
            changed: Vec::new(),
        }
    }

    /// A command is with the kernel: from now on, all or some of it may be on the media.
    pub(super) fn sent(&mut self, sqe: &Sqe) -> Effect {
        self.events += 1;
        let id = self.events;
        let at = |bytes: u64| usize::try_from(bytes).expect("a small disk") / SECTOR;
        match sqe.opcode {
            opcode::Write::CODE | opcode::Writev::CODE => {
                let bytes = sqe.bytes();
                let first = at(sqe.off);
                for (nth, sector) in bytes.chunks_exact(SECTOR).enumerate() {
                    let content = Rc::new(sector.try_into().expect("a sector"));
                    self.push(first + nth, id, content);
                }
                Effect::Write {
                    id,
                    sectors: first..first + bytes.len() / SECTOR,
                    durable: sqe.rw_flags & libc::RWF_DSYNC.cast_unsigned() != 0,
                }
            }
            opcode::Fallocate::CODE | opcode::UringCmd16::CODE => {
                let (offset, len) = sqe.range();
                let sectors = at(offset)..at(offset + len);
                for sector in sectors.clone() {
                    let zeroes = Rc::clone(&self.zeroes);
                    self.push(sector, id, zeroes);
                }
                Effect::Zero { id, sectors }
            }
            opcode::Fsync::CODE => Effect::Sync { sent: id },
            _ => Effect::None,
        }
    }

    fn push(&mut self, sector: usize, id: u64, content: Content) {
        self.changed.push(sector);
        self.sectors[sector].since.push(Sent {
            id,
            content,
            done: None,
            dropped: false,
        });
    }

    /// The kernel answered `res`. What failed may be on the media all the same, in part.
    pub(super) fn ended(&mut self, effect: Effect, res: i32, direct: bool) {
        self.events += 1;
        match effect {
            Effect::None => {}
            Effect::Write {
                id,
                sectors,
                durable,
            } => {
                let whole = usize::try_from(res).unwrap_or(0) / SECTOR;
                let durable = durable && self.honesty != Honesty::IgnoresDsync;
                for sector in sectors.take(whole) {
                    self.done(sector, id, durable);
                }
            }
            Effect::Zero { id, sectors } if res >= 0 => {
                sectors.for_each(|sector| self.done(sector, id, false));
            }
            Effect::Zero { .. } => {}
            Effect::Sync { sent } if res >= 0 => self.synced(sent),
            // Write-back failed, and the page cache takes its pages for clean (fsync(2), "NOTES").
            Effect::Sync { .. } if !direct && res == -libc::EIO => self.drop_pages(),
            Effect::Sync { .. } => {}
        }
    }

    fn done(&mut self, sector: usize, id: u64, durable: bool) {
        let now = self.events;
        let track = &mut self.sectors[sector];
        // Something later may be durable already, and then this is past.
        let Some(at) = track.since.iter().position(|sent| sent.id == id) else {
            return;
        };
        track.since[at].done = Some(now);
        if durable {
            self.settle(sector, at);
        }
    }

    /// What is at `at` of a sector's list is durable, and what came before is gone.
    fn settle(&mut self, sector: usize, at: usize) {
        self.changed.push(sector);
        let track = &mut self.sectors[sector];
        let last = track.since.drain(..=at).next_back();
        track.durable = last.expect("it has that many").content;
    }

    /// All that was done before `by` is durable, but what the page cache has dropped.
    fn synced(&mut self, by: u64) {
        if self.honesty == Honesty::IgnoresSync {
            return;
        }
        for sector in 0..self.sectors.len() {
            let covered = |sent: &Sent| sent.done.is_some_and(|at| at < by) && !sent.dropped;
            if let Some(at) = self.sectors[sector].since.iter().rposition(covered) {
                self.settle(sector, at);
            }
        }
    }

    /// A sync by somebody else, of all that is done; `false` if it failed.
    pub fn sync(&mut self, works: bool, direct: bool) {
        self.events += 1;
        let sent = self.events;
        let res = if works { 0 } else { -libc::EIO };
        self.ended(Effect::Sync { sent }, res, direct);
    }

    fn drop_pages(&mut self) {
        for sent in self.sectors.iter_mut().flat_map(|track| &mut track.since) {
            // What is under way may have been in the page cache already.
            sent.dropped = true;
        }
    }

    /// What a sector may hold after a crash.
    pub fn may_hold(&self, sector: usize) -> impl Iterator<Item = &Content> {
        let track = &self.sectors[sector];
        std::iter::once(&track.durable).chain(track.since.iter().map(|sent| &sent.content))
    }

    /// The sectors of which a crash leaves other things than before, since this was asked last.
    pub fn take_changed(&mut self) -> Vec<usize> {
        std::mem::take(&mut self.changed)
    }

    /// How many images a crash can leave, counting equal ones more than once.
    pub fn images(&self) -> u64 {
        let choices = self
            .sectors
            .iter()
            .map(|track| 1 + track.since.len() as u64);
        choices.fold(1, u64::saturating_mul)
    }

    /// The image a crash leaves if `pick(n)` says for each sector which of its `n` contents.
    pub fn image(&self, mut pick: impl FnMut(usize) -> usize) -> Vec<u8> {
        let mut image = Vec::with_capacity(self.sectors.len() * SECTOR);
        for track in &self.sectors {
            let content = match pick(1 + track.since.len()) {
                0 => &track.durable,
                nth => &track.since[nth - 1].content,
            };
            image.extend_from_slice(&content[..]);
        }
        image
    }

    /// Image number `nth` of [`Self::images`].
    pub fn nth_image(&self, mut nth: u64) -> Vec<u8> {
        self.image(|choices| {
            let choices = choices as u64;
            let picked = nth % choices;
            nth /= choices;
            usize::try_from(picked).expect("a small number")
        })
    }
}
