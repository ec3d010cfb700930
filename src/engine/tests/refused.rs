//! Calls that the kernel refuses, by a filter that makes `io_uring_enter` fail on one thread for good. What
//! fails for a while is tried with the whole daemon (tests/faults/enter.rs), because such a filter cannot be taken off.

use super::*;

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, apply_filter};

/// From here on, on this thread.
fn refuse_to_enter(errno: i32) {
    let filter = SeccompFilter::new(
        [(libc::SYS_io_uring_enter, vec![])].into(),
        SeccompAction::Allow,
        SeccompAction::Errno(errno.cast_unsigned()),
        std::env::consts::ARCH.try_into().unwrap(),
    );
    let program: BpfProgram = filter.unwrap().try_into().unwrap();
    apply_filter(&program).unwrap();
}

/// An engine with one read that is queued and not submitted, on a thread where nothing can be submitted any
/// more.
fn stuck(errno: i32, io_poll: IoPoll) -> Engine {
    let image = Image::new(On::Buffered, 1 << 20);
    let Target::File(file) = image.target() else {
        unreachable!()
    };
    let mut engine = engine(8);
    let disk = engine
        .add_disk(Target::File(FileTarget { io_poll, ..file }))
        .unwrap();
    // Alive for ever: nobody will say when the kernel has done with it.
    let buffer = Box::leak(Box::new(Buffer::new(4096, 0)));
    let segments = Box::leak(buffer.segments(&[]).into_boxed_slice());
    // SAFETY: buffer and segments are never freed. Unsafe because `queue_rq` is.
    unsafe { engine.queue_rq(disk, tag(0, 1), transfer(Op::Read, 0, segments)) }.unwrap();
    refuse_to_enter(errno);
    engine
}

/// Runs each case on a thread of its own, which ends with its filter.
fn on_a_thread(case: impl FnOnce() + Send + 'static) {
    thread::spawn(case).join().expect("it holds");
}

/// Turns of a worker whose ring is refused, and less than the pauses between them take together.
const TURNS: u32 = 30;
const AT_LEAST: Duration = Duration::from_millis(200);

#[test]
fn a_ring_that_cannot_be_entered_for_now_is_tried_again_without_burning_the_cpu() {
    for errno in [libc::EAGAIN, libc::EBUSY, libc::ENOMEM, libc::EINTR] {
        for io_poll in [IoPoll::Never, IoPoll::Always] {
            on_a_thread(move || {
                // Dropping it would wait for the request, also where this fails.
                let mut engine = std::mem::ManuallyDrop::new(stuck(errno, io_poll));
                let begun = Instant::now();
                engine.commit_rqs().expect("it passes");
                for _ in 0..TURNS {
                    let mut events = Vec::new();
                    engine
                        .reap(&mut |event| events.push(event))
                        .expect("it passes");
                    assert_eq!(events, [], "the request is neither done nor failed");
                    engine.wait(None).expect("it passes");
                }
                let took = begun.elapsed();
                assert!(
                    took >= AT_LEAST,
                    "{errno} {io_poll:?}: {TURNS} turns in {took:?}"
                );
                assert!(engine.counters().refused >= u64::from(TURNS));
                assert_eq!(engine.in_flight(), 1, "the request is kept");
            });
        }
    }
}

#[test]
fn the_queue_fills_up_where_nothing_is_taken_and_says_so() {
    on_a_thread(|| {
        let mut engine = stuck(libc::EAGAIN, IoPoll::Never);
        // Each is an entry, up to where one is to be waited for. In the end there is room for none, and no panic, and
        // nothing that waits for room here.
        for token in 0..4 {
            let (ours, _theirs) = new_eventfd(EventfdFlags::NONBLOCK);
            let call = engine.add_call(ours, token).unwrap();
            (0..100).for_each(|_| engine.call(call));
        }
        // SAFETY: a flush has no buffers. Unsafe because `queue_rq` is.
        let refused = unsafe { engine.queue_rq(DiskSlot(0), tag(1, 1), FLUSH) };
        let in_flight = engine.in_flight();
        // It would wait for that one.
        std::mem::forget(engine);
        assert_eq!((refused, in_flight), (Err(Busy::RetryLater), 1));
    });
}

#[test]
fn a_broken_ring_is_an_error_and_dropping_it_ends() {
    for errno in [libc::EBADF, libc::ENXIO, libc::EINVAL] {
        on_a_thread(move || {
            let mut engine = stuck(errno, IoPoll::Never);
            let error = engine.commit_rqs().expect_err("it is broken");
            assert_eq!(error.raw_os_error(), Some(errno));
            let error = engine.wait(None).expect_err("and stays so");
            assert_eq!(error.raw_os_error(), Some(errno));
            drop(engine);
        });
    }
}
