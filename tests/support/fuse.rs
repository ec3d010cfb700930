//! A FUSE file system of the test's own: files in memory, a journal of what reached it, and a switch that makes it
//! hang as a server does that has lost its storage.
//!
//! No part of `support`, so that benchmarks and fuzz targets do without the crate behind it: a suite takes it in by
//! `#[path = "support/fuse.rs"] mod fuse;` beside `mod support;`.

#![allow(dead_code, reason = "each suite uses a part of it")]

use crate::support::{DEADLINE, Rng};
use fuser::{
    Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    InitFlags, KernelConfig, LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty,
    ReplyEntry, ReplyOpen, ReplyWrite, Request, Session, TimeOrNow, WriteFlags,
};
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::geteuid;
use std::ffi::OsStr;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, SystemTime};
use tempfile::TempDir;

/// How long the kernel may believe what it was told. None: it asks each time.
const TTL: Duration = Duration::ZERO;

/// What reached the server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Data.
    Write {
        /// The file, by its place in the list of [`FuseMount::new`].
        file: usize,
        /// Where, in bytes.
        offset: u64,
        /// What.
        data: Vec<u8>,
    },
    /// A sync (`FUSE_FSYNC`): all writes of the file that stand before it are durable.
    Sync {
        /// As above.
        file: usize,
    },
}

/// A mounted file system, unmounted at the end. Drop what has its files open before it.
pub struct FuseMount {
    dir: TempDir,
    files: Vec<String>,
    server: Arc<Server>,
}

struct Server {
    names: Vec<String>,
    state: Mutex<State>,
    waits: Condvar,
}

/// Answers a request that waits.
type Answer = Box<dyn FnOnce(&Server) + Send>;

#[derive(Default)]
struct State {
    contents: Vec<Vec<u8>>,
    journal: Vec<Entry>,
    hangs: bool,
    waiting: Vec<Answer>,
}

impl fmt::Debug for FuseMount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FuseMount")
            .field("dir", &self.dir)
            .field("files", &self.files)
            .finish_non_exhaustive()
    }
}

impl FuseMount {
    /// Mounts a file system with these files, each of so many zero bytes. `None`, with a word on stderr, where this
    /// process cannot mount one.
    pub fn new(files: &[(&str, u64)]) -> Option<FuseMount> {
        if !geteuid().is_root() || !Path::new("/dev/fuse").exists() {
            eprintln!("skipped: mounting FUSE needs root and /dev/fuse");
            return None;
        }
        let names: Vec<String> = files.iter().map(|(name, _)| (*name).to_owned()).collect();
        let zeroes = |bytes: &u64| vec![0; usize::try_from(*bytes).expect("fits into memory")];
        let state = State {
            contents: files.iter().map(|(_, bytes)| zeroes(bytes)).collect(),
            ..State::default()
        };
        let server = Arc::new(Server {
            names: names.clone(),
            state: Mutex::new(state),
            waits: Condvar::new(),
        });
        let dir = tempfile::tempdir().expect("a directory");
        let mut config = Config::default();
        config.mount_options = vec![
            MountOption::FSName("blkmq-test".to_owned()),
            MountOption::DefaultPermissions,
        ];
        config.acl = fuser::SessionACL::All;
        let session =
            Session::new(Handle(Arc::clone(&server)), dir.path(), &config).expect("FUSE mounts");
        // It ends with the last open file, which may be after this value.
        std::thread::spawn(move || session.run());
        Some(FuseMount {
            dir,
            files: names,
            server,
        })
    }

    /// Where a file is.
    pub fn path(&self, name: &str) -> PathBuf {
        assert!(self.files.iter().any(|file| file == name), "no such file");
        self.dir.path().join(name)
    }

    /// From now on no request is answered. This process must not touch the files then.
    pub fn hang(&self) {
        self.server.state().hangs = true;
    }

    /// Answers what waits, and everything that comes.
    pub fn release(&self) {
        let waiting = {
            let mut state = self.server.state();
            state.hangs = false;
            std::mem::take(&mut state.waiting)
        };
        for answer in waiting {
            answer(&self.server);
        }
    }

    /// Waits until this many requests wait for their answer; false after the deadline.
    pub fn wait_for_waiting(&self, count: usize) -> bool {
        let state = self.server.state();
        let waits = |state: &mut State| state.waiting.len() < count;
        let (_state, timeout) = (self.server.waits)
            .wait_timeout_while(state, DEADLINE, waits)
            .expect("no holder panics");
        !timeout.timed_out()
    }

    /// How many requests wait for their answer.
    pub fn waiting(&self) -> usize {
        self.server.state().waiting.len()
    }

    /// How much has reached the server so far: the length of the journal.
    pub fn reached(&self) -> usize {
        self.server.state().journal.len()
    }

    /// Everything that has reached the server.
    pub fn journal(&self) -> Vec<Entry> {
        self.server.state().journal.clone()
    }

    /// What has been written to a file.
    pub fn content(&self, file: usize) -> Vec<u8> {
        self.server.state().contents[file].clone()
    }

    /// What a power cut of the server could leave of a file of so many bytes when the journal was this long: all that
    /// was synced, and of the rest any sectors.
    pub fn after_power_cut(&self, file: usize, bytes: usize, at: usize, rng: &mut Rng) -> Vec<u8> {
        let state = self.server.state();
        let journal = &state.journal[..at];
        let synced = journal
            .iter()
            .rposition(|entry| *entry == Entry::Sync { file })
            .unwrap_or(0);
        let mut content = vec![0; bytes];
        for (nth, entry) in journal.iter().enumerate() {
            let Entry::Write {
                file: of,
                offset,
                data,
            } = entry
            else {
                continue;
            };
            if *of != file {
                continue;
            }
            for (sector, piece) in data.chunks(512).enumerate() {
                if nth < synced || rng.below(2) == 0 {
                    let at = usize::try_from(*offset).expect("in memory") + sector * 512;
                    content[at..at + piece.len()].copy_from_slice(piece);
                }
            }
        }
        content
    }
}

impl Drop for FuseMount {
    fn drop(&mut self) {
        self.release();
        let _ = unmount(self.dir.path(), UnmountFlags::DETACH);
    }
}

impl Server {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder panics")
    }

    /// Answers a request now, or when the server no longer hangs.
    fn when_alive(&self, answer: impl FnOnce(&Server) + Send + 'static) {
        let mut state = self.state();
        if state.hangs {
            state.waiting.push(Box::new(answer));
            self.waits.notify_all();
            return;
        }
        drop(state);
        answer(self);
    }

    /// The attributes of a file, or of the directory; inode 2 is the first file.
    fn attributes(&self, ino: u64) -> Option<FileAttr> {
        let epoch = SystemTime::UNIX_EPOCH;
        let root = ino == INodeNo::ROOT.0;
        let size = match root {
            true => 0,
            false => self.state().contents.get(file_of(ino)?)?.len() as u64,
        };
        Some(FileAttr {
            ino: INodeNo(ino),
            size,
            blocks: size.div_ceil(512),
            atime: epoch,
            mtime: epoch,
            ctime: epoch,
            crtime: epoch,
            kind: if root {
                FileType::Directory
            } else {
                FileType::RegularFile
            },
            perm: if root { 0o755 } else { 0o666 },
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        })
    }

    fn write(&self, file: usize, offset: u64, data: Vec<u8>) {
        let mut state = self.state();
        let at = usize::try_from(offset).expect("in memory");
        let content = &mut state.contents[file];
        if content.len() < at + data.len() {
            content.resize(at + data.len(), 0);
        }
        content[at..at + data.len()].copy_from_slice(&data);
        state.journal.push(Entry::Write { file, offset, data });
    }
}

fn file_of(ino: u64) -> Option<usize> {
    usize::try_from(ino.checked_sub(2)?).ok()
}

/// What the session calls.
struct Handle(Arc<Server>);

impl Filesystem for Handle {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // As libfuse has it: without this the kernel waits for each direct write before it sends the next.
        let wanted = InitFlags::FUSE_ASYNC_DIO | InitFlags::FUSE_PARALLEL_DIROPS;
        let _ = config.add_capabilities(wanted);
        Ok(())
    }

    fn lookup(&self, _req: &Request, _parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let found = self
            .0
            .names
            .iter()
            .position(|file| OsStr::new(file) == name);
        self.0.when_alive(move |server| {
            match found.and_then(|file| server.attributes(file as u64 + 2)) {
                Some(attributes) => reply.entry(&TTL, &attributes, Generation(0)),
                None => reply.error(Errno::ENOENT),
            }
        });
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        self.0
            .when_alive(move |server| match server.attributes(ino.0) {
                Some(attributes) => reply.attr(&TTL, &attributes),
                None => reply.error(Errno::ENOENT),
            });
    }

    fn setattr(
        &self,
        _req: &Request,
        ino: INodeNo,
        _mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<fuser::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        self.0.when_alive(move |server| {
            if let (Some(size), Some(file)) = (size, file_of(ino.0)) {
                let size = usize::try_from(size).expect("in memory");
                server.state().contents[file].resize(size, 0);
            }
            match server.attributes(ino.0) {
                Some(attributes) => reply.attr(&TTL, &attributes),
                None => reply.error(Errno::ENOENT),
            }
        });
    }

    fn open(&self, _req: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        self.0
            .when_alive(move |_| reply.opened(FileHandle(0), FopenFlags::empty()));
    }

    fn flush(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        self.0.when_alive(move |_| reply.ok());
    }

    fn read(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.0.when_alive(move |server| {
            let state = server.state();
            let content = file_of(ino.0).map_or(&[][..], |file| &state.contents[file]);
            let at = |offset: u64| {
                usize::try_from(offset)
                    .expect("in memory")
                    .min(content.len())
            };
            reply.data(&content[at(offset)..at(offset + u64::from(size))]);
        });
    }

    fn write(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let data = data.to_vec();
        self.0.when_alive(move |server| {
            let Some(file) = file_of(ino.0) else {
                return reply.error(Errno::EBADF);
            };
            let bytes = u32::try_from(data.len()).expect("a request's");
            server.write(file, offset, data);
            reply.written(bytes);
        });
    }

    fn fsync(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        self.0.when_alive(move |server| {
            if let Some(file) = file_of(ino.0) {
                server.state().journal.push(Entry::Sync { file });
            }
            reply.ok();
        });
    }

    fn fallocate(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        self.0.when_alive(move |server| {
            let (Some(file), libc::FALLOC_FL_PUNCH_HOLE) =
                (file_of(ino.0), mode & !libc::FALLOC_FL_KEEP_SIZE)
            else {
                return reply.error(Errno::EOPNOTSUPP);
            };
            let end = server.state().contents[file].len() as u64;
            let length = length.min(end.saturating_sub(offset));
            let zeroes = vec![0; usize::try_from(length).expect("in memory")];
            server.write(file, offset, zeroes);
            reply.ok();
        });
    }
}
