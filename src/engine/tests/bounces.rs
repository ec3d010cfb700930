//! Bounce buffers, when a disk does not give back what it has.

use std::io::Write;

use super::*;

#[test]
fn a_disk_whose_image_does_not_answer_leaves_other_disks_their_bounce_buffers() {
    let image = Image::new(On::Direct, 1 << 20);
    let (silent, mut end) = io::pipe().expect("a pipe");
    let mut engine = engine(64);
    let Target::File(file) = image.target() else {
        unreachable!()
    };
    // What reads it waits until something is written.
    let stuck = engine
        .add_disk(Target::File(FileTarget {
            file: silent.into(),
            ..file
        }))
        .unwrap();
    let good = engine.add_disk(image.target()).unwrap();
    let mut buffers: Vec<Buffer> = (0..40).map(|_| Buffer::new(512, 1)).collect();
    let segments: Vec<Vec<iovec>> = buffers.iter_mut().map(|b| b.segments(&[])).collect();
    let mut held = 0;
    loop {
        let command = transfer(Op::Read, 0, &segments[held]);
        let tag = tag(u16::try_from(held).unwrap(), 0);
        // SAFETY: the buffers are alive until the engine is. Unsafe because `queue_rq` is.
        let queued = unsafe { engine.queue_rq(stuck, tag, command) };
        let Err(busy) = queued else {
            held += 1;
            continue;
        };
        assert_eq!(busy, Busy::WakesOnCompletion);
        break;
    }
    assert_eq!(held, usize::from(BOUNCE_OF_DISK + BOUNCE_SHARED));
    let content = image.content();
    for round in 0..10 {
        let own = held..held + usize::from(BOUNCE_OF_DISK);
        for at in own.clone() {
            let command = transfer(Op::Read, 512 * (at + round) as u64, &segments[at]);
            // SAFETY: as above. Unsafe because `queue_rq` is.
            unsafe {
                engine.queue_rq(good, tag(u16::try_from(at).unwrap(), round as u16), command)
            }
            .expect("a disk has a part of its own");
        }
        let events = reap_until(&mut engine, |events| events.len() == own.len());
        assert!(
            events.iter().all(|event| matches!(
                event,
                Event::Done {
                    result: Ok(512),
                    ..
                }
            )),
            "{events:?}"
        );
        for at in own {
            let from = 512 * (at + round);
            assert!(buffers[at].bytes() == &content[from..from + 512]);
        }
    }
    // The rest is answered too, so that the engine can end.
    end.write_all(&vec![0; 512 * held]).expect("room");
    let events = reap_until(&mut engine, |events| events.len() == held);
    assert_eq!(events.len(), held);
    assert_eq!(
        engine.memory_free_bounces(),
        usize::from(2 * BOUNCE_OF_DISK + BOUNCE_SHARED)
    );
}
