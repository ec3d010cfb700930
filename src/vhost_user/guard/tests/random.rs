//! Whatever comes in whatever pieces: no panic, and nothing that passes breaks the protocol.

use super::*;
use proptest::prelude::*;

/// The protocol's own words for what may pass, written apart from the rules: request number, and
/// whether a payload of that many bytes with that many descriptors is one.
fn lawful(found: &Found) -> bool {
    let (bytes, fds) = (found.payload.len(), found.fds.len());
    let words = |at: usize| u32::from_ne_bytes(found.payload[at..at + 4].try_into().unwrap());
    let long = |at: usize| u64::from_ne_bytes(found.payload[at..at + 8].try_into().unwrap());
    if found.flags & !8 != 1 {
        return false;
    }
    match found.request {
        1 | 3 | 4 | 15 | 17 | 34 | 36 | 43 => bytes == 0 && fds == 0,
        21 => bytes == 0 && fds == 1,
        2 | 16 => bytes == 8 && fds == 0,
        8 => bytes == 8 && fds == 0 && words(0) < 4 && matches!(words(4).count_ones(), 1),
        10 => bytes == 8 && fds == 0 && words(0) < 4 && words(4) < 65536,
        11 => bytes == 8 && fds == 0 && words(0) < 4,
        18 => bytes == 8 && fds == 0 && words(0) < 4 && words(4) < 2,
        12..=14 => {
            let queue = long(0);
            bytes == 8 && queue & 0xff < 4 && queue >> 9 == 0 && fds == usize::from(queue < 256)
        }
        9 => bytes == 40 && fds == 0 && words(0) < 4 && words(4) < 2 && long(8) % 16 == 0,
        24 | 25 => {
            fds == 0
                && bytes == 12 + words(4) as usize
                && words(4) > 0
                && u64::from(words(0)) + u64::from(words(4)) <= 256
        }
        5 => {
            let count = words(0) as usize;
            let guests: Vec<u64> = (0..count).map(|i| long(8 + 32 * i)).collect();
            fds == count
                && bytes == 8 + 32 * count
                && (1..=32).contains(&count)
                && guests.is_sorted()
                && (0..count).all(|i| sound(&found.payload[8 + 32 * i..]))
        }
        37 => bytes == 40 && fds == 1 && sound(&found.payload[8..]),
        38 => bytes == 40 && fds == 0,
        42 => bytes == 8 && fds == 1 && words(0) < 2 && words(4) == 0,
        _ => false,
    }
}

/// The region at the start of `bytes` is not empty and nothing of it wraps.
fn sound(bytes: &[u8]) -> bool {
    let word = |i: usize| u64::from_ne_bytes(bytes[8 * i..8 * i + 8].try_into().unwrap());
    let size = u128::from(word(1));
    size > 0
        && [0, 2, 3]
            .iter()
            .all(|&i| u128::from(word(i)) + size <= u128::from(u64::MAX))
}

/// A number that is often near something.
fn number() -> impl Strategy<Value = u64> {
    prop_oneof![
        0_u64..6,
        (0_u64..16).prop_map(|page| page << 12),
        (0_u32..64).prop_map(|bit| 1 << bit),
        (0_u64..64).prop_map(|back| u64::MAX - back),
        any::<u64>(),
    ]
}

/// A kind of descriptor to attach.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Event,
    Pipe,
    File,
    Socket,
}

impl Kind {
    fn open(self) -> OwnedFd {
        match self {
            Kind::Event => event(),
            Kind::Pipe => rustix::pipe::pipe().unwrap().1,
            Kind::File => file_of(1 << 20).into(),
            Kind::Socket => UnixStream::pair().unwrap().0.into(),
        }
    }
}

/// A message that is mostly right: the request's own payload size more often than not.
fn message() -> impl Strategy<Value = (u32, u32, Vec<u8>, Vec<Kind>)> {
    let request = prop_oneof![9 => 1_u32..46, 1 => any::<u32>()];
    let flags = prop_oneof![9 => prop_oneof![Just(1_u32), Just(9)], 1 => any::<u32>()];
    let kind = prop_oneof![
        Just(Kind::Event),
        Just(Kind::Pipe),
        Just(Kind::File),
        Just(Kind::Socket)
    ];
    (
        request,
        flags,
        prop::collection::vec(number(), 0..14),
        prop::collection::vec(kind, 0..4),
        0_usize..10,
    )
        .prop_map(|(request, flags, words, kinds, wildness)| {
            let mut payload: Vec<u8> = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
            let mut kinds = kinds;
            if wildness > 0 {
                let (bytes, fds) = match request {
                    2 | 16 | 8 | 10 | 11 | 18 => (8, 0),
                    12..=14 => (8, 1),
                    9 => (40, 0),
                    5 => (40, 1),
                    37 => (40, 1),
                    38 => (40, 0),
                    24 | 25 => (20, 0),
                    21 => (0, 1),
                    _ => (0, 0),
                };
                payload.resize(bytes, 0);
                kinds.resize(fds, Kind::Event);
                if wildness > 3 {
                    match request {
                        5 => payload[..8].copy_from_slice(&1_u64.to_ne_bytes()),
                        24 | 25 => payload[4..8].copy_from_slice(&8_u32.to_ne_bytes()),
                        _ => {}
                    }
                    if matches!(request, 5 | 37) {
                        kinds = vec![Kind::File];
                    }
                }
            }
            (request, flags, payload, kinds)
        })
}

/// Sends `messages` cut into pieces of `cuts` bytes, over and over; descriptors leave with the
/// piece that holds their message's first byte. What passes fits the device's socket buffer.
fn run(messages: Vec<Sent>, cuts: &[usize]) -> (SessionEnd, Vec<Found>) {
    let Running {
        front_end,
        device,
        thread,
        ..
    } = running();
    let mut cuts = cuts.iter().cycle();
    'all: for message in messages {
        let mut fds: Vec<_> = message.fds.iter().map(AsFd::as_fd).collect();
        let mut rest = message.bytes.as_slice();
        while !rest.is_empty() {
            let (piece, after) = rest.split_at((*cuts.next().unwrap()).min(rest.len()));
            match send_segment(&front_end, piece, &fds) {
                Ok(sent) => assert_eq!(sent, piece.len()),
                // Refused already.
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
                    ) =>
                {
                    break 'all;
                }
                Err(error) => panic!("{error}"),
            }
            fds.clear();
            rest = after;
        }
    }
    drop(front_end);
    (thread.join(), find_all(&device))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn bytes_of_any_kind(
        bytes in prop::collection::vec(prop_oneof![Just(0_u8), Just(1), 0_u8..40, any::<u8>()], 0..200),
        cuts in prop::collection::vec(1_usize..64, 1..8),
    ) {
        let mut all = opening();
        all.push(Sent { bytes, fds: Vec::new() });
        let (end, found) = run(all, &cuts);
        prop_assert!(matches!(end, SessionEnd::FrontEndLeft | SessionEnd::Refused(_)), "{end}");
        for found in &found {
            prop_assert!(lawful(found), "{found:?}");
        }
    }

    #[test]
    fn messages_of_any_kind(
        messages in prop::collection::vec(message(), 1..12),
        cuts in prop::collection::vec(1_usize..64, 1..8),
    ) {
        let mut all = opening();
        all.extend(messages.into_iter().map(|(request, flags, payload, kinds)| Sent {
            fds: kinds.into_iter().map(Kind::open).collect(),
            ..raw(request, flags, &payload)
        }));
        let count = all.len();
        let (end, found) = run(all, &cuts);
        match end {
            SessionEnd::FrontEndLeft => prop_assert_eq!(found.len(), count),
            SessionEnd::Refused(refusal) => {
                prop_assert!(found.len() < count);
                prop_assert!(!refusal.to_string().contains('\n'));
            }
            other => prop_assert!(false, "{}", other),
        }
        for found in &found {
            prop_assert!(lawful(found), "{found:?}");
        }
    }
}
