//! Each rule, with what passes it and what does not.

use super::*;
use crate::disk::resize::ConfigChanged;

const PAGE: u64 = 0x1000;

/// 1 MiB at guest address 0 and front-end address 0x7000_0000.
fn some_memory() -> Sent {
    mem_table(&[[0, 256 * PAGE, 0x7000_0000, 0]]).with(file_of(256 * PAGE))
}

#[test]
fn requests_without_contents_pass_and_take_none() {
    for request in [
        R::GET_FEATURES,
        R::SET_OWNER,
        R::RESET_OWNER,
        R::GET_PROTOCOL_FEATURES,
        R::GET_QUEUE_NUM,
        R::RESET_DEVICE,
        R::GET_MAX_MEM_SLOTS,
    ] {
        pass(vec![plain(request)]);
        refuse(vec![u64s(request, &[0])], "payload of 8 bytes");
        refuse(
            vec![plain(request).with(event())],
            "1 file descriptors attached, expected 0",
        );
    }
}

#[test]
fn what_the_daemon_does_not_offer_is_refused_by_name() {
    for (request, name) in [
        (7, "SET_LOG_FD"),
        (19, "SEND_RARP"),
        (22, "IOTLB_MSG"),
        (28, "POSTCOPY_ADVISE"),
        (33, "GPU_SET_SOCKET"),
        (35, "VRING_KICK"),
        (40, "GET_STATUS"),
        (41, "GET_SHARED_OBJECT"),
        (44, "GET_SHMEM_CONFIG"),
        (0, "request 0"),
        (45, "request 45"),
        (u32::MAX, "request 4294967295"),
    ] {
        refuse(vec![raw(request, 1, &[])], &format!("{name}: this daemon"));
    }
}

#[test]
fn flags_are_those_of_a_request_of_version_1() {
    let found = {
        let (_, found) = exchange(vec![raw(1, 0x9, &[])]);
        found
    };
    assert_eq!(found[0].flags, 0x9, "NEED_REPLY goes through");
    for flags in [0, 2, 3, 0x5, 0x11, 0x8000_0001, u32::MAX] {
        refuse(vec![raw(1, flags, &[])], "header flags");
    }
}

#[test]
fn a_request_needs_its_protocol_feature() {
    for (request, name) in [
        (R::GET_QUEUE_NUM, "MQ"),
        (R::SET_LOG_BASE, "LOG_SHMFD"),
        (R::SET_DEVICE_STATE_FD, "DEVICE_STATE"),
        (R::CHECK_DEVICE_STATE, "DEVICE_STATE"),
        (R::SET_BACKEND_REQ_FD, "BACKEND_REQ"),
        (R::GET_CONFIG, "CONFIG"),
        (R::SET_CONFIG, "CONFIG"),
        (R::RESET_DEVICE, "RESET_DEVICE"),
        (R::GET_MAX_MEM_SLOTS, "CONFIGURE_MEM_SLOTS"),
        (R::ADD_MEM_REG, "CONFIGURE_MEM_SLOTS"),
        (R::REM_MEM_REG, "CONFIGURE_MEM_SLOTS"),
    ] {
        let (end, found) = exchange(vec![plain(request)]);
        let want = format!("{request:?}: protocol feature {name} was not negotiated");
        assert!(end.to_string().contains(&want), "{end}");
        assert!(found.is_empty());
    }
}

#[test]
fn a_device_state_has_a_direction_and_a_channel_that_ends() {
    let transfer = |direction, phase| u32s(R::SET_DEVICE_STATE_FD, &[direction, phase]);
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    let (socket, peer) = UnixStream::pair().unwrap();
    pass(vec![
        transfer(0, 0).with(writer),
        plain(R::CHECK_DEVICE_STATE),
        transfer(0, 0).with(socket),
        transfer(1, 0).with(reader),
        transfer(1, 0).with(file_of(1)),
    ]);
    // It would be kept until it is read, with all that waits in it.
    refuse(
        vec![transfer(1, 0).with(peer)],
        "state is a Unix stream socket",
    );
    refuse(vec![transfer(0, 0)], "0 file descriptors attached");
    refuse(vec![transfer(0, 0).with(event())], "state is an eventfd");
    refuse(vec![transfer(2, 0).with(file_of(1))], "in direction 2");
    refuse(vec![transfer(0, 1).with(file_of(1))], "phase 1, expected");
}

#[test]
fn a_session_has_one_owner() {
    refuse(
        vec![plain(R::SET_OWNER), plain(R::SET_OWNER)],
        "SET_OWNER: the session has an owner",
    );
    pass(vec![
        plain(R::SET_OWNER),
        plain(R::RESET_OWNER),
        plain(R::SET_OWNER),
    ]);
}

#[test]
fn features_that_were_not_offered_are_refused() {
    for (get, set) in [
        (R::GET_FEATURES, R::SET_FEATURES),
        (R::GET_PROTOCOL_FEATURES, R::SET_PROTOCOL_FEATURES),
    ] {
        let Running {
            front_end,
            device,
            thread,
            ..
        } = running();
        send(&front_end, &plain(get));
        assert_eq!(find(&device).unwrap().request, u32::from(get));
        send(&device, &raw(get.into(), 5, &0b0110_u64.to_ne_bytes()));
        assert_eq!(find(&front_end).unwrap().payload, 0b0110_u64.to_ne_bytes());
        send(&front_end, &u64s(set, &[0b0100]));
        assert_eq!(find(&device).unwrap().payload, 0b0100_u64.to_ne_bytes());
        send(&front_end, &u64s(set, &[0b1110]));
        let end = thread.join();
        assert!(
            end.to_string()
                .contains(&format!("{set:?}: feature bits 0x8 were never offered")),
            "{end}"
        );
        assert!(find(&device).is_none());
    }
}

#[test]
fn enable_wants_protocol_features_and_a_switch_value() {
    pass(vec![
        u32s(R::SET_VRING_ENABLE, &[3, 1]),
        u32s(R::SET_VRING_ENABLE, &[3, 0]),
    ]);
    refuse(
        vec![u32s(R::SET_VRING_ENABLE, &[0, 2])],
        "SET_VRING_ENABLE: queue 0: 2 is neither",
    );
    refuse(
        vec![
            u64s(R::SET_FEATURES, &[0]),
            u32s(R::SET_VRING_ENABLE, &[0, 1]),
        ],
        "bit 30",
    );
    for reset in [R::RESET_DEVICE, R::RESET_OWNER] {
        refuse(
            vec![plain(reset), u32s(R::SET_VRING_ENABLE, &[0, 0])],
            "bit 30",
        );
    }
}

#[test]
fn queues_are_those_the_disk_has() {
    for request in [
        R::SET_VRING_NUM,
        R::SET_VRING_BASE,
        R::GET_VRING_BASE,
        R::SET_VRING_ENABLE,
    ] {
        pass(vec![u32s(request, &[3, 1])]);
        for index in [4, 256, u32::MAX] {
            let want = format!("{request:?}: queue {index} does not exist, this disk has 4");
            refuse(vec![u32s(request, &[index, 1])], &want);
        }
    }
    for request in [R::SET_VRING_KICK, R::SET_VRING_CALL, R::SET_VRING_ERR] {
        refuse(vec![u64s(request, &[4]).with(event())], "queue 4 does not");
        refuse(vec![u64s(request, &[0x1ff])], "queue 255 does not");
        refuse(
            vec![u64s(request, &[0x200]).with(event())],
            "value 0x200 has bits beyond",
        );
    }
    let mut addr = ring_addresses(4, 0, 0x7000_0000);
    refuse(vec![some_memory(), addr], "queue 4 does not");
    addr = ring_addresses(3, 0, 0x7000_0000);
    pass(vec![some_memory(), addr]);
}

#[test]
fn queue_sizes_are_powers_of_two() {
    for size in [1, 2, 128, 256] {
        pass(vec![u32s(R::SET_VRING_NUM, &[0, size])]);
    }
    for size in [0, 3, 100, 257, 512, 0x1_0000, u32::MAX] {
        refuse(
            vec![u32s(R::SET_VRING_NUM, &[2, size])],
            &format!("queue 2: size {size} is no power of two from 1 to 256"),
        );
    }
}

#[test]
fn a_base_is_a_split_rings_index() {
    pass(vec![u32s(R::SET_VRING_BASE, &[0, 0xffff])]);
    refuse(
        vec![u32s(R::SET_VRING_BASE, &[0, 0x1_0000])],
        "queue 0: base 65536",
    );
}

/// Descriptor table, used ring, available ring and log, at `at` and two pages behind it.
fn ring_addresses(queue: u32, flags: u32, at: u64) -> Sent {
    let first = u64::from(queue) | u64::from(flags) << 32;
    u64s(
        R::SET_VRING_ADDR,
        &[first, at, at + PAGE, at + 2 * PAGE, u64::MAX - 3],
    )
}

#[test]
fn ring_addresses_are_aligned_and_in_memory() {
    let at = 0x7000_0000;
    pass(vec![some_memory(), ring_addresses(0, 1, at)]);
    refuse(
        vec![ring_addresses(0, 0, at)],
        "descriptor table at 0x70000000 is in no",
    );
    refuse(
        vec![some_memory(), ring_addresses(0, 2, at)],
        "unknown address flags 0x2",
    );
    for (addresses, text) in [
        (
            [at + 8, at, at],
            "descriptor table at 0x70000008 is not aligned to 16",
        ),
        (
            [at, at + 2, at],
            "used ring at 0x70000002 is not aligned to 4",
        ),
        (
            [at, at, at + 1],
            "available ring at 0x70000001 is not aligned to 2",
        ),
        (
            [at - 16, at, at],
            "descriptor table at 0x6ffffff0 is in no memory",
        ),
        (
            [at, at + 256 * PAGE, at],
            "used ring at 0x70100000 is in no memory",
        ),
        (
            [at, at, u64::MAX - 1],
            "available ring at 0xfffffffffffffffe is in no",
        ),
    ] {
        let [desc, used, avail] = addresses;
        refuse(
            vec![
                some_memory(),
                u64s(R::SET_VRING_ADDR, &[0, desc, used, avail, 0]),
            ],
            text,
        );
    }
    // The region they were in is gone.
    let region = [0, 256 * PAGE, at, 0];
    refuse(
        vec![
            some_memory(),
            one_region(R::REM_MEM_REG, region),
            ring_addresses(0, 0, at),
        ],
        "is in no memory region",
    );
}

#[test]
fn a_kick_is_an_eventfd() {
    let kick = |fd: OwnedFd| u64s(R::SET_VRING_KICK, &[1]).with(fd);
    // Also a second time, on a live ring.
    let found = pass(vec![kick(event()), kick(event())]);
    assert_eq!(found[1].fds.len(), 1);
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    refuse(
        vec![kick(writer)],
        "SET_VRING_KICK: queue 1: the kick descriptor is a pipe, expected an eventfd",
    );
    refuse(vec![kick(reader)], "reading end of a pipe");
    let (socket, _peer) = UnixStream::pair().unwrap();
    refuse(
        vec![kick(socket.into())],
        "is a Unix stream socket, expected an eventfd",
    );
    refuse(
        vec![kick(file_of(8).into())],
        "is a file on tmpfs, expected an eventfd",
    );
}

#[test]
fn a_call_or_an_error_is_an_eventfd_or_something_to_write() {
    for (request, role) in [(R::SET_VRING_CALL, "call"), (R::SET_VRING_ERR, "error")] {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        pass(vec![u64s(request, &[0]).with(event())]);
        pass(vec![u64s(request, &[0]).with(writer)]);
        let (socket, _peer) = UnixStream::pair().unwrap();
        pass(vec![u64s(request, &[0]).with(socket)]);
        refuse(
            vec![u64s(request, &[0]).with(reader)],
            &format!("the {role} descriptor is the reading end of a pipe"),
        );
        let (datagram, _peer) = std::os::unix::net::UnixDatagram::pair().unwrap();
        refuse(
            vec![u64s(request, &[0]).with(datagram)],
            &format!("the {role} descriptor is socket:"),
        );
    }
}

#[test]
fn a_ring_without_descriptors_says_so() {
    for request in [R::SET_VRING_KICK, R::SET_VRING_CALL, R::SET_VRING_ERR] {
        pass(vec![u64s(request, &[0x102])]);
        refuse(
            vec![u64s(request, &[2])],
            "0 file descriptors attached, expected 1",
        );
        refuse(
            vec![u64s(request, &[0x102]).with(event())],
            "1 file descriptors attached, expected 0",
        );
        refuse(
            vec![u64s(request, &[2]).with(event()).with(event())],
            "2 file descriptors attached, expected 1",
        );
    }
}

/// Cloud Hypervisor before v51 reads all of the space at 0x100.
#[test]
fn the_whole_config_is_read_at_the_offset_of_old_cloud_hypervisors() {
    pass(vec![config_message(R::GET_CONFIG, 256, 60, 1, 60)]);
    for (request, size) in [(R::GET_CONFIG, 57), (R::SET_CONFIG, 60)] {
        let message = config_message(request, 256, size, 1, size as usize);
        refuse(
            vec![message],
            &format!("config access of {size} bytes at 256"),
        );
    }
}

#[test]
fn config_is_read_and_written_inside_its_space() {
    for request in [R::GET_CONFIG, R::SET_CONFIG] {
        for (offset, size) in [(0, 57), (0, 60), (0, 256), (255, 1), (32, 1)] {
            pass(vec![config_message(
                request,
                offset,
                size,
                1,
                size as usize,
            )]);
        }
        for (offset, size, contents) in [
            (1, 256, 256),
            (256, 1, 1),
            (u32::MAX, 1, 1),
            (0, u32::MAX, 1),
            (0, 0, 1),
        ] {
            let want = format!("config access of {size} bytes at {offset}");
            refuse(
                vec![config_message(request, offset, size, 0, contents)],
                &want,
            );
        }
        refuse(
            vec![config_message(request, 0, 8, 0, 9)],
            "payload of 21 bytes does not fit its contents, which take 20",
        );
        refuse(
            vec![config_message(request, 0, 8, 4, 8)],
            "config flags 0x4",
        );
        refuse(
            vec![config_message(request, 0, 0, 0, 0)],
            "payload of 12 bytes, expected 13 to 268",
        );
        refuse(
            vec![config_message(request, 0, 257, 0, 257)],
            "payload of 269 bytes",
        );
    }
}

#[test]
fn a_memory_table_reaches_the_device_by_guest_address_with_its_files() {
    let sizes = [3 * PAGE, PAGE, 2 * PAGE];
    let regions = [
        [20 * PAGE, sizes[0], 0x9000_0000, 0],
        [0, sizes[1], 0x7000_0000, 0],
        [10 * PAGE, sizes[2], 0x8000_0000, 0],
    ];
    let mut message = mem_table(&regions);
    // Padding behind the count, which the protocol leaves open.
    message.bytes[16..20].fill(0xaa);
    for size in sizes {
        message = message.with(file_of(size));
    }
    let (end, found) = exchange(vec![message]);
    assert!(matches!(end, SessionEnd::FrontEndLeft), "{end}");
    let words: Vec<u64> = found[0]
        .payload
        .chunks(8)
        .map(|word| u64::from_ne_bytes(word.try_into().unwrap()))
        .collect();
    let sorted = [&[3][..], &regions[1], &regions[2], &regions[0]].concat();
    assert_eq!(words, sorted);
    let lengths: Vec<u64> = found[0]
        .fds
        .iter()
        .map(|fd| {
            File::from(fd.try_clone().unwrap())
                .metadata()
                .unwrap()
                .len()
        })
        .collect();
    assert_eq!(lengths, [sizes[1], sizes[2], sizes[0]]);
}

#[test]
fn a_memory_table_with_room_to_spare_is_cut_to_its_regions() {
    let region = [0, PAGE, 0x7000_0000, 0];
    let mut message = mem_table(&[region, [0; 4]]).with(file_of(PAGE));
    message.bytes[12..16].copy_from_slice(&1_u32.to_ne_bytes());
    let (end, found) = exchange(vec![message, plain(R::SET_OWNER)]);
    assert!(matches!(end, SessionEnd::FrontEndLeft), "{end}");
    assert_eq!(found[0].payload, mem_table(&[region]).bytes[12..]);
    assert_eq!(found[1].request, u32::from(R::SET_OWNER));
}

#[test]
fn a_memory_table_has_as_many_files_as_it_says_and_has_regions() {
    refuse(
        vec![mem_table(&[[0, PAGE, 0, 0]])],
        "0 file descriptors attached, expected 1",
    );
    refuse(
        vec![
            mem_table(&[[0, PAGE, 0, 0]])
                .with(file_of(PAGE))
                .with(file_of(PAGE)),
        ],
        "2 file descriptors attached, expected 1",
    );
    for count in [0, 33, u32::MAX] {
        let mut message = mem_table(&[[0, PAGE, 0, 0]]).with(file_of(PAGE));
        message.bytes[12..16].copy_from_slice(&count.to_ne_bytes());
        refuse(
            vec![message],
            &format!("{count} memory regions, expected 1 to 32"),
        );
    }
    let mut message = mem_table(&[[0, PAGE, 0, 0]]).with(file_of(PAGE));
    message.bytes[12..16].copy_from_slice(&2_u32.to_ne_bytes());
    refuse(
        vec![message],
        "payload of 40 bytes does not fit its contents, which take 72",
    );

    let many = |count: u64| {
        let regions: Vec<_> = (0..count).map(|i| [i * PAGE, PAGE, i * PAGE, 0]).collect();
        let mut message = mem_table(&regions);
        for _ in 0..count {
            message = message.with(file_of(PAGE));
        }
        message
    };
    pass(vec![many(32)]);
    refuse(vec![many(33)], "more than 32 file descriptors");
    let mut table = many(33);
    table.fds.clear();
    refuse(vec![table], "payload of 1064 bytes, expected 40 to 1032");
}

#[test]
fn a_region_is_sound_wherever_it_comes() {
    let max = u64::MAX;
    let table = |region| mem_table(&[region]);
    let add = |region| one_region(R::ADD_MEM_REG, region);
    for message in [&table as &dyn Fn(RegionWords) -> Sent, &add] {
        pass(vec![message([0, PAGE, 0, PAGE]).with(file_of(2 * PAGE))]);
        for (region, text) in [
            ([7, 0, 0, 0], "guest address 0x7 is empty"),
            ([max - 5, 16, 0, 0], "run past the end of the guest's"),
            ([0, 16, max - 5, 0], "run past the end of the front end's"),
            ([0, 16, 0, max - 5], "run past the end of the largest file"),
            ([PAGE, max, 0, 0], "run past the end"),
            (
                [0, PAGE + 1, 0, 0],
                "needs 0x1001 bytes of a file that has 0x1000",
            ),
            (
                [0, PAGE, 0, 1],
                "needs 0x1001 bytes of a file that has 0x1000",
            ),
            (
                [0, 1 << 62, 0, 0],
                "needs 0x4000000000000000 bytes of a file",
            ),
        ] {
            refuse(vec![message(region).with(file_of(PAGE))], text);
        }
        let region = [0, PAGE, 0, 0];
        let (reader, _writer) = rustix::pipe::pipe().unwrap();
        refuse(
            vec![message(region).with(reader)],
            "backed by the reading end of a pipe",
        );
        refuse(vec![message(region).with(event())], "backed by an eventfd");
        let read_only = {
            let file = tempfile::NamedTempFile::new().unwrap();
            file.as_file().set_len(PAGE).unwrap();
            File::open(file.path()).unwrap()
        };
        refuse(
            vec![message(region).with(read_only)],
            "backed by a file not open for reading and writing",
        );
        // How long a character device is, only the mapping tells.
        let zero = File::options()
            .read(true)
            .write(true)
            .open("/dev/zero")
            .unwrap();
        pass(vec![message([0, PAGE, 0, 0]).with(zero)]);
    }
    let memfd = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&memfd, PAGE).unwrap();
    pass(vec![table([0, PAGE, 0, 0]).with(memfd)]);
}

#[test]
fn a_region_is_whole_huge_pages() {
    use rustix::fs::MemfdFlags;
    const HUGE: u64 = 2 << 20;
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    // It takes no page to make one, but hugetlbfs.
    let Ok(file) = rustix::fs::memfd_create("huge", flags) else {
        println!("not tested: no hugetlbfs");
        return;
    };
    rustix::fs::ftruncate(&file, 4 * HUGE).unwrap();
    let table =
        |size, offset| mem_table(&[[0, size, 0x7000_0000, offset]]).with(file.try_clone().unwrap());
    pass(vec![table(2 * HUGE, HUGE)]);
    for (size, offset) in [(HUGE + 4096, 0), (HUGE, 4096)] {
        refuse(
            vec![table(size, offset)],
            "is no whole number of its file's huge pages of 0x200000 bytes",
        );
    }
}

#[test]
fn regions_do_not_overlap() {
    let add = |guest, pages| {
        one_region(
            R::ADD_MEM_REG,
            [guest * PAGE, pages * PAGE, guest * PAGE, 0],
        )
        .with(file_of(pages * PAGE))
    };
    pass(vec![add(10, 2), add(12, 1), add(9, 1)]);
    refuse(vec![add(10, 2), add(11, 4)], "0xa000 and 0xb000 overlap");
    refuse(vec![add(10, 2), add(9, 2)], "overlap");
    refuse(vec![add(10, 2), add(10, 2)], "overlap");
    refuse(
        vec![
            mem_table(&[[PAGE, PAGE, 0, 0], [0, PAGE + 1, 0, 0]])
                .with(file_of(PAGE))
                .with(file_of(2 * PAGE)),
        ],
        "0x0 and 0x1000 overlap",
    );
    // A table replaces what was there.
    pass(vec![add(0, 2), some_memory(), some_memory()]);
}

#[test]
fn regions_are_removed_by_what_identifies_them() {
    let region = [PAGE, PAGE, 5 * PAGE, 0];
    let add = || one_region(R::ADD_MEM_REG, region).with(file_of(PAGE));
    let moved = [PAGE, PAGE, 5 * PAGE, 7 * PAGE];
    pass(vec![add(), one_region(R::REM_MEM_REG, moved), add()]);
    for (at, name) in [(0, "0x1001"), (1, "0x1001 bytes"), (2, "0x1000")] {
        let mut other = region;
        other[at] += 1;
        refuse(
            vec![add(), one_region(R::REM_MEM_REG, other)],
            "no memory region of",
        );
        refuse(vec![add(), one_region(R::REM_MEM_REG, other)], name);
    }
    refuse(
        vec![one_region(R::REM_MEM_REG, region)],
        "no memory region of",
    );
    refuse(
        vec![
            add(),
            one_region(R::REM_MEM_REG, region)
                .with(event())
                .with(event()),
        ],
        "file descriptors attached",
    );

    // Some front ends attach the region's file. The device does not get it.
    let mut messages = opening();
    messages.push(add());
    messages.push(one_region(R::REM_MEM_REG, region).with(file_of(PAGE)));
    let (end, found) = exchange(messages);
    assert!(matches!(end, SessionEnd::FrontEndLeft), "{end}");
    assert_eq!(found[3].request, u32::from(R::REM_MEM_REG));
    assert!(found[3].fds.is_empty());
}

#[test]
fn regions_are_as_many_as_the_limit() {
    let few = SessionLimits {
        max_regions: 2,
        ..limits()
    };
    let add = |guest| {
        one_region(R::ADD_MEM_REG, [guest * PAGE, PAGE, guest * PAGE, 0]).with(file_of(PAGE))
    };
    let messages = |count| {
        opening()
            .into_iter()
            .chain((0..count).map(add))
            .collect::<Vec<_>>()
    };
    let (end, _) = exchange_with(few, &messages(2));
    assert!(matches!(end, SessionEnd::FrontEndLeft), "{end}");
    let (end, found) = exchange_with(few, &messages(3));
    assert!(
        end.to_string()
            .contains("3 memory regions, expected 1 to 2"),
        "{end}"
    );
    assert_eq!(found.len(), 4);
}

#[test]
fn a_channel_is_a_unix_stream_socket_and_carries_config_changes() {
    let channel = |fd: OwnedFd| plain(R::SET_BACKEND_REQ_FD).with(fd);
    refuse(vec![plain(R::SET_BACKEND_REQ_FD)], "0 file descriptors");
    refuse(
        vec![channel(event())],
        "the back-end channel is an eventfd, expected a stream socket",
    );
    let (datagram, _peer) = std::os::unix::net::UnixDatagram::pair().unwrap();
    refuse(vec![channel(datagram.into())], "expected a stream socket");

    let Running {
        front_end,
        device,
        notifier,
        thread,
        ..
    } = running();
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(DEADLINE)).unwrap();
    assert!(!notifier.config_changed().unwrap(), "nothing negotiated");
    for message in opening() {
        send(&front_end, &message);
        find(&device).unwrap();
    }
    assert!(!notifier.config_changed().unwrap(), "no channel yet");
    send(&front_end, &channel(theirs.into()));
    let found = find(&device).unwrap();
    assert_eq!(found.fds.len(), 1, "the device has the original");
    drop(found);

    assert!(notifier.config_changed().unwrap());
    let change = find(&ours).unwrap();
    assert_eq!((change.request, change.flags), (2, 1));
    assert!(change.payload.is_empty());

    // Without CONFIG nobody wants to hear of it.
    send(&front_end, &u64s(R::SET_PROTOCOL_FEATURES, &[0x20]));
    find(&device).unwrap();
    assert!(!notifier.config_changed().unwrap());

    drop(front_end);
    assert!(matches!(thread.join(), SessionEnd::FrontEndLeft));
    assert!(!notifier.config_changed().unwrap());
    assert!(find(&ours).is_none(), "the duplicate is closed");
}
