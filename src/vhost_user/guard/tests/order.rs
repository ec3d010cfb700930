//! The orders in which real front ends say things, all of which pass.

use super::*;

const PAGE: u64 = 0x1000;

fn ring(queue: u32, user: u64) -> Vec<Sent> {
    vec![
        u32s(R::SET_VRING_NUM, &[queue, 128]),
        u32s(R::SET_VRING_BASE, &[queue, 0]),
        u64s(
            R::SET_VRING_ADDR,
            &[queue.into(), user, user + 2 * PAGE, user + PAGE, 0],
        ),
        u64s(R::SET_VRING_KICK, &[queue.into()]).with(event()),
    ]
}

#[test]
fn qemu() {
    let user = 0x7f00_0000_0000;
    let mut messages = vec![
        plain(R::GET_FEATURES),
        plain(R::GET_PROTOCOL_FEATURES),
        u64s(R::SET_PROTOCOL_FEATURES, &[ALL_PROTOCOL]),
        plain(R::GET_QUEUE_NUM),
        plain(R::GET_MAX_MEM_SLOTS),
        plain(R::SET_BACKEND_REQ_FD).with(UnixStream::pair().unwrap().0),
        plain(R::SET_OWNER),
    ];
    for queue in 0..4 {
        messages.push(u64s(R::SET_VRING_CALL, &[queue]).with(event()));
        messages.push(u64s(R::SET_VRING_ERR, &[queue]).with(event()));
    }
    messages.push(config_message(R::GET_CONFIG, 0, 57, 0, 57));
    messages.push(u64s(R::SET_FEATURES, &[PROTOCOL_FEATURES]));
    // A poll queue has no call descriptor; calls come again, before there is memory.
    messages.push(u64s(R::SET_VRING_CALL, &[0]).with(event()));
    messages.push(u64s(R::SET_VRING_CALL, &[0x101]));
    messages.push(u64s(R::SET_FEATURES, &[PROTOCOL_FEATURES]));
    messages.push(one_region(R::ADD_MEM_REG, [0, 640 * 1024, user, 0]).with(file_of(64 << 20)));
    messages.push(
        one_region(
            R::ADD_MEM_REG,
            [0xc_0000, 32 << 20, user + 0xc_0000, 0xc_0000],
        )
        .with(file_of(64 << 20)),
    );
    messages.extend(ring(0, user));
    messages.extend(ring(1, user + 16 * PAGE));
    for queue in 0..4 {
        // Queues that the guest does not use are enabled too, with nothing set.
        messages.push(u32s(R::SET_VRING_ENABLE, &[queue, 1]));
    }
    // The guest resets the device and starts again.
    messages.push(u32s(R::SET_VRING_ENABLE, &[0, 0]));
    messages.push(u32s(R::GET_VRING_BASE, &[0, 0]));
    messages.push(one_region(R::REM_MEM_REG, [0, 640 * 1024, user, 0]));
    messages.push(plain(R::RESET_DEVICE));
    messages.push(u64s(R::SET_FEATURES, &[PROTOCOL_FEATURES]));
    messages.push(one_region(R::ADD_MEM_REG, [0, 640 * 1024, user, 0]).with(file_of(64 << 20)));
    messages.extend(ring(0, user));
    messages.push(u32s(R::SET_VRING_ENABLE, &[0, 1]));
    pass(messages);
}

#[test]
fn cloud_hypervisor_and_firecracker() {
    let user = 0x7f00_0000_0000;
    let mut messages = vec![
        plain(R::SET_OWNER),
        plain(R::GET_FEATURES),
        u64s(R::SET_FEATURES, &[PROTOCOL_FEATURES]),
        plain(R::GET_PROTOCOL_FEATURES),
        u64s(R::SET_PROTOCOL_FEATURES, &[ALL_PROTOCOL]),
        plain(R::GET_QUEUE_NUM),
        config_message(R::GET_CONFIG, 0, 60, 1, 60),
        u64s(R::SET_FEATURES, &[PROTOCOL_FEATURES]),
        mem_table(&[
            [0, 1 << 20, user, 0],
            [1 << 32, 1 << 20, user + (1 << 20), 1 << 20],
        ])
        .with(file_of(2 << 20))
        .with(file_of(2 << 20)),
    ];
    messages.extend(ring(0, user));
    messages.push(u64s(R::SET_VRING_CALL, &[0]).with(event()));
    messages.push(u32s(R::SET_VRING_ENABLE, &[0, 1]));
    messages.push(config_message(R::SET_CONFIG, 32, 1, 1, 1));
    pass(messages);
}

#[test]
fn user_mode_linux() {
    let user = 0x6000_0000;
    let (_reader, call) = UnixStream::pair().unwrap();
    let mut messages = vec![
        plain(R::SET_OWNER),
        plain(R::GET_FEATURES),
        plain(R::GET_PROTOCOL_FEATURES),
        u64s(R::SET_PROTOCOL_FEATURES, &[0x8 | 0x20 | 0x200]),
        plain(R::SET_BACKEND_REQ_FD).with(UnixStream::pair().unwrap().0),
        config_message(R::GET_CONFIG, 0, 60, 0, 60),
        u64s(R::SET_FEATURES, &[PROTOCOL_FEATURES]),
        mem_table(&[[user, 1 << 20, user, PAGE]]).with(file_of(2 << 20)),
        u64s(R::SET_VRING_CALL, &[0]).with(call),
    ];
    messages.extend(ring(0, user));
    messages.push(u32s(R::SET_VRING_ENABLE, &[0, 1]));
    pass(messages);
}

#[test]
fn the_old_way_without_protocol_features() {
    let mut messages = vec![
        plain(R::GET_FEATURES),
        plain(R::SET_OWNER),
        u64s(R::SET_FEATURES, &[0]),
        mem_table(&[[0, 1 << 20, 0, 0]]).with(file_of(1 << 20)),
    ];
    messages.extend(ring(0, 0));
    messages.push(u64s(R::SET_VRING_CALL, &[0]).with(event()));
    messages.push(u32s(R::GET_VRING_BASE, &[0, 0]));
    let (end, found) = exchange_with(limits(), &messages);
    assert!(matches!(end, SessionEnd::FrontEndLeft), "{end}");
    assert_eq!(found.len(), messages.len());
}
