//! A disk that grows while it is served.
//!
//! Growing is safe at any moment: nothing that is in flight changes its meaning. First every worker
//! takes requests up to the new size, then the configuration space says it, then the front end
//! hears that it changed (virtio 1.3, section 5.2.4; vhost-user, VHOST_USER_BACKEND_CONFIG_CHANGE_MSG).
//! A guest that reads the new capacity, early or late, finds it served.
//!
//! Shrinking is not safe at any moment, since a guest that believes in the old capacity has data
//! there. It does not happen: the disk keeps the size it promised, and what the image no longer has
//! fails one request at a time.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread;
use std::time::{Duration, Instant};

use crate::config::ImageSource;
use crate::error::StartError;
use crate::image::ImageKind;

use super::Disk;
use crate::worker::message::{Message, ask_all};

/// How long a look at the image is waited for. Only storage that does not answer takes longer.
const LOOK: Duration = Duration::from_secs(1);

/// Tells a front end that the disk's configuration has changed.
pub trait ConfigChanged: fmt::Debug + Send + Sync {
    /// Tells it, without waiting. `false`: there is no way to tell it.
    ///
    /// # Errors
    ///
    /// The way to the front end is closed or broken.
    fn config_changed(&self) -> io::Result<bool>;
}

/// The size of a disk, and who is told when it changes.
#[derive(Debug)]
pub(super) struct Size {
    bytes: AtomicU64,
    /// Held while it changes, which may last as long as the image's storage takes.
    changing: Mutex<()>,
    /// The one who holds it was asked to change the size, and does not only look.
    resizes: AtomicBool,
    /// The image is to be looked at.
    look: AtomicBool,
    /// The image was seen smaller than the disk, and the log said so.
    shrunk: AtomicBool,
    /// How the front end that is connected hears of it.
    front_end: Mutex<Option<Arc<dyn ConfigChanged>>>,
}

impl Size {
    pub fn new(bytes: u64) -> Size {
        Size {
            bytes: AtomicU64::new(bytes),
            changing: Mutex::new(()),
            resizes: AtomicBool::new(false),
            look: AtomicBool::new(false),
            shrunk: AtomicBool::new(false),
            front_end: Mutex::new(None),
        }
    }

    fn try_lock(&self) -> Option<MutexGuard<'_, ()>> {
        match self.changing.try_lock() {
            Ok(alone) => Some(alone),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    fn front_end(&self) -> MutexGuard<'_, Option<Arc<dyn ConfigChanged>>> {
        self.front_end
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why a disk keeps its size. Each is one line.
#[derive(Debug, thiserror::Error)]
pub enum ResizeError {
    /// Less than the guest was promised.
    #[error(
        "{wanted_bytes} bytes are less than the {now_bytes} that the guest was promised, and a disk \
         does not shrink while it is served; shut the guest down, shrink the image, start the daemon again"
    )]
    Shrinks {
        /// What it was to have.
        wanted_bytes: u64,
        /// What it has.
        now_bytes: u64,
    },
    /// Not whole logical blocks.
    #[error("{0} bytes are not a multiple of the logical block size {1}")]
    Unaligned(u64, u32),
    /// The image of a read-only disk is not ours to extend.
    #[error("the disk is read-only; extend its image, then ask without a size")]
    ReadOnly,
    /// A device is extended by whoever manages it.
    #[error("a block device has its own size, now {0} bytes; extend it, then ask without a size")]
    Device(u64),
    /// The image does not say how large it is, or does not grow.
    #[error("the image's size cannot be {what}: {source}")]
    Image {
        /// "read" or "changed".
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// Another process has an image that is locked while it is used.
    #[error("{0}")]
    InUse(StartError),
    /// Another process may have the image from now on.
    #[error("this daemon is ending; ask the one that serves the disk next")]
    Ending,
    /// A worker's engine cannot use the image so far.
    #[error("the larger image cannot be used: {0}")]
    Engine(io::Error),
}

impl Disk {
    /// Its size in bytes as things are now, a multiple of the logical block size.
    pub fn size_bytes(&self) -> u64 {
        self.size.bytes.load(Ordering::Acquire)
    }

    /// The front end that is to hear of changes; `None`: it left.
    pub fn set_notifier(&self, notifier: Option<Arc<dyn ConfigChanged>>) {
        *self.size.front_end() = notifier;
    }

    /// Begins to change the size; nothing, if it is being changed. A look at the image that is under way is waited for,
    /// because it takes no time as a rule.
    pub fn begin_resize(&self) -> Option<Resize<'_>> {
        let deadline = Instant::now() + LOOK;
        loop {
            if let Some(alone) = self.size.try_lock() {
                self.size.resizes.store(true, Ordering::SeqCst);
                return Some(Resize {
                    disk: self,
                    _alone: alone,
                });
            }
            if self.size.resizes.load(Ordering::SeqCst) || Instant::now() >= deadline {
                return None;
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// As [`Resize::follow_image`]. Does not wait for a change that is under way: the image is looked at after that.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn follow_image(&self) -> Result<u64, ResizeError> {
        self.size.look.store(true, Ordering::SeqCst);
        self.look_again()
    }

    /// Looks at the image as long as that is wished and no other thread changes the size.
    pub(crate) fn look_again(&self) -> Result<u64, ResizeError> {
        let mut outcome = Ok(self.size_bytes());
        while self.size.look.load(Ordering::SeqCst) {
            let Some(_alone) = self.size.try_lock() else {
                break;
            };
            if self.size.look.swap(false, Ordering::SeqCst) {
                outcome = self.follow();
            }
        }
        outcome
    }
}

/// A change of a disk's size. There is one at a time.
#[derive(Debug)]
pub struct Resize<'a> {
    disk: &'a Disk,
    _alone: MutexGuard<'a, ()>,
}

impl Drop for Resize<'_> {
    fn drop(&mut self) {
        self.disk.size.resizes.store(false, Ordering::SeqCst);
    }
}

impl Resize<'_> {
    /// Looks at the image, and grows if it has grown. What is behind its last whole logical block
    /// does not count. Returns the size that holds then.
    ///
    /// # Errors
    ///
    /// The image has become smaller than the disk; it cannot be looked at.
    pub fn follow_image(self) -> Result<u64, ResizeError> {
        let outcome = self.disk.follow();
        self.end(outcome)
    }

    /// Grows to `size_bytes`. A regular file is extended if it is shorter.
    ///
    /// # Errors
    ///
    /// It is less than now, or ends within a logical block; the disk is read-only or has a block
    /// device behind it, so that the size is not ours to choose; the file system refuses; another
    /// process has the image.
    pub fn grow_to(self, size_bytes: u64) -> Result<u64, ResizeError> {
        let outcome = self.disk.grow_to(size_bytes);
        self.end(outcome)
    }

    /// Ends the change, and then looks at the image if that was wished meanwhile. In this order: a wish that comes in
    /// between finds the lock free, or is seen here.
    fn end(self, outcome: Result<u64, ResizeError>) -> Result<u64, ResizeError> {
        let disk = self.disk;
        drop(self);
        if let Err(error) = disk.look_again() {
            log::warn!(disk = disk.id.0; "disk {}: {error}", disk.config.serial);
        }
        outcome
    }
}

impl Disk {
    /// As [`Resize::grow_to`], by the one who may change the size.
    fn grow_to(&self, size_bytes: u64) -> Result<u64, ResizeError> {
        let block = self.config.logical_block_size;
        if !size_bytes.is_multiple_of(block.into()) {
            return Err(ResizeError::Unaligned(size_bytes, block));
        }
        let now_bytes = self.size_bytes();
        if size_bytes < now_bytes {
            return Err(ResizeError::Shrinks {
                wanted_bytes: size_bytes,
                now_bytes,
            });
        }
        let image = &self.image;
        let there = image.current_size_bytes().map_err(read_error)?;
        match image.kind {
            ImageKind::Null => return self.adopt(size_bytes),
            ImageKind::BlockDevice if there != size_bytes => {
                return Err(ResizeError::Device(there));
            }
            ImageKind::File if there < size_bytes && image.read_only => {
                return Err(ResizeError::ReadOnly);
            }
            ImageKind::File if there < size_bytes => {
                let _used = self.begin_extension()?;
                image
                    .extend_to(size_bytes)
                    .map_err(|source| ResizeError::Image {
                        what: "changed",
                        source,
                    })?;
            }
            ImageKind::File | ImageKind::BlockDevice => {}
        }
        self.follow()
    }

    /// As [`Resize::follow_image`], by the one who may change the size.
    fn follow(&self) -> Result<u64, ResizeError> {
        let now_bytes = self.size_bytes();
        if self.image.kind == ImageKind::Null {
            return Ok(now_bytes);
        }
        let there = self.image.current_size_bytes().map_err(read_error)?;
        let whole = there - there % u64::from(self.config.logical_block_size);
        if whole < now_bytes {
            if !self.size.shrunk.swap(true, Ordering::Relaxed) {
                log::warn!(
                    disk = self.id.0; "disk {}: {} has {there} bytes, less than the {now_bytes} the guest was promised; \
                     what lies behind them cannot be read",
                    self.config.serial,
                    self.image_name()
                );
            }
            return Err(ResizeError::Shrinks {
                wanted_bytes: whole,
                now_bytes,
            });
        }
        self.size.shrunk.store(false, Ordering::Relaxed);
        if whole == now_bytes {
            return Ok(now_bytes);
        }
        if whole != there {
            log::warn!(
                disk = self.id.0; "disk {}: {} has {there} bytes; the last {} are no whole logical block and are not served",
                self.config.serial,
                self.image_name(),
                there - whole
            );
        }
        self.adopt(whole)
    }

    /// Makes a larger size hold everywhere, and tells the front end.
    fn adopt(&self, size_bytes: u64) -> Result<u64, ResizeError> {
        let before = self.size_bytes();
        if size_bytes == before {
            return Ok(before);
        }
        let outcomes = ask_all(self.workers(), |done| {
            Message::Resize(self.id, size_bytes, done)
        });
        for outcome in outcomes {
            outcome.map_err(ResizeError::Engine)?;
        }
        self.size.bytes.store(size_bytes, Ordering::Release);
        self.note_change();
        log::info!(
            disk = self.id.0; "disk {}: grew from {before} to {size_bytes} bytes",
            self.config.serial
        );
        self.tell_front_end();
        Ok(size_bytes)
    }

    /// Has the front end read the configuration space again.
    pub fn tell_front_end(&self) {
        let Some(notifier) = self.size.front_end().clone() else {
            return;
        };
        match notifier.config_changed() {
            Ok(true) => {}
            Ok(false) => log::info!(
                disk = self.id.0; "disk {}: the front end takes no notice of changes (it has not negotiated BACKEND_REQ and \
                 CONFIG); the guest sees the new size when it is started again",
                self.config.serial
            ),
            Err(error) => log::warn!(
                disk = self.id.0; "disk {}: the front end cannot be told of the new size: {error}",
                self.config.serial
            ),
        }
    }

    fn image_name(&self) -> String {
        match &self.config.image {
            ImageSource::File { path } => format!("the image {path:?}"),
            ImageSource::Null { .. } => "it".to_owned(),
        }
    }
}

fn read_error(source: io::Error) -> ResizeError {
    ResizeError::Image {
        what: "read",
        source,
    }
}
