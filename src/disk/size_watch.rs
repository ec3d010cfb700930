//! Notices that an image has grown, at no cost while none does.
//!
//! A regular file is watched for being closed by somebody who could write to it (inotify,
//! IN_CLOSE_WRITE): that is the last thing whoever extends it does, and the only event that our own
//! writes do not cause. A block device's size is announced by the kernel to all who listen for its
//! events (a uevent "change", from set_capacity_and_notify in block/genhd.c and from the device
//! mapper). Both are only a reason to look.

use std::collections::BTreeSet;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::thread::{self, JoinHandle};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::inotify;
use rustix::io::Errno;
use rustix::net::netlink::{self, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, recv};

use crate::image::{Image, ImageKind};

use crate::mq::ids::DiskId;

use super::{Disk, ResizeError};
use crate::sys::listener::Stop;

/// Enough for a few calls and a line of the log.
const STACK_BYTES: usize = 128 * 1024;

/// The kernel's own uevents, not udev's (NETLINK_KOBJECT_UEVENT).
const KERNEL_EVENTS: u32 = 1;

/// A uevent is 2 KiB at most (UEVENT_BUFFER_SIZE) and its path behind it.
const EVENT_BYTES: usize = 8192;

/// Watches the images of all disks.
#[derive(Debug)]
pub struct GrowthWatch {
    /// Only there if there are files, and if they can be watched.
    files: Option<OwnedFd>,
    /// For each inotify watch, the place of its disk.
    watched: Vec<(i32, usize)>,
    /// Only there if there are devices.
    events: Option<OwnedFd>,
    /// For each device number, the place of its disk.
    devices: Vec<(u64, usize)>,
    disks: Vec<Arc<Disk>>,
}

impl GrowthWatch {
    /// Begins to watch, with whatever permissions the images were opened with. One that cannot be watched
    /// is followed when a user says so, and the log tells that.
    pub fn new(images: &[Image]) -> GrowthWatch {
        let mut watch = GrowthWatch {
            files: None,
            watched: Vec::new(),
            events: None,
            devices: Vec::new(),
            disks: Vec::new(),
        };
        for (place, image) in images.iter().enumerate() {
            let watching = match image.kind {
                ImageKind::File => watch.add_file(image, place),
                ImageKind::BlockDevice => watch.add_device(image, place),
                ImageKind::Null => continue,
            };
            if let Err(error) = watching {
                log::warn!(
                    disk = place; "the size of the image of disk @{place} cannot be watched: {error}{}; use blkmqctl resize",
                    limit_of(&error)
                );
            }
        }
        watch
    }

    fn add_file(&mut self, image: &Image, place: usize) -> io::Result<()> {
        let files = match &self.files {
            Some(files) => files,
            None => {
                let flags = inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK;
                self.files.insert(inotify::init(flags)?)
            }
        };
        // By descriptor, so that it is this file and not the one that has its name by now.
        let path = format!("/proc/self/fd/{}", image.file.as_raw_fd());
        let id = inotify::add_watch(files, path, inotify::WatchFlags::CLOSE_WRITE)?;
        self.watched.push((id, place));
        Ok(())
    }

    fn add_device(&mut self, image: &Image, place: usize) -> io::Result<()> {
        if self.events.is_none() {
            let socket = rustix::net::socket_with(
                AddressFamily::NETLINK,
                SocketType::DGRAM,
                SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
                Some(netlink::KOBJECT_UEVENT),
            )?;
            rustix::net::bind(&socket, &SocketAddrNetlink::new(0, KERNEL_EVENTS))?;
            self.events = Some(socket);
        }
        let number = image.file.metadata()?.rdev();
        self.devices.push((number, place));
        Ok(())
    }

    /// Watches for `disks`, which have the images, on a thread of its own, which sleeps until an image may
    /// have grown.
    ///
    /// # Errors
    ///
    /// The thread cannot be started.
    pub fn spawn(
        mut self,
        disks: &[Arc<Disk>],
        stop: &Stop,
        begin: Receiver<()>,
    ) -> io::Result<Option<JoinHandle<()>>> {
        if self.watched.is_empty() && self.devices.is_empty() {
            return Ok(None);
        }
        self.disks = disks.to_vec();
        let stop = stop.watch()?;
        thread::Builder::new()
            .name("growth".to_owned())
            .stack_size(STACK_BYTES)
            .spawn(move || {
                if begin.recv().is_ok() {
                    self.run(&stop);
                }
            })
            .map(Some)
    }

    fn run(self, stop: &OwnedFd) {
        let mut looks = Vec::new();
        loop {
            let mut fds = vec![PollFd::new(stop, PollFlags::IN)];
            for source in self.files.iter().chain(&self.events) {
                fds.push(PollFd::new(source, PollFlags::IN));
            }
            match poll(&mut fds, None) {
                Err(Errno::INTR) => continue,
                Err(_) => return,
                Ok(_) if !fds[0].revents().is_empty() => return,
                Ok(_) => {}
            }
            for disk in self.changed() {
                if !disk.image().file_system.is_remote() {
                    follow(disk);
                    continue;
                }
                // The answer may never come, and others are not to wait for it. A second look is left to the
                // first one, which sees all that a third would.
                looks.retain(|(_, look): &(DiskId, JoinHandle<()>)| !look.is_finished());
                if looks.iter().filter(|(id, _)| *id == disk.id).count() == 2 {
                    continue;
                }
                let (id, disk) = (disk.id, Arc::clone(disk));
                let look = thread::Builder::new()
                    .name("growth-remote".to_owned())
                    .stack_size(STACK_BYTES)
                    .spawn(move || follow(&disk));
                match look {
                    Ok(look) => looks.push((id, look)),
                    Err(error) => {
                        log::warn!("no thread can be started to look at an image's size: {error}");
                    }
                }
            }
        }
    }

    /// The disks whose images may have changed since the last time, each once.
    fn changed(&self) -> Vec<&Arc<Disk>> {
        let mut changed = BTreeSet::new();
        if let Some(files) = &self.files {
            let mut space = [MaybeUninit::uninit(); 4096];
            let mut reader = inotify::Reader::new(files, &mut space);
            while let Ok(event) = reader.next() {
                let lost = event.events().contains(inotify::ReadFlags::QUEUE_OVERFLOW);
                let of_event = |id: i32| lost || id == event.wd();
                let of_event = self.watched.iter().filter(|(id, _)| of_event(*id));
                changed.extend(of_event.map(|(_, place)| *place));
            }
        }
        let mut bytes = [0; EVENT_BYTES];
        while let Some(events) = &self.events {
            match recv(events, &mut bytes, RecvFlags::DONTWAIT) {
                Ok((length, _)) => {
                    let number = changed_device(&bytes[..length]);
                    let of_event = self.devices.iter().filter(|(n, _)| Some(*n) == number);
                    changed.extend(of_event.map(|(_, place)| *place));
                }
                Err(Errno::INTR) => {}
                // Some were lost: it may have been any.
                Err(Errno::NOBUFS) => changed.extend(self.devices.iter().map(|(_, place)| *place)),
                Err(_) => break,
            }
        }
        changed
            .into_iter()
            .map(|place| &self.disks[place])
            .collect()
    }
}

/// The limit that stands behind an error of inotify, with the words that lead to it.
fn limit_of(error: &io::Error) -> &'static str {
    match Errno::from_io_error(error) {
        Some(Errno::MFILE) => {
            " (the user's inotify instances are used up: raise fs.inotify.max_user_instances with sysctl)"
        }
        Some(Errno::NOSPC) => {
            " (the user's inotify watches are used up: raise fs.inotify.max_user_watches with sysctl)"
        }
        _ => "",
    }
}

fn follow(disk: &Disk) {
    match disk.follow_image() {
        // Said in the log when it is noticed.
        Ok(_) | Err(ResizeError::Shrinks { .. }) => {}
        Err(error) => {
            log::warn!(disk = disk.id.0; "disk {}: {error}", disk.config.serial);
        }
    }
}

/// The device number in a uevent that says that a block device changed: `change@/devices/...`, then
/// `KEY=VALUE` parts, each with a zero byte behind it.
fn changed_device(event: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(event).ok()?;
    let mut parts = text.split('\0');
    if !parts.next()?.starts_with("change@") {
        return None;
    }
    let (mut block, mut major, mut minor) = (false, None, None);
    for part in parts {
        match part.split_once('=') {
            Some(("SUBSYSTEM", subsystem)) => block = subsystem == "block",
            Some(("MAJOR", number)) => major = number.parse().ok(),
            Some(("MINOR", number)) => minor = number.parse().ok(),
            _ => {}
        }
    }
    block.then_some(rustix::fs::makedev(major?, minor?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_devices_change_is_told_from_other_events() {
        let event = |text: &str| changed_device(text.replace(' ', "\0").as_bytes());
        let change = "change@/devices/virtual/block/loop3 ACTION=change SUBSYSTEM=block MAJOR=7 MINOR=3 RESIZE=1 ";
        assert_eq!(event(change), Some(rustix::fs::makedev(7, 3)));
        assert_eq!(event(&change.replace("change@", "add@")), None);
        assert_eq!(event(&change.replace("=block", "=tty")), None);
        assert_eq!(event(&change.replace("MINOR=3 ", "")), None);
        assert_eq!(event(&change.replace("MINOR=3", "MINOR=x")), None);
        assert_eq!(changed_device(&[0xff, 0, 1]), None);
    }
}
