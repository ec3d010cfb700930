//! What a session waits for.

use std::time::Instant;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use super::{Guard, SessionEnd};

/// What `poll` reports unasked when the other end is closed.
pub(super) const HUNG_UP: PollFlags = PollFlags::HUP.union(PollFlags::ERR);

/// What a turn found ready.
pub(super) struct Ready {
    pub(super) stop: bool,
    pub(super) wish: bool,
    pub(super) make_way: bool,
    pub(super) memory_lost: bool,
    pub(super) front_end: PollFlags,
    pub(super) device: PollFlags,
}

impl Guard {
    /// Polls for what can be used: a side is read only while the other side's queue has room.
    pub(super) fn wait(&self) -> Result<Ready, SessionEnd> {
        let interest = |readable: bool, writable: bool| {
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::IN, readable);
            flags.set(PollFlags::OUT, writable);
            flags
        };
        let from_device = self.to_front_end.has_room();
        let mut fds = vec![
            PollFd::new(&self.stop, PollFlags::IN),
            PollFd::new(
                &self.front_end,
                interest(self.takes_requests(), !self.to_front_end.is_empty()),
            ),
        ];
        // A hang-up is reported whether or not it is asked for. One that cannot be acted on yet,
        // because the last answers have nowhere to go, is not polled for: it would not let us sleep.
        let with_device = from_device || !self.device_hung_up;
        if with_device {
            fds.push(PollFd::new(
                &self.device,
                interest(from_device, !self.to_device.is_empty()),
            ));
        }
        let extra = fds.len();
        let wishes = [
            self.memory_lost.as_ref(),
            self.rest.make_way(),
            self.rest.wish(),
        ];
        fds.extend(
            wishes
                .iter()
                .flatten()
                .map(|fd| PollFd::new(*fd, PollFlags::IN)),
        );
        loop {
            match poll(&mut fds, self.stall.timeout(Instant::now()).as_ref()) {
                Ok(_) => break,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(SessionEnd::Io(errno.into())),
            }
        }
        let mut came = fds[extra..].iter().map(|fd| !fd.revents().is_empty());
        let [memory_lost, make_way, wish] =
            wishes.map(|fd| fd.is_some() && came.next() == Some(true));
        Ok(Ready {
            stop: !fds[0].revents().is_empty(),
            front_end: fds[1].revents(),
            device: match with_device {
                true => fds[2].revents(),
                false => PollFlags::empty(),
            },
            memory_lost,
            make_way,
            wish,
        })
    }
}
