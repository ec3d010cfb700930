//! I/O that failed: who hears of it, and when it is tried again.
//!
//! As it is with QEMU's rerror and werror, a disk can be told to *stop* at an error: the guest is not
//! told, the request goes back to the head of its hctx, and the disk is held until somebody who has
//! removed the cause says so. A held disk's hctxs are quiesced and its rings are not drained, so that
//! it takes nothing other disks could use. What wants a ring to be empty (a stop, a change of memory, another
//! elevator) does not wait for that: then what is held is tried once more, and ends as it ends. What does not want that
//! lets it be: a take-over, the begin of write-through, and the end of a session whose front end keeps an
//! in-flight region, where the next session finds the requests.

use std::sync::Arc;

use crate::config::OnError;
use crate::engine::Errno;
use crate::mq::Mq;
use crate::mq::ids::{DiskId, DriverTag, HctxId};
use crate::mq::request::{Op, Status};
use crate::virtio::geometry::DiskShape;
use crate::virtio::guest_io::GuestIo;

use super::queue::{Gates, Port};
use super::{Worker, WorkerDisk, heat, open_port};
use crate::worker::io_errors::{DiskFaults, Followed, Hold};

/// At most one line about the failed I/O of a disk in this time.
const LOG_INTERVAL_NS: u64 = 1_000_000_000;

/// A disk's policy, and what became of it.
#[derive(Debug)]
pub(super) struct Care {
    policy: OnError,
    hold: Arc<Hold>,
    followed: Followed,
    pub faults: DiskFaults,
    /// What freezes the disk wants its requests to end, whatever becomes of them.
    pub must_empty: bool,
    logged_ns: Option<u64>,
    /// Failures since then that were not logged.
    unlogged: u64,
}

impl Care {
    pub fn new(policy: OnError, hold: Arc<Hold>) -> Care {
        Care {
            policy,
            followed: Followed::new(hold.times()),
            hold,
            faults: DiskFaults::default(),
            must_empty: false,
            logged_ns: None,
            unlogged: 0,
        }
    }

    /// Whether this error holds the disk.
    fn holds(&self, errno: Errno) -> bool {
        match (self.policy, errno.0) {
            // Wanted by whoever gave the timeout; answered for good by the device; no fault of the
            // image, but of the guest's memory.
            (_, libc::ECANCELED | libc::EOPNOTSUPP | libc::EFAULT) | (OnError::Report, _) => false,
            (OnError::Enospc, errno) => matches!(errno, libc::ENOSPC | libc::EDQUOT),
            (OnError::Stop, _) => true,
        }
    }

    /// Whether what a ring has in flight is to end, as it ends.
    fn must_end(&self, gates: Gates) -> bool {
        gates.must_end() || gates.frozen && self.must_empty
    }

    fn may_log(&mut self, now_ns: u64) -> bool {
        let due = self
            .logged_ns
            .is_none_or(|at| now_ns - at >= LOG_INTERVAL_NS);
        if due {
            self.logged_ns = Some(now_ns);
        } else {
            self.unlogged += 1;
        }
        due
    }
}

/// An operation failed: the status the guest is to get, or `None` if it was taken back, with the disk
/// held.
#[cold]
pub(super) fn failed(
    mq: &mut Mq<GuestIo>,
    ports: &mut [Option<Port>],
    disks: &mut [Option<WorkerDisk>],
    now_ns: u64,
    tag: DriverTag,
    errno: Errno,
) -> Option<Status> {
    let status = status_of(errno);
    let Some((hctx, request_tag, request)) = mq.issued(tag) else {
        return Some(status);
    };
    let port = open_port(ports, hctx);
    let id = port.id;
    let gates = port.gates;
    let disk = disks[id.disk.index()]
        .as_mut()
        .expect("rings belong to disks that were added");
    disk.care.faults.errors.count(errno);
    let ends = disk.care.must_end(gates);
    // What a failed sync has lost is lost: a second one that went well would be a lie.
    let stops = !ends && request.op != Op::Flush && disk.care.holds(errno);
    let first = stops && !disk.care.faults.held;
    if first || disk.care.may_log(now_ns) {
        let name = name(&disk.shape);
        let more = match std::mem::take(&mut disk.care.unlogged) {
            0 => String::new(),
            more => format!(" ({more} more failed since the last such line)"),
        };
        log::error!(
            disk = id.disk.0; "disk {name}: {id} tag {request_tag}: {:?} of {} bytes at sector {} failed: {errno}{}{more}",
            request.op,
            request.bytes,
            request.sector.0,
            if first {
                "; the disk is held: remove the cause, then run blkmqctl resume"
            } else {
                ""
            }
        );
    }
    if !stops {
        return Some(status);
    }
    if first {
        disk.care.hold.begin(&mut disk.care.followed);
        hold(mq, ports, disk, id.disk);
    }
    // It goes back to an hctx that does not send it again. It may have been sent while its ring had to be empty, and
    // come back when it has not any more.
    mq.quiesce(hctx);
    mq.requeue(tag);
    None
}

/// Stops the disk's queues on this worker.
fn hold(mq: &mut Mq<GuestIo>, ports: &mut [Option<Port>], disk: &mut WorkerDisk, id: DiskId) {
    disk.care.faults.held = true;
    for (port, index) in ports.iter_mut().zip(0..) {
        if let Some(port) = port.as_mut().filter(|port| port.id.disk == id) {
            port.gates.held = true;
            // What is being drained has to end.
            if !disk.care.must_end(port.gates) {
                mq.quiesce(HctxId(index));
            }
        }
    }
}

/// What the guest is told of an error of the host.
fn status_of(errno: Errno) -> Status {
    match errno.0 {
        libc::EOPNOTSUPP => Status::Unsupp,
        _ => Status::IoErr,
    }
}

fn name(shape: &DiskShape) -> String {
    let serial = shape.serial.split(|byte| *byte == 0).next();
    String::from_utf8_lossy(serial.unwrap_or_default()).into_owned()
}

impl Worker {
    /// Holds what another worker has found a reason to hold.
    #[cold]
    pub(super) fn follow_holds(&mut self) {
        for (disk, index) in self.disks.iter_mut().zip(0..) {
            let Some(disk) = disk else { continue };
            if disk.care.followed.follow(disk.care.hold.times()) {
                hold(&mut self.mq, &mut self.ports, disk, DiskId(index));
            }
        }
    }

    /// Goes on with a disk that was held `until` times: what failed is the first to be tried again.
    pub(super) fn resume(&mut self, id: DiskId, until: u32) {
        let Some(disk) = &mut self.disks[id.index()] else {
            return;
        };
        disk.care.followed.resume(until);
        disk.care.faults.held = false;
        for (port, index) in self.ports.iter_mut().zip(0..) {
            if let Some(port) = port.as_mut().filter(|port| port.id.disk == id) {
                port.gates.held = false;
                self.mq.unquiesce(HctxId(index));
                heat(&mut self.hot, port, HctxId(index));
            }
        }
    }

    pub(super) fn care_of(&mut self, id: DiskId) -> Option<&mut Care> {
        let disk = self.disks.get_mut(id.index())?.as_mut();
        disk.map(|disk| &mut disk.care)
    }

    /// Whether a disk is held after an error, so that what failed is in flight until it is resumed.
    pub(super) fn waits_after_error(&self, id: DiskId) -> bool {
        let disk = self.disks.get(id.index()).and_then(Option::as_ref);
        disk.is_some_and(|disk| disk.care.faults.held)
    }

    /// All hctxs there are.
    pub(super) fn hctxs(&self) -> Vec<HctxId> {
        self.ports().map(|(hctx, _)| hctx).collect()
    }

    /// A ring that is to be empty: what is held of it goes on, and limits do not keep it waiting.
    pub(super) fn let_end(&mut self, hctx: HctxId) {
        if self.mq.is_quiesced(hctx) {
            self.mq.unquiesce(hctx);
        }
        self.mq.set_ending(hctx, true);
        // Of a disk that is held nobody looked at what the ring owes.
        heat(&mut self.hot, open_port(&mut self.ports, hctx), hctx);
    }

    /// A ring need not be empty any more: if its disk is held, it waits like the others.
    pub(super) fn wait_again(&mut self, hctx: HctxId) {
        let port = open_port(&mut self.ports, hctx);
        let care = self.disks[port.id.disk.index()]
            .as_ref()
            .map(|disk| &disk.care);
        if port.gates.held && care.is_some_and(|care| !care.must_end(port.gates)) {
            self.mq.quiesce(hctx);
        }
    }

    /// A new ring of a disk that is held waits like the others.
    pub(super) fn join_hold(&mut self, hctx: HctxId) {
        let port = open_port(&mut self.ports, hctx);
        if self.disks[port.id.disk.index()]
            .as_ref()
            .is_some_and(|disk| disk.care.faults.held)
        {
            port.gates.held = true;
            self.mq.quiesce(hctx);
        }
    }

    /// Nothing of the disk is in flight here, so that there is nothing left to hold.
    pub(super) fn end_hold(&mut self, id: DiskId) {
        if let Some(disk) = &self.disks[id.index()]
            && disk.care.faults.held
        {
            let until = disk.care.hold.times().get();
            self.resume(id, until);
        }
    }

    /// What every disk's errors were, and whether it is held.
    pub(super) fn faults(&self) -> Vec<(DiskId, DiskFaults)> {
        self.disks
            .iter()
            .zip(0..)
            .filter_map(|(disk, index)| Some((DiskId(index), disk.as_ref()?.care.faults)))
            .collect()
    }
}
