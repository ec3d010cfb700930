//! Threads that exist before there is anything to serve.
//!
//! The last step of a take-over makes the disks this process's. After it nothing may fail, so all threads are
//! started before, and wait.

use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::thread::JoinHandle;

use crate::takeover::ControlSocket;
use crate::vhost_user::session::StartWith;

/// The threads that serve, to be joined in this order.
pub struct Threads {
    pub disks: Vec<JoinHandle<()>>,
    pub growth: Option<JoinHandle<()>>,
    pub control: Option<(JoinHandle<()>, Arc<ControlSocket>)>,
}

impl Threads {
    /// The control socket takes no more clients, so its path goes as those of the disks do.
    pub fn close_control(&self) {
        if let Some((_, socket)) = &self.control {
            socket.remove_file();
        }
    }

    /// Waits for all of them.
    pub fn join(self) {
        for thread in self.disks.into_iter().chain(self.growth) {
            let _ = thread.join();
        }
        if let Some((thread, _socket)) = self.control {
            let _ = thread.join();
        }
    }
}

/// Threads that wait to be told to begin. They end if they are not.
pub struct Parked {
    /// The threads.
    pub threads: Threads,
    /// By disk.
    pub begin_disks: Vec<Sender<StartWith>>,
    /// The other two.
    pub begin_others: [Sender<()>; 2],
}

impl Parked {
    /// Has the threads serve, each disk's with its beginning.
    pub fn begin(self, beginnings: Vec<StartWith>) -> Threads {
        if let Some((_, socket)) = &self.threads.control {
            socket.adopt();
        }
        for (begin, beginning) in self.begin_disks.iter().zip(beginnings) {
            // Each waits for it.
            let _ = begin.send(beginning);
        }
        for begin in self.begin_others {
            // There is no such thread if there is nothing for it to do.
            let _ = begin.send(());
        }
        self.threads
    }
}
