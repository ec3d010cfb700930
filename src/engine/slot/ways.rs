//! Which ways to discard and to zero a disk has.

use super::Method;
use crate::engine::target::Abilities;

/// Whether an errno says "not in this way" rather than "this went wrong".
pub(super) fn is_refusal(errno: i32) -> bool {
    matches!(
        errno,
        libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY | libc::ENODEV | libc::EINVAL
    )
}

impl Abilities {
    pub(super) fn allows(self, method: Method) -> bool {
        match method {
            Method::Discard => self.discard,
            Method::Punch => self.punch,
            Method::ZeroRange => self.zero_range,
            Method::Zero => self.zero,
            Method::Write => true,
        }
    }

    pub(super) fn strike_out(&mut self, method: Method) {
        match method {
            Method::Discard => self.discard = false,
            Method::Punch => self.punch = false,
            Method::ZeroRange => self.zero_range = false,
            Method::Zero | Method::Write => {}
        }
    }
}
