//! The eventfds of a ring: how the guest and we wake each other.

use std::os::fd::OwnedFd;

use crate::engine::{CallSlot, Engine};
use crate::mq::ids::{HctxId, RingId};

use super::super::message::FdRole;
use super::{Worker, heat};

impl Worker {
    pub(super) fn set_fd(&mut self, hctx: HctxId, role: FdRole, fd: Option<OwnedFd>) {
        let token = u32::from(hctx.0);
        let port = self.ports[hctx.index()].as_mut().expect("the port exists");
        match role {
            FdRole::Kick => {
                if std::mem::take(&mut port.has_kick) {
                    self.engine.unwatch(token);
                }
                if let Some(fd) = fd {
                    match self.engine.watch(fd, token) {
                        Ok(()) => port.has_kick = true,
                        Err(error) => {
                            log::warn!("{}: the kick fd cannot be watched: {error}", port.id);
                        }
                    }
                }
                // A kick may have come before we listened.
                heat(&mut self.hot, port, hctx);
            }
            FdRole::Call => {
                replace_call(&mut self.engine, &mut port.call, port.id, fd, token);
                // Whoever waits on the new fd has not been told of what was used before.
                port.ring.request_call();
                super::touch(&mut self.touched, port, hctx);
            }
            FdRole::Err => replace_call(&mut self.engine, &mut port.err, port.id, fd, token),
        }
    }
}

fn replace_call(
    engine: &mut Engine,
    slot: &mut Option<CallSlot>,
    ring: RingId,
    fd: Option<OwnedFd>,
    token: u32,
) {
    if let Some(old) = slot.take() {
        engine.remove_call(old);
    }
    if let Some(fd) = fd {
        match engine.add_call(fd, token) {
            Ok(new) => *slot = Some(new),
            Err(error) => log::warn!("{ring}: the call or err fd cannot be used: {error}"),
        }
    }
}
