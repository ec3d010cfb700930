//! What a guest was told of the disk and chose, kept for the process after this one in the front end's
//! in-flight region.

use std::sync::{MutexGuard, PoisonError};

use std::fmt;

use super::Disk;
use super::write_cache::CacheState;
use crate::virtio::inflight::{InflightRegion, Notes};

/// Who writes the notes of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keeping {
    /// This process.
    Here,
    /// Not this process: another has the disk, or may have it in the next moment.
    Elsewhere,
    /// No process: one that knows no notes may have the disk in the next moment. What the guest chooses there is
    /// not noted, so nothing that is noted may be believed.
    Nowhere,
}

/// Who knows what a guest is told of its disk.
pub trait NoteKeeper: fmt::Debug + Send + Sync {
    /// The notes of a region that is made now, for a driver that begins.
    fn notes(&self) -> Notes;

    /// Uses what `region` says of a guest that runs, and keeps its notes up to date from now on.
    ///
    /// # Errors
    ///
    /// The guest was told what does not hold here: one line that says what to do.
    fn adopt(&self, region: &InflightRegion) -> Result<(), String>;

    /// The number of the disk, and its name for the log.
    fn who(&self) -> (u16, &str);
}

impl Disk {
    /// `keeping` says from now on who writes notes. Those that are there do not change by this.
    pub fn set_keeping(&self, keeping: Keeping) {
        *self.lock_keeping() = keeping;
    }

    /// Brings the notes up to date, or makes them void where no process keeps them.
    pub fn note_change(&self) {
        self.note(&self.lock_cache());
    }

    /// The same, unless the cache mode is being changed: that may take long, and ends with the same.
    pub fn note_unless_changing(&self) {
        if let Some(cache) = self.try_lock_cache() {
            self.note(&cache);
        }
    }

    /// Writes the notes down, if the front end has given a region.
    ///
    /// None are written before it is known what the guest has chosen: where there are none, the next process knows
    /// that it does not know.
    pub(super) fn note(&self, cache: &CacheState) {
        let Some(region) = cache.region() else {
            return;
        };
        // Held until the last store: after `set_keeping` nothing is written for the process before.
        let keeping = self.lock_keeping();
        match *keeping {
            Keeping::Here if cache.can_be_noted() => {
                let notes = Notes {
                    in_doubt: cache.is_in_doubt(),
                    started: cache.started,
                    ..self.notes_of(cache.is_promised())
                };
                if region.notes() != Some(notes) {
                    region.write_notes(&notes);
                }
            }
            Keeping::Here | Keeping::Elsewhere => {}
            Keeping::Nowhere => region.void_notes(),
        }
    }

    /// The front end takes its region along, maybe to a process that does not keep the notes.
    pub(super) fn leave_notes(&self, cache: &CacheState) {
        let is_void = *self.lock_keeping() == Keeping::Nowhere;
        if is_void {
            self.note(cache);
        }
    }

    fn lock_keeping(&self) -> MutexGuard<'_, Keeping> {
        self.keeping.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The notes for a driver that has not started a ring.
    fn notes_of(&self, write_through: bool) -> Notes {
        Notes {
            size_bytes: self.size_bytes(),
            logical_block_size: self.config.logical_block_size,
            read_only: self.config.read_only,
            write_through,
            in_doubt: false,
            started: false,
        }
    }

    /// What a guest that was told `told` cannot go on with here, in words that name the option.
    fn cannot_go_on(&self, told: &Notes) -> Option<String> {
        let config = &self.config;
        let (block, size) = (config.logical_block_size, self.size_bytes());
        if told.logical_block_size != block {
            return Some(format!(
                "it was started with logical blocks of {told} bytes, and has {block} here; start this daemon \
                 with --logical-block-size {told}, or restart the virtual machine",
                told = told.logical_block_size
            ));
        }
        if told.read_only != config.read_only {
            let (is, advice) = match told.read_only {
                true => ("cannot be written", "with"),
                false => ("can be written", "without"),
            };
            return Some(format!(
                "it was started with a disk that {is}; start this daemon {advice} --read-only, or restart the \
                 virtual machine"
            ));
        }
        (told.size_bytes > size).then(|| {
            format!(
                "it was told of {} bytes, and the disk has {size}; extend the image to its former size, or \
                 restart the virtual machine",
                told.size_bytes
            )
        })
    }
}

impl NoteKeeper for Disk {
    fn who(&self) -> (u16, &str) {
        (self.id.0, &self.config.serial)
    }

    fn notes(&self) -> Notes {
        self.notes_of(self.lock_cache().chosen)
    }

    fn adopt(&self, region: &InflightRegion) -> Result<(), String> {
        let notes = region.notes();
        if let Some(told) = &notes {
            if let Some(why) = self.cannot_go_on(told) {
                return Err(why);
            }
            if !told.started {
                self.driver_begins();
            }
            self.guest_has(told).map_err(|error| {
                format!("it has write-through, and the image cannot be synced: {error}")
            })?;
        }
        // A region without notes was not made for a driver that begins here.
        let started = notes.is_none_or(|notes| notes.started);
        self.keep_notes_in(region.clone(), started);
        Ok(())
    }
}
