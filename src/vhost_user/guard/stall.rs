//! A front end that neither goes on nor leaves: half a message that never ends, answers that are never read.
//!
//! Meanwhile its session holds descriptors that nothing has judged yet: those of the half message, and those of messages
//! that are not read while answers are not taken. One of them may be the other end of the session's own connection, so
//! that the connection would never end, not even when its front end is gone. So such a session ends after a while. A
//! front end that works does neither: it sends a message at once, and reads an answer before it asks for much more than
//! the socket's buffer holds.

use std::time::{Duration, Instant};

use rustix::event::Timespec;

/// How long a front end may stay in the middle of something without a byte in either direction.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);

/// Notices that nothing moves.
#[derive(Debug)]
pub(super) struct Stall {
    patience: Duration,
    /// Bytes that had moved at the last look, and when that was first so; `None` while nothing is awaited.
    since: Option<(u64, Instant)>,
}

impl Stall {
    /// Waits for `patience`.
    pub(super) fn new(patience: Duration) -> Stall {
        Stall {
            patience,
            since: None,
        }
    }

    /// Takes note of the state at `now`: whether the front end is `midway` in something, and how many bytes have moved
    /// so far. True if it is, and nothing has moved for too long.
    pub(super) fn look(&mut self, midway: bool, moved: u64, now: Instant) -> bool {
        match self.since {
            _ if !midway => self.since = None,
            Some((before, at)) if before == moved => {
                return now.saturating_duration_since(at) >= self.patience;
            }
            _ => self.since = Some((moved, now)),
        }
        false
    }

    /// How long to wait at most for something to happen.
    pub(super) fn timeout(&self, now: Instant) -> Option<Timespec> {
        let (_, at) = self.since?;
        let left = (at + self.patience).saturating_duration_since(now);
        Timespec::try_from(left).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_awaited_and_does_not_move_is_a_stall() {
        let begin = Instant::now();
        let at = |seconds: u64| begin + Duration::from_secs(seconds);
        let mut stall = Stall::new(Duration::from_secs(10));
        assert!(!stall.look(false, 0, at(0)));
        assert!(!stall.look(false, 0, at(100)), "nothing is awaited");
        assert!(stall.timeout(at(100)).is_none());
        assert!(!stall.look(true, 5, at(100)));
        assert_eq!(stall.timeout(at(104)).map(|t| t.tv_sec), Some(6));
        assert!(!stall.look(true, 5, at(109)));
        assert!(!stall.look(true, 6, at(110)), "it moves");
        assert!(!stall.look(true, 6, at(119)));
        assert!(!stall.look(false, 6, at(119)), "it is whole");
        assert!(!stall.look(true, 6, at(119)), "another one");
        assert!(stall.look(true, 6, at(129)));
    }
}
