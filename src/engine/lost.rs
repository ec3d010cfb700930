//! Completions of transfers whose buffers were lost while the kernel had them.

use io_uring::cqueue;

use super::{Engine, KIND_MASK, KIND_SLOT};

/// Generation and index of user data.
#[expect(clippy::cast_possible_truncation, reason = "fields of the user data")]
#[inline]
pub(super) fn fields(data: u64) -> (u32, u16) {
    ((data >> 16) as u32, data as u16)
}

impl Engine {
    /// The result of a completion. With `lost`, which [`crate::sys::sigbus::Losses::are_any`] said after the
    /// completion was there, it is `EFAULT` if the transfer may have read zeros that were put in the place of
    /// guest memory, or written where no guest looks.
    #[inline]
    pub(super) fn result(&self, entry: &cqueue::Entry, lost: bool) -> i32 {
        match lost {
            true => self.judge(entry),
            false => entry.result(),
        }
    }

    #[cold]
    fn judge(&self, entry: &cqueue::Entry) -> i32 {
        let (generation, index) = fields(entry.user_data());
        let slot = self.slots.get(usize::from(index));
        let is_lost = entry.user_data() & KIND_MASK == KIND_SLOT
            && entry.result() >= 0
            && slot.is_some_and(|slot| {
                u32::from(slot.generation) == generation && slot.is_in(&self.ring.losses)
            });
        if is_lost {
            -libc::EFAULT
        } else {
            entry.result()
        }
    }
}
