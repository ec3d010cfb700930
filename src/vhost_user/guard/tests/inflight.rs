//! The in-flight region: what the guard answers itself, and when.

use std::os::unix::fs::FileExt;
use std::sync::Mutex;

use rustix::fs::{
    MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, ftruncate, memfd_create,
};

use super::*;
use crate::disk::guest_notes::NoteKeeper;
use crate::virtio::inflight::{InflightRegion, Notes};

/// Where the records of a region for four queues begin.
const RECORDS_OF_4: u64 = 128 << 10;
/// Bytes of it: placeholders, records of 1024 entries, mark and notes.
const REGION_OF_4: u64 = RECORDS_OF_4 + 4 * 16448 + 64 + 128;

/// What a front end that wants a region negotiates.
const WITH_INFLIGHT: u64 = ALL_PROTOCOL | 0x1000;

/// As a C structure, with its padding.
fn description(request: R, size: u64, offset: u64, queues: u16, queue_size: u16) -> Sent {
    let mut payload = Vec::new();
    payload.extend(size.to_ne_bytes());
    payload.extend(offset.to_ne_bytes());
    payload.extend(queues.to_ne_bytes());
    payload.extend(queue_size.to_ne_bytes());
    payload.extend([0; 4]);
    raw(request.into(), 1, &payload)
}

fn get(queues: u16, queue_size: u16) -> Sent {
    description(R::GET_INFLIGHT_FD, 0, 0, queues, queue_size)
}

fn set(size: u64, offset: u64, queues: u16, queue_size: u16, file: impl Into<OwnedFd>) -> Sent {
    description(R::SET_INFLIGHT_FD, size, offset, queues, queue_size).with(file)
}

fn memory(bytes: u64) -> OwnedFd {
    let file = memfd_create("region", MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&file, bytes).unwrap();
    file
}

/// A front end, and a device on a thread of its own that answers GET_FEATURES and counts what it finds.
struct Session {
    front_end: UnixStream,
    device: std::thread::JoinHandle<Vec<u32>>,
    store: Arc<InflightStore>,
    thread: Ending,
}

fn session(protocol: u64) -> Session {
    session_with(protocol, InflightStore::default())
}

fn session_with(protocol: u64, store: InflightStore) -> Session {
    let Bench {
        front_end,
        device,
        guard,
    } = bench();
    let store = Arc::new(store);
    let thread = Ending::of(guard.with_inflight(Arc::clone(&store)));
    let device = std::thread::spawn(move || {
        let mut found = Vec::new();
        while let Some(message) = find(&device) {
            found.push(message.request);
            if message.request == u32::from(R::GET_FEATURES) {
                let answer = raw(message.request, 5, &PROTOCOL_FEATURES.to_ne_bytes());
                send(&device, &answer);
            }
        }
        found
    });
    send(&front_end, &u64s(R::SET_PROTOCOL_FEATURES, &[protocol]));
    Session {
        front_end,
        device,
        store,
        thread,
    }
}

/// The line with which a session ends that says this last.
fn refusal(last: Sent) -> String {
    let Session {
        front_end,
        device,
        store,
        thread,
    } = session(WITH_INFLIGHT);
    send(&front_end, &last);
    let end = thread.join();
    assert!(matches!(end, SessionEnd::Refused(_)), "{end}");
    assert!(store.queue(0, 1).is_none());
    drop(front_end);
    let found = device.join().unwrap();
    assert!(!found.contains(&31) && !found.contains(&32), "{found:?}");
    end.to_string()
}

#[test]
fn a_region_is_made_handed_out_and_taken_back() {
    let Session {
        front_end,
        device,
        store,
        thread,
    } = session(WITH_INFLIGHT);
    send(&front_end, &get(4, 128));
    let answer = find(&front_end).unwrap();
    assert_eq!((answer.request, answer.flags), (31, 5));
    assert_eq!(answer.payload.len(), 24);
    let word = |at: usize| u64::from_ne_bytes(answer.payload[at..at + 8].try_into().unwrap());
    assert_eq!((word(0), word(8)), (REGION_OF_4, 0));
    assert_eq!(answer.payload[16..20], [4, 0, 128, 0]);
    let [fd] = <[OwnedFd; 1]>::try_from(answer.fds).unwrap();
    let seals = fcntl_get_seals(&fd).unwrap();
    assert!(seals.contains(SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL));
    let file = File::from(fd);
    let mut records = vec![1; 4 * 16448];
    file.read_exact_at(&mut records, RECORDS_OF_4).unwrap();
    assert!(records.iter().all(|byte| *byte == 0));
    assert!(
        store.queue(0, 128).is_none(),
        "it is not in use before it is set"
    );

    let again = set(REGION_OF_4, 0, 4, 128, file.try_clone().unwrap());
    send(&front_end, &again);
    // Asked for an acknowledgement, it comes, and in order.
    let mut acked = set(REGION_OF_4, 0, 4, 128, file);
    acked.bytes[4] = 9;
    send(&front_end, &plain(R::GET_FEATURES));
    send(&front_end, &acked);
    send(&front_end, &plain(R::GET_FEATURES));
    let answers = [(); 3].map(|()| find(&front_end).unwrap());
    assert_eq!(answers.each_ref().map(|answer| answer.request), [1, 32, 1]);
    assert_eq!(answers[1].flags, 5);
    assert_eq!(answers[1].payload, [0; 8]);
    assert!(store.queue(3, 128).is_some());
    assert!(store.queue(4, 128).is_none());
    // QEMU 10.0.13 starts rings of 1024, whatever size it asks for.
    assert!(store.queue(0, 1024).is_some());
    // The last release finds the records by what is handed over.
    let carried = store.carry().unwrap().unwrap();
    let word = |at: usize| u64::from_ne_bytes(carried.payload[at..at + 8].try_into().unwrap());
    assert_eq!(
        (word(0), word(8)),
        (REGION_OF_4 - RECORDS_OF_4, RECORDS_OF_4)
    );
    assert_eq!(carried.payload[16..20], [4, 0, 0, 4]);
    drop(front_end);
    assert!(matches!(thread.join(), SessionEnd::FrontEndLeft));
    assert_eq!(device.join().unwrap(), [16, 1, 1, 1, 1, 1]);
}

/// A guest's disk that keeps notes, or refuses those it finds.
#[derive(Debug)]
struct Keeper {
    notes: Notes,
    refuses: bool,
    adopted: Mutex<Vec<Option<Notes>>>,
}

impl NoteKeeper for Keeper {
    fn who(&self) -> (u16, &str) {
        (0, "s")
    }

    fn notes(&self) -> Notes {
        self.notes
    }

    fn adopt(&self, region: &InflightRegion) -> Result<(), String> {
        self.adopted.lock().unwrap().push(region.notes());
        match self.refuses {
            true => Err("it was started with --something".to_owned()),
            false => Ok(()),
        }
    }
}

fn keeper(refuses: bool) -> Arc<Keeper> {
    Arc::new(Keeper {
        notes: Notes {
            size_bytes: 1 << 30,
            logical_block_size: 512,
            read_only: false,
            write_through: true,
            in_doubt: false,
            started: false,
        },
        refuses,
        adopted: Mutex::default(),
    })
}

#[test]
fn a_new_region_has_the_disks_notes_before_the_front_end_has_it() {
    let keeper = keeper(false);
    let store = InflightStore::new(Arc::clone(&keeper) as Arc<dyn NoteKeeper>);
    let Session {
        front_end, thread, ..
    } = session_with(WITH_INFLIGHT, store);
    send(&front_end, &get(4, 128));
    let answer = find(&front_end).unwrap();
    let [fd] = <[OwnedFd; 1]>::try_from(answer.fds).unwrap();
    let region = InflightRegion::map(&fd, 0, REGION_OF_4, 4, 128).unwrap();
    assert_eq!(region.notes(), Some(keeper.notes));
    // As QEMU and as Cloud Hypervisor give it back, and an old one.
    send(&front_end, &set(REGION_OF_4, 0, 4, 128, fd));
    send(&front_end, &set(4 * 2112, 0, 4, 128, memory(4 * 2112)));
    send(&front_end, &plain(R::GET_FEATURES));
    find(&front_end).unwrap();
    assert_eq!(*keeper.adopted.lock().unwrap(), [Some(keeper.notes), None]);
    drop(front_end);
    assert!(matches!(thread.join(), SessionEnd::FrontEndLeft));
}

#[test]
fn a_disk_that_cannot_go_on_with_a_guest_ends_the_session_and_says_why() {
    let store = InflightStore::new(keeper(true) as Arc<dyn NoteKeeper>);
    let Session {
        front_end,
        thread,
        store,
        ..
    } = session_with(WITH_INFLIGHT, store);
    send(
        &front_end,
        &set(REGION_OF_4, 0, 4, 128, memory(REGION_OF_4)),
    );
    let end = thread.join().to_string();
    assert!(
        end.contains("SET_INFLIGHT_FD: the guest cannot go on with this disk: it was started with --something"),
        "{end}"
    );
    assert!(store.queue(0, 1).is_none());
}

/// The document says twenty bytes; C structures have twenty-four.
#[test]
fn a_description_without_padding_is_answered_without() {
    let Session {
        front_end, thread, ..
    } = session(WITH_INFLIGHT);
    let padded = get(1, 8);
    send(&front_end, &raw(31, 1, &padded.bytes[12..32]));
    assert_eq!(find(&front_end).unwrap().payload.len(), 20);
    drop(front_end);
    assert!(matches!(thread.join(), SessionEnd::FrontEndLeft));
}

/// Requests sent at once: what came before the region does not see it, what comes after does.
#[test]
fn a_region_counts_from_its_place_in_the_order() {
    let Bench {
        front_end,
        device,
        guard,
    } = bench();
    let store = Arc::new(InflightStore::default());
    let thread = Ending::of(guard.with_inflight(Arc::clone(&store)));
    for message in [
        u64s(R::SET_PROTOCOL_FEATURES, &[WITH_INFLIGHT]),
        plain(R::GET_FEATURES),
        set(64, 0, 1, 1, memory(64)),
        plain(R::GET_QUEUE_NUM),
    ] {
        send(&front_end, &message);
    }
    let requests = [(); 3].map(|()| find(&device).unwrap().request);
    assert_eq!(requests, [16, 1, 1]);
    // The answer to the front end's own question: the region's turn has not come.
    send(&device, &raw(1, 5, &[0; 8]));
    assert_eq!(find(&front_end).unwrap().request, 1);
    assert!(store.queue(0, 1).is_none());
    send(&device, &raw(1, 5, &[0; 8]));
    // And only now the next request.
    assert_eq!(find(&device).unwrap().request, 17);
    assert!(store.queue(0, 1).is_some());
    drop((front_end, device));
    thread.join();
}

/// A front end that leaves while its message waits for a device that does not answer.
#[test]
fn who_leaves_while_a_region_waits_is_gone() {
    let Bench {
        front_end,
        device,
        guard,
    } = bench();
    let thread = Ending::of(guard);
    send(
        &front_end,
        &u64s(R::SET_PROTOCOL_FEATURES, &[WITH_INFLIGHT]),
    );
    send(&front_end, &get(1, 8));
    assert_eq!([(); 2].map(|()| find(&device).unwrap().request), [16, 1]);
    drop(front_end);
    assert!(matches!(thread.join(), SessionEnd::FrontEndLeft));
}

#[test]
fn without_the_feature_there_is_no_region() {
    refuse(
        vec![get(1, 8)],
        "GET_INFLIGHT_FD: protocol feature INFLIGHT_SHMFD was not negotiated",
    );
    refuse(vec![set(4096, 0, 1, 8, memory(4096))], "INFLIGHT_SHMFD");
}

#[test]
fn descriptions_that_cannot_be_are_refused() {
    // The disk has four queues of up to 256.
    for (queues, queue_size) in [
        (0, 8),
        (5, 8),
        (u16::MAX, 8),
        (1, 0),
        (1, 257),
        (u16::MAX, u16::MAX),
    ] {
        let line = refusal(get(queues, queue_size));
        assert!(
            line.contains("GET_INFLIGHT_FD: an in-flight region for"),
            "{line}"
        );
        let line = refusal(set(1 << 30, 0, queues, queue_size, memory(1 << 30)));
        assert!(
            line.contains("SET_INFLIGHT_FD: an in-flight region for"),
            "{line}"
        );
    }
    assert!(refusal(get(1, 8).with(event())).contains("1 file descriptors attached, expected 0"));
    let none = description(R::SET_INFLIGHT_FD, 4096, 0, 1, 8);
    assert!(refusal(none).contains("0 file descriptors attached, expected 1"));
}

#[test]
fn regions_that_cannot_be_are_refused() {
    let room = |bytes| refusal(set(bytes, 0, 4, 256, memory(1 << 20)));
    assert!(room(4 * 4160 - 1).contains("0x40ff bytes for queues that need 0x4100"));
    for (size, offset, file) in [
        (4 * 4160, 0, 4 * 4160 - 1),
        (1 << 20, 4096, 1 << 20),
        (1 << 20, u64::MAX - 4096, 1 << 20),
        (u64::MAX, 0, 1 << 20),
    ] {
        let line = refusal(set(size, offset, 4, 256, memory(file)));
        assert!(line.contains("ends beyond its file"), "{line}");
    }
    let line = refusal(set(4096, 1, 1, 8, memory(8192)));
    assert!(line.contains("cannot be mapped"), "{line}");

    let elsewhere = File::options()
        .read(true)
        .write(true)
        .open("/proc/self/coredump_filter")
        .unwrap();
    for (file, name) in [
        (elsewhere.into(), "a file on file system 0x9fa0"),
        (event(), "an eventfd"),
        (UnixStream::pair().unwrap().0.into(), "a Unix stream socket"),
        (
            File::open("/dev/zero").unwrap().into(),
            "a character device",
        ),
    ] {
        let file: OwnedFd = file;
        let line = refusal(set(4096, 0, 1, 8, file));
        assert!(line.contains(name), "{line}");
    }
    let sealed = memory(4096);
    fcntl_add_seals(&sealed, SealFlags::WRITE).unwrap();
    let line = refusal(set(4096, 0, 1, 8, sealed));
    assert!(line.contains("cannot be mapped"), "{line}");
}
