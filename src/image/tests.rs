use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixListener;

use rustix::fs::{CWD, FileType, Mode, fcntl_getfl, mknodat};
use tempfile::TempDir;

use super::direct_io::{reads, tried_memory_align, tried_offset_align};
use super::*;
use crate::config::{CacheMode, EngineKind};
use crate::config::{PollDevice, Scheduler, SocketSource};
use crate::mq::cpumap::MapKind;
use crate::mq::throttle::Limits;

fn config(image: ImageSource) -> DiskConfig {
    assert_eq!(EngineKind::default(), EngineKind::Auto);
    DiskConfig {
        socket: SocketSource::Fd(3),
        image,
        read_only: false,
        engine: EngineKind::Auto,
        lock: LockWhen::Always,
        force_share: false,
        socket_mode: None,
        socket_group: None,
        on_error: crate::config::OnError::Report,
        io_poll: PollDevice::Auto,
        cache: CacheMode::None,
        discard: true,
        serial: "test".to_owned(),
        logical_block_size: 512,
        num_queues: 4,
        queue_size: 128,
        vcpus: None,
        queue_map: MapKind::Grouping,
        coalesce: None,
        scheduler: Scheduler::Auto,
        limits: Limits::default(),
        group: None,
    }
}

fn of_file(path: &Path) -> DiskConfig {
    config(ImageSource::File {
        path: path.to_owned(),
    })
}

/// A file of `size` bytes in a directory of its own, on the file system of the build.
fn image(size: u64) -> (TempDir, std::path::PathBuf) {
    let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).expect("a directory");
    let path = dir.path().join("disk.img");
    File::create(&path)
        .expect("a file")
        .set_len(size)
        .expect("a size");
    (dir, path)
}

fn refused(config: &DiskConfig) -> String {
    let text = Image::open(config)
        .expect_err("the image is refused")
        .to_string();
    assert!(!text.contains('\n'), "more than one line: {text:?}");
    text
}

#[test]
fn a_regular_file_opens_with_its_size_and_limits() {
    let (_dir, path) = image(1 << 20);
    let image = Image::open(&of_file(&path)).expect("opens");
    assert_eq!(
        (image.kind, image.size_bytes, image.read_only),
        (ImageKind::File, 1 << 20, false)
    );
    assert!(image.physical_block_bytes.is_power_of_two());
    assert!((512..=4096).contains(&image.physical_block_bytes));
    assert_eq!(image.min_io_bytes % image.physical_block_bytes, 0);
    assert_eq!(image.write_zeroes.max_bytes, FILE_RANGE_MAX_BYTES);
    assert_eq!(image.write_zeroes.may_unmap, image.discard.max_bytes > 0);
    assert_eq!(512 % image.dio_offset_align, 0);
    let flags = fcntl_getfl(&image.file).expect("flags");
    assert_eq!(flags.contains(OFlags::DIRECT), image.direct);
    assert!(
        !flags.contains(OFlags::NONBLOCK),
        "io_uring fails requests of a non-blocking file"
    );
}

#[test]
fn the_cache_mode_decides_about_direct_io() {
    let (_dir, path) = image(1 << 20);
    for cache in [
        CacheMode::Writeback,
        CacheMode::Writethrough,
        CacheMode::Unsafe,
    ] {
        let image = Image::open(&DiskConfig {
            cache,
            ..of_file(&path)
        })
        .expect("opens");
        assert!(
            !image.direct
                && !fcntl_getfl(&image.file)
                    .expect("flags")
                    .contains(OFlags::DIRECT)
        );
        assert_eq!((image.dio_mem_align, image.dio_offset_align), (1, 1));
    }
    let by_mode = |cache| {
        Image::open(&DiskConfig {
            cache,
            ..of_file(&path)
        })
        .expect("opens")
        .direct
    };
    assert_eq!(by_mode(CacheMode::None), by_mode(CacheMode::Directsync));
}

#[test]
fn what_the_kernel_says_of_alignment_and_what_reads_show_agree() {
    let (_dir, path) = image(1 << 20);
    // Written, not sparse: a hole may be readable at any alignment.
    fs::write(&path, vec![7u8; 1 << 20]).expect("data");
    let image = Image::open(&of_file(&path)).expect("opens");
    if !image.direct {
        return;
    }
    let tried = tried_offset_align(&image.file).expect("some alignment works");
    assert!(
        tried <= image.dio_offset_align.max(512),
        "the kernel asks for less than works"
    );
    assert!(reads(
        &image.file,
        image.dio_mem_align,
        image.dio_offset_align.max(512),
        0
    ));
    assert!(tried_memory_align(&image.file, 4096).is_some());
}

#[test]
fn opening_changes_nothing() {
    let (_dir, path) = image(0);
    let data: Vec<u8> = (0..(1u32 << 20) + 512).map(|i| (i % 251) as u8).collect();
    fs::write(&path, &data).expect("data");
    File::open(&path)
        .expect("opens")
        .sync_all()
        .expect("stable");
    let before = fs::metadata(&path).expect("metadata");
    drop(Image::open(&of_file(&path)).expect("opens"));
    let after = fs::metadata(&path).expect("metadata");
    assert_eq!(
        (before.size(), before.blocks()),
        (after.size(), after.blocks())
    );
    assert!(
        fs::read(&path).expect("data") == data,
        "the image's bytes have changed"
    );
}

#[test]
fn a_file_system_without_direct_io_is_served_through_the_page_cache() {
    // A file of procfs is regular, and neither direct nor writable.
    let path = Path::new("/proc/self/maps");
    let file = File::open(path).expect("opens");
    let facts = statx(&file, "", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS).expect("statx");
    assert_eq!(
        open_direct(&file, &facts, &QueueLimits::of_device(0, u32::MAX), 512),
        None
    );
}

#[test]
fn a_file_on_tmpfs_opens() {
    let dir = tempfile::tempdir_in("/dev/shm").expect("a directory on tmpfs");
    let path = dir.path().join("disk.img");
    File::create(&path)
        .expect("a file")
        .set_len(1 << 20)
        .expect("a size");
    let image = Image::open(&of_file(&path)).expect("opens");
    if image.direct {
        assert!(reads(&image.file, image.dio_mem_align, 4096, 0));
    }
    assert!(image.discard.max_bytes > 0, "tmpfs makes holes");
}

#[test]
fn a_disk_for_reading_never_discards() {
    let (_dir, path) = image(1 << 20);
    let image = Image::open(&DiskConfig {
        read_only: true,
        ..of_file(&path)
    })
    .expect("opens");
    assert!(image.read_only);
    assert_eq!(image.discard, DiscardLimits::default());
    assert_eq!(image.write_zeroes, WriteZeroesLimits::default());
    assert!(
        rustix::io::pwrite(&image.file, &[0; 512], 0).is_err(),
        "the file itself refuses"
    );
}

#[test]
fn discard_can_be_switched_off() {
    let (_dir, path) = image(1 << 20);
    let image = Image::open(&DiskConfig {
        discard: false,
        ..of_file(&path)
    })
    .expect("opens");
    assert_eq!(image.discard, DiscardLimits::default());
    assert!(image.write_zeroes.max_bytes > 0 && !image.write_zeroes.may_unmap);
}

#[test]
fn sizes_that_make_no_disk_are_refused() {
    let (_dir, path) = image(0);
    assert!(refused(&of_file(&path)).contains("is empty (size 0)"));
    File::create(&path)
        .expect("a file")
        .set_len(1000)
        .expect("a size");
    let text = refused(&of_file(&path));
    assert!(
        text.contains("1000 bytes, which is not a multiple of the logical block size 512"),
        "{text}"
    );
    assert!(text.contains("truncate -s %512"), "{text}");
    File::create(&path)
        .expect("a file")
        .set_len(512 * 9)
        .expect("a size");
    let text = refused(&DiskConfig {
        logical_block_size: 4096,
        ..of_file(&path)
    });
    assert!(text.contains("logical block size 4096"), "{text}");
}

#[test]
fn what_is_no_file_and_no_block_device_is_refused() {
    let dir = tempfile::tempdir().expect("a directory");
    assert!(refused(&of_file(dir.path())).contains("is a directory"));
    assert!(refused(&of_file(Path::new("/dev/null"))).contains("is a character device"));
    let fifo = dir.path().join("fifo");
    mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).expect("a named pipe");
    assert!(refused(&of_file(&fifo)).contains("is a named pipe"));
    let socket = dir.path().join("socket");
    let _listener = UnixListener::bind(&socket).expect("a socket");
    assert!(refused(&of_file(&socket)).contains("is a socket"));
}

#[test]
fn a_missing_file_is_told_with_the_kernels_reason() {
    let text = refused(&of_file(Path::new("/nowhere/disk.img")));
    assert!(
        text.contains("cannot open the image \"/nowhere/disk.img\": No such file or directory"),
        "{text}"
    );
}

#[test]
fn every_reason_of_the_kernel_has_its_advice() {
    let advice = |errno: Errno| open_error(Path::new("a"), errno.into()).to_string();
    assert!(advice(Errno::ACCESS).contains("Permission denied; let this user"));
    assert!(advice(Errno::ROFS).contains("--read-only"));
    assert!(advice(Errno::BUSY).contains("what else is using it"));
    assert!(advice(Errno::IO).contains("the device below it"));
}

#[test]
fn a_null_disk_has_the_size_it_was_given() {
    let image = Image::open(&config(ImageSource::Null {
        size_bytes: 1 << 40,
    }))
    .expect("opens");
    assert_eq!(
        (image.kind, image.size_bytes, image.direct),
        (ImageKind::Null, 1 << 40, false)
    );
    assert_eq!(image.discard.granularity_bytes, 512);
}

#[test]
fn a_devices_limits_are_made_to_fit_the_logical_block() {
    let (_dir, path) = image(1 << 20);
    let config = of_file(&path);
    let mut image = Image::open(&config).expect("opens");
    let queue = QueueLimits {
        logical_block_bytes: 512,
        physical_block_bytes: 4096,
        min_io_bytes: 65536,
        opt_io_bytes: 1 << 20,
        discard_max_bytes: 1 << 30,
        discard_granularity_bytes: 0,
        write_zeroes_max_bytes: 0,
        rotational: true,
        io_poll: false,
    };
    image.take_device_limits(&queue, &config);
    assert_eq!(
        (
            image.physical_block_bytes,
            image.min_io_bytes,
            image.opt_io_bytes
        ),
        (4096, 65536, 1 << 20)
    );
    assert_eq!(
        image.discard,
        DiscardLimits {
            max_bytes: 1 << 30,
            granularity_bytes: 512
        }
    );
    assert_eq!(
        image.write_zeroes,
        WriteZeroesLimits {
            max_bytes: 0,
            may_unmap: true
        }
    );

    // A RAID that reports a stripe which is no multiple of anything.
    let odd = QueueLimits {
        physical_block_bytes: 0,
        min_io_bytes: 1000,
        opt_io_bytes: 33_553_920 + 1,
        ..queue
    };
    image.take_device_limits(&odd, &config);
    assert_eq!(
        (
            image.physical_block_bytes,
            image.min_io_bytes,
            image.opt_io_bytes
        ),
        (512, 512, 0)
    );

    // A device with larger blocks than the guest's, through the page cache.
    image.discard = DiscardLimits::default();
    image.write_zeroes = WriteZeroesLimits::default();
    let coarse = QueueLimits {
        logical_block_bytes: 4096,
        write_zeroes_max_bytes: 1 << 30,
        ..odd
    };
    image.take_device_limits(&coarse, &config);
    assert_eq!((image.discard, image.write_zeroes), Default::default());
}

#[test]
fn a_device_of_a_bad_size_is_not_told_to_be_truncated() {
    for size in [0, 512] {
        let error =
            check_size(Path::new("/dev/x"), ImageKind::BlockDevice, size, 4096).expect_err("bad");
        assert!(error.to_string().contains("set the device up"), "{error}");
    }
    assert!(check_size(Path::new("/dev/x"), ImageKind::BlockDevice, 8192, 4096).is_ok());
}

#[test]
fn a_device_is_polled_only_if_it_has_queues_for_that() {
    let (_dir, path) = image(1 << 20);
    let mut queue = QueueLimits::of_device(0, u32::MAX);
    let asked_of = |kind, wanted, direct, queue: &QueueLimits| {
        let config = DiskConfig {
            io_poll: wanted,
            ..of_file(&path)
        };
        io_poll(&path, (kind, direct), queue, &config)
    };
    let asked = |wanted, direct, queue: &QueueLimits| {
        asked_of(ImageKind::BlockDevice, wanted, direct, queue)
    };
    assert_eq!(
        asked(PollDevice::Auto, true, &queue).unwrap(),
        IoPoll::Never
    );
    let refused = asked(PollDevice::On, true, &queue).unwrap_err().to_string();
    assert!(refused.contains("queue/io_poll in sysfs is 0"), "{refused}");
    queue.io_poll = true;
    let of_file = |wanted| asked_of(ImageKind::File, wanted, true, &queue);
    assert_eq!(of_file(PollDevice::Auto).unwrap(), IoPoll::Never);
    let refused = of_file(PollDevice::On).unwrap_err().to_string();
    assert!(refused.contains("no block device"), "{refused}");
    let refused = asked(PollDevice::On, false, &queue).unwrap_err();
    assert!(refused.to_string().contains("O_DIRECT"), "{refused}");
    for (wanted, direct, expected) in [
        (PollDevice::On, true, IoPoll::Always),
        (PollDevice::Auto, true, IoPoll::PollQueues),
        (PollDevice::Auto, false, IoPoll::Never),
        (PollDevice::Off, true, IoPoll::Never),
    ] {
        assert_eq!(asked(wanted, direct, &queue).unwrap(), expected);
    }
}

#[test]
fn an_image_is_extended_and_never_cut() {
    let (_dir, path) = image(1 << 20);
    let image = Image::open(&of_file(&path)).expect("opens");
    image.extend_to(64 << 20).expect("it grows");
    let found = path.metadata().expect("a file");
    assert_eq!(found.len(), 64 << 20);
    assert!(found.blocks() * 512 < 8 << 20, "it stays sparse");
    // Another process has made it longer meanwhile, and written there.
    let other = File::options().read(true).write(true).open(&path);
    let other = other.expect("it can be written");
    other.set_len(96 << 20).expect("a size");
    let at = (64 << 20) - 2048;
    other.write_all_at(&[7; 4096], at).expect("it is written");
    image.extend_to(64 << 20).expect("nothing is to be done");
    assert_eq!(path.metadata().expect("a file").len(), 96 << 20);
    let mut bytes = [0; 4096];
    other.read_exact_at(&mut bytes, at).expect("it is read");
    assert_eq!(bytes, [7; 4096]);
}
