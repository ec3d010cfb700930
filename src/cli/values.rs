//! Values on the command line: text that becomes a number or a name, or says what it should have been.

use crate::config::SERIAL_MAX_BYTES;
use crate::mq::cpumap::MapKind;
use crate::mq::limits::MAX_RING_SIZE;

/// Splits at single commas; two in a row are one that belongs to the text.
pub(super) fn split_pairs(text: &str) -> Vec<String> {
    let mut pairs = vec![String::new()];
    let mut rest = text.chars().peekable();
    while let Some(c) = rest.next() {
        let ends = c == ',' && rest.next_if_eq(&',').is_none();
        match pairs.last_mut() {
            Some(last) if !ends => last.push(c),
            _ => pairs.push(String::new()),
        }
    }
    pairs
}

/// A serial number: printable ASCII that fits.
pub(super) fn parse_serial(text: &str) -> Result<String, String> {
    if text.is_empty() {
        return Err("it is empty; leave the option out for a serial from the file name".to_owned());
    }
    if text.len() > SERIAL_MAX_BYTES {
        return Err(format!(
            "it has {} bytes, at most {SERIAL_MAX_BYTES} fit",
            text.len()
        ));
    }
    match text.chars().find(|c| !c.is_ascii_graphic() && *c != ' ') {
        Some(c) => Err(format!("{c:?} is not a printable ASCII character")),
        None => Ok(text.to_owned()),
    }
}

/// A logical block size in bytes.
pub(super) fn parse_block_size(text: &str) -> Result<u32, String> {
    match text.parse::<u32>() {
        Ok(bytes @ (512 | 1024 | 2048 | 4096)) => Ok(bytes),
        _ => Err("use 512, 1024, 2048 or 4096".to_owned()),
    }
}

/// The size of a split ring, which is a power of two (virtio 1.3, 2.7); 2 would leave no room for data.
pub(super) fn parse_queue_size(text: &str) -> Result<u16, String> {
    match text.parse::<u16>() {
        Ok(size) if size.is_power_of_two() && (4..=MAX_RING_SIZE).contains(&size) => Ok(size),
        _ => Err(format!("use a power of two from 4 to {MAX_RING_SIZE}")),
    }
}

/// A queue map: a name, or the queue of each vCPU.
pub(super) fn parse_queue_map(text: &str) -> Result<MapKind, String> {
    match text {
        "grouping" => Ok(MapKind::Grouping),
        "modulo" => Ok(MapKind::Modulo),
        list => list
            .split([',', ':'])
            .map(|queue| queue.trim().parse())
            .collect::<Result<Vec<u16>, _>>()
            .map(MapKind::Explicit)
            .map_err(|_| {
                "use grouping, modulo, or the queue of each vCPU, such as 0,0,1,1".to_owned()
            }),
    }
}

/// A size in bytes, in powers of 1024.
///
/// # Errors
///
/// It is no number, or more than a file can have.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let usage = || "use a number of bytes, or a number with K, M, G or T behind it".to_owned();
    let (digits, shift) = match text.chars().last().map(|unit| unit.to_ascii_uppercase()) {
        Some('K') => (&text[..text.len() - 1], 10),
        Some('M') => (&text[..text.len() - 1], 20),
        Some('G') => (&text[..text.len() - 1], 30),
        Some('T') => (&text[..text.len() - 1], 40),
        _ => (text, 0),
    };
    let number: u64 = digits.parse().map_err(|_| usage())?;
    // Offsets in files and in io_uring are signed 64-bit numbers.
    match number.checked_mul(1 << shift) {
        Some(bytes) if i64::try_from(bytes).is_ok() => Ok(bytes),
        _ => Err("it is larger than the 8 EiB a disk can have".to_owned()),
    }
}
