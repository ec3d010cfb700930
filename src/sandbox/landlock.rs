//! The file system and the network, by landlock.

use std::io;
use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, AccessNet, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetStatus, Scope,
};

/// The newest set of rights that was tried with this program. Those a kernel does not know are left
/// out.
const KNOWN: ABI = ABI::V7;

/// Takes all of it away, but for removing files next to `sockets`. What is open stays open.
pub(super) fn restrict(sockets: &[&Path]) -> io::Result<()> {
    let status = (|| {
        let mut rules = Ruleset::default()
            .handle_access(AccessFs::from_all(KNOWN))?
            .handle_access(AccessNet::from_all(KNOWN))?
            .scope(Scope::from_all(KNOWN))?
            .create()?;
        for socket in sockets {
            let directory = match socket.parent() {
                Some(parent) if !parent.as_os_str().is_empty() => parent,
                _ => Path::new("."),
            };
            // One that is gone has nothing to be removed from.
            if let Ok(directory) = PathFd::new(directory) {
                rules = rules.add_rule(PathBeneath::new(directory, AccessFs::RemoveFile))?;
            }
        }
        rules.restrict_self()
    })()
    .map_err(io::Error::other)?;
    if status.ruleset == RulesetStatus::NotEnforced {
        log::info!("this kernel has no landlock: the file system is protected by seccomp alone");
    }
    Ok(())
}
