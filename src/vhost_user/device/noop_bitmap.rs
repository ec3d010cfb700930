//! The bitmap of the vhost-user crate, which is not used: pages are marked by the workers (`session_state/dirty_log.rs`).

use std::io;
use std::sync::Arc;

use vhost_user_backend::bitmap::{BitmapReplace, MemRegionBitmap, MmapLogReg};
use vm_memory::GuestMemoryRegion;
use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};
use vm_memory::mmap::NewBitmap;

/// The crate's bitmap of a memory region, of which we want nothing: it is there to be handed a log, as the
/// crate does before it answers SET_LOG_BASE.
#[derive(Clone, Debug, Default)]
pub struct NoopBitmap;

impl Bitmap for NoopBitmap {
    fn mark_dirty(&self, _offset: usize, _len: usize) {}

    fn dirty_at(&self, _offset: usize) -> bool {
        false
    }

    fn slice_at(&self, _offset: usize) -> NoopBitmap {
        NoopBitmap
    }
}

impl BitmapSlice for NoopBitmap {}

impl WithBitmapSlice<'_> for NoopBitmap {
    type S = NoopBitmap;
}

impl NewBitmap for NoopBitmap {
    fn with_len(_len: usize) -> NoopBitmap {
        NoopBitmap
    }
}

impl MemRegionBitmap for NoopBitmap {
    fn new<R: GuestMemoryRegion>(_region: &R, _log: Arc<MmapLogReg>) -> io::Result<NoopBitmap> {
        Ok(NoopBitmap)
    }
}

impl BitmapReplace for NoopBitmap {
    type InnerBitmap = NoopBitmap;

    fn replace(&self, _bitmap: NoopBitmap) {}
}
