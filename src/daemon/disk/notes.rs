//! What a guest was told of the disk and chose, kept for the process after this one in the front end's
//! in-flight region.

use super::Disk;
use super::cache::CacheState;
use crate::daemon::session::NoteKeeper;
use crate::virtio::inflight::{InflightRegion, Notes};

impl Disk {
    /// Writes the notes down, if the front end has given a region. `started` is whether a ring starts now.
    pub(super) fn note(&self, cache: &CacheState, started: bool) {
        let Some(region) = cache.region() else {
            return;
        };
        let before = region.notes();
        let notes = Notes {
            started: started || before.is_some_and(|notes| notes.started),
            ..self.notes_of(cache.is_promised())
        };
        if before != Some(notes) {
            region.write_notes(&notes);
        }
    }

    /// The notes for a driver that has not started a ring.
    fn notes_of(&self, write_through: bool) -> Notes {
        Notes {
            size_bytes: self.size_bytes(),
            logical_block_size: self.config.logical_block_size,
            read_only: self.config.read_only,
            write_through,
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
            self.guest_has(told.write_through).map_err(|error| {
                format!("it has write-through, and the image cannot be synced: {error}")
            })?;
        }
        let started = notes.is_some_and(|notes| notes.started);
        self.keep_notes_in(region.clone(), started);
        Ok(())
    }
}
