//! Where a worker runs, and how much it may have to serve.

use std::io;

use rustix::thread::{CpuSet, sched_setaffinity};

use crate::sys::cpu_list::CpuList;

/// The CPUs that a worker runs on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Affinity {
    /// The CPUs it may run on; all that the process may use where it is `None`.
    pub cpus: Option<CpuList>,
    /// The node they are on, if the machine has several.
    pub node: Option<u16>,
}

impl Affinity {
    /// Binds the calling thread to the CPUs.
    ///
    /// # Errors
    ///
    /// The kernel does not let it.
    pub fn apply(&self) -> io::Result<()> {
        let Some(list) = &self.cpus else {
            return Ok(());
        };
        let mut set = CpuSet::new();
        for cpu in list.cpus() {
            set.set(usize::from(*cpu));
        }
        Ok(sched_setaffinity(None, &set)?)
    }
}

/// The most that a worker will have to serve at a time.
#[derive(Clone, Copy, Debug, Default)]
pub struct Load {
    /// Virtqueues.
    pub rings: u16,
    /// The disks they belong to.
    pub disks: u16,
}
