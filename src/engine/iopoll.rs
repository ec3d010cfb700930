//! Transfers whose completion is found by polling the device.
//!
//! They have a ring of their own, because in such a ring nothing else can be waited for. While one is
//! under way the worker does not sleep: each of its turns polls the device once (`io_uring_enter` with
//! GETEVENTS), beside everything else it looks at.

use std::io;
use std::mem::MaybeUninit;
use std::time::Duration;

use io_uring::cqueue;

use super::Engine;
use crate::engine::target::{Disk, IoPoll, Target};
use crate::engine::uring::{Ask, REAP_BATCH, Ring};
use crate::engine::{Event, MAX_DISKS};

/// The second ring of an engine.
#[derive(Debug)]
pub(super) struct Polled {
    pub(super) ring: Ring,
    /// Entries pushed and not reaped.
    pub(super) in_flight: u32,
}

impl Engine {
    /// Makes the ring with the first disk that wants it. Without one such a disk is not polled.
    pub(super) fn begin_polling(&mut self, disk: &mut Disk) {
        let Target::File(file) = &disk.target else {
            return;
        };
        if file.io_poll == IoPoll::Never {
            return;
        }
        if self.polled.is_none() {
            let ask = Ask {
                polled: true,
                fixed_files: self.ring.has_files(),
                restricted: self.ring.restricted,
                ..Ask::ALL
            };
            let depth = u32::try_from(self.slots.len()).expect("tags are numbered by u16");
            let entries = depth.next_power_of_two();
            match Ring::new(entries, entries * 2, &[MAX_DISKS.into()], ask) {
                Ok(ring) => self.polled = Some(Polled { ring, in_flight: 0 }),
                Err(error) => log::warn!("devices are not polled: {error}"),
            }
        }
        // An entry names the file in the same way whichever ring it goes to.
        disk.can.poll = match &self.polled {
            Some(polled) => !disk.registered || polled.ring.register_file(disk.index, disk.fd),
            None => false,
        };
    }

    pub(super) fn end_polling(&mut self, index: u16) {
        if let Some(polled) = &self.polled {
            polled.ring.unregister_file(index);
        }
    }

    /// Whether a device has to be polled.
    #[inline]
    pub(super) fn is_polling(&self) -> bool {
        self.polled.as_ref().is_some_and(|p| p.in_flight > 0)
    }

    /// Whether that is worth doing at once: not where the kernel refuses to be entered for it.
    #[inline]
    pub(super) fn polls_now(&self) -> bool {
        self.polled
            .as_ref()
            .is_some_and(|p| p.in_flight > 0 && !p.ring.is_refused())
    }

    /// How long that can wait, for a caller that is going to; `None`: nothing is polled for.
    #[inline]
    pub(super) fn pause_polling(&mut self) -> Option<Duration> {
        let polled = self.polled.as_mut()?;
        (polled.in_flight > 0).then(|| polled.ring.pause())
    }

    #[inline]
    pub(super) fn submit_polled(&mut self) -> io::Result<()> {
        match &mut self.polled {
            Some(polled) if polled.in_flight > 0 => polled.ring.submit(&mut self.counters),
            _ => Ok(()),
        }
    }

    /// Polls the devices once and gives what has ended to whom it belongs; returns how many. Kept out
    /// of the turns of workers that have nothing to poll for, which it would make longer.
    #[inline(never)]
    pub(super) fn reap_polled(&mut self, on: &mut impl FnMut(Event)) -> io::Result<usize> {
        if let Some(polled) = &mut self.polled {
            polled.ring.enter_events(&mut self.counters)?;
        }
        let mut batch = [const { MaybeUninit::<cqueue::Entry>::uninit() }; REAP_BATCH];
        let mut reaped = 0;
        while let Some(polled) = &mut self.polled {
            let entries = polled.ring.take(&mut batch);
            // What goes on from here is pushed and counted anew.
            polled.in_flight -= u32::try_from(entries.len()).expect("REAP_BATCH at most");
            reaped += entries.len();
            let lost = self.ring.losses.are_any();
            for entry in entries {
                let result = self.result(entry, lost);
                self.apply(entry.user_data(), result, entry.flags(), on);
            }
            if entries.len() < REAP_BATCH {
                break;
            }
        }
        Ok(reaped)
    }
}
