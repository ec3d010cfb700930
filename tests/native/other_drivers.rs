//! Front ends written by others: the virtio-driver and blkio crates (both from libblkio).

use crate::support::*;
use blkio::{Blkio, Completion as BlkioCompletion, ReqFlags};
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::Instant;
use virtio_driver::{
    VhostUser, VirtioBlkFeatureFlags, VirtioBlkQueue, VirtioBlkTransport, VirtioFeatureFlags,
};

const DISK: u64 = 16 << 20;
const LEN: usize = 256 << 10;

/// What one driver does: writes `data` at `offset`, clears a part of it, flushes, and returns what it reads there.
type Driver =
    fn(socket: &Path, offset: u64, data: Option<&[u8]>, zero: Option<(u64, u64)>) -> Vec<u8>;

fn with_virtio_driver(
    socket: &Path,
    offset: u64,
    data: Option<&[u8]>,
    zero: Option<(u64, u64)>,
) -> Vec<u8> {
    let features = VirtioFeatureFlags::VERSION_1.bits()
        | VirtioFeatureFlags::RING_EVENT_IDX.bits()
        | VirtioBlkFeatureFlags::all().bits() & !VirtioBlkFeatureFlags::RO.bits();
    let path = socket.to_str().expect("the socket's path is text");
    let vhost = VhostUser::new(path, features).expect("a session");
    let mut transport: Box<VirtioBlkTransport> = Box::new(vhost);
    let mut queues =
        VirtioBlkQueue::<u64>::setup_queues(&mut *transport, 2, 128).expect("two queues");
    let mem = GuestMemory::new(&[(0, 1 << 20)]).expect("shared memory");
    let region = &mem.regions()[0];
    let address = region.user_address() as usize;
    transport
        .map_mem_region(address, region.len, region.fd().as_raw_fd(), 0)
        .expect("the memory is mapped");
    let step = 64 << 10;
    let run = |submit: &mut dyn FnMut(&mut [VirtioBlkQueue<'_, u64>]),
               queues: &mut [VirtioBlkQueue<'_, u64>],
               mut pending: usize| {
        submit(queues);
        for index in 0..2 {
            transport
                .get_submission_notifier(index)
                .notify()
                .expect("the device is kicked");
        }
        let deadline = Instant::now() + DEADLINE;
        while pending > 0 {
            assert!(
                Instant::now() < deadline,
                "{pending} requests have no answer"
            );
            for queue in &mut *queues {
                for done in queue.completions() {
                    assert_eq!(done.ret, 0, "request {}", done.context);
                    pending -= 1;
                }
            }
            std::thread::yield_now();
        }
    };
    if let Some(data) = data {
        mem.write(0, data);
        run(
            &mut |queues| {
                for part in (0..data.len()).step_by(step) {
                    let buffer = std::ptr::with_exposed_provenance(address + part);
                    // SAFETY: the buffer lies in the mapping of `mem`, which outlives the request. Unsafe is what
                    // this driver takes raw addresses with.
                    unsafe {
                        queues[part / step % 2].write_raw(
                            offset + part as u64,
                            buffer,
                            step,
                            part as u64,
                        )
                    }
                    .expect("the queue has room");
                }
            },
            &mut queues,
            data.len() / step,
        );
    }
    if let Some((at, len)) = zero {
        run(
            &mut |queues| {
                queues[0]
                    .write_zeroes(at, len / 2, true, 1)
                    .expect("the queue has room");
                queues[1]
                    .write_zeroes(at + len / 2, len / 2, false, 2)
                    .expect("the queue has room");
            },
            &mut queues,
            2,
        );
        run(
            &mut |queues| {
                // Cleared already; a discard must not bring anything back.
                queues[0].discard(at, len, 3).expect("the queue has room");
            },
            &mut queues,
            1,
        );
    }
    run(
        &mut |queues| queues[1].flush(4).expect("the queue has room"),
        &mut queues,
        1,
    );
    mem.fill(0, LEN, 0xa5);
    run(
        &mut |queues| {
            for part in (0..LEN).step_by(step) {
                let buffer = std::ptr::with_exposed_provenance_mut(address + part);
                // SAFETY: as for the write.
                unsafe {
                    queues[part / step % 2].read_raw(
                        offset + part as u64,
                        buffer,
                        step,
                        part as u64,
                    )
                }
                .expect("the queue has room");
            }
        },
        &mut queues,
        LEN / step,
    );
    mem.read_vec(0, LEN)
}

fn with_blkio(
    socket: &Path,
    offset: u64,
    data: Option<&[u8]>,
    zero: Option<(u64, u64)>,
) -> Vec<u8> {
    let mut blkio = Blkio::new("virtio-blk-vhost-user").expect("the driver exists");
    blkio
        .set_str("path", socket.to_str().expect("the socket's path is text"))
        .expect("a path can be set");
    blkio.connect().expect("a session");
    assert_eq!(blkio.get_u64("capacity").expect("a size"), DISK);
    blkio.set_i32("num-queues", 1).expect("one queue");
    let mut queue = blkio.start().expect("the disk starts").queues.remove(0);
    let region = blkio.alloc_mem_region(1 << 20).expect("shared memory");
    blkio.map_mem_region(&region).expect("the memory is mapped");
    let buffer: *mut u8 = std::ptr::with_exposed_provenance_mut(region.addr);
    let run = |queue: &mut blkio::Blkioq| {
        let mut done: [MaybeUninit<BlkioCompletion>; 1] = [MaybeUninit::uninit()];
        let mut limit = DEADLINE;
        let count = queue
            .do_io(&mut done, 1, Some(&mut limit), None)
            .expect("a completion in time");
        assert_eq!(count, 1);
        // SAFETY: `do_io` filled as many completions as it returned. Unsafe is this crate's interface.
        let done = unsafe { done[0].assume_init_ref() };
        assert_eq!(done.ret, 0, "request {}", done.user_data);
    };
    if let Some(data) = data {
        // SAFETY: the region is 1 MiB of memory of ours and no request is in flight; unsafe because it is mapped raw.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), buffer, data.len()) };
        queue.write(offset, buffer, data.len(), 1, ReqFlags::empty());
        run(&mut queue);
    }
    if let Some((at, len)) = zero {
        queue.write_zeroes(at, len / 2, 2, ReqFlags::empty());
        run(&mut queue);
        queue.write_zeroes(at + len / 2, len / 2, 3, ReqFlags::NO_UNMAP);
        run(&mut queue);
        queue.discard(at, len, 4, ReqFlags::empty());
        run(&mut queue);
    }
    queue.flush(5, ReqFlags::empty());
    run(&mut queue);
    // SAFETY: as for the write.
    unsafe { std::ptr::write_bytes(buffer, 0xa5, LEN) };
    queue.read(offset, buffer, LEN, 6, ReqFlags::empty());
    run(&mut queue);
    // SAFETY: the request has completed, so nobody writes to the region any more.
    let read = unsafe { std::slice::from_raw_parts(buffer, LEN) }.to_vec();
    drop(queue);
    blkio.unmap_mem_region(&region);
    blkio.free_mem_region(&region);
    read
}

/// One driver writes, clears a part and flushes; the other reads the same, and the image holds the same.
fn one_writes_the_other_reads(writer: Driver, reader: Driver, seed: u64) {
    let daemon = Daemon::start(&Spec::image(DISK).args(["--discard", "on"]));
    let offset = 3 << 20;
    let mut expected = Rng::new(seed).bytes(LEN);
    let zero = (offset + 65536, 131072);
    let read = writer(daemon.socket(), offset, Some(&expected), Some(zero));
    expected[65536..65536 + 131072].fill(0);
    assert!(read == expected, "what the writer reads");
    let read = reader(daemon.socket(), offset, None, None);
    assert!(read == expected, "what the reader reads");
    let mut disk = Disk::attach(daemon.socket(), 1);
    assert!(
        disk.read(0, offset / SECTOR, LEN) == expected,
        "what our own driver reads"
    );
    drop(disk);
    let image = std::fs::read(daemon.image()).expect("the image can be read");
    let at = offset as usize;
    assert!(image[at..at + LEN] == expected, "what the image holds");
    daemon.stop();
}

#[test]
fn virtio_driver_writes_and_blkio_reads_the_same() {
    one_writes_the_other_reads(with_virtio_driver, with_blkio, 60);
}

#[test]
fn blkio_writes_and_virtio_driver_reads_the_same() {
    one_writes_the_other_reads(with_blkio, with_virtio_driver, 61);
}
