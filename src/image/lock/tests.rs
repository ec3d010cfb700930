use std::fs::File;
use std::os::fd::OwnedFd;

use super::*;

fn open(path: &Path) -> OwnedFd {
    File::options()
        .read(true)
        .write(true)
        .open(path)
        .unwrap()
        .into()
}

/// An image, and its path.
fn image() -> tempfile::NamedTempFile {
    tempfile::NamedTempFile::new().unwrap()
}

fn now(file: &OwnedFd, access: Access) -> Result<(), Held> {
    lock(file, access, Duration::ZERO).map_err(|error| match error {
        LockError::Held(held) => held,
        LockError::Unsupported(error) => panic!("{error}"),
    })
}

#[test]
fn a_writer_is_alone_and_readers_are_not() {
    let image = image();
    let [a, b, c] = [(); 3].map(|()| open(image.path()));
    assert_eq!(now(&a, Access::Write), Ok(()));
    assert_eq!(now(&b, Access::Write), Err(Held::Writing));
    assert_eq!(now(&b, Access::Read), Err(Held::Writing));
    unlock(&a);
    assert_eq!(now(&b, Access::Read), Ok(()));
    assert_eq!(now(&c, Access::Read), Ok(()));
    assert_eq!(now(&a, Access::Write), Err(Held::Reading));
    unlock(&b);
    assert_eq!(now(&a, Access::Write), Err(Held::Reading));
    drop(c);
    assert_eq!(now(&a, Access::Write), Ok(()));
}

#[test]
fn a_refused_lock_leaves_nothing_behind() {
    let image = image();
    let [a, b, c] = [(); 3].map(|()| open(image.path()));
    now(&a, Access::Read).unwrap();
    now(&b, Access::Write).unwrap_err();
    assert_eq!(now(&c, Access::Read), Ok(()), "b does not count");
}

#[test]
fn duplicates_share_a_lock_and_the_last_one_ends_it() {
    let image = image();
    let [a, b] = [(); 2].map(|()| open(image.path()));
    now(&a, Access::Write).unwrap();
    let duplicate = a.try_clone().unwrap();
    assert_eq!(now(&duplicate, Access::Write), Ok(()), "the same lock");
    drop(a);
    assert_eq!(now(&b, Access::Write), Err(Held::Writing));
    drop(duplicate);
    assert_eq!(now(&b, Access::Write), Ok(()));
}

#[test]
fn who_forces_its_way_is_seen_and_sees_nobody() {
    let image = image();
    let [a, b, c] = [(); 3].map(|()| open(image.path()));
    now(&a, Access::Write).unwrap();
    announce(&b, Access::Write).unwrap();
    drop(a);
    assert_eq!(now(&c, Access::Write), Err(Held::Writing));
    assert_eq!(now(&c, Access::Read), Err(Held::Writing));
}

#[test]
fn a_holder_that_is_about_to_go_is_waited_for() {
    let image = image();
    let [a, b] = [(); 2].map(|()| open(image.path()));
    now(&a, Access::Write).unwrap();
    let waiting = thread::spawn(move || lock(&b, Access::Write, Duration::from_secs(600)).is_ok());
    drop(a);
    assert!(waiting.join().unwrap());
}

#[test]
fn the_bytes_are_qemus() {
    let image = image();
    let [a, b] = [(); 2].map(|()| open(image.path()));
    let locked = |file| -> Vec<i64> {
        (0..1000)
            .filter(|byte| is_locked(file, *byte).unwrap())
            .collect()
    };
    now(&a, Access::Write).unwrap();
    assert_eq!(locked(&b), [100, 101, 201, 203]);
    assert_eq!(
        locked(&a),
        Vec::<i64>::new(),
        "nobody conflicts with itself"
    );
    unlock(&a);
    now(&a, Access::Read).unwrap();
    assert_eq!(locked(&b), [100, 201, 203]);
    unlock(&a);
    announce(&a, Access::Write).unwrap();
    assert_eq!(locked(&b), [100, 101]);
}
