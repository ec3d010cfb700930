//! Options about what may go wrong, and who may do what.

use std::str::FromStr;

use clap::Args;

use super::choices::{LockWhen, OnError, PollDevice, Switch};
use super::{DISK, IO, PROCESS};

/// The flags of one disk.
#[derive(Debug, Clone, Default, PartialEq, Eq, Args)]
pub struct DiskSafety {
    /// When the image is locked against other writers: always, or in-use (only while a
    /// front end runs a queue) [default: always]
    #[arg(
        verbatim_doc_comment, long, value_name = "WHEN", value_enum, hide_possible_values = true,
        help_heading = DISK
    )]
    pub lock: Option<LockWhen>,

    /// Share the image with whoever else writes to it, as QEMU's option of that name
    /// [default: off]
    #[arg(
        verbatim_doc_comment, long, value_name = "on|off", value_enum, hide_possible_values = true,
        num_args = 0..=1, require_equals = true, default_missing_value = "on", help_heading = DISK
    )]
    pub force_share: Option<Switch>,

    /// Mode of the socket's file, in octal [default: as the umask says]
    #[arg(verbatim_doc_comment, long, value_name = "MODE", value_parser = parse_mode, help_heading = DISK)]
    pub socket_mode: Option<u32>,

    /// Group of the socket's file, by name or number [default: the process's]
    #[arg(verbatim_doc_comment, long, value_name = "GROUP", help_heading = DISK)]
    pub socket_group: Option<String>,

    /// Poll the device for completions instead of waiting for its interrupt: auto (for the
    /// guest's poll queues, if the device can), on (for all queues) or off [default: auto]
    #[arg(
        verbatim_doc_comment, long, value_name = "WHEN", value_enum, hide_possible_values = true,
        help_heading = IO
    )]
    pub io_poll: Option<PollDevice>,

    /// What becomes of a request that fails: report (the guest is told), stop (the disk is
    /// held until `blkmqctl resume`, and the guest waits), or enospc (stop if no space is
    /// left, else report) [default: report]
    #[arg(
        verbatim_doc_comment, long, value_name = "POLICY", value_enum, hide_possible_values = true,
        help_heading = IO
    )]
    pub on_error: Option<OnError>,
}

/// The flags of the process.
#[derive(Debug, Clone, Default, PartialEq, Eq, Args)]
pub struct ProcessSafety {
    /// With --take-over, close the sessions of front ends that are not ready to be handed over
    /// after five seconds, instead of giving up [default: give up]
    #[arg(verbatim_doc_comment, long, requires = "take_over", help_heading = PROCESS)]
    pub close_unready: bool,

    /// Become this user (and group) when images and sockets are open [default: stay who
    /// started it]
    #[arg(
        verbatim_doc_comment, long, value_name = "USER[:GROUP]", value_parser = UserName::from_str,
        help_heading = PROCESS
    )]
    pub user: Option<UserName>,

    /// What the process gives up: on, off, or single layers as in seccomp=off,landlock=off;
    /// the others are io-uring, privileges and dumps [default: on]
    #[arg(
        verbatim_doc_comment, long, value_name = "on|off|LAYER=on|off,...",
        value_parser = SandboxLayers::from_str, help_heading = PROCESS
    )]
    pub sandbox: Option<SandboxLayers>,
}

/// A user, and perhaps another group than their own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UserName {
    /// Its name or number.
    pub user: String,
    /// Its name or number.
    pub group: Option<String>,
}

impl FromStr for UserName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (user, group) = match text.split_once(':') {
            Some((user, group)) => (user, Some(group)),
            None => (text, None),
        };
        if user.is_empty() || group.is_some_and(str::is_empty) {
            return Err("give USER or USER:GROUP, by name or number".to_owned());
        }
        Ok(UserName {
            user: user.to_owned(),
            group: group.map(str::to_owned),
        })
    }
}

/// Which layers of the sandbox are put on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SandboxLayers {
    /// Few system calls.
    pub seccomp: bool,
    /// No file system, no network.
    pub landlock: bool,
    /// No capabilities, and none to be gained.
    pub privileges: bool,
    /// No core dumps.
    pub dumps: bool,
    /// Rings that can do what a worker does, and nothing else.
    pub io_uring: bool,
}

impl SandboxLayers {
    /// All, or none.
    pub fn all(on: bool) -> SandboxLayers {
        SandboxLayers {
            seccomp: on,
            landlock: on,
            privileges: on,
            dumps: on,
            io_uring: on,
        }
    }
}

impl Default for SandboxLayers {
    fn default() -> Self {
        SandboxLayers::all(true)
    }
}

impl FromStr for SandboxLayers {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let switch = |text| match text {
            "on" => Some(true),
            "off" => Some(false),
            _ => None,
        };
        if let Some(on) = switch(text) {
            return Ok(SandboxLayers::all(on));
        }
        let mut layers = SandboxLayers::default();
        for pair in text.split(',') {
            let on = pair.split_once('=').and_then(|(_, on)| switch(on));
            let layer = match pair.split('=').next() {
                Some("seccomp") => &mut layers.seccomp,
                Some("landlock") => &mut layers.landlock,
                Some("privileges") => &mut layers.privileges,
                Some("dumps") => &mut layers.dumps,
                Some("io-uring") => &mut layers.io_uring,
                _ => return Err(bad_layer(pair)),
            };
            *layer = on.ok_or_else(|| bad_layer(pair))?;
        }
        Ok(layers)
    }
}

fn bad_layer(pair: &str) -> String {
    format!(
        "'{pair}' is none of on, off, seccomp=on|off, landlock=on|off, io-uring=on|off, \
         privileges=on|off, dumps=on|off"
    )
}

fn parse_mode(text: &str) -> Result<u32, String> {
    match u32::from_str_radix(text, 8) {
        Ok(mode) if mode <= 0o777 && mode & 0o600 == 0o600 => Ok(mode),
        _ => Err(
            "give three octal digits that let the owner read and write, such as 0660".to_owned(),
        ),
    }
}
