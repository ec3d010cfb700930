//! A bounded queue of lines, and the thread that writes them.

use std::fmt;
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::limit::{INTERVAL, Limits, RATE, Source};
use super::stream;

/// Lines that may wait.
const MAX_LINES: usize = 4096;

/// Bytes of all lines that wait. One line may always be longer.
const MAX_BYTES: usize = 1 << 20;

/// Enough to write.
const STACK_BYTES: usize = 128 * 1024;

/// Where lines are put. Putting one in allocates its copy and makes no system call that waits for the stream.
#[derive(Debug)]
pub(super) struct Queue {
    lines: SyncSender<Box<[u8]>>,
    account: Arc<Account>,
    /// Until its thread has begun.
    writer: Arc<Mutex<Option<Writer>>>,
}

/// What both sides count.
#[derive(Debug, Default)]
struct Account {
    /// Bytes that wait.
    bytes: AtomicUsize,
    /// Lines that were put in.
    put: AtomicU64,
    /// Lines that were not, or could not be written.
    lost: AtomicU64,
    /// Lines that have left the queue.
    left: Mutex<u64>,
    progress: Condvar,
}

impl Account {
    fn left(&self) -> MutexGuard<'_, u64> {
        // A number is right after each step.
        self.left.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Queue {
    /// A queue before `stream`, to which nothing is written before [`Queue::start`].
    pub(super) fn new(stream: impl AsFd + Send + 'static, limits: Arc<Limits>) -> Queue {
        let (lines, queued) = sync_channel(MAX_LINES);
        let account = Arc::new(Account::default());
        let writer = Writer {
            stream: Box::new(stream),
            queued,
            account: Arc::clone(&account),
            limits,
        };
        Queue {
            lines,
            account,
            writer: Arc::new(Mutex::new(Some(writer))),
        }
    }

    /// Starts the thread that writes, if that has not been done.
    ///
    /// # Errors
    ///
    /// It cannot be started.
    pub(super) fn start(&self) -> io::Result<()> {
        if lock(&self.writer).is_none() {
            return Ok(());
        }
        // Taken by the thread, so that it is still here if there is none.
        let writer = Arc::clone(&self.writer);
        thread::Builder::new()
            .name("log".to_owned())
            .stack_size(STACK_BYTES)
            .spawn(move || {
                let writer = lock(&writer).take();
                if let Some(writer) = writer {
                    writer.run();
                }
            })
            .map(drop)
    }

    /// Writes what waits, as far as the stream takes it at once, if the thread that writes has not been started.
    pub(super) fn write_early(&self) {
        let writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(writer) = &*writer else {
            return;
        };
        while stream::takes_more(writer.stream.as_fd()) {
            match writer.queued.try_recv() {
                Ok(line) => writer.take(&line),
                Err(_) => return,
            }
        }
    }

    /// Puts a line in, or counts it as lost. Nothing waits.
    pub(super) fn put(&self, line: &[u8]) {
        let account = &self.account;
        let before = account.bytes.fetch_add(line.len(), Ordering::Relaxed);
        let fits = before == 0 || before.saturating_add(line.len()) <= MAX_BYTES;
        if fits && self.lines.try_send(line.into()).is_ok() {
            account.put.fetch_add(1, Ordering::Release);
        } else {
            account.bytes.fetch_sub(line.len(), Ordering::Relaxed);
            // An empty one only wakes the writer, and a full queue does that, too.
            account
                .lost
                .fetch_add(u64::from(!line.is_empty()), Ordering::Relaxed);
        }
    }

    /// Waits until all lines that were put in so far have left, or none has for `patience`. Without a thread they are
    /// written here, however long that takes.
    pub(super) fn settle(&self, patience: Duration) {
        let account = &self.account;
        let put = account.put.load(Ordering::Acquire);
        let mut left = account.left();
        if *left < put {
            drop(left);
            if self.start().is_err() {
                self.write_here();
            }
            left = account.left();
        }
        while *left < put {
            let before = *left;
            let waited = account.progress.wait_timeout(left, patience);
            let timeout;
            (left, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
            if timeout.timed_out() && *left == before {
                return;
            }
        }
    }
}

impl Queue {
    /// Writes what waits, as no thread could be started for it.
    fn write_here(&self) {
        let writer = lock(&self.writer).take();
        let Some(writer) = writer else { return };
        while let Ok(line) = writer.queued.try_recv() {
            writer.take(&line);
        }
        writer.tell_left_out();
    }
}

fn lock(writer: &Mutex<Option<Writer>>) -> MutexGuard<'_, Option<Writer>> {
    // It is there or not, after each step.
    writer.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Writer {
    stream: Box<dyn AsFd + Send>,
    queued: Receiver<Box<[u8]>>,
    account: Arc<Account>,
    limits: Arc<Limits>,
}

impl fmt::Debug for Writer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Writer").finish_non_exhaustive()
    }
}

impl Writer {
    fn run(self) {
        loop {
            let next = match self.limits.is_owing() {
                true => self.queued.recv_timeout(INTERVAL),
                false => self.queued.recv().map_err(RecvTimeoutError::from),
            };
            match next {
                Ok(line) => self.take(&line),
                Err(RecvTimeoutError::Timeout) => {}
                // The queue is gone: no line can follow.
                Err(RecvTimeoutError::Disconnected) => return,
            }
            self.tell_left_out();
        }
    }

    fn take(&self, line: &[u8]) {
        let account = &self.account;
        if !line.is_empty() && self.write(line).is_err() {
            account.lost.fetch_add(1, Ordering::Relaxed);
        }
        let waiting = account.bytes.fetch_sub(line.len(), Ordering::Relaxed);
        if waiting == line.len() {
            self.tell_lost();
        }
        *account.left() += 1;
        account.progress.notify_all();
    }

    fn write(&self, line: &[u8]) -> Result<(), Errno> {
        stream::write_all(self.stream.as_fd(), line)
    }

    /// Says how many lines were lost, when those that were not are written.
    fn tell_lost(&self) {
        let lost = self.account.lost.swap(0, Ordering::Relaxed);
        if lost == 0 {
            return;
        }
        let line = format!(
            "[WARN ] {lost} log lines were lost: standard error did not take them in time\n"
        );
        if self.write(line.as_bytes()).is_err() {
            self.account.lost.fetch_add(lost, Ordering::Relaxed);
        }
    }

    /// Says how many lines of which disk were left out.
    fn tell_left_out(&self) {
        for (source, count) in self.limits.left_out(Instant::now()) {
            let who = match source {
                Source::Process => "the process".to_owned(),
                Source::Disk(disk) => format!("disk @{disk}"),
            };
            let line = format!(
                "[WARN ] {who}: {count} log lines were left out, there were more than {RATE} a second\n"
            );
            // Whether it arrives changes nothing.
            let _ = self.write(line.as_bytes());
        }
    }
}

#[cfg(test)]
mod tests;
