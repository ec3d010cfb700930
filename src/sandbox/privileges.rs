//! Users, groups and capabilities.
//!
//! The system calls used here change one thread, which is enough as long as there is one.

use std::io;

use rustix::io::Errno;
use rustix::process::{Gid, Uid, geteuid, getgroups};
use rustix::thread::{
    CapabilitySet, CapabilitySets, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs, set_thread_groups,
    set_thread_res_gid, set_thread_res_uid,
};

use crate::config::UserName;
use crate::error::StartError;

/// A user, by number.
#[derive(Debug)]
pub(super) struct User {
    name: String,
    uid: u32,
    gid: u32,
    groups: Vec<u32>,
    /// The group was given, and there are to be no others.
    exactly: bool,
}

impl User {
    pub(super) fn find(wanted: &UserName) -> Result<User, StartError> {
        let unknown = |kind, name: &str| {
            StartError::Usage(format!(
                "--user: there is no {kind} '{name}' on this machine; give a name or a number that exists \
             (see --help)"
            ))
        };
        let user = uzers::get_user_by_name(&wanted.user).or_else(|| {
            let uid = wanted.user.parse().ok()?;
            uzers::get_user_by_uid(uid)
        });
        let user = user.ok_or_else(|| unknown("user", &wanted.user))?;
        let gid = match &wanted.group {
            None => user.primary_group_id(),
            Some(group) => find_group(group).ok_or_else(|| unknown("group", group))?,
        };
        let groups = match wanted.group {
            // Given alone, it is all there is to be.
            Some(_) => vec![gid],
            None => uzers::get_user_groups(user.name(), gid)
                .unwrap_or_default()
                .iter()
                .map(uzers::Group::gid)
                .collect(),
        };
        Ok(User {
            name: wanted.user.clone(),
            uid: user.uid(),
            gid,
            groups,
            exactly: wanted.group.is_some(),
        })
    }

    pub(super) fn ids(&self) -> (u32, u32) {
        (self.uid, self.gid)
    }

    /// Becomes the user, for good.
    pub(super) fn assume(&self) -> Result<(), StartError> {
        let fail = |errno: Errno| StartError::BecomeUser {
            user: self.name.clone(),
            source: errno.into(),
        };
        let (uid, gid) = (Uid::from_raw(self.uid), Gid::from_raw(self.gid));
        let groups: Vec<Gid> = self.groups.iter().map(|gid| Gid::from_raw(*gid)).collect();
        match set_thread_groups(&groups) {
            // A process that is the user already may not be allowed to change its groups.
            Err(Errno::PERM) if geteuid() == uid => self.keep_groups()?,
            outcome => outcome.map_err(fail)?,
        }
        set_thread_res_gid(gid, gid, gid).map_err(fail)?;
        set_thread_res_uid(uid, uid, uid).map_err(fail)
    }
}

impl User {
    /// The process has no right to change its groups. That is well if it has none but those it is to have.
    fn keep_groups(&self) -> Result<(), StartError> {
        let has = getgroups().unwrap_or_default();
        let wanted = |gid: u32| gid == self.gid || self.groups.contains(&gid);
        let more: Vec<String> = has
            .iter()
            .map(|gid| gid.as_raw())
            .filter(|gid| !wanted(*gid))
            .map(|gid| gid.to_string())
            .collect();
        if more.is_empty() {
            return Ok(());
        }
        if self.exactly {
            return Err(StartError::KeepsGroups {
                user: self.name.clone(),
                groups: more.join(", "),
            });
        }
        log::warn!(
            "--user {}: this process has more groups than the user ({}) and may not give them up",
            self.name,
            more.join(", ")
        );
        Ok(())
    }
}

/// A group's number, by its name or number.
pub fn find_group(group: &str) -> Option<u32> {
    let found = uzers::get_group_by_name(group).or_else(|| {
        let gid = group.parse().ok()?;
        uzers::get_group_by_gid(gid)
    });
    found.map(|group| group.gid())
}

/// Sees to it that no program which is run could bring a capability back. That takes a capability, so it
/// comes before those are given up, and before the user changes; who has none has nothing to drop.
pub(super) fn bound() -> io::Result<()> {
    for bit in 0..64 {
        let capability = CapabilitySet::from_bits_retain(1 << bit);
        match remove_capability_from_bounding_set(capability) {
            Ok(()) => {}
            // The first the kernel does not know; not ours to drop.
            Err(Errno::INVAL | Errno::PERM) => break,
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

/// Gives all capabilities up, and any way to get some.
pub(super) fn drop_all() -> io::Result<()> {
    set_no_new_privs(true)?;
    clear_ambient_capability_set()?;
    let none = CapabilitySet::empty();
    set_capabilities(
        None,
        CapabilitySets {
            effective: none,
            permitted: none,
            inheritable: none,
        },
    )?;
    Ok(())
}
