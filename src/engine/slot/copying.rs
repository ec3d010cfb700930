//! Reads and writes of an image in memory: a copy where the image's page is there, a system call
//! where it may be a hole.

use std::os::fd::AsRawFd;
use std::ptr;

use libc::iovec;

use super::{Method, Next, Slot, Stage};
use crate::engine::mapping::{Mapping, PAGE_BYTES, Since, in_memory};
use crate::engine::target::{Disk, FileTarget, Target};
use crate::engine::{COPY_SMALL_BYTES, EngineCounters, Errno, Extent};
use crate::mq::request::Op;
use crate::sys::sigbus::Losses;

static ZEROES: [u8; in_memory(PAGE_BYTES)] = [0; in_memory(PAGE_BYTES)];

/// Segments of one system call. A request of more needs several.
const CALL_SEGMENTS: usize = 32;

impl Slot {
    /// Makes the transfer that was started ([`Slot::start_transfer`]) a copy.
    pub(in crate::engine) fn start_copy(&mut self, mapping: &Mapping) {
        self.unsynced = self.fua && mapping.medium().needs_sync();
        self.stage = Stage::Copy;
    }

    /// Where in memory the image's part of a small copy is, and its bytes; none if it is not small.
    #[inline]
    pub(in crate::engine) fn small_copy(&self, disk: &Disk) -> Option<(*const u8, usize)> {
        if self.stage != Stage::Copy || self.total > COPY_SMALL_BYTES {
            return None;
        }
        let image = mapping_of(disk)?.at(self.offset, self.total);
        Some((image, in_memory(self.total)))
    }

    /// The bytes that are left of it.
    pub(in crate::engine) fn left(&self) -> u64 {
        self.total - self.done
    }

    /// Copies or zeroes on, `most` bytes at most. [`Next::Issue`]: what is left is the kernel's to do.
    #[inline]
    pub(in crate::engine) fn copy(
        &mut self,
        disk: &Disk,
        extents: &[Extent],
        most: u64,
        losses: &mut Losses,
        counters: &mut EngineCounters,
    ) -> Next {
        let Target::File(
            file @ FileTarget {
                mapping: Some(mapping),
                ..
            },
        ) = &disk.target
        else {
            unreachable!("only an image in memory is copied")
        };
        let zeroes = self.stage == Stage::Range(Method::Zero);
        let (start, total) = if zeroes {
            let extent = extents[usize::from(self.range)];
            (extent.offset, extent.len)
        } else {
            (self.offset, self.total)
        };
        let end = self.done + most.min(total - self.done);
        while self.done < end {
            let offset = start + self.done;
            let (run, known) = mapping.run(offset, end - self.done);
            // What is behind a mapping that was lost, and holes whose allocation takes its time.
            if mapping.is_lost() || !known && !mapping.medium().is_prompt() {
                return match zeroes {
                    true => self.next_range(Some(Method::Zero), extents, disk.can, counters),
                    false => self.leave_to_kernel(mapping),
                };
            }
            let bytes = in_memory(run);
            if !zeroes {
                // Found here, a page that is gone is not written to the image as zeros.
                if self.op == Op::Write {
                    self.touch(bytes);
                }
                if self.meets(losses) {
                    return Next::Done(Err(Errno(libc::EFAULT)));
                }
            }
            let moved = if known {
                let ours = mapping.at(offset, run);
                // SAFETY: the mapping has so many bytes there, or `at` panics, and the segments hold
                // what is left of the command. The guest, other workers and other processes may
                // write to both at the same time, and get what they made of it. Unsafe because
                // neither has a Rust owner.
                unsafe {
                    match zeroes {
                        true => ours.write_bytes(0, bytes),
                        false => self.copy_segments(ours, bytes, self.op == Op::Read),
                    }
                }
                // What was copied after the loss are zeros, or went nowhere.
                if mapping.is_lost() {
                    return Next::Done(Err(Errno(libc::EIO)));
                }
                run
            } else {
                counters.copy_calls += 1;
                match self.call(file, mapping, offset, run) {
                    Ok(0) => return Next::Done(Err(Errno(libc::EIO))),
                    Ok(moved) => moved,
                    Err(Errno(libc::EINTR)) => continue,
                    Err(errno) => return Next::Done(Err(errno)),
                }
            };
            self.done += moved;
            if !zeroes {
                // Another thread may have found it gone meanwhile.
                if self.meets(losses) {
                    return Next::Done(Err(Errno(libc::EFAULT)));
                }
                self.advance(moved);
            }
        }
        if self.done < total {
            Next::Copy
        } else if zeroes {
            self.range += 1;
            self.next_range(None, extents, disk.can, counters)
        } else {
            self.finish(disk)
        }
    }

    fn leave_to_kernel(&mut self, mapping: &Mapping) -> Next {
        self.since = mapping.now();
        self.stage = Stage::Transfer;
        Next::Issue
    }

    /// Reads or writes `bytes` at most by a system call, and learns from it which pages are there.
    #[cold]
    fn call(
        &self,
        file: &FileTarget,
        mapping: &Mapping,
        offset: u64,
        bytes: u64,
    ) -> Result<u64, Errno> {
        let mut vectors = [iovec {
            iov_base: ZEROES.as_ptr().cast_mut().cast(),
            iov_len: ZEROES.len(),
        }; CALL_SEGMENTS];
        let (mut count, mut left) = (0, in_memory(bytes));
        while left > 0 && count < CALL_SEGMENTS {
            if self.stage == Stage::Copy {
                // SAFETY: as in `copy_segments`, the walk stays inside the segments. Unsafe as there.
                vectors[count] = unsafe { *self.segments.add(count) };
            }
            let len = &mut vectors[count].iov_len;
            *len = (*len).min(left);
            left -= *len;
            count += 1;
        }
        let since = mapping.now();
        let at = i64::try_from(offset).expect("inside the image");
        let (fd, vector_count) = (
            file.file.as_raw_fd(),
            i32::try_from(count).expect("CALL_SEGMENTS at most"),
        );
        // SAFETY: the buffers are valid for the transfer (`start_transfer`'s contract) or the static,
        // which is only read, and the fd is the target's. Unsafe because safe wrappers take slices, which guest memory cannot be.
        let moved = unsafe {
            match self.op {
                Op::Read => libc::preadv(fd, vectors.as_ptr(), vector_count, at),
                _ => libc::pwritev(fd, vectors.as_ptr(), vector_count, at),
            }
        };
        let Ok(moved) = u64::try_from(moved) else {
            let errno = std::io::Error::last_os_error().raw_os_error();
            return Err(Errno(errno.unwrap_or(libc::EIO)));
        };
        match self.op {
            Op::Read => learn_from(mapping, since, offset, moved, &vectors[..count]),
            _ => mapping.wrote(since, offset, moved),
        }
        Ok(moved)
    }

    /// The kernel has written so many bytes.
    #[inline]
    pub(super) fn learn(&self, file: &FileTarget, moved: u64) {
        if let Some(mapping) = &file.mapping
            && self.op == Op::Write
        {
            mapping.wrote(self.since, self.offset + self.done, moved);
        }
    }

    /// The step under way is with the kernel: if it takes pages away from a mapping, it says so.
    #[inline]
    pub(in crate::engine) fn sent(&mut self, disk: &Disk, extents: &[Extent]) {
        let Stage::Range(Method::Discard | Method::Punch | Method::ZeroRange) = self.stage else {
            return;
        };
        if let Some(mapping) = mapping_of(disk)
            && !self.discarding
            && !self.delayed
        {
            let extent = extents[usize::from(self.range)];
            mapping.discards(extent.offset + self.done, self.step);
            self.discarding = true;
        }
    }

    /// The step that was announced by [`Slot::sent`], if there is one, has ended.
    #[inline]
    pub(super) fn announced_is_over(&mut self, disk: &Disk) {
        if self.discarding {
            self.discarding = false;
            if let Some(mapping) = mapping_of(disk) {
                mapping.discarded();
            }
        }
    }
}

fn mapping_of(disk: &Disk) -> Option<&Mapping> {
    match &disk.target {
        Target::File(file) => file.mapping.as_deref(),
        Target::Null { .. } => None,
    }
}

/// A page of which something was read that is not zero is no hole. (One that is all zeroes may be
/// one, and is read by system calls until it is written.)
fn learn_from(mapping: &Mapping, since: Since, offset: u64, bytes: u64, vectors: &[iovec]) {
    let (mut at, end) = (offset, offset + bytes);
    let mut skip_to = offset;
    let mut page = ZEROES;
    for vector in vectors {
        let stop = (at + vector.iov_len as u64).min(end);
        let base = vector.iov_base.cast::<u8>();
        let start = at;
        while at < stop {
            let page_end = ((at / PAGE_BYTES + 1) * PAGE_BYTES).min(stop);
            if at >= skip_to {
                let len = in_memory(page_end - at);
                // SAFETY: inside the vector's buffer, which the kernel has just filled, and no more
                // than a page. The guest may write to it from outside this program; then what is
                // learned may be wrong, which costs memory of its own image and nothing else. Unsafe
                // because no slice may be made of it.
                unsafe {
                    ptr::copy_nonoverlapping(
                        base.add(in_memory(at - start)),
                        page.as_mut_ptr(),
                        len,
                    );
                }
                if page[..len] != ZEROES[..len] {
                    mapping.read(since, at);
                    skip_to = page_end.next_multiple_of(PAGE_BYTES);
                }
            }
            at = page_end;
        }
    }
}
