//! Rings that were stopped for a snapshot, and go on in place.

use std::mem;

use vhost_user_backend::VringT;

use super::{Own, Vring};

/// How far GET_VRING_BASE has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Closing {
    #[default]
    No,
    /// The ring has stopped; the kick is dropped next.
    Kick,
    /// The call is dropped next.
    Call,
}

impl Own {
    /// Whether the crate drops the kick by itself, in which case it is parked.
    pub(super) fn close_kick(&mut self) -> bool {
        let closing = mem::take(&mut self.closing) == Closing::Kick;
        self.parked = None;
        if closing {
            self.parked = Some([self.kick.take(), None]);
            self.closing = Closing::Call;
        }
        closing
    }

    /// The crate drops the call by itself, or the front end sets it.
    pub(super) fn close_call(&mut self) {
        if mem::take(&mut self.closing) == Closing::Call
            && let Some([_, call]) = &mut self.parked
        {
            *call = self.call.take();
        }
    }
}

impl Vring {
    /// Starts a ring again that is only enabled after a snapshot.
    ///
    /// Cloud Hypervisor v53.0 stops the rings before it has the device's state saved, and starts none when the
    /// guest goes on in place: it enables them, as it does after any other pause. So a ring is started with what
    /// it had if the state was saved since it stopped, and nothing at all was set up since then.
    pub(super) fn resume_after_snapshot(&self) {
        if !self.link.session.is_only_saved() {
            return;
        }
        let mut own = self.link.own();
        let Some([kick, call]) = own.parked.take() else {
            return;
        };
        (own.kick, own.call) = (kick, call);
        drop(own);
        log::info!(
            disk = self.link.ring.disk.0; "{}: goes on after a snapshot", self.link.ring
        );
        self.inner.set_queue_ready(true);
        self.start();
    }
}
