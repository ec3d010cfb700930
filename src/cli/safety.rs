//! Options about what may go wrong, and who may do what.

use std::str::FromStr;

use clap::Args;

use super::{DISK, IO, PROCESS};
use crate::config::choices::{LockWhen, OnError, PollDevice, Switch};
use crate::config::safety::{SandboxLayers, UserName};

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

fn parse_mode(text: &str) -> Result<u32, String> {
    match u32::from_str_radix(text, 8) {
        Ok(mode) if mode <= 0o777 && mode & 0o600 == 0o600 => Ok(mode),
        _ => Err(
            "give three octal digits that let the owner read and write, such as 0660".to_owned(),
        ),
    }
}
