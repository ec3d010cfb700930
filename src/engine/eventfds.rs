//! The part of the engine that waits for other people's fds, and calls them.

use std::io;
use std::os::fd::OwnedFd;

use io_uring::{cqueue, opcode, types};

use super::{Engine, KIND_CALL, KIND_CANCEL, KIND_SLOT, KIND_WATCH, user_data};
use crate::engine::watch::{Call, CallSlot, Polled, Waker, Watch, Watched, check_pollable};
use crate::engine::{Errno, Event, MAX_DISKS};
use crate::mq::ids::DriverTag;

impl Engine {
    /// Watches an eventfd: each write to it becomes an [`Event::Kick`] with this token. It is never
    /// read. A count it has already is reported, too. `InvalidInput` for files and devices.
    pub fn watch(&mut self, fd: OwnedFd, token: u32) -> io::Result<()> {
        self.arm(fd, Watched::Kick(token))
    }

    /// Lets a waker wake this engine.
    pub fn watch_waker(&mut self, waker: &Waker) -> io::Result<()> {
        self.arm(waker.duplicate()?, Watched::Waker)
    }

    fn arm(&mut self, fd: OwnedFd, whom: Watched) -> io::Result<()> {
        check_pollable(&fd)?;
        let index = self.watches.vacant()?;
        self.generation = self.generation.wrapping_add(1);
        let watch = Watch::new(fd, whom, self.generation);
        let entry = watch
            .sqe()
            .user_data(user_data(KIND_WATCH, watch.generation, index));
        // SAFETY: a poll names no memory, only an fd, which the table keeps open. Unsafe because
        // other entries do name memory.
        if !unsafe { self.ring.push(&entry, &mut self.counters) } {
            return Err(io::Error::other("io_uring takes no entries at the moment"));
        }
        self.watches.put(index, watch);
        self.ring.submit(&mut self.counters)
    }

    /// Ends a watch and gives the fd back; `None` if nothing is watched with this token, or there is
    /// no file descriptor number left to give it back under. No
    /// [`Event::Kick`] with the token comes after this, and the ring has let go of the fd.
    pub fn unwatch(&mut self, token: u32) -> Option<OwnedFd> {
        let index = self.watches.find(|w| w.whom == Watched::Kick(token))?;
        let watch = self.watches.take(index)?;
        self.cancel(user_data(KIND_WATCH, watch.generation, index));
        let fd = watch.into_fd();
        let theirs = fd.try_clone().ok();
        self.close_or_leak(fd);
        theirs
    }

    /// Closes an fd unless an entry that the kernel would not take yet may name it: the number must
    /// not become somebody else's before that.
    fn close_or_leak(&mut self, fd: OwnedFd) {
        if self.ring.has_queued() {
            log::warn!("io_uring takes no entries; a file descriptor stays open");
            std::mem::forget(fd);
        }
    }

    /// Adds a call fd, an eventfd or a pipe, blocking or not.
    pub fn add_call(&mut self, fd: OwnedFd, token: u32) -> io::Result<CallSlot> {
        let index = self.calls.vacant()?;
        self.generation = self.generation.wrapping_add(1);
        let generation = self.generation;
        let mut call = Call::new(fd, token, generation)?;
        // After the places of the disks.
        let place = u32::from(MAX_DISKS) + u32::from(index);
        call.register(&self.ring, place);
        self.calls.put(index, call);
        Ok(CallSlot { index, generation })
    }

    /// Writes to a call fd, with the next [`Engine::commit_rqs`] or [`Engine::wait`]. Never blocks: a
    /// write that has to wait waits in the kernel, and calls until it is over become one.
    pub fn call(&mut self, slot: CallSlot) {
        let Some(call) = self
            .calls
            .get_mut(slot.index)
            .filter(|c| c.generation == slot.generation)
        else {
            return;
        };
        if call.lost {
            return;
        }
        if call.in_flight {
            call.again = true;
            self.counters.calls_folded += 1;
            return;
        }
        self.send_call(slot.index);
    }

    fn send_call(&mut self, index: u16) {
        let Some(call) = self.calls.get_mut(index) else {
            return;
        };
        let (entry, reports) = call.sqe(self.ring.silent_writes);
        let entry = entry.user_data(user_data(KIND_CALL, call.generation, index));
        // SAFETY: the entry names a static and an fd that the table keeps open. Unsafe because other
        // entries name memory that goes away.
        let sent = unsafe { self.ring.push(&entry, &mut self.counters) };
        call.in_flight = sent && reports;
        call.again = !sent;
        self.unsent_fds |= !sent;
        self.counters.calls += u64::from(sent);
    }

    /// Forgets a call fd; a write under way is cancelled.
    pub fn remove_call(&mut self, slot: CallSlot) {
        if self
            .calls
            .get(slot.index)
            .is_none_or(|c| c.generation != slot.generation)
        {
            return;
        }
        // What is queued names the fd by number: let it go before the number does.
        let _ = self.ring.submit(&mut self.counters);
        let Some(call) = self.calls.take(slot.index) else {
            return;
        };
        // Writes that nobody hears of may wait as well, and all of them go.
        if call.in_flight || call.may_wait() {
            self.cancel(user_data(KIND_CALL, slot.generation, slot.index));
        }
        call.unregister(&self.ring);
        self.close_or_leak(call.into_fd());
    }

    /// Asks the kernel to give up a command. If it does, the command's [`Event::Done`] comes with
    /// `ECANCELED`; I/O that a device has taken cannot be given up, and ends when it ends.
    pub fn cancel_rq(&mut self, tag: DriverTag) {
        if !self.give_up(tag) {
            self.cancel(user_data(KIND_SLOT, u32::from(tag.generation), tag.index));
        }
    }

    /// Makes the kernel let go of an entry's fd. Its last completion is ignored by generation.
    fn cancel(&mut self, target: u64) {
        let all = types::CancelBuilder::user_data(target).all();
        let entry = opcode::AsyncCancel2::new(all)
            .build()
            .user_data(KIND_CANCEL);
        // SAFETY: a cancel names no memory. Unsafe because other entries do.
        if unsafe { self.ring.push(&entry, &mut self.counters) } {
            // The cancelled entry's end is work put off until we enter for events: done here, so
            // that the fd is free when we return.
            let _ = self.ring.enter_events(&mut self.counters);
        }
    }

    #[cold]
    pub(super) fn resend_fds(&mut self) {
        self.unsent_fds = false;
        for index in 0..self.calls.capacity() {
            if self
                .calls
                .get(index)
                .is_some_and(|c| c.again && !c.in_flight)
            {
                self.send_call(index);
            }
        }
        for index in 0..self.watches.capacity() {
            if self.watches.get(index).is_some_and(|w| !w.armed && !w.lost) {
                self.rearm(index);
            }
        }
    }

    fn rearm(&mut self, index: u16) {
        let Some(watch) = self.watches.get_mut(index) else {
            return;
        };
        let entry = watch
            .sqe()
            .user_data(user_data(KIND_WATCH, watch.generation, index));
        // SAFETY: as in `arm`. Unsafe because other entries name memory.
        let sent = unsafe { self.ring.push(&entry, &mut self.counters) };
        watch.armed = sent;
        self.unsent_fds |= !sent;
        self.counters.rearmed += u64::from(sent);
    }

    pub(super) fn apply_to_watch(
        &mut self,
        generation: u32,
        index: u16,
        (res, flags): (i32, u32),
        on: &mut impl FnMut(Event),
    ) {
        let watch = match self.watches.get_mut(index) {
            Some(w) if w.generation == generation => w,
            // The end of a watch that was given up.
            _ => return,
        };
        let polled = watch.on_cqe(res);
        let whom = watch.whom;
        let more = cqueue::more(flags);
        watch.armed = more;
        match (polled, whom) {
            (Polled::Ready, Watched::Kick(token)) => on(Event::Kick(token)),
            (Polled::Ready, Watched::Waker) => on(Event::Message),
            (Polled::Lost(error), Watched::Kick(token)) => on(Event::WatchLost { token, error }),
            (Polled::Lost(_) | Polled::Nothing, _) => {}
        }
        let lost = matches!(polled, Polled::Lost(_));
        if lost && more {
            self.cancel(user_data(KIND_WATCH, generation, index));
        } else if !lost && !more {
            self.rearm(index);
        }
    }

    pub(super) fn apply_to_call(
        &mut self,
        generation: u32,
        index: u16,
        res: i32,
        on: &mut impl FnMut(Event),
    ) {
        let call = match self.calls.get_mut(index) {
            Some(c) if c.generation == generation => c,
            _ => return,
        };
        call.in_flight = false;
        // EAGAIN: the counter is full, so the guest has been told.
        if res < 0 && !matches!(-res, libc::EAGAIN | libc::EINTR) {
            call.lost = true;
            on(Event::CallLost {
                token: call.token,
                error: Errno(-res),
            });
        } else if call.again || res == -libc::EINTR {
            self.send_call(index);
        }
    }
}
