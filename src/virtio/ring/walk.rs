//! How much of a ring was looked at: chains that take long are counted by their descriptors.

use super::Ring;

impl Ring {
    /// How many descriptors of long or odd chains were looked at since [`Ring::start_walk`]: a ring of them can
    /// have a million, where one of common chains has a few thousand.
    #[inline]
    pub fn walked(&self) -> u32 {
        self.walked
    }

    /// Begins to count [`Ring::walked`] anew.
    #[inline]
    pub fn start_walk(&mut self) {
        self.walked = 0;
    }

    pub(in crate::virtio) fn count_walk(&mut self, descriptors: u32) {
        self.walked = self.walked.saturating_add(descriptors);
    }
}
