//! Signals: which end the process in good order, and which must not end it.

use std::fs;
use std::io;
use std::sync::mpsc::Sender;
use std::thread;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGTTOU, SIGUSR1, SIGXFSZ};
use signal_hook::iterator::{Handle, Signals};
use vmm_sys_util::signal::{get_blocked_signals, unblock_signal};

use crate::sys::sigbus::action;

/// Undoes what the parent process left, before there is a second thread to inherit it. A blocked SIGTERM would have
/// no effect, and a blocked SIGBUS would end the process where its handler should repair guest memory.
pub fn prepare() -> Inherited {
    for signal in get_blocked_signals().unwrap_or_default() {
        // Some cannot be: they are the C library's own.
        let _ = unblock_signal(signal);
    }
    // A write beyond RLIMIT_FSIZE then fails with EFBIG, which is an I/O error of one request. And a log line does
    // not stop the process because it is in the background of a terminal (stty tostop).
    for signal in [SIGXFSZ, SIGTTOU] {
        if let Err(error) = action::ignore(signal) {
            log::warn!("signal {signal} cannot be ignored: {error}");
        }
    }
    Inherited {
        ignores_hangup: is_ignored(SIGHUP),
    }
}

/// What the parent process wants to be kept.
#[derive(Clone, Copy, Debug)]
pub struct Inherited {
    /// SIGHUP is ignored, as nohup(1) has it.
    pub ignores_hangup: bool,
}

/// Signals that are for the main thread: SIGTERM, SIGINT and SIGHUP, which end the process in good order, and SIGUSR1.
#[derive(Debug)]
pub struct Watch(Signals);

impl Watch {
    /// Keeps signals from here on until there is a thread for them. A SIGHUP that the parent process ignored stays
    /// ignored.
    ///
    /// # Errors
    ///
    /// No descriptor to be had.
    pub fn new(inherited: Inherited) -> io::Result<Watch> {
        let mut watched = vec![SIGTERM, SIGINT, SIGUSR1];
        if !inherited.ignores_hangup {
            watched.push(SIGHUP);
        }
        Signals::new(watched).map(Watch)
    }

    /// Sends each signal to `arrived`.
    ///
    /// # Errors
    ///
    /// The thread cannot be started.
    pub fn start<T: Send + 'static>(
        mut self,
        arrived: Sender<T>,
        event: impl Fn(i32) -> T + Send + 'static,
    ) -> io::Result<Handle> {
        let handle = self.0.handle();
        thread::Builder::new()
            .name("signals".to_owned())
            .spawn(move || {
                for signal in self.0.forever() {
                    if arrived.send(event(signal)).is_err() {
                        return;
                    }
                }
            })?;
        Ok(handle)
    }
}

/// Whether the process ignores a signal; false if the kernel does not say.
fn is_ignored(signal: i32) -> bool {
    let status = fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    let mask = status
        .lines()
        .find_map(|line| line.strip_prefix("SigIgn:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ignored_signal_is_told_from_others() {
        assert!(
            is_ignored(signal_hook::consts::SIGPIPE),
            "by the standard library"
        );
        assert!(!is_ignored(signal_hook::consts::SIGUSR2));
    }
}
