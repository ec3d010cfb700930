//! Who gets how much: two flows on one hctx, two disks on one worker.

use std::collections::BTreeMap;

use super::*;

/// A device that works on so many requests at a time, each for the same time, and takes more, which
/// wait in the order in which they came.
struct Device {
    /// How many it takes.
    room: usize,
    /// When each of its servers is free.
    free_ns: Vec<u64>,
    service_ns: u64,
    now_ns: u64,
    /// In the order in which they end.
    taken: VecDeque<(u64, DriverTag)>,
    dispatched: Vec<Vec<u32>>,
    /// Requests of the stream and of the flood that wait, and what was dispatched of each while
    /// both did.
    waiting: [usize; 2],
    competing: [u64; 2],
}

impl Device {
    fn new(room: usize, servers: usize, service_ns: u64) -> Self {
        Device {
            room,
            free_ns: vec![0; servers],
            service_ns,
            now_ns: 0,
            taken: VecDeque::new(),
            dispatched: Vec::new(),
            waiting: [0; 2],
            competing: [0; 2],
        }
    }
}

impl Driver<u32> for Device {
    fn queue_rq(
        &mut self,
        _disk: DiskId,
        _hctx: HctxId,
        tag: DriverTag,
        _request: &Request,
        parts: Parts<'_, u32>,
    ) -> Result<(), Busy> {
        if self.taken.len() == self.room {
            return Err(Busy::UntilCompletion);
        }
        let next = self.free_ns.iter_mut().min().expect("it has servers");
        let end_ns = self.now_ns.max(*next) + self.service_ns;
        *next = end_ns;
        self.taken.push_back((end_ns, tag));
        let parts: Vec<u32> = parts.copied().collect();
        let flow = usize::from(!is_stream(parts[0]));
        if self.waiting.iter().all(|n| *n > 0) {
            self.competing[flow] += 1;
        }
        self.waiting[flow] -= parts.len();
        self.dispatched.push(parts);
        Ok(())
    }
}

/// A worker with this device, and when each request came.
struct Worker {
    mq: Mq<u32>,
    device: Device,
    came_ns: BTreeMap<u32, u64>,
    /// (payload, how long it took).
    ended: Vec<(u32, u64)>,
}

impl Worker {
    fn new(mq: Mq<u32>, device: Device) -> Self {
        Worker {
            mq,
            device,
            came_ns: BTreeMap::new(),
            ended: Vec::new(),
        }
    }

    /// Time goes on until something ends.
    fn reap(&mut self) {
        let (now_ns, _) = *self.device.taken.front().expect("something is in flight");
        self.device.now_ns = now_ns;
        self.mq.start_turn(now_ns);
        while let Some((at, tag)) = self.device.taken.front().copied() {
            if at > now_ns {
                break;
            }
            self.device.taken.pop_front();
            let Worker { came_ns, ended, .. } = self;
            self.mq.complete(tag, Ok(()), |_, payload, _, _| {
                let came_ns = came_ns.remove(&payload).expect("it ends once");
                ended.push((payload, now_ns - came_ns));
            });
        }
    }

    fn plug(&mut self, id: HctxId, tag: u16, payload: u32, request: Request) {
        self.came_ns.insert(payload, self.device.now_ns);
        self.device.waiting[usize::from(!is_stream(payload))] += 1;
        self.mq
            .plug(id, RequestTag(tag), request, payload, &mut self.device);
    }
}

const STREAM_DEPTH: u16 = 16;
const FLOOD_DEPTH: u16 = 96;

/// Payloads are request tags, and the guest gives the first of them to its stream.
fn is_stream(payload: u32) -> bool {
    payload < STREAM_DEPTH.into()
}

/// How one sequential stream fares beside a random flood on the same hctx: its share of what was
/// dispatched while both had something waiting, its share of the requests that ended, and how many
/// of its requests were merged, in percent.
fn stream_beside_flood(ctxs: u16, flood_regions: &[u64]) -> [u64; 3] {
    let mut mq = Mq::new(TagDepth::for_disks(1));
    let id = mq.add_hctx(HctxConfig {
        disk: DiskId(0),
        queue: QueueId(0),
        ring_size: 128,
        ctxs,
    });
    let mut worker = Worker::new(mq, Device::new(4, 4, 100_000));
    let mut random = Random(1);
    let mut free: Vec<u16> = (0..STREAM_DEPTH + FLOOD_DEPTH).rev().collect();
    let mut at = 0;
    let (mut stream_ended, mut ended) = (0, 0);
    for _ in 0..4000 {
        // Both send as much as they may, mixed as they come.
        while !free.is_empty() {
            let nth = usize::try_from(random.below(free.len() as u64)).unwrap();
            let tag = free.swap_remove(nth);
            let sector = if tag < STREAM_DEPTH {
                at = (at + 8) % 2048;
                at
            } else {
                let nth = random.below(flood_regions.len() as u64);
                flood_regions[usize::try_from(nth).unwrap()] * 2048 + random.below(256) * 8
            };
            worker.plug(id, tag, tag.into(), read(sector));
        }
        worker.mq.unplug(id, &mut worker.device);
        worker.mq.run(&mut worker.device);
        worker.reap();
        for (payload, _) in worker.ended.drain(..) {
            free.push(u16::try_from(payload).unwrap());
            stream_ended += u64::from(is_stream(payload));
            ended += 1;
        }
        worker.mq.run(&mut worker.device);
    }
    let device = &worker.device;
    let stream = device.dispatched.iter().filter(|parts| is_stream(parts[0]));
    let stream: Vec<_> = stream.collect();
    let requests: usize = stream.iter().map(|parts| parts.len()).sum();
    let percent = |part: u64, of: u64| part * 100 / of;
    [
        percent(device.competing[0], device.competing.iter().sum()),
        percent(stream_ended, ended),
        percent((requests - stream.len()) as u64, requests as u64),
    ]
}

#[test]
fn a_stream_beside_a_flood_has_a_ctx_of_its_own() {
    let (stream, hot) = Ctxs2::new().two_regions();
    assert_eq!(stream, 0);
    let hot = [hot / 2048];
    let everywhere: Vec<u64> = (1..1000).collect();
    println!("one ctx, two ctxs: stream's share of dispatches, of requests; merged, in percent");
    for (name, regions) in [("one region", &hot[..]), ("everywhere", &everywhere)] {
        let one = stream_beside_flood(1, regions);
        let two = stream_beside_flood(2, regions);
        println!("a flood on {name}: {one:?}, {two:?}");
        if regions.len() == 1 {
            assert!(two[0] >= 40, "{two:?}");
            assert!(two[0] > one[0] && two[2] > one[2], "{one:?} {two:?}");
        }
    }
}

/// What a quiet disk (one request at a time) gets beside one that floods, on one worker with `tags`
/// driver tags: its median and 99th percentile in microseconds, and its requests for each thousand.
fn quiet_beside_flood(tags: u16, depth: u16, fair: bool) -> [u64; 3] {
    let mut mq = Mq::new(super::tags(2, 0, tags));
    let hctxs = [0, 1].map(|disk| {
        mq.add_hctx(HctxConfig {
            disk: DiskId(disk),
            queue: QueueId(0),
            ring_size: 1024,
            ctxs: 1,
        })
    });
    let mut worker = Worker::new(mq, Device::new(usize::MAX, 32, 100_000));
    let mut random = Random(1);
    let mut free: Vec<u16> = (0..depth).collect();
    let mut quiet_free = true;
    let (mut quiet, mut ended) = (Vec::new(), 0);
    while ended < 40_000 {
        while let Some(tag) = free.pop() {
            worker.plug(hctxs[0], tag, tag.into(), read(random.below(1 << 20) * 100));
        }
        worker.mq.unplug(hctxs[0], &mut worker.device);
        if std::mem::take(&mut quiet_free) {
            worker.plug(hctxs[1], 0, u32::MAX, read(random.below(1 << 20) * 100));
        }
        worker.mq.unplug(hctxs[1], &mut worker.device);
        worker.mq.run(&mut worker.device);
        if !fair {
            worker.mq.tags.be_unfair();
        }
        worker.reap();
        for (payload, took_ns) in worker.ended.drain(..) {
            ended += 1;
            if payload == u32::MAX {
                quiet.push(took_ns / 1000);
                quiet_free = true;
            } else {
                free.push(u16::try_from(payload).unwrap());
            }
        }
        worker.mq.run(&mut worker.device);
    }
    // What it got before the flood was there does not count.
    let mut quiet = quiet.split_off(10);
    quiet.sort_unstable();
    let count = quiet.len();
    [
        quiet[count / 2],
        quiet[count * 99 / 100],
        count as u64 * 1000 / ended,
    ]
}

#[test]
fn a_quiet_disk_beside_a_flood_keeps_its_share_of_the_tags() {
    println!("tags, flood's depth: quiet disk's p50 us, p99 us, requests in a thousand");
    for (tags, depth) in [(32, 128), (64, 128), (128, 128), (248, 128), (248, 512)] {
        let fair = quiet_beside_flood(tags, depth, true);
        let unfair = quiet_beside_flood(tags, depth, false);
        println!("{tags} tags, depth {depth}: fair {fair:?}, without {unfair:?}");
        assert!(fair[1] <= unfair[1], "{fair:?} {unfair:?}");
        if tags <= 64 {
            // The flood holds no more than half of the tags, and so no more than the device works on.
            assert!(fair[1] <= 200, "{fair:?}");
            assert!(fair[1] * 2 <= unfair[1], "{fair:?} {unfair:?}");
        }
    }
}

#[test]
fn who_waits_for_a_tag_keeps_its_place_behind_a_disk_that_takes_each_that_comes() {
    let mut bench = Bench::new(2);
    bench.mq = Mq::new(tags(3, 0, 2));
    let ids = [0, 1, 2].map(|disk| {
        bench.mq.add_hctx(HctxConfig {
            disk: DiskId(disk),
            queue: QueueId(0),
            ring_size: 64,
            ctxs: 1,
        })
    });
    for id in ids {
        let ten: Vec<_> = (0..10)
            .map(|tag| (tag, read(u64::from(tag) * 100)))
            .collect();
        bench.drain(id, &ten);
    }
    for _ in 0..9 {
        bench.mq.tags.be_unfair();
        bench.complete(0, Ok(()));
        bench.run();
    }
    let ended = |id: HctxId| {
        bench
            .done
            .iter()
            .filter(|done| done.0 / 100 == u32::from(id.0))
            .count()
    };
    assert!(ids.iter().all(|id| ended(*id) >= 2), "{:?}", bench.done);
}
