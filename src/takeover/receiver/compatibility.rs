//! The questions before anything changes: will the other hand over, and can its guests go on here?

use std::fmt::Display;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use crate::config::DiskConfig;
use crate::image::{Image, ImageKind};

use super::super::state::{Ask, DiskFacts, Facts, Plan, READS};
use super::super::trust::printable;
use super::super::{PATIENCE, file_of};

/// Most bytes of the answer's head, and of a refusal with it.
const MAX_ANSWER_BYTES: u64 = 64 * 1024;

/// Asks for a take-over on the control socket. What follows are frames.
pub(super) fn ask(stream: &UnixStream) -> Result<(), String> {
    let body = serde_json::to_string(&Ask {
        formats: READS.to_vec(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
    })
    .expect("plain values always serialize");
    let request = format!(
        "POST /v1/take-over HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\
         Connection: Upgrade\r\nUpgrade: blkmq-take-over\r\n\r\n{body}",
        body.len()
    );
    let text = |error: io::Error| format!("it does not answer: {error}");
    stream.set_read_timeout(Some(PATIENCE)).map_err(text)?;
    stream.set_write_timeout(Some(PATIENCE)).map_err(text)?;
    let mut stream = stream;
    stream.write_all(request.as_bytes()).map_err(text)?;
    // Byte by byte: what follows the head is not ours to read.
    let mut head = Vec::new();
    let deadline = Instant::now() + PATIENCE;
    while !head.ends_with(b"\r\n\r\n") {
        if Instant::now() > deadline {
            return Err("it does not answer".to_owned());
        }
        let mut byte = [0];
        stream.read_exact(&mut byte).map_err(text)?;
        head.push(byte[0]);
        if head.len() as u64 > MAX_ANSWER_BYTES {
            return Err("it does not speak HTTP; is this its control socket?".to_owned());
        }
    }
    if head.starts_with(b"HTTP/1.1 101 ") {
        return Ok(());
    }
    let mut body = String::new();
    // However it ends, what came of it is all there is to show.
    let _ = stream.take(MAX_ANSWER_BYTES).read_to_string(&mut body);
    let why = serde_json::from_str::<serde_json::Value>(&body)
        .ok()
        .and_then(|value| Some(printable(value.get("error")?.as_str()?)));
    let head = String::from_utf8_lossy(&head);
    let first = printable(head.lines().next().unwrap_or_default());
    Err(why.unwrap_or_else(|| format!("it answers {first}; is this its control socket?")))
}

/// Whether the facts are an answer to the plan: nothing is handed over that was not asked for, and nothing twice.
pub(super) fn answers(facts: &Facts, plan: &Plan) -> Result<(), String> {
    let mut names: Vec<&str> = facts.disks.iter().map(|disk| &*disk.socket).collect();
    if let Some(name) = names
        .iter()
        .find(|name| !plan.disks.iter().any(|own| own == *name))
    {
        return Err(format!(
            "it announces a disk on {}, which was not asked for",
            printable(name)
        ));
    }
    let announced = names.len();
    names.sort_unstable();
    names.dedup();
    if names.len() < announced {
        return Err("it announces a disk twice".to_owned());
    }
    if facts.control && plan.control.is_none() {
        return Err("it announces a control socket, which was not asked for".to_owned());
    }
    Ok(())
}

/// Whether a guest that was promised `facts` can go on with `disk` and `image`.
pub(super) fn compatible(
    facts: &DiskFacts,
    disk: &DiskConfig,
    image: &Image,
) -> Result<(), String> {
    let same = |what: &str, was: &dyn Display, is: &dyn Display| {
        if was.to_string() == is.to_string() {
            Ok(())
        } else {
            Err(format!("{what} was {was} and would be {is}"))
        }
    };
    if facts.file != file_of(image) {
        return Err("the image is not the file that the guest has been using".to_owned());
    }
    same(
        "the logical block size",
        &facts.logical_block_size,
        &disk.logical_block_size,
    )?;
    same("read-only", &facts.read_only, &disk.read_only)?;
    for (what, was, is) in [
        ("--num-queues", facts.num_queues, disk.num_queues),
        ("--queue-size", facts.queue_size, disk.queue_size),
    ] {
        if is < was {
            return Err(format!("{what} was {was}, and may not become less ({is})"));
        }
    }
    if image.size_bytes < facts.size_bytes && image.kind != ImageKind::Null {
        return Err(format!(
            "the image has {} bytes, less than the {} that the guest was promised",
            image.size_bytes, facts.size_bytes
        ));
    }
    Ok(())
}
