//! Images to measure on.

use crate::backend::Image;
use crate::support::Rng;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;
use tempfile::TempDir;

/// An image, and what has to be kept as long as it is used.
pub struct Made {
    /// The image.
    pub image: Image,
    /// Where it goes away with.
    _dir: Option<TempDir>,
}

/// Makes or finds the image that `--image` names: null, memory, disk or a path. `size` is in bytes.
///
/// # Errors
///
/// It cannot be written.
pub fn make(name: &str, size: u64, dir: &Path) -> Result<Made, String> {
    let said = |path: &Path, error: std::io::Error| format!("{}: {error}", path.display());
    match name {
        "null" => Ok(Made {
            image: Image::Null(size),
            _dir: None,
        }),
        "memory" => {
            let shm = Path::new("/dev/shm");
            let dir = TempDir::new_in(shm).map_err(|error| said(shm, error))?;
            let path = dir.path().join("disk.img");
            fill(&path, size).map_err(|error| said(&path, error))?;
            Ok(Made {
                image: Image::File(path),
                _dir: Some(dir),
            })
        }
        "disk" => {
            let path = dir.join("vhost-bench.img");
            fs::create_dir_all(dir).map_err(|error| said(dir, error))?;
            if fs::metadata(&path).map_or(0, |found| found.len()) != size {
                fill(&path, size).map_err(|error| said(&path, error))?;
            }
            Ok(Made {
                image: Image::File(path),
                _dir: None,
            })
        }
        _ => {
            let path = Path::new(name);
            fs::metadata(path).map_err(|error| said(path, error))?;
            Ok(Made {
                image: Image::File(path.to_path_buf()),
                _dir: None,
            })
        }
    }
}

/// Writes every block, so that reads go to the disk, with data that no layer below can make smaller.
fn fill(path: &Path, size: u64) -> std::io::Result<()> {
    const CHUNK: usize = 1 << 20;
    // A file that is there with the right size counts as whole, so it gets its name at the end.
    let part = path.with_extension("part");
    let mut file = BufWriter::with_capacity(CHUNK, File::create(&part)?);
    let mut rng = Rng::new(size);
    let chunk = rng.bytes(CHUNK);
    let mut left = size;
    while left > 0 {
        let stamp = rng.next().to_le_bytes();
        let len = usize::try_from(left.min(CHUNK as u64)).expect("at most a chunk");
        file.write_all(&stamp[..len.min(8)])?;
        file.write_all(&chunk[len.min(8)..len])?;
        left -= len as u64;
    }
    file.into_inner()?.sync_all()?;
    fs::rename(part, path)
}
