//! Where the threads that serve disks wait while another process may take the disks over.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;

use crate::mq::ids::DiskId;

use crate::sys::listener::Stop;
use crate::vhost_user::device::session_state::SessionState;
use crate::vhost_user::guard::{CarriedInflight, CarriedRegion, Negotiated};

/// A listening socket, and the identity (device and inode) of its file if that is to be removed at
/// the end.
#[derive(Debug)]
pub struct CarriedListener {
    /// The socket.
    pub socket: OwnedFd,
    /// Of its file.
    pub file: Option<(u64, u64)>,
}

/// A session at rest, whose rings are still the workers'.
#[derive(Debug)]
pub struct RestingSession {
    /// The connection to its front end.
    pub front_end: OwnedFd,
    /// SET_BACKEND_REQ_FD
    pub channel: Option<OwnedFd>,
    /// What was negotiated.
    pub negotiated: Negotiated,
    /// The guest's memory.
    pub regions: Vec<CarriedRegion>,
    /// SET_INFLIGHT_FD
    pub inflight: Option<CarriedInflight>,
    /// Its rings.
    pub state: Arc<SessionState>,
}

/// What a disk's thread has when it is at rest.
#[derive(Debug, Default)]
pub struct AtRest {
    /// Where front ends connect; a connection that was handed over has none.
    pub listener: Option<CarriedListener>,
    /// The session that was served.
    pub session: Option<RestingSession>,
}

/// What a thread at rest does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Goes on.
    GoOn,
    /// Ends, and leaves sockets and connections as they are: another process has them.
    Leave,
    /// Closes its session, which cannot be handed over, and comes to rest without it.
    MakeWay,
}

/// What woke a thread that waited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Woken {
    /// The process is ending.
    Stopped,
    /// It is to come to rest.
    Wished,
    /// What it waited for is readable.
    Readable,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Serving,
    /// Threads come to rest and wait there.
    Resting,
    Left,
}

/// A place for all disks' threads.
#[derive(Debug)]
pub struct RestPlace {
    /// Readable while threads are to come to rest.
    wish: OwnedFd,
    /// Readable while sessions that are not at rest are to end.
    make_way: OwnedFd,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    phase: Phase,
    /// How often threads were told what comes of it. A thread that slept through that may find them asked to
    /// rest once more.
    rounds: u64,
    /// Sessions that are not at rest, or cannot be carried, are to end.
    makes_way: bool,
    /// By disk.
    places: Vec<Place>,
}

#[derive(Debug)]
enum Place {
    Busy,
    AtRest(AtRest),
    /// It cannot be carried, and why.
    Unable(String),
    /// This process has not what it takes to carry it; its front end is not to blame.
    Failed(String),
    /// The thread has ended; nothing of the disk is left to carry.
    Gone,
}

impl RestPlace {
    /// For this many disks.
    ///
    /// # Errors
    ///
    /// No descriptor to be had.
    pub fn new(disks: usize) -> io::Result<RestPlace> {
        Ok(RestPlace {
            wish: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            make_way: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            state: Mutex::new(State {
                phase: Phase::Serving,
                rounds: 0,
                makes_way: false,
                places: (0..disks).map(|_| Place::Busy).collect(),
            }),
            changed: Condvar::new(),
        })
    }

    /// A descriptor that is readable while threads are to come to rest.
    ///
    /// # Errors
    ///
    /// No descriptor to be had.
    pub fn wish(&self) -> io::Result<OwnedFd> {
        self.wish.try_clone()
    }

    /// A descriptor that is readable while sessions that are not at rest are to end.
    ///
    /// # Errors
    ///
    /// No descriptor to be had.
    pub fn make_way(&self) -> io::Result<OwnedFd> {
        self.make_way.try_clone()
    }

    /// Waits until `fd` is readable, `stop` is said, or the thread is to come to rest.
    pub fn wait(&self, stop: &Stop, fd: &impl AsFd) -> Woken {
        loop {
            let mut fds = [
                PollFd::new(stop, PollFlags::IN),
                PollFd::new(&self.wish, PollFlags::IN),
                PollFd::new(fd, PollFlags::IN),
            ];
            match poll(&mut fds, None) {
                Err(Errno::INTR) => continue,
                Err(_) => return Woken::Stopped,
                Ok(_) => {}
            }
            let woken = [Woken::Stopped, Woken::Wished, Woken::Readable];
            let mut ready = woken.into_iter().zip(&fds);
            if let Some((why, _)) = ready.find(|(_, fd)| !fd.revents().is_empty()) {
                return why;
            }
        }
    }

    /// A disk's thread is at rest with this, and waits for what comes of it.
    pub fn rest(&self, disk: DiskId, with: io::Result<AtRest>) -> Verdict {
        let mut state = self.lock();
        if state.phase == Phase::Resting {
            state.places[disk.index()] = match with {
                Ok(with) => Place::AtRest(with),
                Err(error) if error.raw_os_error().is_some() => Place::Failed(error.to_string()),
                Err(error) => Place::Unable(error.to_string()),
            };
            self.changed.notify_all();
        }
        let round = state.rounds;
        let makes_way = |state: &State| {
            state.makes_way && matches!(state.places[disk.index()], Place::Unable(_))
        };
        let mut state = self
            .changed
            .wait_while(state, |state| {
                state.phase == Phase::Resting && state.rounds == round && !makes_way(state)
            })
            .unwrap_or_else(PoisonError::into_inner);
        match state.phase {
            Phase::Resting if state.rounds == round => {
                state.places[disk.index()] = Place::Busy;
                Verdict::MakeWay
            }
            Phase::Left => Verdict::Leave,
            Phase::Serving | Phase::Resting => Verdict::GoOn,
        }
    }

    /// A disk's thread ends.
    pub fn gone(&self, disk: DiskId) {
        self.lock().places[disk.index()] = Place::Gone;
        self.changed.notify_all();
    }

    /// Has all threads come to rest, not later than `deadline`; what each of them has, by disk. Sessions that have not
    /// come to rest by then, or cannot be carried, are closed if there is a second deadline, until which their threads
    /// have time for that.
    ///
    /// # Errors
    ///
    /// The first disk whose thread did not, and why. In either case [`RestPlace::go_on`] or
    /// [`RestPlace::leave`] has to follow.
    pub fn gather(
        &self,
        mut deadline: Instant,
        mut close_until: Option<Instant>,
    ) -> Result<Vec<AtRest>, (DiskId, String)> {
        let mut state = self.lock();
        state.phase = Phase::Resting;
        // Fails only when the counter is full, which says the same.
        let _ = rustix::io::write(&self.wish, &1u64.to_ne_bytes());
        loop {
            let place = |holds: fn(&Place) -> bool| {
                let at = state.places.iter().position(holds)?;
                u16::try_from(at).ok().map(DiskId)
            };
            let unable = place(|place| matches!(place, Place::Unable(_)));
            let failed = place(|place| matches!(place, Place::Failed(_)));
            let refused = unable.filter(|_| close_until.is_none() && !state.makes_way);
            if let Some(disk) = failed.or(refused)
                && let Place::Unable(why) | Place::Failed(why) = &state.places[disk.index()]
            {
                return Err((disk, format!("cannot be carried: {why}")));
            }
            let Some(busy) = unable.or_else(|| place(|place| matches!(place, Place::Busy))) else {
                break;
            };
            let mut left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let Some(until) = close_until.take() else {
                    return Err((busy, "does not come to rest".to_owned()));
                };
                deadline = until;
                left = deadline.saturating_duration_since(Instant::now());
                state.makes_way = true;
                // As above.
                let _ = rustix::io::write(&self.make_way, &1u64.to_ne_bytes());
                self.changed.notify_all();
            }
            state = self
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        Ok(state
            .places
            .iter_mut()
            .map(|place| match place {
                Place::AtRest(with) => std::mem::take(with),
                Place::Busy | Place::Unable(_) | Place::Failed(_) | Place::Gone => {
                    AtRest::default()
                }
            })
            .collect())
    }

    /// All go on as before.
    pub fn go_on(&self) {
        self.end(Phase::Serving);
    }

    /// All end and leave what they have to another process.
    pub fn leave(&self) {
        self.end(Phase::Left);
    }

    /// Whether another process has the disks.
    pub fn is_left(&self) -> bool {
        self.lock().phase == Phase::Left
    }

    fn end(&self, phase: Phase) {
        let mut state = self.lock();
        // Nobody polls for it in vain from here on.
        for event in [&self.wish, &self.make_way] {
            let _ = rustix::io::read(event, &mut [0; 8]);
        }
        state.makes_way = false;
        state.phase = phase;
        state.rounds += 1;
        for place in &mut state.places {
            if !matches!(place, Place::Gone) {
                *place = Place::Busy;
            }
        }
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;
    use std::time::Duration;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    #[test]
    fn who_is_asked_again_before_it_has_woken_up_comes_to_rest_again() {
        let place = RestPlace::new(1).unwrap();
        let mut heard = Ok(());
        thread::scope(|scope| {
            scope.spawn(|| {
                let stop = Stop::new().unwrap();
                let never = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
                loop {
                    assert_eq!(place.wait(&stop, &never), Woken::Wished);
                    if place.rest(DiskId(0), Ok(AtRest::default())) == Verdict::Leave {
                        break;
                    }
                }
            });
            for _ in 0..10_000 {
                heard = place.gather(soon(), None).map(drop);
                if heard.is_err() {
                    break;
                }
                place.go_on();
            }
            // So that it ends, whatever was heard.
            let _ = place.gather(soon(), None);
            place.leave();
        });
        assert_eq!(heard, Ok(()));
    }

    #[test]
    fn all_come_to_rest_and_hear_what_comes_of_it() {
        let place = RestPlace::new(3).unwrap();
        place.gone(DiskId(2));
        for leaves in [false, true] {
            let verdicts = thread::scope(|scope| {
                let place = &place;
                let threads = [0, 1].map(|disk| {
                    scope.spawn(move || {
                        let stop = Stop::new().unwrap();
                        let never = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
                        assert_eq!(place.wait(&stop, &never), Woken::Wished);
                        place.rest(DiskId(disk), Ok(AtRest::default()))
                    })
                });
                assert_eq!(place.gather(soon(), None).unwrap().len(), 3);
                match leaves {
                    true => place.leave(),
                    false => place.go_on(),
                }
                threads.map(|thread| thread.join().unwrap())
            });
            let verdict = if leaves {
                Verdict::Leave
            } else {
                Verdict::GoOn
            };
            assert_eq!(verdicts, [verdict; 2]);
            assert_eq!(place.is_left(), leaves);
        }
    }

    #[test]
    fn who_is_late_or_unable_is_named_and_all_go_on() {
        let place = RestPlace::new(2).unwrap();
        let (disk, why) = place.gather(Instant::now(), None).unwrap_err();
        assert_eq!((disk, &*why), (DiskId(0), "does not come to rest"));
        place.go_on();
        // Too late: nobody is asked any more.
        assert_eq!(place.rest(DiskId(0), Ok(AtRest::default())), Verdict::GoOn);
        thread::scope(|scope| {
            scope.spawn(|| {
                let stop = Stop::new().unwrap();
                let never = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
                assert_eq!(place.wait(&stop, &never), Woken::Wished);
                let unable = Err(io::Error::other("no descriptors"));
                assert_eq!(place.rest(DiskId(1), unable), Verdict::GoOn);
            });
            let (disk, why) = place.gather(soon(), None).unwrap_err();
            assert_eq!(
                (disk, &*why),
                (DiskId(1), "cannot be carried: no descriptors")
            );
            place.go_on();
        });
    }
}
