//! The dirty log: each page the daemon writes while LOG_ALL is set is marked, and no other. And the little that a
//! snapshot keeps of a disk.

use crate::support::disk::{finish, finish_all, kind, status};
use crate::support::*;
use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::os::fd::AsRawFd;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{
    VhostTransferStateDirection as Direction, VhostTransferStatePhase as Phase,
    VhostUserProtocolFeatures,
};
use vhost::{VhostBackend, VhostUserDirtyLogRegion, VringConfigData};

const DISK: u64 = 8 << 20;
const LOG_ALL: u64 = 1 << 26;
const PAGE: u64 = 4096;
/// Two regions next to each other, and one with a gap before it.
const MEMORY: [(u64, usize); 3] = [(0, 8 << 20), (8 << 20, 4 << 20), (1 << 30, 4 << 20)];

fn setup() -> Setup {
    Setup {
        memory: MEMORY.to_vec(),
        protocol: protocol::KNOWN | VhostUserProtocolFeatures::LOG_SHMFD,
        ..Setup::default()
    }
}

/// A log in shared memory, as a front end keeps it.
struct Log {
    mem: GuestMemory,
    offset: u64,
    bytes: usize,
}

impl Log {
    /// With a bit for each page below `end`.
    fn new(end: u64, offset: u64) -> Self {
        let bytes = end.div_ceil(PAGE * 8) as usize;
        let len = (offset as usize + bytes).next_multiple_of(4096);
        let mem = GuestMemory::new(&[(0, len)]).expect("a memfd");
        Log { mem, offset, bytes }
    }

    fn whole() -> Self {
        Self::new((1 << 30) + (4 << 20), 0)
    }

    /// SET_LOG_BASE.
    fn give_to(&self, front: &mut Front) -> front::Result<()> {
        let region = VhostUserDirtyLogRegion {
            mmap_size: self.bytes as u64,
            mmap_offset: self.offset,
            mmap_handle: self.mem.regions()[0].fd().as_raw_fd(),
        };
        front.vhost.set_log_base(0, Some(region))
    }

    /// The pages that are marked.
    fn marked(&self) -> BTreeSet<u64> {
        let bytes = self.mem.read_vec(self.offset, self.bytes);
        (0..self.bytes as u64 * 8)
            .filter(|page| bytes[(page / 8) as usize] >> (page % 8) & 1 == 1)
            .collect()
    }

    fn clear(&self) {
        self.mem.fill(0, self.mem.regions()[0].len, 0);
    }
}

/// SET_FEATURES with or without LOG_ALL, on rings that run.
fn set_logging(front: &mut Front, on: bool) {
    let all = if on { LOG_ALL } else { 0 };
    let features = front.features | all;
    front
        .vhost
        .set_features(features)
        .expect("LOG_ALL is offered");
}

/// SET_VRING_ADDR again, on a ring that runs: the same addresses, and where its used ring is logged.
fn set_used_log(front: &mut Front, queue: &Queue, log: Option<u64>) -> front::Result<()> {
    let [desc, avail, used] = queue
        .ring_addresses()
        .map(|gpa| front.mem.user_address(gpa));
    let addresses = VringConfigData {
        queue_max_size: queue.size(),
        queue_size: queue.size(),
        flags: u32::from(log.is_some()),
        desc_table_addr: desc,
        used_ring_addr: used,
        avail_ring_addr: avail,
        log_addr: log,
    };
    front.vhost.set_vring_addr(queue.index, &addresses)
}

fn pages(range: Range<u64>) -> impl Iterator<Item = u64> {
    range.start / PAGE..range.end.div_ceil(PAGE)
}

/// What a device writes for the chains it is given: an oracle that knows nothing of the daemon.
#[derive(Default)]
struct Written(BTreeSet<u64>);

impl Written {
    fn bytes(&mut self, gpa: u64, len: u64) {
        self.0.extend(pages(gpa..gpa + len));
    }

    /// The first `len` writable bytes of the chain, and the status byte at its end.
    fn chain(&mut self, chain: &[Seg], mut len: u64, status: u64) {
        self.bytes(status, 1);
        for seg in chain.iter().filter(|seg| seg.writable) {
            let here = len.min(u64::from(seg.len));
            if here > 0 {
                self.bytes(seg.gpa, here);
                len -= here;
            }
        }
    }

    /// Used elements from index `from`, `count` of them, and the index; the ring is logged at `used`.
    fn ring(&mut self, used: u64, size: u16, from: u16, count: u16) {
        self.bytes(used + 2, 2);
        for index in from..from + count {
            self.bytes(used + 4 + 8 * u64::from(index % size), 8);
        }
    }
}

/// Memory by page.
fn snapshot(mem: &GuestMemory) -> Vec<(u64, Vec<u8>)> {
    let regions = mem.regions().iter();
    regions
        .flat_map(|region| {
            let bytes = mem.read_vec(region.gpa, region.len);
            let pages: Vec<_> = bytes.chunks(PAGE as usize).map(<[u8]>::to_vec).collect();
            (region.gpa / PAGE..).zip(pages)
        })
        .collect()
}

fn changed(before: &[(u64, Vec<u8>)], after: &[(u64, Vec<u8>)]) -> BTreeSet<u64> {
    let pairs = before.iter().zip(after);
    pairs.filter(|(a, b)| a != b).map(|(a, _)| a.0).collect()
}

/// One request and how many bytes of data the device writes for it.
type Case = (Request, u64);

/// Requests of every kind, each with memory of its own.
fn cases(mem: &GuestMemory, rng: &mut Rng) -> Vec<Case> {
    let alone = |bytes: usize| mem.alloc(bytes.next_multiple_of(4096), 4096);
    let mut cases = Vec::new();
    // In and across pages, with buffers in several pieces, and many of them.
    for (len, at) in [
        (512, 0),
        (4096, 0),
        (4096, 100),
        (65536, 4000),
        (1 << 20, 7),
    ] {
        let gpa = alone(len + 8192) + at;
        cases.push((Request::read(8, &[Seg::writable(gpa, len)]), len as u64));
        let gpa = alone(len + 8192) + at;
        cases.push((Request::write(16, &[Seg::readable(gpa, len)]), 0));
    }
    let scattered: Vec<Seg> = (0..60)
        .map(|_| Seg::writable(alone(12288) + rng.below(4096), 1536))
        .collect();
    cases.push((Request::read(3, &scattered), 60 * 1536));
    // From one region into the next, which is elsewhere in the daemon.
    let edge = MEMORY[1].0 - 8192;
    cases.push((Request::read(64, &[Seg::writable(edge, 16384)]), 16384));
    let far = mem.alloc_in(2, 8192, 4096);
    cases.push((Request::read(64, &[Seg::writable(far + 512, 4096)]), 4096));
    cases.push((
        Request::read(0, &[Seg::writable(alone(4096), 512)]).status_with_data(),
        512,
    ));
    // The serial, into a buffer whose second page stays untouched.
    let gpa = alone(8192) + 4096 - 20;
    cases.push((Request::get_id(Seg::writable(gpa, 20)), 20));
    let gpa = alone(8192) + 4096 - 10;
    cases.push((Request::get_id(Seg::writable(gpa, 20)), 20));
    cases.push((Request::get_id(Seg::writable(alone(8192) + 4000, 4192)), 20));
    cases.push((Request::flush(), 0));
    cases.push((
        Request::ranges(kind::DISCARD, mem, &[disk::Range::new(0, 8)]),
        0,
    ));
    cases.push((
        Request::ranges(kind::WRITE_ZEROES, mem, &[disk::Range::new(8, 8)]),
        0,
    ));
    // Refused: nothing but the status is written.
    let beyond = [Seg::writable(alone(4096), 4096)];
    cases.push((Request::read(DISK / SECTOR, &beyond), 0));
    cases.push((Request::new(77, 0, &[Seg::writable(alone(4096), 64)]), 0));
    cases
}

/// Runs every case under a log that started at `offset` in its file, with the used ring logged at `used_log`,
/// and compares the marks with the oracle and with what has changed.
fn exactly_what_is_written_is_marked(offset: u64, event_idx: bool, elsewhere: bool) {
    let content = Rng::new(7).bytes(DISK as usize);
    let daemon = Daemon::start_ours(&Spec::image_of(&content));
    let mut front_setup = setup();
    if !event_idx {
        front_setup.features &= !features::EVENT_IDX;
    }
    let mut front = Front::connect(daemon.socket(), &front_setup).expect("a session");
    front.mem.alloc_in(1, 4 << 20, 4096);
    let edge = MEMORY[0].1 - 8192;
    let shape = QueueSetup {
        size: 1024,
        event_idx,
        ..QueueSetup::default()
    };
    let mut queue = front.queue(0, shape).expect("a queue");
    let mut rng = Rng::new(11);
    let cases = cases(&front.mem, &mut rng);
    assert!(
        front.mem.alloc(1, 1) < edge as u64,
        "the edge belongs to one case"
    );

    // Not yet.
    let log = Log::new((1 << 30) + (4 << 20), offset);
    let early = [Seg::writable(front.mem.alloc(4096, 4096), 4096)];
    assert_eq!(Request::read(0, &early).run(&mut queue).status, status::OK);
    log.give_to(&mut front).expect("a log");
    assert_eq!(Request::read(0, &early).run(&mut queue).status, status::OK);
    assert_eq!(log.marked(), BTreeSet::new(), "nothing without LOG_ALL");

    // The ring is served meanwhile.
    set_logging(&mut front, true);
    let [_, avail, used] = queue.ring_addresses();
    let used_log = if elsewhere { 0x3000_0000 + 1028 } else { used };
    set_used_log(&mut front, &queue, Some(used_log)).expect("a ring's log");
    log.clear();

    let mut written = Written::default();
    let from = queue.device_used_idx();
    let laid_out: Vec<_> = cases
        .iter()
        .map(|(request, len)| (request.lay_out(&front.mem), *len))
        .collect();
    for (n, ((chain, status), _)) in laid_out.iter().enumerate() {
        queue
            .push_chain(n as u64, chain, *status)
            .expect("the ring has room");
    }
    let before = snapshot(&front.mem);
    queue.publish();
    let done = finish_all(&mut queue, cases.len());
    for ((chain, status), len) in &laid_out {
        written.chain(chain, *len, *status);
    }
    written.ring(used_log, 1024, from, cases.len() as u16);
    assert_eq!(done.len(), cases.len());
    let base = front.stop(0).expect("the ring stops");
    assert_eq!(base, queue.avail_idx());

    let (marked, after) = (log.marked(), snapshot(&front.mem));
    // Whether it asked for kicks again before it stopped, only the daemon knows.
    let mut told = marked.clone();
    let event = (used_log + 4 + 8 * 1024) / PAGE;
    if event_idx && !written.0.contains(&event) {
        told.remove(&event);
    }
    assert_eq!(told, written.0);
    // The driver has written its own index meanwhile.
    let own: BTreeSet<u64> = pages(avail..avail + 6 + 2 * 1024).collect();
    let mut changed = &changed(&before, &after) - &own;
    if elsewhere {
        changed.retain(|page| !pages(used..used + 6 + 8 * 1024).any(|used| used == *page));
    }
    assert!(changed.is_subset(&marked), "{:x?}", &changed - &marked);

    // And no longer.
    front.start(&queue).expect("the ring starts again");
    log.clear();
    set_logging(&mut front, false);
    log.clear();
    assert_eq!(Request::read(0, &early).run(&mut queue).status, status::OK);
    front.stop(0).expect("the ring stops");
    assert_eq!(log.marked(), BTreeSet::new(), "nothing after LOG_ALL");
}

#[test]
fn exactly_the_pages_that_are_written_are_marked() {
    exactly_what_is_written_is_marked(0, true, false);
}

#[test]
fn a_log_may_begin_anywhere_in_its_file() {
    exactly_what_is_written_is_marked(12288, true, false);
}

#[test]
fn without_event_idx_the_wish_for_kicks_is_in_the_flags_page() {
    exactly_what_is_written_is_marked(0, false, false);
}

#[test]
fn a_used_ring_is_logged_where_the_front_end_says() {
    exactly_what_is_written_is_marked(0, true, true);
}

/// LOG_ALL goes on and off while requests are in flight: what completes after it went on is marked, whenever it
/// was sent, and requests are served as if nothing were.
#[test]
fn logging_is_turned_on_and_off_under_load() {
    let content = Rng::new(3).bytes(DISK as usize);
    let daemon = Daemon::start_ours(&Spec::image_of(&content));
    let mut disk =
        Disk::attach_with(daemon.socket(), &setup(), 2, QueueSetup::default()).expect("a session");
    let log = Log::whole();
    log.give_to(&mut disk.front).expect("a log");
    let len = 32 << 10;
    let buffers: Vec<u64> = (0..64).map(|_| disk.mem().alloc(len, 4096)).collect();
    for round in 0..100 {
        let on = round % 2 == 0;
        let mem = disk.front.mem.clone();
        let queue = &mut disk.queues[round % 2];
        for (n, gpa) in (0..).zip(&buffers) {
            mem.fill(*gpa, len, 0);
            let data = [Seg::writable(*gpa, len)];
            queue.push(n, kind::IN, 0, n * 64, &data).expect("room");
        }
        queue.publish();
        // Some have completed by now and some have not.
        let first = finish(queue);
        log.clear();
        set_logging(&mut disk.front, on);
        let queue = &mut disk.queues[round % 2];
        let untold: Vec<_> = std::iter::from_fn(|| queue.reap()).collect();
        let known = 1 + untold.len();
        let late = finish_all(queue, buffers.len() - known);
        let all: Vec<_> = [first]
            .into_iter()
            .chain(untold)
            .chain(late.iter().copied())
            .collect();
        for done in &all {
            assert_eq!((done.status, done.len as usize), (status::OK, len + 1));
            let at = done.token as usize * 64 * 512;
            assert!(mem.read_vec(buffers[done.token as usize], len) == content[at..at + len]);
        }
        if on {
            // Those were in flight, or not even taken, when LOG_ALL was adopted.
            disk.front.stop(round % 2).expect("the ring stops");
            let marked = log.marked();
            for done in late {
                let gpa = buffers[done.token as usize];
                assert!(pages(gpa..gpa + len as u64).all(|page| marked.contains(&page)));
            }
            let queue = &disk.queues[round % 2];
            disk.front.start(queue).expect("the ring starts again");
        }
    }
    set_logging(&mut disk.front, false);
    log.clear();
    disk.read(0, 0, 65536);
    disk.front.stop(0).expect("the ring stops");
    assert_eq!(log.marked(), BTreeSet::new());
    let summary = daemon.stop();
    assert_eq!(summary.total(|queue| queue.errors), 0);
}

/// A device that is started in the midst of a migration gets LOG_ALL first and its log last: what was written
/// in between is unknown then, and all memory counts as written.
#[test]
fn a_log_that_comes_late_has_everything() {
    let daemon = Daemon::start_ours(&Spec::image(DISK));
    let with_all = Setup {
        features: features::KNOWN | LOG_ALL,
        ..setup()
    };
    let mut front = Front::connect(daemon.socket(), &with_all).expect("a session");
    let mut queue = front.queue(0, QueueSetup::default()).expect("a queue");
    let data = [Seg::writable(front.mem.alloc(4096, 4096), 4096)];
    assert_eq!(Request::read(0, &data).run(&mut queue).status, status::OK);
    let log = Log::whole();
    log.give_to(&mut front).expect("a log");
    let all = MEMORY
        .iter()
        .flat_map(|(gpa, len)| pages(*gpa..gpa + *len as u64));
    assert_eq!(log.marked(), all.collect());

    // A second start: this time the log of the first is still there, and has what was written.
    log.clear();
    front.stop(0).expect("the ring stops");
    log.clear();
    front.start(&queue).expect("the ring starts again");
    assert_eq!(Request::read(0, &data).run(&mut queue).status, status::OK);
    let second = Log::whole();
    second.give_to(&mut front).expect("a log");
    front.stop(0).expect("the ring stops");
    let marked = second.marked();
    assert!(marked.contains(&(data[0].gpa / PAGE)));
    assert!(marked.len() < 8, "{marked:x?}");
}

#[test]
fn a_log_that_does_not_reach_to_the_end_of_memory_ends_the_session() {
    let daemon = Daemon::start_ours(&Spec::image(DISK));
    let mut front = Front::connect(daemon.socket(), &setup()).expect("a session");
    Log::new(1 << 30, 0)
        .give_to(&mut front)
        .expect_err("it is too short");
    assert!(front.is_closed());
    assert!(daemon.wait_for_message("dirty log of 262144 pages for guest memory that ends at"));
    // Nobody else is harmed.
    Disk::attach(daemon.socket(), 1).flush(0);
}

/// The log's file goes away under the daemon: the rings that should mark pages stop, and the rest goes on.
#[test]
fn a_truncated_log_stops_its_rings_and_nothing_else() {
    let daemon = Daemon::start_ours(&Spec::image(DISK));
    let mut disk =
        Disk::attach_with(daemon.socket(), &setup(), 1, QueueSetup::default()).expect("a session");
    let log = Log::whole();
    log.give_to(&mut disk.front).expect("a log");
    set_logging(&mut disk.front, true);
    disk.flush(0);
    rustix::fs::ftruncate(log.mem.regions()[0].fd(), 0).expect("a memfd");
    let queue = &mut disk.queues[0];
    // The first request finds out, so the second is not taken.
    assert_eq!(Request::flush().run(queue).status, status::OK);
    Request::flush().push(queue, 1);
    queue.publish();
    assert!(daemon.wait_for_message("the file of the dirty log was made shorter"));
    drop(disk);
    Disk::attach(daemon.socket(), 1).flush(0);
}

/// Where its used ring is logged must have a bit too; a front end that names another place loses the ring.
#[test]
fn a_used_ring_logged_beyond_the_log_is_not_served() {
    let daemon = Daemon::start_ours(&Spec::image(DISK));
    let mut disk =
        Disk::attach_with(daemon.socket(), &setup(), 2, QueueSetup::default()).expect("a session");
    Log::whole().give_to(&mut disk.front).expect("a log");
    set_logging(&mut disk.front, true);
    set_used_log(&mut disk.front, &disk.queues[0], Some(1 << 40)).expect("taken note of");
    assert!(daemon.wait_for_message("the dirty log does not reach to the used ring"));
    disk.flush(1);
}

/// Cloud Hypervisor's way: a snapshot of the stopped device, restored by another daemon.
#[test]
fn a_snapshot_keeps_the_cache_mode_that_the_guest_chose() {
    let with_state = Setup {
        protocol: protocol::KNOWN | VhostUserProtocolFeatures::DEVICE_STATE,
        ..setup()
    };
    let connect =
        |daemon: &Daemon| Front::connect(daemon.socket(), &with_state).expect("a session");
    let load = |front: &Front, state: &[u8]| {
        let (reader, writer) = rustix::pipe::pipe().expect("a pipe");
        let set = front
            .vhost
            .set_device_state_fd(Direction::LOAD, Phase::STOPPED, reader);
        assert!(set.expect("a channel").is_none());
        assert_eq!(
            rustix::io::write(&writer, state).expect("room"),
            state.len()
        );
        drop(writer);
        front.vhost.check_device_state()
    };

    let source = Daemon::start_ours(&Spec::image(DISK));
    let mut front = connect(&source);
    let writeback = 32;
    front.set_config(writeback, &[0]).expect("a config write");
    let (reader, writer) = rustix::pipe::pipe().expect("a pipe");
    let set = front
        .vhost
        .set_device_state_fd(Direction::SAVE, Phase::STOPPED, writer);
    assert!(set.expect("a channel").is_none());
    let mut state = Vec::new();
    File::from(reader)
        .read_to_end(&mut state)
        .expect("a pipe that ends");
    front.vhost.check_device_state().expect("it was saved");
    front
        .vhost
        .check_device_state()
        .expect_err("nothing was transferred");

    let destination = Daemon::start_ours(&Spec::image(DISK));
    let mut front = connect(&destination);
    assert_eq!(front.config_bytes(writeback, 1).expect("a config"), [1]);
    load(&front, &[]).expect("no state is a state");
    load(&front, b"something else").expect_err("a state of somebody else's");
    assert!(destination.wait_for_message("a state is not restored: it is not this daemon's"));
    assert_eq!(front.config_bytes(writeback, 1).expect("a config"), [1]);
    load(&front, &state).expect("a state of ours");
    assert_eq!(front.config_bytes(writeback, 1).expect("a config"), [0]);
    // The session goes on with it.
    let mut queue = front.queue(0, QueueSetup::default()).expect("a queue");
    assert_eq!(Request::flush().run(&mut queue).status, status::OK);
}

/// A front end that says it has written a state, and still has the pipe open: it is told so, and the session goes on.
#[test]
fn a_state_that_does_not_come_is_not_waited_for() {
    let with_state = Setup {
        protocol: protocol::KNOWN | VhostUserProtocolFeatures::DEVICE_STATE,
        ..setup()
    };
    let daemon = Daemon::start_ours(&Spec::image(DISK));
    let mut front = Front::connect(daemon.socket(), &with_state).expect("a session");
    let (reader, _writer) = rustix::pipe::pipe().expect("a pipe");
    let set = front
        .vhost
        .set_device_state_fd(Direction::LOAD, Phase::STOPPED, reader);
    set.expect("a channel");
    front
        .vhost
        .check_device_state()
        .expect_err("the pipe is open");
    let mut queue = front.queue(0, QueueSetup::default()).expect("a queue");
    assert_eq!(Request::flush().run(&mut queue).status, status::OK);
}
