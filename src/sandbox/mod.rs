//! What the process gives up once it has all it needs, so that whoever takes it over has little.
//!
//! A guest's requests and a front end's messages are parsed here, and a mistake in that may one day let
//! somebody run code of their own. Then the sandbox decides what it is worth. In the order in which it
//! is put on:
//!
//! | layer | what is given up |
//! |---|---|
//! | `dumps` | core dumps, and being looked into by others of the same user (`PR_SET_DUMPABLE`) |
//! | `--user` | root |
//! | `privileges` | all capabilities, and gaining any by running something (`no_new_privs`) |
//! | `landlock` | the file system, but for removing our sockets; TCP; abstract sockets; signals to others |
//! | `seccomp` | all system calls but those of `filter.rs` |
//!
//! What io_uring does is no system call, so each ring has a list of its own of what it may do: see
//! `engine/uring/mod.rs`.
//!
//! The layers but the last belong to a thread and are inherited, so they are put on before there is
//! another thread ([`enter`]). The last needs all threads to be there that set up a ring, and then is
//! put on all of them at once ([`seal`]).

mod landlock;
mod privileges;
mod seccomp;
mod sigsys;
mod syscall_names;

use std::path::Path;

use rustix::process::{DumpableBehavior, set_dumpable_behavior};

use crate::config::{SandboxLayers, UserName};
use crate::error::StartError;

use self::privileges::User;
pub use self::privileges::find_group;

/// A user the process is to become, with the names looked up.
#[derive(Debug)]
pub struct Identity(User);

impl Identity {
    /// Looks the names up, while that is still possible.
    ///
    /// # Errors
    ///
    /// There is no such user or group.
    pub fn find(name: &UserName) -> Result<Identity, StartError> {
        User::find(name).map(Identity)
    }

    /// The user and the group, by number.
    pub fn ids(&self) -> (u32, u32) {
        self.0.ids()
    }
}

/// Puts on all layers but the last. Images and sockets are open; `sockets` are the paths that are
/// removed at the end. There is one thread.
///
/// # Errors
///
/// The process may not become the user, or the kernel refuses a layer that it has.
pub fn enter(
    layers: SandboxLayers,
    user: Option<&Identity>,
    sockets: &[&Path],
) -> Result<(), StartError> {
    let fail = |layer: &'static str| move |source| StartError::Sandbox { layer, source };
    // Asks the kernel for the auxiliary vector, once, and may need a file for that.
    rustix::param::page_size();
    if layers.dumps {
        set_dumpable_behavior(DumpableBehavior::NotDumpable)
            .map_err(|errno| fail("dumps")(errno.into()))?;
    }
    if layers.privileges {
        privileges::bound().map_err(fail("privileges"))?;
    }
    if let Some(Identity(user)) = user {
        user.assume()?;
        // The kernel lifts that of a process that changes its user to what a sysctl says.
        if layers.dumps {
            set_dumpable_behavior(DumpableBehavior::NotDumpable)
                .map_err(|errno| fail("dumps")(errno.into()))?;
        }
    }
    if layers.privileges {
        privileges::drop_all().map_err(fail("privileges"))?;
    }
    if layers.landlock {
        landlock::restrict(sockets).map_err(fail("landlock"))?;
    }
    Ok(())
}

/// Puts the last layer on every thread there is; those that come later inherit it.
///
/// # Errors
///
/// The kernel has no seccomp filters.
pub fn seal(layers: SandboxLayers) -> Result<(), StartError> {
    if layers.seccomp {
        sigsys::install()
            .and_then(|()| seccomp::install())
            .map_err(|source| StartError::Sandbox {
                layer: "seccomp",
                source,
            })?;
    }
    log::debug!("sandbox: {layers:?}");
    Ok(())
}

#[cfg(test)]
mod tests;
