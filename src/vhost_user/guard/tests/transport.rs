//! How messages arrive and leave: pieces, descriptors, peers that stop, leave or talk nonsense.

use super::*;
use crate::sys::child;
use rustix::net::SendFlags;

/// Sends `message` in pieces of `step` bytes, all its descriptors with the piece `with`.
fn send_in_pieces(socket: &UnixStream, message: &Sent, step: usize, with: usize) {
    let fds: Vec<_> = message.fds.iter().map(AsFd::as_fd).collect();
    for (piece, bytes) in message.bytes.chunks(step).enumerate() {
        let fds = if piece == with { fds.as_slice() } else { &[] };
        send_segment(socket, bytes, fds).unwrap();
    }
}

#[test]
fn a_message_in_pieces_reaches_the_device_whole() {
    let bench = running();
    for (step, pieces) in [(1, 20), (5, 4), (12, 2), (13, 2), (19, 2)] {
        for with in [0, pieces / 2, pieces - 1] {
            let message = u64s(R::SET_VRING_CALL, &[2]).with(event());
            send_in_pieces(&bench.front_end, &message, step, with);
            let found = find(&bench.device).unwrap();
            assert_eq!(found.payload, message.bytes[12..]);
            assert_eq!(found.fds.len(), 1, "step {step}, with piece {with}");
        }
    }
    drop(bench.front_end);
    assert!(matches!(bench.thread.join(), SessionEnd::FrontEndLeft));
}

#[test]
fn an_answer_in_pieces_reaches_the_front_end_whole() {
    let bench = running();
    send(&bench.front_end, &plain(R::GET_FEATURES));
    find(&bench.device).unwrap();
    let answer = raw(1, 5, &77_u64.to_ne_bytes());
    send_in_pieces(&bench.device, &answer, 1, 0);
    assert_eq!(
        find(&bench.front_end).unwrap().payload,
        77_u64.to_ne_bytes()
    );
}

#[test]
fn descriptors_in_several_pieces_keep_their_order() {
    let bench = running();
    let sizes = [0x1000_u64, 0x2000, 0x3000];
    let regions: Vec<_> = (0..3_u64)
        .map(|i| [i << 20, sizes[usize::try_from(i).unwrap()], i << 20, 0])
        .collect();
    let message = mem_table(&regions);
    let files: Vec<File> = sizes.into_iter().map(file_of).collect();
    let third = message.bytes.len() / 3;
    for (piece, file) in files.iter().enumerate() {
        let end = if piece == 2 {
            message.bytes.len()
        } else {
            (piece + 1) * third
        };
        send_segment(
            &bench.front_end,
            &message.bytes[piece * third..end],
            &[file.as_fd()],
        )
        .unwrap();
    }
    let found = find(&bench.device).unwrap();
    let lengths: Vec<u64> = found
        .fds
        .into_iter()
        .map(|fd| File::from(fd).metadata().unwrap().len())
        .collect();
    assert_eq!(lengths, sizes);
}

#[test]
fn messages_that_share_a_segment_are_told_apart() {
    let bench = running();
    let mut bytes = Vec::new();
    for message in [
        plain(R::GET_FEATURES),
        u32s(R::SET_VRING_NUM, &[0, 64]),
        plain(R::GET_PROTOCOL_FEATURES),
    ] {
        bytes.extend(message.bytes);
    }
    // And the beginning of a fourth.
    bytes.extend(&plain(R::SET_OWNER).bytes[..7]);
    send_segment(&bench.front_end, &bytes, &[]).unwrap();
    for request in [R::GET_FEATURES, R::SET_VRING_NUM, R::GET_PROTOCOL_FEATURES] {
        assert_eq!(find(&bench.device).unwrap().request, u32::from(request));
    }
    send_segment(&bench.front_end, &plain(R::SET_OWNER).bytes[7..], &[]).unwrap();
    assert_eq!(
        find(&bench.device).unwrap().request,
        u32::from(R::SET_OWNER)
    );
}

#[test]
fn a_bad_header_ends_the_session_before_its_payload_comes() {
    for (header, text) in [
        (
            [0xdead_beef, 0xffff_ffff, 0xffff_ffff],
            "header flags 0xffffffff",
        ),
        (
            [u32::from(R::SET_FEATURES), 1, u32::MAX],
            "payload of 4294967295 bytes, expected 8 to 8",
        ),
        (
            [u32::from(R::SET_MEM_TABLE), 1, 4096],
            "payload of 4096 bytes, expected 40 to 1032",
        ),
    ] {
        let bench = running();
        let bytes: Vec<u8> = header.iter().flat_map(|w| w.to_ne_bytes()).collect();
        send_segment(&bench.front_end, &bytes, &[]).unwrap();
        let end = bench.thread.join();
        assert!(end.to_string().contains(text), "{end}");
        assert!(find(&bench.device).is_none());
        assert!(find(&bench.front_end).is_none(), "the front end is told");
    }
}

#[test]
fn too_many_descriptors_end_the_session_and_are_closed() {
    for pieces in [1, 40] {
        let bench = running();
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let bytes = [0; 11];
        let fds = vec![writer.as_fd(); 40 / pieces];
        // Bytes of a header that is never whole; the session ends without waiting for it.
        for piece in 0..pieces {
            let piece = if pieces == 1 {
                &bytes[..]
            } else {
                &bytes[..usize::from(piece < 11)]
            };
            if piece.is_empty() || send_segment(&bench.front_end, piece, &fds).is_err() {
                break;
            }
        }
        if pieces > 1 {
            // Eleven so far; the twelfth byte brings the rest.
            let fds = vec![writer.as_fd(); 30];
            send_segment(&bench.front_end, &[0], &fds).unwrap();
        }
        let end = bench.thread.join();
        assert!(
            end.to_string().contains("more than 32 file descriptors"),
            "{end}"
        );
        drop(writer);
        let mut byte = [0];
        assert_eq!(
            rustix::io::read(&reader, &mut byte).unwrap(),
            0,
            "all writers are closed"
        );
    }
}

#[test]
fn descriptors_of_a_refused_message_are_closed() {
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    refuse(
        vec![u64s(R::SET_VRING_KICK, &[0]).with(writer)],
        "is a pipe",
    );
    assert_eq!(rustix::io::read(&reader, &mut [0]).unwrap(), 0);
}

#[test]
fn half_a_message_is_not_passed_on() {
    for cut in 1..20 {
        let Bench {
            front_end,
            device,
            guard,
        } = bench();
        let message = u64s(R::SET_VRING_KICK, &[0]).with(event());
        send_segment(&front_end, &message.bytes[..cut], &[message.fds[0].as_fd()]).unwrap();
        drop(front_end);
        assert!(matches!(guard.run(), SessionEnd::FrontEndLeft));
        assert!(find(&device).is_none(), "cut at {cut}");
    }
}

#[test]
fn the_stop_event_ends_a_session_that_waits() {
    for begun in [0, 5, 14] {
        let bench = running();
        let message = u64s(R::SET_FEATURES, &[0]);
        if begun > 0 {
            send_segment(&bench.front_end, &message.bytes[..begun], &[]).unwrap();
        }
        signal(&bench.stop);
        assert!(matches!(bench.thread.join(), SessionEnd::Stopped));
        assert!(find(&bench.device).is_none(), "the device sees the end");
        assert!(
            find(&bench.front_end).is_none(),
            "and so does the front end"
        );
    }
}

/// Sends copies of `message` until nothing more is taken for a while; how many went.
fn flood(socket: &UnixStream, message: &Sent) -> usize {
    let mut sent = 0;
    let mut quiet = 0;
    while quiet < 20 {
        match rustix::net::send(
            socket,
            &message.bytes,
            SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
        ) {
            Ok(bytes) => {
                assert_eq!(bytes, message.bytes.len());
                sent += 1;
                quiet = 0;
                assert!(sent < 100_000, "what is not read must push back");
            }
            Err(Errno::AGAIN) => {
                quiet += 1;
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(errno) => panic!("{errno}"),
        }
    }
    sent
}

#[test]
fn a_device_that_does_not_read_pushes_back_and_loses_nothing() {
    let bench = running();
    let sent = flood(&bench.front_end, &u32s(R::SET_VRING_NUM, &[0, 64]));
    for _ in 0..sent {
        assert_eq!(
            find(&bench.device).unwrap().request,
            u32::from(R::SET_VRING_NUM)
        );
    }
    drop(bench.front_end);
    assert!(matches!(bench.thread.join(), SessionEnd::FrontEndLeft));
    assert!(find(&bench.device).is_none());
}

#[test]
fn a_front_end_that_does_not_read_pushes_back_and_loses_nothing() {
    let bench = running();
    let sent = flood(&bench.device, &raw(8, 5, &0_u64.to_ne_bytes()));
    // Requests still go through.
    send(&bench.front_end, &plain(R::SET_OWNER));
    assert_eq!(
        find(&bench.device).unwrap().request,
        u32::from(R::SET_OWNER)
    );
    for _ in 0..sent {
        assert_eq!(find(&bench.front_end).unwrap().request, 8);
    }
    drop(bench.device);
    assert!(matches!(bench.thread.join(), SessionEnd::BackendClosed));
}

#[test]
fn a_session_whose_peers_do_not_read_can_be_stopped() {
    let bench = running();
    flood(&bench.front_end, &u32s(R::SET_VRING_NUM, &[0, 64]));
    flood(&bench.device, &raw(8, 5, &0_u64.to_ne_bytes()));
    signal(&bench.stop);
    assert!(matches!(bench.thread.join(), SessionEnd::Stopped));
}

#[test]
fn a_front_end_that_leaves_is_noticed_while_the_device_does_not_read() {
    let bench = running();
    flood(&bench.front_end, &u32s(R::SET_VRING_NUM, &[0, 64]));
    drop(bench.front_end);
    assert!(matches!(bench.thread.join(), SessionEnd::FrontEndLeft));
}

/// Clock ticks of CPU that the thread `tid` has used, from /proc.
fn cpu_ticks(tid: i32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/self/task/{tid}/stat")).unwrap();
    let fields: Vec<_> = stat
        .rsplit(')')
        .next()
        .unwrap()
        .split_whitespace()
        .collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

#[test]
fn a_device_that_leaves_a_front_end_that_does_not_read_costs_no_cpu() {
    let (front_end, vmm) = UnixStream::pair().unwrap();
    let (backend, device) = UnixStream::pair().unwrap();
    let stop = event();
    let guard = Guard::new(vmm, backend, limits(), stop.try_clone().unwrap()).unwrap();
    let (ended, ending) = mpsc::channel();
    let (send_tid, tid) = mpsc::channel();
    std::thread::spawn(move || {
        send_tid
            .send(rustix::thread::gettid().as_raw_nonzero().get())
            .unwrap();
        ended.send(guard.run())
    });
    let tid = tid.recv().unwrap();
    flood(&device, &raw(8, 5, &0_u64.to_ne_bytes()));
    drop(device);
    let before = cpu_ticks(tid);
    std::thread::sleep(Duration::from_millis(300));
    // 300 ms of spinning would be 30 ticks.
    assert!(cpu_ticks(tid) - before < 10, "the guard spins");
    drop(front_end);
    assert!(matches!(Ending(ending).join(), SessionEnd::FrontEndLeft));
}

#[test]
fn the_devices_last_words_are_heard() {
    let bench = running();
    send(&bench.front_end, &plain(R::SET_OWNER));
    find(&bench.device).unwrap();
    send(&bench.device, &raw(3, 5, &1_u64.to_ne_bytes()));
    drop(bench.device);
    assert_eq!(find(&bench.front_end).unwrap().payload, 1_u64.to_ne_bytes());
    assert!(find(&bench.front_end).is_none());
    assert!(matches!(bench.thread.join(), SessionEnd::BackendClosed));
}

#[test]
fn a_device_that_sends_no_answers_is_our_own_fault() {
    for (flags, size) in [(1, 8_u32), (7, 8), (5, 4097)] {
        let bench = running();
        let words = [1, flags, size];
        let bytes: Vec<u8> = words.iter().flat_map(|w: &u32| w.to_ne_bytes()).collect();
        send_segment(&bench.device, &bytes, &[]).unwrap();
        let end = bench.thread.join();
        assert!(matches!(end, SessionEnd::Io(_)), "{end}");
        assert!(end.to_string().contains("no answer"), "{end}");
    }
}

#[test]
fn the_sockets_own_flags_stay_as_they_are() {
    let (front_end, vmm) = UnixStream::pair().unwrap();
    let (backend, device) = UnixStream::pair().unwrap();
    let kept = [vmm.try_clone().unwrap(), backend.try_clone().unwrap()];
    let guard = Guard::new(vmm, backend, limits(), event()).unwrap();
    send(&front_end, &plain(R::SET_OWNER));
    drop(front_end);
    guard.run();
    for socket in kept {
        let flags = rustix::fs::fcntl_getfl(&socket).unwrap();
        assert!(!flags.contains(rustix::fs::OFlags::NONBLOCK));
    }
    assert!(find(&device).is_some());
    assert!(
        find(&device).is_none(),
        "shut down, though a duplicate is open"
    );
}

/// Runs in a process of its own, since the limit of open files is the whole process's.
#[test]
fn descriptors_lost_for_want_of_numbers_end_the_session() {
    const NAME: &str = "descriptors_lost_for_want_of_numbers_end_the_session";
    const CHILD: &str = "SESSION_TEST_FEW_FDS";
    if std::env::var_os(CHILD).is_none() {
        let output = child::run(child::of(module_path!(), NAME).env(CHILD, "1"));
        assert!(output.status.success(), "{output:?}");
        return;
    }
    let Bench {
        front_end, guard, ..
    } = bench();
    let fd = event();
    let message = u64s(R::SET_FEATURES, &[0]);
    send_segment(&front_end, &message.bytes, &[fd.as_fd(); 32]).unwrap();
    let few = rustix::process::Rlimit {
        current: Some(16),
        ..rustix::process::getrlimit(rustix::process::Resource::Nofile)
    };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, few).unwrap();
    let end = guard.run();
    assert!(
        end.to_string()
            .contains("file descriptors were lost: raise"),
        "{end}"
    );
}

#[test]
fn a_message_that_leaves_in_parts_hands_its_descriptors_over_once() {
    use crate::vhost_user::guard::wire::{Header, Message};
    let (ours, theirs) = UnixStream::pair().unwrap();
    let payload = vec![7; 1 << 20];
    let mut queue = SendQueue::default();
    queue.push(Message {
        header: Header {
            request: 1,
            flags: 5,
            size: 1 << 20,
        },
        payload,
        fds: vec![event()],
    });
    let (mut bytes, mut fds, mut flushes) = (0, 0, 0);
    while bytes < 12 + (1 << 20) {
        assert_eq!(queue.flush(&ours).unwrap(), Flushed::Open);
        flushes += 1;
        let mut part = vec![0; 64 << 10];
        let (got, received) = recv_segment(&theirs, &mut part);
        bytes += got;
        fds += received.len();
    }
    assert!(queue.is_empty());
    assert!(flushes > 1);
    assert_eq!(fds, 1);
}

/// Without an end to it each of these would keep the session's own connection open for ever: what holds it is what is
/// never read.
#[test]
fn a_front_end_that_leaves_its_own_connection_behind_in_something_unfinished_is_not_waited_for() {
    let own = |front_end: &UnixStream| front_end.try_clone().unwrap();
    // With half a message.
    let bench = bench();
    let message = mem_table(&[[0, 0x1000, 0, 0]]).with(own(&bench.front_end));
    let fds: Vec<_> = message.fds.iter().map(AsFd::as_fd).collect();
    send_segment(&bench.front_end, &message.bytes[..20], &fds).unwrap();
    drop((bench.front_end, message));
    let end = Ending::of(bench.guard.with_patience(Duration::from_millis(100))).join();
    assert!(matches!(end, SessionEnd::Stalled), "{end}");

    // Behind answers that are not taken, where no more is read.
    let bench = super::bench();
    let end = Ending::of(bench.guard.with_patience(Duration::from_secs(1)));
    let device = bench.device.try_clone().unwrap();
    let answering = std::thread::spawn(move || {
        let answer = raw(1, 5, &[0; 8]).bytes;
        device.set_read_timeout(None).unwrap();
        device.set_write_timeout(None).unwrap();
        while find(&device).is_some() && send_segment(&device, &answer, &[]).is_ok() {}
    });
    let ask = plain(R::GET_FEATURES);
    let soon = Some(Duration::from_millis(300));
    bench.front_end.set_write_timeout(soon).unwrap();
    while send_segment(&bench.front_end, &ask.bytes, &[]).is_ok() {}
    rustix::net::sockopt::set_socket_send_buffer_size(&bench.front_end, 400_000).unwrap();
    send(
        &bench.front_end,
        &plain(R::GET_FEATURES).with(own(&bench.front_end)),
    );
    drop(bench.front_end);
    let end = end.join();
    assert!(matches!(end, SessionEnd::Stalled), "{end}");
    answering.join().unwrap();
}
